"""Steps of a scenario that compare the KV that loads bring with the KV that was stored, in vLLM's KV tensors."""

from typing import Any

from scenario_damage import worker_side


class Bytes:
    """Watches the mover of the worker's side that lives in this process."""

    llm: Any

    def watch_bytes(self) -> None:
        """From now on remember what stores take and compare what loads bring; `byte_differences` tells."""
        mover = worker_side()._mover
        core = self.llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        tensors = {tensor.data_ptr(): tensor for tensor in runner.kv_caches}
        self.watched = Watched(mover, list(tensors.values()), core.vllm_config.cache_config.num_gpu_blocks)
        for name in ("store", "load_now", "submit_load", "join_load", "poll"):
            setattr(mover, name, getattr(self.watched, name))

    def byte_differences(self) -> dict[str, int]:
        """Blocks compared, and those of them that were not as stored."""
        different = sum(int(count) for count in self.watched.different)
        return {"compared": self.watched.compared, "different": different}


class Watched:
    """Stands before a mover. A load is compared when it is joined, or when it is told of as ended."""

    def __init__(self, mover: Any, tensors: list[Any], blocks: int) -> None:
        self._tensors, self._blocks = tensors, blocks
        self._names = {name: getattr(mover, name) for name in dir(mover) if not name.startswith("_")}
        self._stored: dict[int, Any] = {}
        self._loads: dict[int, tuple[Any, Any]] = {}
        self.compared = 0
        self.different: list[Any] = []

    def store(self, job: int, rows: Any, blocks: Any, *part: int) -> None:
        # On a GPU in the stream's order: what a store must see. Of parts the last one sees all of it.
        for row, block in zip(rows.tolist(), self._content(blocks), strict=True):
            self._stored[row] = block
        self._names["store"](job, rows, blocks, *part)

    def load_now(self, job: int, rows: Any, blocks: Any, by_layers: bool = False) -> None:
        self._loads[job] = (rows, blocks)
        self._names["load_now"](job, rows, blocks, by_layers)

    def submit_load(self, job: int, rows: Any, blocks: Any, by_layers: bool = False) -> None:
        self._loads[job] = (rows, blocks)
        self._names["submit_load"](job, rows, blocks, by_layers)

    def join_load(self, job: int, layer: int | None = None) -> None:
        self._names["join_load"](job, layer)
        if layer is None:
            self._compare(job)

    def poll(self) -> Any:
        ended = self._names["poll"]()
        for job, _, _ in ended:
            self._compare(job)
        return ended

    def _compare(self, job: int) -> None:
        rows, blocks = self._loads.pop(job, ((), ()))
        if len(rows):
            self.compared += len(rows)
            content = self._content(blocks)
            stored = (self._stored[row] for row in rows.tolist())
            self.different += [(a != b).any() for a, b in zip(stored, content, strict=True)]

    def _content(self, blocks: Any) -> Any:
        """The bytes of each block, of all layers."""
        import torch

        from lmcache_rs.copy.cpu import as_blocks

        pages = []
        for tensor in self._tensors:
            whole = as_blocks(tensor, self._blocks)
            index = torch.from_numpy(blocks.astype("int64")).to(whole.device)
            pages.append(whole.view(torch.uint8)[index].flatten(1))
        return torch.cat(pages, 1)
