"""What tests share: two small models, a way to run scripts in processes of their own, and the rules of the markers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prepare_model
import tiny_model as tiny_model_script
from progress import CommandError
from redis_server import RedisServer
from redis_server import program as redis_program
from support import RunScript, Soak, hash_of, lack, require_markers
from vllm_scenarios import Run, Steps

SCENARIO = Path(__file__).with_name("scenario.py")
OTHER_MODELS = Path(__file__).with_name("other_models.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """See `require_markers`."""
    require_markers(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Say which round of a soak test failed."""
    report = yield
    soak = getattr(item, "funcargs", {}).get("soak")
    if soak is not None and report.failed:
        seed = soak.seed + soak.count
        report.sections.append(("soak", f"Failed at seed {seed}: repeat with LMCACHE_SOAK_SEED={seed}"))
    return report


@pytest.fixture
def soak(record_property: Callable[[str, object], None]) -> Iterator[Soak]:
    """`for seed in soak.rounds(100, "sequences")`: 100 rounds in CI, a length of time under `make soak`.

    The test is marked `soak` too. What was run and how often goes into the report that `make soak` reads.
    """
    soak = Soak()
    yield soak
    record_property("soak_what", soak.what)
    record_property("soak_count", soak.count)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A Llama of 4 layers with random weights whose output depends on the KV; float32, without a tokenizer.

    Its name holds a hash of what makes it, so that a change of the script makes a new one.
    """
    version = hash_of(Path(tiny_model_script.__file__))
    return tiny_model_script.make_tiny_model(prepare_model.MODELS / f"tiny-{version}")


@pytest.fixture
def other_model(run_script: RunScript) -> Callable[[str], Path]:
    """`other_model(name)`: one of other_models.py, made once for each version of that script."""

    def make(name: str) -> Path:
        path = prepare_model.MODELS / f"{name}-{hash_of(OTHER_MODELS)}"
        if not path.exists():
            prepare_model.MODELS.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=prepare_model.MODELS, prefix="unfinished-") as folder:
                run_script(OTHER_MODELS, name, Path(folder) / "model")
                try:
                    (Path(folder) / "model").rename(path)
                except OSError:
                    if not path.exists():  # else another process was quicker
                        raise
        return path

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, with its tokenizer."""
    try:
        prepare_model.prepare()
    except CommandError as error:
        lack(f"SmolLM2 could not be downloaded: {error}")
    return prepare_model.SMOLLM2


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """A RunScript that keeps its files in the test's own folder."""
    return RunScript(tmp_path)


@pytest.fixture
def run_scenario(tiny_model: Path, run_script: RunScript) -> Callable[..., Run]:
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


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A redis-server of the test's own, with a password, in a folder whose name is short enough for a socket's."""
    if redis_program() is None:
        lack("redis-server is not installed")
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        yield server


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
