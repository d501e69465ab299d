"""The engine benchmark: lmcache_rs beside no connector and its peers, processes alternating, as a table of medians.

    python benches/gpu/engine.py [--modes none,null,lmcache_rs,offload] [--rounds 3] [--only-start] [--cpu-gb 20]
                                 [--results FILE]

Prints the card, the versions and the floor: the KV of ten prompts at the card's own copy speed, plus one step. "null"
is a connector that does nothing: what vLLM itself spends on any. FILE keeps what each process found, a line each; the
table is of all that it holds, so that a benchmark can be gone on with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine_run import KV_BYTES_PER_TOKEN, PROMPTS, TOKENS

RUN = Path(__file__).with_name("engine_run.py")
PROCESS_S_MAX = 420

FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "first run, median s": lambda r: statistics.median([*r["first_s"], r["repeated_s"][0]]),
    "second run, s": lambda r: r["repeated_s"][1],
    "later runs, median s": lambda r: statistics.median(r["repeated_s"][2:]),
    "one hit alone, p50 ms": lambda r: statistics.median(r["hit_ms"]),
    "1,000 tokens computed, ms": lambda r: r["short"]["computed_ms"],
    "1,000 tokens found, ms": lambda r: r["short"]["found_ms"],
    "token gap without hits, p50 ms": lambda r: r["streams"]["quiet_ms"],
    "token gap beside hits, mean ms": lambda r: r["streams"]["gap_mean_ms"],
    "token gap beside hits, p99 ms": lambda r: r["streams"]["gap_p99_ms"],
    "first token of those hits, p50 ms": lambda r: r["streams"]["ttft_p50_ms"],
    "first token beside a cold prefill, p50 ms": lambda r: r["beside_prefill"]["ttft_p50_ms"],
}
ENGINE_FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "engine start, s": lambda r: r["start_s"],
    "RAM of the whole engine, GiB": lambda r: r["ram_gib"],
}


Results = dict[str, list[dict[str, Any]]]
"""By mode, one for each process."""


def run_once(mode: str, arguments: list[str]) -> dict[str, Any] | None:
    """One process, its figures shown; None, with the end of its output shown, when it fails."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(RUN), mode, *arguments], capture_output=True, text=True, timeout=PROCESS_S_MAX
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    print(f"{mode}: {'done' if lines else 'FAILED'} after {time.monotonic() - began:.0f} s", flush=True)
    if not lines:
        print((done.stdout + done.stderr)[-3000:], flush=True)
        return None
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    shown = ENGINE_FIGURES | (FIGURES if "hit_ms" in result else {})
    print(*(f"    {name}: {figure(result):.3f}" for name, figure in shown.items()), sep="\n", flush=True)
    return result


def results_of(path: Path | None, modes: list[str], only_start: bool) -> Results:
    """What `path` holds from earlier of `modes` and this workload."""
    results: Results = {mode: [] for mode in modes}
    for line in path.read_text().splitlines() if path is not None and path.exists() else ():
        result = json.loads(line)
        if result["mode"] in results and ("hit_ms" not in result) == only_start:
            results[result["mode"]].append(result)
    return results


def copy_speed() -> float:
    """GB/s of one pinned copy to the card, the best of five: the floor of every load."""
    import torch

    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, host.numel() / (time.perf_counter() - began) / 1e9)
    return best


def print_figures(figures: dict[str, Callable[[dict[str, Any]], float]], results: Results) -> None:
    """A line for each figure, a column for each mode: median of the processes, least and most."""
    for name, figure in figures.items():
        cells = []
        for processes in results.values():
            values = [figure(result) for result in processes]
            cells.append(
                f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
                if values
                else "failed"
            )
        print(f"{name:42}" + "".join(f"{cell:>30}" for cell in cells))


def main() -> None:
    """Alternate the modes, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", default="none,null,lmcache_rs,offload")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-start", action="store_true", help="time starts and run no workload")
    parser.add_argument("--results", type=Path, help="keeps what processes found; earlier ones count too")
    options, others = parser.parse_known_args()
    if options.only_start:
        others.append("--only-start")
    modes = options.modes.split(",")
    results = results_of(options.results, modes, options.only_start)
    for _ in range(options.rounds):
        for mode in modes:
            result = run_once(mode, others)
            if result is None:
                continue
            results[mode].append(result)
            if options.results is not None:
                with options.results.open("a") as file:
                    file.write(json.dumps({"mode": mode} | result) + "\n")

    import torch
    import vllm

    print(f"\n{torch.cuda.get_device_name()}, vLLM {vllm.__version__}, torch {torch.__version__}")
    print(f"{'median (least to most)':42}" + "".join(f"{mode:>30}" for mode in modes))
    print_figures(ENGINE_FIGURES, results)
    if options.only_start:
        return
    speed = copy_speed()
    floor = PROMPTS * (TOKENS + 1) * KV_BYTES_PER_TOKEN / speed / 1e9
    print_figures(FIGURES, results)
    same = [all(r["same"] for r in processes) for processes in results.values()]
    print(f"{'same first tokens in every run':42}" + "".join(f"{'yes' if s else 'NO':>30}" for s in same))
    print(
        f"pinned copy to the card {speed:.1f} GB/s; floor of a warm run {floor:.3f} s of copying and one step"
    )


if __name__ == "__main__":
    main()
