"""Runs scenarios: the real vLLM engine in a process of its own, with and without the connector."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SCENARIO = Path(__file__).with_name("scenario.py")
SCENARIO_S_MAX = 240

Steps = list[tuple[str, dict[str, Any]]]


@dataclass
class Run:
    """What a scenario returned, step by step, and what it logged."""

    results: list[Any]
    log: str


def connector(role: str = "kv_both", name: str = "LMCacheConnectorV1", **extra: Any) -> dict[str, Any]:
    return {"kv_connector": name, "kv_role": role, "kv_connector_extra_config": extra}


@pytest.fixture
def run_scenario(tiny_model: Path) -> Callable[..., Run]:
    """`run_scenario(steps, connector=..., llm={...}, env={...}, model=...)`."""

    def run(
        steps: Steps,
        connector: dict[str, Any] | None = None,
        llm: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        model: Path | None = None,
    ) -> Run:
        spec = {"model": str(model or tiny_model), "llm": llm or {}, "connector": connector, "steps": steps}
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("LMCACHE_", "VLLM_"))}
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
            "LMCACHE_MAX_LOCAL_CPU_SIZE": "64MiB",
        }
        done = subprocess.run(
            [sys.executable, str(SCENARIO)],
            input=json.dumps(spec),
            env=environment | (env or {}),
            capture_output=True,
            text=True,
            timeout=SCENARIO_S_MAX,
            check=False,
        )
        log = done.stdout + done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
        assert done.returncode == 0 and lines, f"the engine ended with {done.returncode}:\n{log[-6000:]}"
        return Run(json.loads(lines[-1].removeprefix("RESULTS ")), log)

    return run
