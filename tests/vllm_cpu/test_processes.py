"""Starts and ends: wrong settings stop the start, keys survive a restart, a killed engine leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import clean_environment, end_session
from vllm_scenarios import Run, Steps, connector, generate

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

A: Any = [[1, 300]]
CHILDREN_S_MAX = 60


def test_a_wrong_setting_stops_the_start(run_script: Any, tiny_model: Path) -> None:
    code = f"""
from vllm import LLM
from vllm.config import KVTransferConfig
LLM(model={str(tiny_model)!r}, skip_tokenizer_init=True, enforce_eager=True, kv_cache_memory_bytes=1 << 26,
    kv_transfer_config=KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both"))
"""
    done = run_script(code, env={"LMCACHE_MAX_LOCAL_CPU_SIZE": "lots"}, in_process=True, check=False)
    assert done.returncode != 0
    assert "LMCACHE_MAX_LOCAL_CPU_SIZE" in done.stdout
    assert "'lots'" in done.stdout
    assert "GiB" in done.stdout, "the remedy"


def test_a_restart_finds_the_same_keys(run_scenario: Callable[..., Run]) -> None:
    steps: Steps = [("record_keys", {}), generate(A), generate(A, salt="s"), ("keys", {})]
    first, second = (run_scenario(steps, connector=connector()).results[-1] for _ in range(2))
    assert first == second
    assert len(first) == len(set(first)) == 2 * (300 // 32 + 1)


HANG = """
import os, time
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

if __name__ == "__main__":
    llm = LLM(model={model!r}, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=2048,
              kv_cache_memory_bytes=1 << 26, disable_log_stats=True,
              kv_transfer_config=KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both"))
    llm.generate([dict(prompt_token_ids=list(range(3, 303)))], SamplingParams(max_tokens=1, detokenize=False))
    open({ready!r}, "w").close()
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        ("VLLM::EngineCore", signal.SIGKILL),
        ("VLLM::EngineCore", signal.SIGTERM),
        ("VLLM::Worker", signal.SIGKILL),
        ("python", signal.SIGINT),
    ],
)
def test_a_killed_engine_leaves_nothing_behind(
    victim: str, number: signal.Signals, tiny_model: Path, tmp_path: Path
) -> None:
    """Whichever of its processes is killed, the engine's others end in bounded time.

    A user's process that is killed outright leaves vLLM's own processes behind, with a connector or without.
    """
    ready, log = tmp_path / "ready", tmp_path / "log"
    script = tmp_path / "engine.py"
    script.write_text(HANG.format(model=str(tiny_model), ready=str(ready)))
    shared_before = set(os.listdir("/dev/shm"))
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            env=clean_environment({"LMCACHE_MAX_LOCAL_CPU_SIZE": "64MiB"}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell's background jobs ignore SIGINT, and so would this one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        wait_for(lambda: ready.exists() or process.poll() is not None, 240)
        assert ready.exists(), log.read_text()[-4000:]
        assert "Storing KV cache for 300 out of 300 tokens" in log.read_text()
        os.kill(process.pid if victim == "python" else engine_processes(process.pid)[victim], number)
        assert wait_for(lambda: not engine_processes(process.pid), CHILDREN_S_MAX), "processes are left"
        assert "LMCache ERROR" not in log.read_text()
    finally:
        end_session(process)
        process.wait()
    ours = [name for name in set(os.listdir("/dev/shm")) - shared_before if "lmcache" in name.lower()]
    assert not ours


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


def engine_processes(session: int) -> dict[str, int]:
    """vLLM's processes of a session that are alive, by the title that vLLM gives them."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            state, _, _, of_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            title = (entry / "cmdline").read_text().split("\0")[0]
        except (OSError, ValueError):
            continue
        if int(of_session) == session and state != "Z" and title.startswith("VLLM::"):
            found[title] = int(entry.name)
    return found
