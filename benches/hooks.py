"""Time spent inside the connector's hooks, both roles, copies included, as a share of a cold run of the real engine.

    python benches/hooks.py [--model .models/SmolLM2-135M-Instruct] [--num-prompts 2] [--num-tokens 4000] [--repeats 3]
                            [--floor]

The floor is 0: a run without a connector calls no hooks. One process, so that both roles are counted. Then steps with
nothing to do: streams that decode, and store nothing. Their floor, by --floor, are the hooks of a connector that does
nothing: what the stopwatch and cold caches take.
"""

import argparse
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("LMCACHE_LOG_LEVEL", "WARNING")

SCHEDULER_HOOKS = {"build_connector_meta", "update_connector_output"}
"""Those that are called in every step; others of the scheduler's side come with a request's begin or end."""
LAYER_HOOKS = {"has_connector_metadata", "wait_for_layer_load", "save_kv_layer"}
"""Called for every layer, where the forward is no CUDA graph."""

NOT_HOOKS = {"requires_kv_delivery", "requires_piecewise_for_cudagraph"}


class HookClock:
    """Wraps a connector class's hooks, those that ours has, with a stopwatch; nested hooks are counted once."""

    def __init__(self, connector: type) -> None:
        from lmcache_rs.connector.vllm_v1 import LMCacheConnectorV1

        ours = vars(LMCacheConnectorV1).items()
        names = {name for name, hook in ours if callable(hook) and name[0] != "_"} - NOT_HOOKS
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._inside = False
        for name in names:
            if (hook := getattr(connector, name, None)) is not None:
                setattr(connector, name, self._timed(name, hook))

    def _timed(self, name: str, hook: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return hook(*args, **kwargs)
            self._inside, began = True, time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self.calls[name] += 1
                self._inside = False

        return timed

    def take(self) -> tuple[float, dict[str, float], Counter[str]]:
        """(all seconds, seconds by hook, calls by hook) since the last call."""
        seconds, calls = dict(self.seconds), self.calls.copy()
        self.seconds.clear()
        self.calls.clear()
        return sum(seconds.values()), seconds, calls


def main() -> None:
    """Run cold and warm rounds and print the shares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct")
    parser.add_argument("--num-prompts", type=int, default=2)
    parser.add_argument("--num-tokens", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--floor", action="store_true", help="a connector that does nothing instead of ours")
    options = parser.parse_args()
    os.environ.setdefault("LMCACHE_MAX_LOCAL_CPU_SIZE", "4")

    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    from lmcache_rs.connector.vllm_v1 import LMCacheConnectorV1

    timed: type = LMCacheConnectorV1
    transfer: dict[str, Any] = {"kv_connector": "LMCacheConnectorV1"}
    if options.floor:
        sys.path.append(str(Path(__file__).parent / "gpu"))
        from engine_run import NULL
        from null_connector import NullConnector

        timed, transfer = NullConnector, NULL
    clock = HookClock(timed)
    llm = LLM(
        model=options.model,
        dtype="bfloat16",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=8192,
        kv_cache_memory_bytes=512 << 20,
        kv_transfer_config=KVTransferConfig(kv_role="kv_both", **transfer),
        disable_log_stats=True,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    cold: list[float] = []
    warm: list[float] = []
    cold_hooks: list[float] = []
    warm_hooks: list[float] = []
    for repeat in range(options.repeats):
        prompts: Any = [
            {
                "prompt_token_ids": [100 + repeat * 50 + i]
                + [1000 + j % 997 for j in range(options.num_tokens - 1)]
            }
            for i in range(options.num_prompts)
        ]
        clock.take()
        for runs, hooks in ((cold, cold_hooks), (warm, warm_hooks)):
            began = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            runs.append(time.perf_counter() - began)
            total, by_hook, calls = clock.take()
            hooks.append(total)
    print(f"{options.num_prompts} prompts of {options.num_tokens} tokens, {options.repeats} rounds, medians")
    for name, runs, hooks in (("first run", cold, cold_hooks), ("second run", warm, warm_hooks)):
        share = statistics.median(h / r for h, r in zip(hooks, runs, strict=True))
        print(
            f"{name}: {statistics.median(runs):.3f} s ({min(runs):.3f} to {max(runs):.3f}), "
            f"hooks {statistics.median(hooks) * 1e3:.2f} ms = {share:.3%}"
        )
    print("hooks of the last second run, ms (calls):")
    for name, seconds in sorted(by_hook.items(), key=lambda item: -item[1])[:8]:
        print(f"  {name}: {seconds * 1e3:.3f} ({calls[name]})")
    for streams in (1, 8):
        print_idle_steps(streams, clock, llm, sampling)


def print_idle_steps(streams: int, clock: HookClock, llm: Any, sampling: Any) -> None:
    """Microseconds that both sides take for a step of streams that decode."""
    sampling = sampling.clone()
    sampling.max_tokens, sampling.ignore_eos = 200, True
    engine = llm.llm_engine
    for i in range(streams):
        engine.add_request(f"stream {streams} {i}", {"prompt_token_ids": [i, 5, 6, 7]}, sampling)
    for _ in range(20):  # they are all admitted, and their prompts stored
        engine.step()
    times: dict[str, list[float]] = {"worker": [], "layers": [], "scheduler": []}
    clock.take()
    while engine.has_unfinished_requests():
        engine.step()
        _, by_hook, calls = clock.take()
        if not calls["build_connector_meta"] or calls["request_finished_all_groups"]:
            continue
        sums = dict.fromkeys(times, 0.0)
        for name, seconds in by_hook.items():
            side = "scheduler" if name in SCHEDULER_HOOKS else "layers" if name in LAYER_HOOKS else "worker"
            sums[side] += seconds * 1e6
        for side, us in sums.items():
            times[side].append(us)
    worker, layers, scheduler = (statistics.median(values) for values in times.values())
    print(
        f"{streams} streams that decode, us a step: worker {worker:.1f}, its hooks of layers {layers:.1f}, "
        f"scheduler {scheduler:.1f}"
    )


if __name__ == "__main__":
    main()
