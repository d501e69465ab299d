"""Two engines share KV outside of RAM only where everything is equal that changes its bytes, and then they do."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from weight_files import copied_elsewhere, flip, write_weights

from lmcache_rs.connector import namespace, vllm_api
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.namespace import Unnamed, namespace_properties

CONFIGURATION = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
GEOMETRY = Geometry(32, 4096, 10, ("l0", "l1"), 100, 1, "cpu", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGURATION))
    write_weights(folder / "model.safetensors")
    return folder


def engine_config(folder: Path, **arguments: Any) -> Any:
    return EngineArgs(
        str(folder), skip_tokenizer_init=True, enforce_eager=True, **arguments
    ).create_engine_config()


@pytest.fixture(scope="module")
def base(model: Path) -> Any:
    return engine_config(model)


def kv_cache(**spec: Any) -> Any:
    values = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32} | spec
    group = SimpleNamespace(layer_names=["l0", "l1"], kv_cache_spec=FullAttentionSpec(**values))
    tensors = [SimpleNamespace(layers=["l0"]), SimpleNamespace(layers=["l1"])]
    return SimpleNamespace(
        kv_cache_groups=[group], kv_cache_tensors=tensors, kv_cache_layout=None, num_blocks=100
    )


def name(
    config: Any, kv: Any = None, geometry: Geometry = GEOMETRY, chunk_tokens: int = 256
) -> dict[str, str]:
    properties = namespace_properties(config, kv or kv_cache(), geometry, chunk_tokens)
    assert not isinstance(properties, Unnamed), properties
    assert len({key for key, _ in properties}) == len(properties)
    assert all(isinstance(text, str) and text.isascii() for pair in properties for text in pair)
    return dict(properties)


def unnamed(config: Any) -> Unnamed:
    found = namespace_properties(config, kv_cache(), GEOMETRY, 256)
    assert isinstance(found, Unnamed)
    return found


def changed(config: Any, part: str, attribute: str, value: Any) -> Any:
    """A copy with another value, past all of vLLM's checks."""
    other = copy.copy(config)
    inner = copy.copy(getattr(config, part))
    object.__setattr__(inner, attribute, value)
    object.__setattr__(other, part, inner)
    return other


def test_it_is_the_same_every_time(base: Any, model: Path) -> None:
    assert name(base) == name(base) == name(engine_config(model))


def test_it_is_the_same_in_another_process(base: Any, model: Path) -> None:
    code = "import sys, json, test_namespace as t; from pathlib import Path\n"
    code += "print('\\n' + json.dumps(t.name(t.engine_config(Path(sys.argv[1])))))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, str(model)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(ran.stdout.splitlines()[-1]) == name(base)


# The parts of the configuration, field by field.

WHOLE = {
    "model_config": namespace._NOT_OF_MODEL,
    "cache_config": namespace._NOT_OF_CACHE,
    "attention_config": set(),
}


@pytest.mark.parametrize("part", WHOLE)
def test_each_field_counts_or_is_named_as_one_that_does_not(base: Any, part: str) -> None:
    for field in fields(getattr(base, part)):
        if field.name in (
            "prefix_caching_hash_algo",
            "trust_remote_code",
            "enable_sleep_mode",
            "hf_config",
            "model",
            "model_weights",
        ):
            continue  # have tests of their own
        other = name(changed(base, part, field.name, "another"))
        assert (other != name(base)) is (field.name not in WHOLE[part]), field.name


@pytest.mark.parametrize("part", ["additional_config", "engram_config", "diffusion_config"])
def test_other_parts_count(base: Any, part: str) -> None:
    other = copy.copy(base)
    object.__setattr__(other, part, {"a": 1})
    assert name(other) != name(base)


@pytest.mark.parametrize("attribute", namespace._OF_PARALLEL)
def test_how_the_model_is_split_counts(base: Any, attribute: str) -> None:
    assert name(changed(base, "parallel_config", attribute, 2)) != name(base)


def test_what_only_schedules_does_not_count(base: Any, model: Path) -> None:
    arguments = {"max_num_seqs": 3, "gpu_memory_utilization": 0.5, "served_model_name": "x", "seed": 5}
    assert name(engine_config(model, **arguments)) == name(base)


