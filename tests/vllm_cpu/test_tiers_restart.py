"""Disk and Redis under the real engine: what one engine wrote another one finds, with right tokens, or not at all."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redis_server import RedisServer
from vllm_scenarios import Run, Steps, connector, generate

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

A, B, C = [[1, 600]], [[2, 600]], [[3, 600]]
"""Three chunks each, the last one of 88 tokens."""
CHUNKS = 3
EACH: Steps = [generate(A), generate(B), generate(C)]


def disk(folder: Path, **extra: Any) -> dict[str, Any]:
    return connector(local_disk=str(folder), max_local_disk_size="100MiB", **extra)


def with_another_value(model: Path) -> None:
    """Change one tensor of a model in place: size, names and shapes stay."""
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    begin, end = header["model.layers.1.self_attn.v_proj.weight"]["data_offsets"]
    # All signs of it, so that the words change too.
    for i in range(start + begin + 3, start + end, 4):
        content[i] ^= 0x80
    path.write_bytes(content)


def test_disk(
    run_scenario: Callable[..., Run], baseline: Callable[..., Run], tiny_model: Path, tmp_path: Path
) -> None:
    """Written when seen again, found after a restart, refused under another name or for another model.

    The control is C, of which wrong bytes are written: they give the wrong tokens again, so these come from disk.
    """
    folder, model = tmp_path / "kv", tmp_path / "model"
    shutil.copytree(tiny_model, model)
    right_a, right_b, right_c = baseline(EACH).tokens()

    steps: Steps = [generate(A), generate(B), ("written", {})]
    steps += [generate(A), generate(B), ("written", {})]
    steps += [generate(C), ("swap_layers", {}), generate(C), ("written", {})]
    first = run_scenario(steps, connector=disk(folder), model=model)
    assert "Beside RAM, KV is kept on disk at " in first.log
    *computed, wrong_c = first.tokens()
    assert computed == [right_a, right_b, right_a, right_b, right_c]
    assert wrong_c != right_c
    once, twice, at_end = first.results[2], first.results[5], first.results[9]
    assert "written_chunks:disk" not in once, "seen once only"
    assert twice["written_chunks:disk"] == 2 * CHUNKS
    assert at_end["written_chunks:disk"] == 3 * CHUNKS
    shutil.copytree(folder, tmp_path / "copy")

    steps = [("trickle", {}), generate(A), generate(C)]
    steps += [("rotate_files", {"folder": str(folder)}), generate(B), ("stats", {})]
    second = run_scenario(steps, connector=disk(folder), model=model)
    assert second.tokens() == [right_a, wrong_c, right_b]
    assert [second.cached(i) for i in (1, 2, 4)] == [[599], [599], [0]]
    assert second.results[3] >= 3 * CHUNKS
    stats = second.results[-1]
    assert stats["loads_as_fetched"] == 2, "they began before all had come"
    assert stats["fetched_chunks:disk"] == 2 * CHUNKS
    assert stats["failed_fetches:disk"] > 0
    refusals = {name: count for name, count in stats.items() if name.startswith("tier_refusals:disk:load:")}
    assert refusals, stats
    assert len(re.findall(r"Fetched 3 of 3 chunks from disk for request \d: ", second.log)) == 2

    with_another_value(model)
    third = run_scenario(
        [generate(A), generate(C), ("stats", {})], connector=disk(tmp_path / "copy"), model=model
    )
    assert [third.cached(i) for i in range(2)] == [[0], [0]]
    assert third.tokens() != [right_a, right_c]
    assert third.results[-1]["tier_lookups"] == 2 * CHUNKS
    assert "fetched_chunks:disk" not in third.results[-1]


def test_two_ranks_on_disk(
    run_scenario: Callable[..., Run], baseline: Callable[..., Run], tmp_path: Path
) -> None:
    """Scheduler and workers in processes of their own, which must agree on the namespace."""
    steps: Steps = [generate(A), generate(B, A)]
    runs = [
        run_scenario(
            steps,
            connector=disk(tmp_path, write_policy="through"),
            llm={"tensor_parallel_size": 2},
            env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
            in_process=False,
        )
        for _ in range(2)
    ]
    ((right_a,), (right_b,), _) = baseline(EACH).tokens()
    assert [run.tokens() for run in runs] == [[[right_a], [right_b, right_a]]] * 2
    assert [run.cached(0) for run in runs] == [[0], [599]]
    assert runs[1].cached(1) == [599, 599]
    assert runs[1].log.count("Fetched 3 of 3 chunks from disk for request ") == 2


def test_redis(
    run_scenario: Callable[..., Run], baseline: Callable[..., Run], redis_server: RedisServer
) -> None:
    """Found after a restart; the server hangs, dies and comes back beside a serving engine; nothing after a reset."""
    # vLLM logs what is in the connector's configuration; passwords belong into the environment.
    redis: dict[str, Any] = {
        "connector": connector(write_policy="through"),
        "env": {"LMCACHE_REMOTE_URL": redis_server.url},
    }
    right_a, right_b, right_c = baseline(EACH).tokens()

    first = run_scenario([generate(A), generate(B), ("written", {})], **redis)
    assert first.tokens() == [right_a, right_b]
    assert first.results[-1]["written_chunks:redis"] == 2 * CHUNKS

    second = run_scenario([generate(A), generate(C), ("written", {}), ("reset", {})], **redis)
    assert second.tokens() == [right_a, right_c]
    assert [second.cached(i) for i in range(2)] == [[599], [0]]
    assert second.results[2]["fetched_chunks:redis"] == CHUNKS
    assert second.results[3] is True

    pid, again = {"pid": redis_server.pid}, ("served_again", {"prompt": A, "tokens": 599})
    steps: Steps = [generate(A, B, C), ("written", {}), ("clear_ram", {}), generate(B)]
    steps += [("hang", pid), ("clear_ram", {}), generate(A, C), ("hang", {**pid, "hangs": False}), again]
    steps += [("kill", pid), ("clear_ram", {}), generate(A, C), ("stats", {})]
    steps += [("start", {"command": redis_server.command}), again]
    third = run_scenario(steps, **redis)
    assert third.cached(0) == [0, 0, 0], "reset by the engine before"
    assert third.cached(3) == [599], "written anew"
    assert third.cached(6) == [0, 0], "the server hangs"
    assert third.cached(8) == [599], "it goes on"
    assert third.cached(11) == [0, 0], "the server is dead"
    assert third.cached(14) == [599], "it is back"
    a_and_c = [*right_a, *right_c]
    assert third.tokens() == [[*right_a, *right_b, *right_c], right_b, a_and_c, right_a, a_and_c, right_a]
    stats = third.results[12]
    assert not [name for name in stats if name.startswith("errors")]
    assert any(name.startswith("tier_refusals:redis:find:") for name in stats), stats
    assert "Looking for KV on redis fails: it failed or cannot be reached (" in third.log
    assert redis_server.password not in "".join(run.log for run in (first, second, third))
