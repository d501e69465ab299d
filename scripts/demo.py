"""The demo: the benefit script without and with lmcache_rs on a small model, and whether the words are the same.

`make demo` sets up the environment and the model first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prepare_model import MODELS, SMOLLM2
from progress import CommandError, fail, run, say

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "cpu_offload.py"
LOG = MODELS / "demo.log"
NUM_PROMPTS, NUM_TOKENS = 2, 4000
OPTIONS = (
    *("--model", SMOLLM2, "--num-prompts", NUM_PROMPTS, "--num-tokens", NUM_TOKENS),
    *("--max-model-len", 8192, "--dtype", "bfloat16", "--enforce-eager"),
)
STAGES = {"First run: ": "first run", "Second run: ": "second run", "Speedup": "stopping vLLM"}
RESULTS = ("First run time", "Second run time", "Speedup")


@dataclass(frozen=True)
class Outcome:
    """What one call of the benefit script measured, over both of its runs."""

    name: str
    lines: list[str]
    first_s: float
    second_s: float
    tokens: int
    tokens_hit: int
    """In the second run."""
    first_tokens_hit: int
    words: list[list[list[int]]]

    def row(self) -> str:
        """One line of the table."""
        return (
            f"{self.name:<16}{self.first_s:>10.2f} s{self.second_s:>11.2f} s"
            f"{self.first_s / self.second_s:>10.2f}x{self.tokens_hit:>10,} of {self.tokens:,}"
        )


HEADER = f"{'':<16}{'first run':>12}{'second run':>13}{'speed-up':>11}   tokens hit in the second"


def cpu_list() -> str:
    """The cores that this process may use, as vLLM's CPU build wants them; its default leaves one idle."""
    cores = sorted(os.sched_getaffinity(0))
    ranges: list[list[int]] = []
    for core in cores:
        if ranges and core == ranges[-1][1] + 1:
            ranges[-1][1] = core
        else:
            ranges.append([core, core])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def variables() -> dict[str, str]:
    """The environment of the benefit script; settings of this shell must not change the demo."""
    ours = {
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cpu_list(),
        "VLLM_NO_USAGE_STATS": "1",
    }
    foreign = ("LMCACHE_", "VLLM_", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | ours


def stage(lines: list[str]) -> str:
    """What the benefit script is doing, from the last lines it printed."""
    for line in reversed(lines):
        for begin, name in STAGES.items():
            if line.startswith(begin):
                return name
    return "starting vLLM"


def measure(name: str, *options: str, settings: Mapping[str, str] | None = None) -> Outcome:
    """Call the benefit script once, with `settings` added to its environment."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [str(word) for word in (sys.executable, SCRIPT, *OPTIONS, *options, "--json", result)]
        begin = LOG.stat().st_size if LOG.exists() else 0
        env = variables() | dict(settings or {})
        run(f"running the benefit script {name}", command, LOG, env=env, every_s=5, status=stage)
        runs: dict[str, Any] = json.loads(result.read_text())
    with LOG.open("rb") as log:
        log.seek(begin)
        printed = log.read().decode("utf-8", "replace").splitlines()
    first, second = runs["first"], runs["second"]
    return Outcome(
        name=name,
        lines=[line for line in printed if line.startswith(RESULTS)],
        first_s=first["seconds"],
        second_s=second["seconds"],
        tokens=sum(second["prompt_tokens"]),
        tokens_hit=sum(second["cached_tokens"]),
        first_tokens_hit=sum(first["cached_tokens"]),
        words=[first["token_ids"], second["token_ids"]],
    )


def main() -> None:
    """Measure without and with, print the table, fail when the words differ."""
    LOG.unlink(missing_ok=True)
    say(f"{NUM_PROMPTS} prompts of {NUM_TOKENS:,} tokens, twice, on {SMOLLM2.name}; vLLM's own output: {LOG}")
    try:
        outcomes = [measure("without cache"), measure("with lmcache_rs", "--enable-lmcache")]
    except CommandError as error:
        fail(str(error))
    for outcome in outcomes:
        say(f"\n{outcome.name}:")
        say("\n".join(outcome.lines))
    say(f"\n{HEADER}")
    say("\n".join(outcome.row() for outcome in outcomes))
    same = outcomes[0].words == outcomes[1].words
    say(f"\nSame words: {'yes' if same else 'no'}")
    if not same:
        fail(f"the cache changed what the model says; see {LOG}")
    if outcomes[1].tokens_hit == 0:
        fail(f"the cache was never hit; see {LOG}")


if __name__ == "__main__":
    main()