ARGUMENTS = [
    {"dtype": "float32"},
    {"max_model_len": 100},
    {"hf_overrides": {"rope_theta": 5.0}},
    {
        "hf_overrides": {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "max_position_embeddings": 512,
        }
    },
    {"block_size": 64},
    {"load_format": "safetensors"},
    {"prefix_caching_hash_algo": "sha256_cbor"},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_what_changes_kv_counts(base: Any, model: Path, arguments: dict[str, Any]) -> None:
    assert name(engine_config(model, **arguments)) != name(base)


def test_the_configuration_in_effect_counts(base: Any) -> None:
    words = base.model_config.hf_config.to_dict()
    hf_config = SimpleNamespace(to_dict=lambda: words | {"rope_parameters": {"rope_theta": 5.0}})
    assert name(changed(base, "model_config", "hf_config", hf_config)) != name(base)
    hf_config = SimpleNamespace(to_dict=lambda: words | {"_name_or_path": "/x", "transformers_version": "0"})
    assert name(changed(base, "model_config", "hf_config", hf_config)) == name(base)


@pytest.mark.parametrize(
    "kv",
    [
        kv_cache(num_kv_heads=1),
        kv_cache(head_size=64),
        kv_cache(dtype=torch.bfloat16),
        kv_cache(sliding_window=64),
        SimpleNamespace(**(vars(kv_cache()) | {"kv_cache_layout": "HND"})),
        SimpleNamespace(
            **(vars(kv_cache()) | {"kv_cache_tensors": [SimpleNamespace(shared_by=["l0", "l1"])]})
        ),
        SimpleNamespace(**(vars(kv_cache()) | {"kv_cache_groups": kv_cache().kv_cache_groups * 2})),
    ],
)
def test_the_layout_of_kv_counts(base: Any, kv: Any) -> None:
    assert name(base, kv) != name(base)


def test_the_number_of_blocks_does_not_count(base: Any) -> None:
    kv = SimpleNamespace(**(vars(kv_cache()) | {"num_blocks": 7}))
    assert name(base, kv, replace(GEOMETRY, gpu_blocks=7, rows=3, ranks_on_host=4)) == name(base)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 16},
        {"row_bytes": 8192},
        {"layer_names": ("l1", "l0")},
        {"ranks": 2},
        {"windows": (64,)},
    ],
    ids=str,
)
def test_the_geometry_counts(base: Any, changes: dict[str, Any]) -> None:
    assert name(base, geometry=replace(GEOMETRY, **changes)) != name(base)


def test_the_size_of_chunks_counts(base: Any) -> None:
    assert name(base, chunk_tokens=128) != name(base)


