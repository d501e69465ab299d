"""Runs scenarios: the real vLLM engine in a process of its own, with and without the connector."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SCENARIO = Path(__file__).with_name("scenario.py")

Steps = list[tuple[str, dict[str, Any]]]


@dataclass
class Run:
    """What a scenario returned, step by step, and what it logged."""

    results: list[Any]
    log: str

    def tokens(self, *steps: int) -> list[list[list[int]]]:
        """Generated tokens of the given steps, of all that generate when none is given."""
        chosen = steps or [i for i, r in enumerate(self.results) if isinstance(r, dict) and "tokens" in r]
        return [self.results[i]["tokens"] for i in chosen]

    def cached(self, step: int) -> list[int]:
        """Tokens that each request of a step did not have to compute."""
        return list(self.results[step]["cached"])


def connector(role: str = "kv_both", name: str = "LMCacheConnectorV1", **extra: Any) -> dict[str, Any]:
    """A `kv_transfer_config`; `extra` are settings without their `lmcache.` prefix."""
    settings = {f"lmcache.{k}": v for k, v in extra.items()}
    return {"kv_connector": name, "kv_role": role, "kv_connector_extra_config": settings}


@pytest.fixture(scope="session")
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
