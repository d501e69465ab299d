"""Our connector class against the base classes of every version of vLLM from 0.26 to 0.33, without importing vLLM.

connector_api.json, made by scripts/connector_api.py, says what each version has.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from connector_api import EVERYTHING, Forms, forms
from support import ROOT

CONNECTOR = ROOT / "python" / "lmcache_rs" / "connector"
DATA = json.loads(Path(__file__).with_name("connector_api.json").read_text())
VERSIONS = tuple(DATA["sources"])
API: dict[str, dict[str, dict[str, list[str]]]] = DATA["api"]

LEFT = {
    "bind_kv_cache_manager": "calls bind_gpu_block_pool, which versions before it call themselves",
    "finish_forward": "stores wait for wait_for_save, when the draft model has written too",
    "get_external_cache_hit_sources": "answers with `_cache_hit_source`",
    "get_finished_count": "all ranks",
    "get_handshake_metadata": "nothing is exchanged at start",
    "get_kv_connector_kv_cache_events": "no events",
    "get_loaded_kv_cache_group_ids": "all groups that can be cached, and a model with others is declined",
    "get_mem_pool_context": "vLLM allocates KV as it likes",
    "get_required_kvcache_layout": "any layout will do",
    "prefer_cross_layer_blocks": "False: one tensor a layer will do",
    "register_cross_layers_kv_cache": "only called when preferred",
    "register_finished_partial_tail": "False: for models with recurrent state",
    "reset_capture_state": "what was captured is what we want to know",
    "restore_kv_caches": "vLLM maps the same addresses again",
    "role": "vLLM's own",
    "set_host_xfer_buffer_ops": "no host buffers",
    "set_xfer_handshake_metadata": "nothing is exchanged at start",
    "supports_divergent_local_hybrid_hits": "False: for models with recurrent state",
    "supports_sleep_mode": "True",
    "take_events": "no events",
}
"""Members of the base class that we leave as they are, and why that is right."""


def of_version(name: str, version: str) -> Forms:
    """Members of a class or function as one version has them."""
    members = API[name].items()
    return {m: form for m, fs in members for form, versions in fs.items() if version in versions}


def ours() -> Forms:
    """The hooks of our class, those inherited from vLLM left out."""
    found = forms((CONNECTOR / "vllm_v1.py").read_text(), "LMCacheConnectorV1")
    reporting = forms((CONNECTOR / "metrics.py").read_text(), "Reporting")
    assert found is not None
    assert reporting is not None
    return {member: form for member, form in (found | reporting).items() if member}


def kind(form: str) -> str:
    """What is in front of the parameters and decides how a member is called."""
    decorators = form.partition("(")[0].split()
    return next((d for d in decorators if d in ("property", "classmethod", "staticmethod")), "method")


def signature(form: str) -> inspect.Signature:
    """Callable form of "... (self, request, blocks=...)"; the barrier's `guard(lambda: ...)` has parentheses too."""
    namespace: dict[str, Any] = {}
    exec(f"def f({form[form.rindex('(') + 1 : -1]}): ...", namespace)
    return inspect.signature(namespace["f"])


def accepts(mine: inspect.Signature, base: inspect.Signature) -> bool:
    """Whether whatever may be passed to `base`, by position or by name, may be passed to `mine`."""
    names = [p.name for p in base.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    optional = [p.name for p in base.parameters.values() if p.default is not p.empty]
    extra = {"extra": 1} if any(p.kind is p.VAR_KEYWORD for p in base.parameters.values()) else {}
    try:
        mine.bind(*names, **extra)
        mine.bind(**dict.fromkeys(names, 1), **extra)
        mine.bind(**{n: 1 for n in names if n not in optional}, **extra)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("version", VERSIONS)
def test_our_class_can_be_used_as_each_versions_base_class(version: str) -> None:
    mine = ours()
    for base in ("KVConnectorBase_V1", "SupportsHMA"):
        for member, form in of_version(base, version).items():
            if not member or form == "constant":
                continue
            assert member in mine or "abstractmethod" not in form, f"{member} must be there"
            if member in mine:
                assert kind(mine[member]) == kind(form), member
                assert accepts(signature(mine[member]), signature(form)), (member, mine[member], form)
            else:
                assert member in LEFT, f"{member}: override it, or say why not"


def test_every_hook_of_ours_is_one_of_vllms() -> None:
    known = {member for base in ("KVConnectorBase_V1", "SupportsHMA") for member in API[base]}
    assert not set(ours()) - known
    assert not set(LEFT) - known
    assert not set(LEFT) & set(ours())


SINCE = {"KVConnectorTransferResults": "0.30.0", "CacheHitSource": "0.32.0"}
"""What older versions lack; vllm_api.py knows how to do without."""


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_that_is_imported_read_or_called_is_there(version: str) -> None:
    for name, members in API.items():
        expected = version >= SINCE.get(name, "")
        assert bool(of_version(name, version)) == expected, name
        if expected and name not in ("KVConnectorBase_V1", "KVConnectorStats"):
            assert set(of_version(name, version)) == set(members), name


@pytest.mark.parametrize("version", VERSIONS)
def test_our_calls_are_what_each_version_takes(version: str) -> None:
    pool = of_version("BlockPool", version)
    signature(pool["touch"]).bind("self", ["block"])
    signature(pool["free_blocks"]).bind("self", iter(["block"]))
    signature(pool["reset_prefix_cache"]).bind("self")
    signature(of_version("get_hash_fn_by_name", version)[""]).bind("sha256")
    signature(of_version("generate_block_hash_extra_keys", version)[""]).bind("request", 0, 31, 0)
    signature(of_version("hash_block_tokens", version)[""]).bind("function", None, [1], None)
    hasher = signature(of_version("get_request_block_hasher", version)[""])
    assert list(hasher.parameters)[:2] == ["hash_block_size", "caching_hash_fn"]
    if version >= SINCE["KVConnectorTransferResults"]:
        fields = set(of_version("KVConnectorTransferResults", version))
        assert {"finished_recving", "failed_recving"} <= fields


@pytest.mark.parametrize(
    ("file", "name", "base"),
    [
        ("vllm_api.py", "WorkerMetadata", "KVConnectorWorkerMetadata"),
        ("metrics.py", "LMCacheStats", "KVConnectorStats"),
        ("metrics.py", "LMCachePromMetrics", "KVConnectorPromMetrics"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_classes_beside_the_connector(version: str, file: str, name: str, base: str) -> None:
    mine = forms((CONNECTOR / file).read_text(), name, EVERYTHING)
    assert mine is not None
    for member, form in of_version(base, version).items():
        if not member or "(" not in form:
            continue
        if member in mine:
            assert accepts(signature(mine[member]), signature(form)), member
        else:
            assert "abstractmethod" not in form, member
