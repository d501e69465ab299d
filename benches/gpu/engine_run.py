"""One process of the engine benchmark: starts vLLM with one connector, runs every workload, prints one line of JSON.

    python benches/gpu/engine_run.py none|null|lmcache_rs|offload|lmcache [--cpu-gb 20] [--gpu-gb 24] [--only-start]

The model is Qwen3-8B with dummy weights: its words mean nothing, its work is the real one. The GPU budget is cut so
that the KV of ten prompts of 10,001 tokens (14.7 GB) does not stay on the card. "null" is a connector that does
nothing: what vLLM itself spends on any.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
KV_BYTES_PER_TOKEN = 2 * 36 * 8 * 128 * 2
PROMPTS, TOKENS, STREAMS = 10, 10_000, 8
HIT_EVERY_S = 0.12

NULL: dict[str, Any] = {"kv_connector": "NullConnector", "kv_connector_module_path": "null_connector"}
CONNECTORS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "null": NULL,
    "lmcache_rs": {"kv_connector": "LMCacheRsConnector"},
    "lmcache": {"kv_connector": "LMCacheConnectorV1"},
    "offload": {"kv_connector": "OffloadingConnector"},
}


def ram_taken() -> float:
    """GiB of this machine that are not available."""
    memory = psutil.virtual_memory()
    return float(memory.total - memory.available) / 2**30


def prompt(seed: int, tokens: int = TOKENS) -> Any:
    """A prompt that shares no block with one of another seed."""
    return {"prompt_token_ids": [seed] + [1000 + (j * 7 + seed * 13) % 5000 for j in range(tokens)]}


class Engine:
    """vLLM with one connector, and the workloads."""

    def __init__(self, mode: str, cpu_gb: float, gpu_gb: float) -> None:
        import torch
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig

        self.sampling = SamplingParams
        transfer = CONNECTORS[mode]
        if mode == "offload" and transfer is not None:
            transfer = transfer | {"kv_connector_extra_config": {"cpu_bytes_to_use": int(cpu_gb * 2**30)}}
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(QWEN3_8B))
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        began = time.perf_counter()
        self.llm = LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=16384,
            enable_prefix_caching=False,
            gpu_memory_utilization=gpu_gb / total,
            compilation_config={
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
            },
            kv_transfer_config=KVTransferConfig(kv_role="kv_both", **transfer) if transfer else None,
            disable_log_stats=True,
        )
        self.start_s = time.perf_counter() - began
        self.generate([prompt(120_000)])

    def generate(self, prompts: Any, max_tokens: int = 1) -> tuple[float, list[int]]:
        """(seconds, first tokens)."""
        sampling = self.sampling(temperature=0, max_tokens=max_tokens, detokenize=False)
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - began, [o.outputs[0].token_ids[0] for o in outputs]

    def first_runs(self, rounds: int = 5) -> list[float]:
        """Ten prompts that nobody has seen, s; the pool fills up, and what comes later evicts."""
        seconds = []
        for i in range(rounds):
            seconds.append(self.generate([prompt(1000 + i * PROMPTS + j) for j in range(PROMPTS)])[0])
            time.sleep(1.0)
        return seconds

    def benefit(self, rounds: int = 4) -> dict[str, Any]:
        """The same ten prompts again and again: the first run computes, the others find; s."""
        prompts = [prompt(100 + i) for i in range(PROMPTS)]
        seconds, tokens = [], []
        for _ in range(rounds):
            took, first = self.generate(prompts)
            seconds.append(took)
            tokens.append(first)
            time.sleep(1.0)
        return {"repeated_s": seconds, "same": all(t == tokens[0] for t in tokens)}

    def single_hits(self, rounds: int = 2) -> list[float]:
        """Each stored prompt alone, ms."""
        return [self.generate([prompt(100 + i)])[0] * 1e3 for _ in range(rounds) for i in range(PROMPTS)]

    def short_hits(self, repeats: int = 10) -> dict[str, float]:
        """1,000 tokens, computed and found, ms."""
        cold = [self.generate([prompt(5000 + i, 1000)])[0] * 1e3 for i in range(repeats)]
        time.sleep(0.2)
        warm = [self.generate([prompt(5000 + i, 1000)])[0] * 1e3 for i in range(repeats)]
        return {"computed_ms": statistics.median(cold), "found_ms": statistics.median(warm)}

    def beside_streams(self, cold_prefill: bool = False) -> dict[str, float]:
        """Eight streams decode while stored prompts come back: gaps of the streams, first tokens of the hits, ms.

        `cold_prefill`: a prompt that nobody stored is computed at the same time, and no streams run.
        """
        engine = self.llm.llm_engine
        decode = self.sampling(temperature=0, max_tokens=400, ignore_eos=True, detokenize=False)
        once = self.sampling(temperature=0, max_tokens=1, detokenize=False)
        for i in range(0 if cold_prefill else STREAMS):
            engine.add_request(f"d{i}", prompt(90_000 + i, 100), decode)
        began = time.perf_counter()
        sent: dict[str, float] = {}
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        gaps: list[tuple[float, float]] = []
        start_s = 0.05 if cold_prefill else 1.0
        if cold_prefill:
            for i in range(3):
                engine.add_request(f"c{i}", prompt(70_000 + i), once)
        while engine.has_unfinished_requests():
            now = time.perf_counter()
            if len(sent) < PROMPTS and now - began > start_s + HIT_EVERY_S * len(sent):
                sent[f"h{len(sent)}"] = now
                engine.add_request(f"h{len(sent) - 1}", prompt(100 + len(sent) - 1), once)
            for output in engine.step():
                now, name = time.perf_counter(), output.request_id
                if name.startswith("h"):
                    first.setdefault(name, now - sent[name])
                elif name.startswith("d"):
                    if name in last:
                        gaps.append((now, now - last[name]))
                    last[name] = now
        window = min(sent.values()), max(sent[n] + t for n, t in first.items())
        busy = sorted(g for t, g in gaps if window[0] <= t <= window[1]) or [0.0]
        quiet = sorted(g for t, g in gaps if t < window[0]) or [0.0]
        ttft = sorted(first.values())
        return {
            "quiet_ms": statistics.median(quiet) * 1e3,
            "gap_mean_ms": statistics.fmean(busy) * 1e3,
            "gap_p99_ms": busy[int(0.99 * (len(busy) - 1))] * 1e3,
            "ttft_p50_ms": statistics.median(ttft) * 1e3,
            "ttft_max_ms": ttft[-1] * 1e3,
        }


def main() -> None:
    """Run all workloads with one connector."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=sorted(CONNECTORS))
    parser.add_argument("--cpu-gb", type=float, default=20)
    parser.add_argument("--gpu-gb", type=float, default=24)
    parser.add_argument("--only-start", action="store_true", help="start the engine and run no workload")
    options = parser.parse_args()
    os.environ.update(
        LMCACHE_CHUNK_SIZE="256",
        LMCACHE_MAX_LOCAL_CPU_SIZE=str(options.cpu_gb),
    )
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    before = ram_taken()
    engine = Engine(options.mode, options.cpu_gb, options.gpu_gb)
    result: dict[str, Any] = {"start_s": engine.start_s, "ram_gib": ram_taken() - before}
    if not options.only_start:
        result["first_s"] = engine.first_runs()
        result |= engine.benefit()
        result["ram_gib"] = ram_taken() - before
        result["hit_ms"] = engine.single_hits()
        result["short"] = engine.short_hits()
        result["streams"] = engine.beside_streams()
        result["beside_prefill"] = engine.beside_streams(cold_prefill=True)
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
