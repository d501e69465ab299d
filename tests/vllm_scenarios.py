"""What the tests of the real engine are made of: steps, connectors, and what a run returned."""

from dataclasses import dataclass
from typing import Any

Step = tuple[str, dict[str, Any]]
Steps = list[Step]


def generate(*prompts: Any, **options: Any) -> Step:
    """Generate for all prompts at once; a prompt is a list of `[seed, tokens]` pieces."""
    return ("generate", {"prompts": list(prompts), **options})


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


SHORT, EXACT, LONG = [[1, 300]], [[2, 256]], [[3, 3000]]
EXTENDED = [[3, 2560], [4, 200]]
BATCH = [[[10 + i, 600]] for i in range(6)]
MANY = [[[30 + i, 900]] for i in range(8)]
TINY = [[[50 + i, 31 + i]] for i in range(8)]

# A life of requests: repeated, longer, in batches, preempted; HITS are what is found when nothing is evicted.
LIFE: Steps = [
    generate(SHORT),
    generate(SHORT),
    generate(EXACT),
    generate(EXACT),
    generate(LONG),
    generate(LONG),
    generate(EXTENDED),
    generate(*BATCH),
    generate(*BATCH),
    generate(*TINY),
    generate(*TINY, SHORT, LONG),
    generate(*MANY, max_tokens=200),
    generate(*MANY, max_tokens=200),
    generate(SHORT, *BATCH, EXTENDED),
]
HITS = {1: [299], 3: [255], 5: [2999], 6: [2560]}

OTHER = [[7, 3000]]

# Aborted before, during and after a load.
ABORTS: Steps = [
    generate(LONG),
    ("abort", {"prompt": LONG, "after": 0}),
    ("abort", {"prompt": LONG, "after": 1, "hold_loads": True}),
    ("abort", {"prompt": LONG, "after": 8}),
    generate(LONG),
    ("abort", {"prompt": OTHER, "after": 2}),
    generate(OTHER),
    generate(OTHER, LONG),
]
FAILURES: Steps = [("fail_loads", {"count": 2}), generate(LONG, *BATCH), generate(LONG, *BATCH)]

# All of it in one engine, where starting one takes as long as running this.
WHOLE_LIFE: Steps = [*LIFE, *ABORTS, *FAILURES]


def with_control(steps: Steps) -> Steps:
    """The steps, what came of them, and a negative control: LONG from the cache, whole and then damaged."""
    ending: Steps = [("settle", {}), ("preemptions", {}), ("stats", {})]
    control: Steps = [("reset", {"connector": False}), ("swap_layers", {}), generate(LONG)]
    return [*steps, *ending, generate(LONG), *control]


def check_whole_life(run: Run, expected: Run, steps: Steps, preempts: bool = True) -> dict[str, float]:
    """The tokens of `with_control(steps)`, which begin with WHOLE_LIFE, and a clean end. Returns statistics."""
    *tokens, right, wrong = run.tokens()
    assert tokens == expected.tokens()
    assert right == tokens[LIFE.index(generate(LONG))] != wrong, "the control: other KV, other tokens"
    assert run.cached(-1)[0] > 0
    preemptions, stats = run.results[len(steps) + 1 : len(steps) + 3]
    assert preemptions > 0 or not preempts, "some requests were preempted and resumed"
    assert stats["leases"] == stats["reserved"] == stats["leaving"] == 0, stats
    assert stats["free"] + stats["visible"] == stats["rows"], stats
    assert stats["loads"] > 0
    assert not [name for name in stats if name.startswith("errors:") and name != "errors:load"], stats
    return dict(stats)
