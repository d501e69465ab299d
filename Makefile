# Everything runs in one virtual environment, which `setup` makes and keeps up to date.
VENV ?= .venv
PYTHON ?= python3
export VENV

# Absolute, since some commands run elsewhere.
override BIN := $(abspath $(VENV))/bin
# The Rust crates are built against the Python of the environment.
export PYO3_PYTHON := $(BIN)/python

.DEFAULT_GOAL := help

.PHONY: help  ## Show this list.
help:
	@echo "Usage: make TARGET [VENV=folder, default .venv] [PYTHON=python3.11 or newer]"
	@echo
	@sed -n 's/^\.PHONY: \([a-z-]*\)  ## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS='|' read -r name text; do printf '%-14s %s\n' "$$name" "$$text"; done

.PHONY: demo  ## Show what the cache brings on a small model; with TIER=disk or TIER=redis after a restart of vLLM.
demo: setup model
	@$(BIN)/python scripts/$(if $(TIER),demo_tier.py $(TIER),demo.py)

.PHONY: test  ## Set up and run every test, Rust and Python (PYTEST_ARGS="-k words" runs some).
test: test-rust test-python

.PHONY: test-rust  ## Run the tests of the Rust core.
test-rust: setup
	@# rust/py is left out: it holds no logic, and as an extension module it does not link outside of Python.
	@if cargo nextest --version >/dev/null 2>&1; then \
		cargo nextest run --workspace --exclude lmcache-py; \
	else \
		cargo test --workspace --exclude lmcache-py --all-targets; \
	fi
	@cargo test --quiet --workspace --exclude lmcache-py --doc
	@# Interleavings: with these features locks and threads are those of a model checker.
	@cargo test --quiet --package lmcache-core --features loom --test loom_index
	@cargo test --quiet --package lmcache-core --features shuttle --lib schedules

.PHONY: test-python  ## Run the tests of the Python package, the connector and the examples.
test-python: setup model
	@# Each engine has one thread. A file's tests stay together, as they share what they are compared with.
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest \
		--numprocesses logical --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

.PHONY: soak  ## Run the long forms of the tests, DURATION seconds each (default 60), and count what is wrong.
soak: setup model
	@$(BIN)/python scripts/soak.py $(or $(DURATION),60)

.PHONY: coverage  ## Measure which lines of the Rust core its tests reach; needs cargo-tarpaulin.
coverage: setup
	@cargo tarpaulin --version >/dev/null 2>&1 || { echo "FAILED: cargo install cargo-tarpaulin"; exit 1; }
	cargo tarpaulin --engine ptrace --package lmcache-core --include-files 'rust/core/src/*' --fail-under 90

.PHONY: versions  ## Unpack other versions of vLLM into .vllm (VERSIONS="0.26.0 0.31.0"; default: those that CI runs).
versions: setup
	@$(BIN)/python scripts/vllm_versions.py $(VERSIONS)

.PHONY: test-versions  ## Run the real engine of other versions of vLLM (VERSIONS as above).
test-versions: versions model
	@VLLM_VERSIONS="$(VERSIONS)" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(BIN)/python -m pytest tests/versions $(PYTEST_ARGS)

.PHONY: lint  ## Check format, style and types, and the stub against the extension module.
lint: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	@# What these features change is checked by itself: the rest is the same code.
	cargo clippy --package lmcache-core --lib --test loom_index --features loom --locked -- -D warnings
	cargo clippy --package lmcache-core --lib --tests --features shuttle --locked -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/stubtest lmcache_rs._core --allowlist tests/stubtest_allowlist.txt

.PHONY: format  ## Format all sources.
format: setup
	cargo fmt --all
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: bench  ## Run the benchmarks that need no GPU, Rust (criterion) and Python.
bench: setup model
	cargo bench --workspace --exclude lmcache-py
	@set -e; for bench in benches/*.py; do \
		if [ -e "$$bench" ]; then echo "== $$bench"; $(BIN)/python "$$bench"; fi; \
	done

.PHONY: bench-gpu  ## Run the benchmarks of an NVIDIA GPU: copies beside the card's own, the engine beside its peers.
bench-gpu: setup
	$(BIN)/python benches/gpu/copies.py
	$(BIN)/python benches/gpu/engine.py
	$(BIN)/python benches/gpu/short_prompts.py
	$(BIN)/python benches/gpu/engine.py --only-start --cpu-gb 64

.PHONY: wheel  ## Build the wheels to ship into dist/.
wheel: setup
	$(BIN)/maturin build --release --locked --out dist
	@if [ -e compat/pyproject.toml ]; then $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist ./compat; fi

.PHONY: compat  ## Install the small distribution that provides the name `lmcache` (done by `setup` as well).
compat: setup
	$(BIN)/python -m pip install --no-deps --force-reinstall ./compat

.PHONY: setup  ## Make or update the environment: vLLM, the tools, the wheel built from these sources.
setup:
	@$(PYTHON) scripts/setup_env.py

.PHONY: model  ## Prepare the small model of the demo and the tests.
model: setup
	@$(BIN)/python scripts/prepare_model.py

.PHONY: clean  ## Remove what was built; the environment and the models stay.
clean:
	cargo clean
	rm -rf dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python tests examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean  ## Remove the environment, the models and the other versions of vLLM too.
distclean: clean
	rm -rf .venv .models .vllm