@pytest.mark.parametrize(
    "variable", ["VLLM_KV_CACHE_LAYOUT", "VLLM_ATTENTION_BACKEND", "VLLM_CPU_ATTN_SPLIT_KV"]
)
def test_variables_that_choose_layouts_count(
    base: Any, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = name(base)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert name(base) == before
    monkeypatch.setenv(variable, "x")
    assert name(base) != before


@pytest.mark.parametrize("what", ["device_identity", "software_versions"])
def test_device_and_software_count(base: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = name(base)
    monkeypatch.setattr(vllm_api, what, lambda *_: "another")
    assert name(base) != before


def test_versions_are_those_of_the_distributions() -> None:
    found = vllm_api.software_versions(["torch", "no-such-distribution"])
    assert found["vllm"].partition("+")[0].count(".") == 2
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert not {"no-such-distribution", "lmcache_rs", "lmcache-rs"} & set(found)


# A drafter, adapters.


@dataclass
class Speculative:
    method: str
    draft_model_config: Any
    model: str = "/path"
    num_speculative_tokens: int = 3
    draft_load_config: Any = None


def with_drafter(base: Any, **values: Any) -> Any:
    other = copy.copy(base)
    object.__setattr__(
        other, "speculative_config", Speculative(**({"method": "ngram", "draft_model_config": None} | values))
    )
    return other


def test_a_drafter_counts_with_its_weights(base: Any, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "draft")
    draft = copy.copy(base.model_config)
    object.__setattr__(draft, "model", str(tmp_path / "draft"))
    names = [
        name(base),
        name(with_drafter(base)),
        name(with_drafter(base, num_speculative_tokens=4)),
        name(with_drafter(base, method="eagle", draft_model_config=base.model_config)),
        name(with_drafter(base, method="eagle", draft_model_config=draft)),
    ]
    flip(tmp_path / "draft" / "model.safetensors", -10_000)
    names.append(name(with_drafter(base, method="eagle", draft_model_config=draft)))
    assert all(one not in names[:i] for i, one in enumerate(names))
    assert name(with_drafter(base, model="/other")) == names[1]


def test_adapters_count_only_where_they_are_changed(base: Any) -> None:
    def lora(**values: Any) -> dict[str, str]:
        other = copy.copy(base)
        object.__setattr__(other, "lora_config", SimpleNamespace(**values))
        return name(other)

    assert (
        lora(max_loras=4, lora_dtype=base.model_config.dtype)
        == lora(lora_dtype="auto", target_modules=None)
        == name(base)
    )
    assert lora(lora_dtype=torch.float16) != name(base)
    assert lora(target_modules=["q_proj"]) != name(base)


@pytest.fixture
def other(model: Path, tmp_path: Path) -> Path:
    return copied_elsewhere(model, tmp_path)


def test_a_copy_elsewhere_is_the_same(base: Any, other: Path) -> None:
    assert name(engine_config(other)) == name(base)


# What has no name.


def test_weights_that_cannot_be_named(base: Any, other: Path, tmp_path: Path) -> None:
    for load_format in ("dummy", "tensorizer", "npcache", "modelexpress", "ours"):
        found = unnamed(changed(base, "load_config", "load_format", load_format))
        assert found == Unnamed("weights", f"weights of load_format {load_format} cannot be told from others")
    assert unnamed(changed(base, "model_config", "model_weights", "s3://bucket")).reason == "weights"
    missing = unnamed(changed(base, "model_config", "model", "no/such-repository"))
    assert missing == Unnamed("weights", "the model's files are not found on this machine")
    config = engine_config(other)
    for path in other.glob("*.safetensors"):
        path.unlink()
    assert "no files of weights" in unnamed(config).message


def test_parts_from_other_repositories_have_no_name(base: Any) -> None:
    hf_config = SimpleNamespace(to_dict=lambda: {"text_model_id": "a/b"})
    assert unnamed(changed(base, "model_config", "hf_config", hf_config)).reason == "weights"
    hf_config = SimpleNamespace(to_dict=lambda: {"auto_map": {"AutoModel": "a/b--modeling.X"}})
    config = changed(base, "model_config", "hf_config", hf_config)
    name(config)  # the code is not used
    assert unnamed(changed(config, "model_config", "trust_remote_code", True)).reason == "weights"


@pytest.mark.parametrize("algorithm", ["builtin", "xxhash", "xxhash_cbor"])
def test_keys_that_can_be_forged_have_no_name(base: Any, algorithm: str) -> None:
    found = unnamed(changed(base, "cache_config", "prefix_caching_hash_algo", algorithm))
    assert found == Unnamed(
        "hash_algorithm", f"keys made of {algorithm} hashes are not safe outside of the process"
    )


def test_kv_that_changes_at_run_time_has_no_name(base: Any) -> None:
    assert unnamed(changed(base, "cache_config", "calculate_kv_scales", True)).reason == "kv_scales"
    other = copy.copy(base)
    object.__setattr__(other, "weight_transfer_config", object())
    assert unnamed(other).reason == "weight_transfer"
    assert unnamed(changed(base, "model_config", "enable_sleep_mode", True)).reason == "sleep_mode"


def test_values_that_only_have_an_address_have_no_name(base: Any) -> None:
    assert unnamed(changed(base, "attention_config", "backend", object())).reason == "configuration"


def test_a_repository_in_the_cache_is_found(base: Any, model: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--org--model"
    shutil.copytree(model, home / "snapshots" / ("a" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    config = changed(base, "model_config", "model", "org/model")
    config = changed(config, "load_config", "download_dir", str(tmp_path))
    assert name(config) == name(base)
    assert unnamed(changed(config, "model_config", "revision", "other")).reason == "weights"
