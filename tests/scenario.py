"""Runs one engine through the steps of a scenario, in one process, and prints what came out as JSON.

Takes one argument: `{"model": path, "llm": {...}, "connector": {...} | null, "steps": [[operation, {...}], ...]}`.
Prompts are lists of `[seed, tokens]` pieces, so that prompts share prefixes where their pieces do.
"""

import json
import sys
import time
from typing import Any

from scenario_bytes import Bytes
from scenario_damage import Damage, handle, hold_completions, worker_side
from scenario_inputs import Inputs, cached, tokens_of, told
from scenario_tiers import Tiers


class Scenario(Bytes, Damage, Inputs, Tiers):
    def __init__(self, model: str, llm: dict[str, Any], connector: dict[str, Any] | None) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        options: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 8192,
            "enable_prefix_caching": False,
            "block_size": 32,
            "kv_cache_memory_bytes": 270 * 32 * 4096,
            "max_num_batched_tokens": 512,
            "seed": 0,
            "disable_log_stats": True,
        }
        if connector is not None:
            options["kv_transfer_config"] = KVTransferConfig(**connector)
        self.llm = LLM(model=model, **(options | llm))
        self.ids = 0
        self.preempted = 0
        self.layers_joined = 0
        self.loads_gated = 0
        self.parts_stored = 0
        self.drafted = 0
        self._count_preemptions_and_drafts()

    def _count_preemptions_and_drafts(self) -> None:
        core = getattr(self.llm.llm_engine.engine_core, "engine_core", None)
        if core is None:  # the scheduler lives in another process
            return
        preempt, schedule = core.scheduler._preempt_request, core.scheduler.schedule

        def preempting(*arguments: Any, **options: Any) -> Any:
            self.preempted += 1
            return preempt(*arguments, **options)

        def scheduling(*arguments: Any, **options: Any) -> Any:
            output = schedule(*arguments, **options)
            self.drafted += sum(map(len, output.scheduled_spec_decode_tokens.values()))
            return output

        core.scheduler._preempt_request = preempting
        core.scheduler.schedule = scheduling

    def sampling(self, max_tokens: int, params: dict[str, Any] | None = None, **options: Any) -> Any:
        from vllm import SamplingParams

        extra = {"kv_transfer_params": params} if params else None
        return SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            detokenize=False,
            ignore_eos=True,
            extra_args=extra,
            **options,
        )

    def generate(
        self,
        prompts: list[Any],
        max_tokens: int = 8,
        params: dict[str, Any] | None = None,
        salt: str | None = None,
        adapter: list[Any] | None = None,
        turns: int = 1,
    ) -> dict[str, Any]:
        """The answers to the prompts; with several turns, that to the prompt and all earlier answers and questions."""
        extra = {"cache_salt": salt} if salt else {}
        options: dict[str, Any] = {"use_tqdm": False}
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            options["lora_request"] = LoRARequest(*adapter)
        texts = [tokens_of(p) for p in prompts]
        for turn in range(turns):
            requests = [{"prompt_token_ids": text, **extra} for text in texts]
            outputs = self.llm.generate(requests, self.sampling(max_tokens, params), **options)
            if turn + 1 < turns:
                answers = [list(o.outputs[0].token_ids) for o in outputs]
                texts = [t + a + tokens_of([[99, 7]]) for t, a in zip(texts, answers, strict=True)]
        return told(outputs)

    def first_tokens(self, prompts: list[Any]) -> dict[str, Any]:
        """One token for each prompt, and by how much its log probability is above the next best one's."""
        requests = [{"prompt_token_ids": tokens_of(p)} for p in prompts]
        outputs = self.llm.generate(requests, self.sampling(1, logprobs=2), use_tqdm=False)
        leads = []
        for output in outputs:
            best = sorted((p.logprob for p in output.outputs[0].logprobs[0].values()), reverse=True)
            leads.append(best[0] - best[1])
        return {
            "first": [o.outputs[0].token_ids[0] for o in outputs],
            "leads": leads,
            "cached": [cached(o) for o in outputs],
        }

    def abort(
        self, prompt: Any, after: int, max_tokens: int = 40, hold_loads: bool = False
    ) -> dict[str, Any]:
        """Abort the request after so many steps; then step on until the engine is idle."""
        engine = self.llm.llm_engine
        self.ids += 1
        request_id = f"abort-{self.ids}"
        held = hold_loads and worker_side() is not None
        release = hold_completions() if held else lambda: None
        engine.add_request(request_id, {"prompt_token_ids": tokens_of(prompt)}, self.sampling(max_tokens))
        finished = False
        for _ in range(after):
            finished = finished or any(o.finished for o in engine.step())
        loading = len(worker_side().answers.asynchronous) if worker_side() is not None else 0
        engine.abort_request([request_id])
        release()
        for _ in range(5):
            engine.step()
        return {"finished": finished, "loading": loading}

    def reset(self, connector: bool = True) -> bool:
        return bool(self.llm.reset_prefix_cache(reset_connector=connector))

    def settle(self) -> None:
        """Step until nothing is in flight: one process makes no steps of its own after the last request."""
        for _ in range(1000):
            if not handle()._scheduler.has_work():
                return
            self.llm.llm_engine.step()
            time.sleep(1e-3)
        raise RuntimeError("stores were not acknowledged")

    def sleep(self, level: int = 1) -> None:
        self.llm.sleep(level=level)

    def wake(self) -> None:
        self.llm.wake_up()

    def stats(self) -> dict[str, float]:
        return dict(handle().stats())

    def freeze(self, frozen: bool = True) -> None:
        handle().freeze(frozen)

    def clear(self) -> int:
        return int(handle().clear())

    def lose_during(self, prompt: Any, after: int) -> None:
        """Run a request, and lose what is stored after so many of its steps, as by eviction: it goes on storing."""
        engine = self.llm.llm_engine
        self.ids += 1
        engine.add_request(f"lost-{self.ids}", {"prompt_token_ids": tokens_of(prompt)}, self.sampling(8))
        for step in range(1000):
            if step == after:
                handle()._scheduler.index.clear()
            if not engine.has_unfinished_requests():
                return
            engine.step()
        raise RuntimeError("the request does not end")

    def destroy(self) -> None:
        from lmcache_rs.integration.vllm.utils import ENGINE_NAME
        from lmcache_rs.v1.cache_engine import LMCacheEngineBuilder

        LMCacheEngineBuilder.destroy(ENGINE_NAME)

    def record_keys(self) -> None:
        """From now on note the keys under which requests are looked up."""
        side = handle()._scheduler
        self.recorded: list[str] = []
        lookup = side._lookup
        answer = lookup.answer

        def noting(record: Any, *arguments: Any, **options: Any) -> Any:
            hashes = [
                *record.request.block_hashes,
                lookup.tail(record, len(record.request.block_hashes) * 32),
            ]
            self.recorded += [record.space.key(block_hash).hex() for block_hash in hashes]
            return answer(record, *arguments, **options)

        lookup.answer = noting

    def keys(self) -> list[str]:
        return self.recorded

    def preemptions(self) -> int:
        return self.preempted

    def drafts(self) -> int:
        """Tokens that were proposed for a step without being known yet."""
        return self.drafted

    def watch_copies(self) -> None:
        """From now on compare the bytes of blocks and rows after every copy."""
        import numpy

        core = self.llm.llm_engine.engine_core.engine_core
        tensors = core.model_executor.driver_worker.worker.model_runner.kv_caches
        mover = worker_side()._mover
        pool, self.compared, self.unequal = numpy.from_dlpack(mover._pool), 0, 0

        def watched(copy: Any) -> Any:
            def copying(job: int, rows: Any, blocks: Any, *options: Any) -> None:
                copy(job, rows, blocks, *options)
                for row, block in zip(rows, blocks, strict=True):
                    kv = b"".join(bytes(t[int(block)].view(-1).view(UINT8).numpy()) for t in tensors)
                    self.compared += 1
                    self.unequal += kv != bytes(pool[row, : len(kv)])

            return copying

        from torch import uint8 as UINT8  # noqa: N812

        mover.store, mover.load_now = watched(mover.store), watched(mover.load_now)

    def copies(self) -> dict[str, int]:
        return {"compared": self.compared, "unequal": self.unequal}

    def version(self) -> str:
        import vllm

        return str(vllm.__version__)

    def block_hasher(self) -> tuple[str, bool | None]:
        """What hashes the blocks of requests, and whether ours is believed."""
        hasher = self.llm.llm_engine.engine_core.engine_core.request_block_hasher
        return type(hasher).__name__, getattr(hasher, "is_believed", None)

    def load_by_layers(self) -> None:
        """From now on synchronous loads of any size come by layers; what the forward waits for, and how, is counted."""
        import dataclasses

        lookup, mover = handle()._scheduler._lookup, worker_side()._mover
        lookup._rules = dataclasses.replace(lookup._rules, layered_bytes_min=1)
        join = mover.join_load

        def counting(job: int, layer: int | None = None) -> None:
            self.layers_joined += layer is not None
            join(job, layer)

        mover.join_load = counting
        gate = mover.gate_load

        def counting_gates(job: int) -> bool:
            gated = gate(job)
            self.loads_gated += gated
            return bool(gated)

        mover.gate_load = counting_gates

    def gated_loads(self) -> int:
        return self.loads_gated

    def store_by_layers(self) -> None:
        """From now on stores of any size go by layers, where the device has parts; their parts are counted."""
        from lmcache_rs.connector import stored_layers

        stored_layers.BYTES_MIN, mover = 1, worker_side()._mover
        store = mover.store

        def counting(job: int, rows: Any, blocks: Any, *part: int) -> None:
            self.parts_stored += len(part)
            store(job, rows, blocks, *part)

        mover.store = counting

    def stored_parts(self) -> int:
        return self.parts_stored

    def layer_joins(self) -> int:
        return self.layers_joined


def main() -> None:
    spec = json.loads(sys.argv[1])
    scenario = Scenario(spec["model"], spec.get("llm", {}), spec.get("connector"))
    results = [getattr(scenario, operation)(**arguments) for operation, arguments in spec["steps"]]
    print("RESULTS " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
