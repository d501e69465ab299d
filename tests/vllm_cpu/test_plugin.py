"""Which class vLLM finds under which name, with and without a real LMCache beside us."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

SHOW = """
from vllm.plugins import load_general_plugins
load_general_plugins()
load_general_plugins()
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as F
for name in ("LMCacheConnectorV1", "LMCacheRsConnector"):
    found = F.get_connector_class_by_name(name) if name in F._registry else None
    print("FOUND", name, found and found.__module__, found and found.__name__)
import torch
print("CUDA", torch.cuda.is_initialized())
"""
OURS = "lmcache_rs.connector.vllm_v1"
THEIRS = "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector"


@pytest.mark.parametrize(
    ("real", "env", "owner", "alias"),
    [
        (False, {}, OURS, OURS),
        (False, {"LMCACHE_RS_DISABLE_PLUGIN": "1"}, THEIRS, None),
        (True, {}, THEIRS, OURS),
        (True, {"LMCACHE_RS_OVERRIDE_LMCACHE": "1"}, OURS, OURS),
    ],
)
def test_names(
    real: bool, env: dict[str, str], owner: str, alias: str | None, run_script: Any, tmp_path: Path
) -> None:
    # A folder of this name is no package, and no LMCache.
    (tmp_path / "site" / "lmcache").mkdir(parents=True)
    if real:
        (tmp_path / "site" / "lmcache" / "__init__.py").write_text("")
    env = env | {"PYTHONPATH": str(tmp_path / "site")}
    output = run_script(SHOW, env=env).stdout
    assert f"FOUND LMCacheConnectorV1 {owner} LMCacheConnectorV1" in output
    name = "LMCacheRsConnector" if alias else None
    assert f"FOUND LMCacheRsConnector {alias} {name}" in output
    assert "CUDA False" in output
