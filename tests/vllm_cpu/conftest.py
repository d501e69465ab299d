"""Runs scenarios: the real vLLM engine in a process of its own, with and without the connector."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm_scenarios import Run, Steps

SCENARIO = Path(__file__).with_name("scenario.py")


@pytest.fixture
def run_scenario(tiny_model: Path, run_script: Any) -> Callable[..., Run]:
    """`run_scenario(steps, connector=..., llm={...}, env={...}, model=..., in_process=True)`."""

    def run(
        steps: Steps,
        connector: dict[str, Any] | None = None,
        llm: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        model: Path | None = None,
        in_process: bool = True,
    ) -> Run:
        spec = {"model": str(model or tiny_model), "llm": llm or {}, "connector": connector, "steps": steps}
        settings = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "64MiB"} | (env or {})
        done = run_script(SCENARIO, json.dumps(spec), env=settings, in_process=in_process)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
        assert lines, done.stdout[-6000:]
        return Run(json.loads(lines[-1].removeprefix("RESULTS ")), done.stdout)

    return run


_BASELINES: dict[str, Run] = {}


@pytest.fixture
def baseline(run_scenario: Callable[..., Run]) -> Callable[..., Run]:
    """The same steps without a connector; run once for equal steps and options."""

    def run(steps: Steps, **options: Any) -> Run:
        plain = [(name, arguments) for name, arguments in steps if name in ("generate", "abort")]
        key = json.dumps([plain, options], sort_keys=True, default=str)
        if key not in _BASELINES:
            _BASELINES[key] = run_scenario(plain, **options)
        return _BASELINES[key]

    return run


@pytest.fixture
def hybrid_model(tmp_path: Path, run_script: Any) -> Path:
    """A model with several KV cache groups."""
    run_script(Path(__file__).with_name("hybrid_model.py"), tmp_path / "hybrid")
    return tmp_path / "hybrid"
