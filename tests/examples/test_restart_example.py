"""The quickstart of disk and Redis: run twice, the second process finds what the first computed, and says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from redis_server import RedisServer
from support import ROOT, RunScript

EXAMPLE = ROOT / "examples" / "restart.py"

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def run_twice(run_script: RunScript, model: Path, *options: str, in_process: bool) -> str:
    """Check both runs and return the second one's output."""
    runs = [
        run_script(EXAMPLE, *options, "--model", model, "--enforce-eager", in_process=in_process).stdout
        for _ in range(2)
    ]
    shape = r"^(['\"].*['\"]) in \d+\.\d\d s \((\d+) of (\d+) tokens found\)$"
    (first,), (second,) = (re.findall(shape, output, re.MULTILINE) for output in runs)
    words, found, total = first
    assert int(found) == 0
    # vLLM counts the last token too, which it computes all the same, if the load began before all had come.
    assert second in [(words, str(int(total) - last), total) for last in (0, 1)]
    return runs[1]


def test_disk(run_script: RunScript, smollm2: Path, tmp_path: Path) -> None:
    """In vLLM's default processes, as users run it."""
    disk = tmp_path / "kv"
    output = run_twice(run_script, smollm2, "--disk", str(disk), in_process=False)
    assert f"Beside RAM, KV is kept on disk at {disk} (10 GiB); written at once (" in output
    assert re.search(r"Fetched (\d+) of \1 chunks from disk for request 0: \d\.\d{4} GB in ", output)


def test_redis(run_script: RunScript, smollm2: Path, redis_server: RedisServer) -> None:
    """In one process, which is quicker to start. The password is in no line of ours."""
    output = run_twice(run_script, smollm2, "--redis", redis_server.url, in_process=True)
    assert re.search(r"Beside RAM, KV is kept on redis at unix:///\S*/redis.sock; written at once \(", output)
    assert re.search(r"Fetched (\d+) of \1 chunks from redis for request 0: \d\.\d{4} GB in ", output)
    assert redis_server.password not in output
