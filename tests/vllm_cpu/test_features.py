"""What users can ask for, in the real engine: roles, settings of requests, resets, clean-up, several ranks."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from vllm_scenarios import Run, Steps, connector, generate

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

A, B, C = [[1, 300]], [[2, 300]], [[3, 300]]


def test_settings_of_requests_and_control_at_run_time(run_scenario: Callable[..., Run]) -> None:
    steps: Steps = [
        generate(A, params={"lmcache.skip_save": True}),
        generate(A),
        generate(A, params={"lmcache.tag.user": "x"}),
        generate(A, params={"lmcache.tag.user": "x"}),
        generate(A, salt="s"),
        generate(A, salt="s"),
        ("freeze", {}),
        generate(B),
        generate(B),
        generate(A),
        ("freeze", {"frozen": False}),
        generate(B),
        generate(B),
        ("clear", {}),
        generate(B),
        ("reset", {}),
        generate(B),
        ("sleep", {}),
        ("wake", {}),
        generate(B),
        ("destroy", {}),
        ("destroy", {}),
        generate(B),
        generate(C),
    ]
    run = run_scenario(steps, connector=connector())
    hit, miss = [299], [0]
    # Sleeping resets what vLLM caches, and asks its connector to do the same.
    expected = [miss, miss, miss, hit, miss, hit, miss, miss, hit, miss, hit, miss, miss, miss, miss, miss]
    cached = [r["cached"] for r in run.results if isinstance(r, dict)]
    assert cached == expected
    assert run.results[15] is True, "reset_prefix_cache(reset_connector=True)"
    assert len({str(t) for t in run.tokens(0, 1, 2, 3, 4, 5, 9)}) == 1
    assert len({str(t) for t in run.tokens(7, 8, 11, 12, 14, 16, 19, 22)}) == 1


@pytest.mark.parametrize("role", ["kv_consumer", "kv_producer"])
def test_roles(role: str, run_scenario: Callable[..., Run]) -> None:
    run = run_scenario([generate(A), generate(A), ("stats", {})], connector=connector(role))
    assert run.cached(1) == [0]
    assert (run.results[2]["visible"] > 0) == (role == "kv_producer")


def test_min_retrieve_tokens(run_scenario: Callable[..., Run]) -> None:
    long: Any = [[3, 600]]
    run = run_scenario(
        [generate(A), generate(A), generate(long), generate(long)],
        connector=connector(min_retrieve_tokens=400),
    )
    assert (run.cached(1), run.cached(3)) == ([0], [599])
    assert "LMCache hit tokens: 299, but need to load: 299 < min_retrieve 400" in run.log


def test_log_lines_with_vllms_own_prefix_cache(run_scenario: Callable[..., Run]) -> None:
    prompt: Any = [[5, 45]]
    run = run_scenario(
        [generate(prompt), generate(prompt)], connector=connector(), llm={"enable_prefix_caching": True}
    )
    assert run.cached(1) == [44]
    lines = re.findall(r"LMCache INFO: (Storing .*|Reqid.*) \(", run.log)
    assert lines == [
        "Reqid: 0, Total tokens 45, LMCache hit tokens: 0, need to load: 0",
        "Storing KV cache for 45 out of 45 tokens for request 0",
        "Reqid: 1, Total tokens 45, LMCache hit tokens: 44, need to load: 12",
    ]


def test_the_log_level_is_the_users(run_scenario: Callable[..., Run]) -> None:
    run = run_scenario([generate(A)], connector=connector(), env={"LMCACHE_LOG_LEVEL": "WARNING"})
    assert "LMCache INFO" not in run.log


def test_chunked_prefill_stores_as_it_goes(run_scenario: Callable[..., Run]) -> None:
    run = run_scenario([generate([[1, 1200]], max_tokens=1)], connector=connector())
    assert re.findall(r"Storing KV cache for (\d+) out of (\d+) tokens for request 0 ", run.log) == [
        ("512", "512"),
        ("512", "1024"),
        ("176", "1200"),
    ]


def test_processes_and_module_path(run_scenario: Callable[..., Run]) -> None:
    """vLLM's default: engine and worker in processes of their own; the plugin off, the class found by its module."""
    by_path = connector() | {"kv_connector_module_path": "lmcache_rs.connector"}
    run = run_scenario(
        [generate(A), generate(A), ("reset", {}), generate(A)],
        connector=by_path,
        env={"LMCACHE_RS_DISABLE_PLUGIN": "1"},
        in_process=False,
    )
    assert [run.cached(i) for i in (0, 1, 3)] == [[0], [299], [0]]


def test_two_ranks_find_what_one_finds(
    run_scenario: Callable[..., Run], baseline: Callable[..., Run]
) -> None:
    steps = [generate(A), generate(A), generate(A, B), generate(B, max_tokens=30)]
    run = run_scenario(
        steps,
        connector=connector(),
        llm={"tensor_parallel_size": 2},
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        in_process=False,
    )
    assert run.tokens() == baseline(steps).tokens()
    assert [run.cached(i) for i in range(4)] == [[0], [299], [299, 0], [299]]
    assert run.log.count("Storing KV cache for 300 out of 300 tokens for request 0 ") == 1


DECLINED = {
    "local_cpu": ({"local_cpu": False}, {}, "The KV cache is not offloaded: local_cpu is off"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_is_declined_runs_without_a_cache(case: str, run_scenario: Callable[..., Run]) -> None:
    extra, llm, line = DECLINED[case]
    run = run_scenario([generate(A), generate(A)], connector=connector(**extra), llm=llm)
    assert run.cached(1) == [0]
    assert line in run.log
