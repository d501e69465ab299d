"""Every example, run as its README says, with small sizes; and what the Makefile and the READMEs promise."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import ROOT, RunScript, clean_environment, end_session

EXAMPLES = ROOT / "examples"
SECONDS = r"\d+\.\d\d"

pytestmark = pytest.mark.timeout(600)


def run_benefit_script(
    run_script: RunScript, model: Path, *options: str, in_process: bool = False
) -> tuple[str, dict[str, Any]]:
    """Its output and its JSON, for 2 prompts of 300 tokens."""
    result = run_script.folder / "result.json"
    output = run_script(
        EXAMPLES / "cpu_offload.py",
        *("--model", model, "--num-prompts", 2, "--num-tokens", 300, "--max-model-len", 512),
        *("--dtype", "float32", "--enforce-eager", "--json", result, *options),
        in_process=in_process,
    ).stdout
    return output, json.loads(result.read_text())


@pytest.mark.vllm
def test_benefit_script(run_script: RunScript, smollm2: Path) -> None:
    plain, without = run_benefit_script(run_script, smollm2, in_process=True)
    cached, with_cache = run_benefit_script(run_script, smollm2, "--enable-lmcache")

    for output in (plain, cached):
        for line in (
            rf"First run time: {SECONDS} seconds",
            rf"Second run time: {SECONDS} seconds",
            rf"Speedup \(first run / second run\): {SECONDS}x",
        ):
            assert re.search(f"^{line}$", output, re.MULTILINE), output
    tokens = with_cache["second"]["prompt_tokens"]
    assert min(tokens) > 300
    assert without["second"]["cached_tokens"] == with_cache["first"]["cached_tokens"] == [0, 0]
    # A full hit leaves one token to compute; whether vLLM counts that one as hit depends on how it was loaded.
    hits = with_cache["second"]["cached_tokens"]
    assert all(n - 1 <= hit <= n for n, hit in zip(tokens, hits, strict=True)), (tokens, hits)
    for name in ("first", "second"):
        assert with_cache[name]["token_ids"] == without[name]["token_ids"]


@pytest.mark.vllm
def test_offline_quickstart(run_script: RunScript, smollm2: Path) -> None:
    output = run_script(EXAMPLES / "offline.py", "--model", smollm2, "--enforce-eager").stdout

    found = re.findall(r"^Who .*\((\d+) of (\d+) tokens found\)$", output, re.MULTILINE)
    assert len(found) == 2, output
    (first, _), (second, total) = found
    assert int(first) == 0
    assert int(second) > 0.9 * int(total)
    assert re.search(r"Storing KV cache for (\d+) out of \1 tokens for request 0 ", output)
    assert re.search(rf"Reqid: 1, Total tokens {total}, LMCache hit tokens: {second}, need to load: ", output)


@pytest.fixture
def server(smollm2: Path, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The online quickstart's server on a free port; gives the port and the log file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    log = tmp_path / "server.log"
    command = [EXAMPLES / "online" / "serve.sh", smollm2.relative_to(ROOT), "--port", str(port)]
    options = ["--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", "2048", "--enforce-eager"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options],
            cwd=ROOT,
            env=clean_environment({"VLLM_CPU_KVCACHE_SPACE": "1"}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        wait_until_healthy(process, port, log)
        yield port, log
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()[-4000:]
    finally:
        end_session(process)


def wait_until_healthy(process: subprocess.Popen[str], port: int, log: Path, limit_s: float = 240) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not come up\n{log.read_text()[-8000:]}", pytrace=False)


@pytest.mark.vllm
def test_online_quickstart(server: tuple[int, Path], smollm2: Path) -> None:
    port, log = server
    command = [EXAMPLES / "online" / "ask.sh", smollm2.relative_to(ROOT), str(port)]
    answers = []
    for _ in range(2):
        asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert asked.returncode == 0, asked.stderr
        answers.append(json.loads(asked.stdout))

    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [31, 31]
    first, second = (answer["choices"][0]["text"] for answer in answers)
    assert "Paris" in first
    assert first == second
    assert_log_lines(log.read_text(), answers)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        metrics = page.read().decode()
    for name, value in {"num_hit_tokens": 30, "num_stored_tokens": 31, "num_retrieve_requests": 1}.items():
        assert re.search(rf"^lmcache:{name}_total{{.*}} {value}\.0$", metrics, re.MULTILINE), name
    assert re.search(r'^lmcache:num_misses_total{.*reason="not_found".*} 1\.0$', metrics, re.MULTILINE)
    assert re.search(r"^lmcache:local_cache_used_rows{.*} 1\.0$", metrics, re.MULTILINE)


def assert_log_lines(log: str, answers: list[dict[str, Any]]) -> None:
    """The quickstart's two lines are in the server's log, in LMCache's format, with the ids that the user got."""
    first, second = (f"{answer['id']}-0" for answer in answers)
    messages = [
        f"Reqid: {first}, Total tokens 31, LMCache hit tokens: 0, need to load: 0",
        f"Storing KV cache for 31 out of 31 tokens for request {first}",
        f"Reqid: {second}, Total tokens 31, LMCache hit tokens: 30, need to load: 30",
    ]
    shape = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] LMCache INFO: (?:%s) \([a-z_]+\.py:\d+:[a-z_.]+\)$"
    wanted = re.compile(shape % "|".join(map(re.escape, messages)), re.MULTILINE)
    found = [line for line in log.splitlines() if "Reqid:" in line or "Storing KV cache" in line]
    assert len(found) == len(messages), found
    for line, message in zip(found, messages, strict=True):
        assert message in line
        assert wanted.search(line), line


# LMCache's own quickstart for CPU offloading, in its own names, as its users have it.
LMCACHE_SCRIPT = """
import os
os.environ["LMCACHE_CHUNK_SIZE"] = "256"
os.environ["LMCACHE_LOCAL_CPU"] = "True"
os.environ["LMCACHE_MAX_LOCAL_CPU_SIZE"] = "0.1"

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.integration.vllm.utils import ENGINE_NAME

if __name__ == "__main__":
    ktc = KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")
    llm = LLM(model={model!r}, kv_transfer_config=ktc, max_model_len=2048, enforce_eager=True,
              enable_prefix_caching=False, kv_cache_memory_bytes=100 << 20)
    prompt = "Hello, how are you? " * 40
    for _ in range(2):
        output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1))[0]
        print("CACHED", output.num_cached_tokens, len(output.prompt_token_ids))
    LMCacheEngineBuilder.destroy(ENGINE_NAME)
"""


@pytest.mark.vllm
def test_lmcaches_own_script_runs_unchanged(run_script: RunScript, smollm2: Path) -> None:
    output = run_script(LMCACHE_SCRIPT.format(model=str(smollm2))).stdout
    (cold, total), (warm, _) = (
        map(int, found) for found in re.findall(r"^CACHED (\d+) (\d+)$", output, re.MULTILINE)
    )
    assert (cold, warm) == (0, total - 1)
    assert f"Storing KV cache for {total} out of {total} tokens for request 0 " in output
