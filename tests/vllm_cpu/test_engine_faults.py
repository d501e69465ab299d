"""Every hook of the real engine fails in turn, by an exception and a panic of Rust: it goes on, with right tokens."""

from collections.abc import Callable
from typing import Any

import pytest

from vllm_scenarios import Run, Steps, connector, generate

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CALLS = {
    "scheduler": [
        "add_request",
        "matched_tokens",
        "admit",
        "plan_step",
        "acknowledge",
        "finish_request",
    ],
    "worker": [
        "begin_step",
        "before_forward",
        "after_forward",
        "end_step",
        "take_received",
        "take_bad_blocks",
        "take_acks",
        "take_step_acks",
    ],
}
FAULTS: list[dict[str, Any]] = [
    {"side": side, "call": call, "panics": panics}
    for side, calls in CALLS.items()
    for call in calls
    for panics in (False, True)
]
STORED_LONG, STORED_SHORT = [[1, 300]], [[2, 60]]
NEW = [[[1, 256], [100 + i, 90]] for i in range(len(FAULTS))]
"""One for each fault: the start of a stored prompt, and an end that is seen once before, not stored."""

FAILED_LOADS = 8
"""As many as turn the cache off."""


def provoke(fault: dict[str, Any]) -> Steps:
    """The fault, and what makes the engine call it: here an output has answers only of loads that failed."""
    failed_load: Steps = [("fail_loads", {"count": 1})] if fault["call"] == "acknowledge" else []
    return [("fault", fault), *failed_load]


def test_every_hook_fails_in_turn(run_scenario: Callable[..., Run]) -> None:
    """Short loads hold the step and long ones do not, so each fault meets one of each kind."""
    steps: Steps = [
        generate(*NEW, max_tokens=4, params={"lmcache.skip_save": True}),
        generate(STORED_LONG, STORED_SHORT, max_tokens=4),
        ("settle", {}),
    ]
    for fault, new in zip(FAULTS, NEW, strict=True):
        steps += [*provoke(fault), generate(STORED_LONG, STORED_SHORT, new, max_tokens=4), ("settle", {})]
    steps += [("faults_left", {}), generate(STORED_LONG, STORED_SHORT, max_tokens=4), ("stats", {})]
    # From here on every load fails, until the cache turns itself off.
    steps += [("fault", FAULTS[0]), generate([[3, 9]], max_tokens=1), ("fail_loads", {"count": FAILED_LOADS})]
    steps += [generate(STORED_LONG, STORED_SHORT, max_tokens=4)] * 6
    steps += [("stats", {}), ("pass_time", {"seconds": 61.0})]
    steps += [generate(STORED_LONG, STORED_SHORT, max_tokens=4)] * 2 + [("settle", {}), ("stats", {})]
    run = run_scenario(steps, connector=connector(sync_load_max_size="400KiB"))
    check_tokens(run)
    (left,) = [result for result in run.results if isinstance(result, list)]
    assert left == []
    after_faults, while_off, last = (r for r in run.results if isinstance(r, dict) and "lookups" in r)
    errors = {name: count for name, count in after_faults.items() if name.startswith("errors")}
    assert errors
    assert "turned_off" not in after_faults
    assert while_off["turned_off"] == 1
    assert while_off["misses:turned_off"] > 0
    assert run.log.count("failures within 30 s: the cache is off for 60 s") == 1
    assert run.log.count("The cache is on again") == 1
    found = run.cached(len(run.results) - 3)
    assert found[0] >= 299, "it is on again"
    assert found[1] >= 59
    for stats in (after_faults, last):
        assert stats["leases"] == stats["reserved"] == stats["leaving"] == 0
        assert stats["free"] + stats["visible"] == stats["rows"]


def check_tokens(run: Run) -> None:
    """Each prompt gives what it gave at first, when nothing was stored."""
    new, stored, *later = run.tokens()
    for i, tokens in enumerate(later[: len(FAULTS)]):
        assert tokens == [*stored, new[i]], FAULTS[i]
    for tokens in later[len(FAULTS) :]:
        assert len(tokens) == 1 or tokens == stored
