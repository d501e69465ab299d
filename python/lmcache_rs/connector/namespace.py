"""Everything that changes the bytes of stored KV, as properties: two engines share KV outside of RAM if all are equal.

What may or may not change them goes in: too many properties cost misses, one too few wrong answers. So a part of
vLLM's configuration is taken whole, without the fields that are named here, and what newer versions add is in it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_rs.connector import vllm_api as api
from lmcache_rs.connector.canonical import UnsayableError, plain, text
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.weights import UnreadableError, digest

CRYPTOGRAPHIC_HASHES = ("sha256", "sha256_cbor")
"""Of vLLM's block hashes, those of which nobody can make two equal ones."""

LOAD_FORMATS = (
    *(
        "auto",
        "hf",
        "safetensors",
        "fastsafetensors",
        "instanttensor",
        "mistral",
        "pt",
        "bitsandbytes",
        "gguf",
    ),
    *("sharded_state", "runai_streamer"),
)
"""Ways of loading that read the files of the model's folder, and no copies of them elsewhere."""

ENVIRONMENT = ("LAYOUT", "ATTENTION", "ATTN", "MLA", "FLASHINFER", "KV_CACHE", "FP8", "QUANT", "AITER")
"""vLLM's variables with one of these in their names choose layouts and kernels."""

PACKAGES = ("torch", "transformers", "flashinfer-python", "flash-attn", "aiter")
"""vLLM chooses attention and its layout by what is installed, and reads models' configurations with transformers."""

# Paths and names (the files are looked into instead), what comes after KV, and what is only there to be quick.
_NOT_OF_MODEL = {
    *(
        "model",
        "model_weights",
        "hf_config",
        "tokenizer",
        "tokenizer_mode",
        "tokenizer_revision",
        "revision",
        "hf_config_path",
    ),
    *(
        "hf_token",
        "served_model_name",
        "seed",
        "allowed_local_media_path",
        "allowed_media_domains",
    ),
    *(
        "enforce_eager",
        "return_sampling_mask",
        "max_logprobs",
        "logprobs_mode",
        "use_fp64_gumbel",
        "pooler_config",
    ),
    *(
        "enable_trace_replay",
        "disable_cascade_attn",
        "skip_tokenizer_init",
        "generation_config",
        "logits_processors",
    ),
    *(
        "override_generation_config",
        "renderer_num_workers",
        "io_processor_plugin",
        "enable_nccl_comm_suspend",
    ),
    *(
        "sleep_mode_backend",
        "sleep_mode_offload_cudagraph",
        "sleep_preserve_parameter_names",
    ),
    *(
        "enable_cumem_allocator",
        "enable_prompt_embeds",
        "spec_target_max_model_len",
        "enable_return_routed_experts",
    ),
}
_NOT_OF_CACHE = {
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "enable_prefix_caching"),
    *(
        "prefix_cache_retention_interval",
        "prefix_match_unit",
        "user_specified_block_size",
        "_block_size_resolved",
    ),
    *("num_gpu_blocks", "num_cpu_blocks", "kv_cache_size_tokens", "kv_cache_max_concurrency", "swap_space"),
    *("cpu_offload_gb", "cpu_kvcache_space_bytes", "kv_offloading_size", "kv_offloading_backend"),
    *("cache_hit_alignment_tokens", "hash_block_size", "effective_attention_block_size"),
}
_OF_PARALLEL = (
    *("tensor_parallel_size", "pipeline_parallel_size", "world_size", "prefill_context_parallel_size"),
    *("decode_context_parallel_size", "dcp_kv_cache_interleave_size", "cp_kv_cache_interleave_size"),
    *("enable_expert_parallel", "enable_hc_sp"),
)
_NOT_OF_DRAFTER = {
    "target_model_config",
    "target_parallel_config",
    "draft_model_config",
    "draft_parallel_config",
}
_NOT_OF_DRAFTER |= {"model", "revision", "draft_load_config"}


@dataclass(frozen=True, slots=True)
class Unnamed:
    """Why KV of this engine may not leave its process; `reason` is the metric's label."""

    reason: str
    message: str


class _UnnamedError(Exception):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.unnamed = Unnamed(reason, message)


def namespace_properties(
    vllm_config: Any, kv_cache_config: Any, geometry: Geometry, chunk_tokens: int
) -> list[tuple[str, str]] | Unnamed:
    """Names and values of everything that changes the bytes of KV, the same in every process that computes the same.

    Reads pieces of the model's files: seconds for large ones. The part that a rank has is not in it.
    """
    try:
        cache, load = vllm_config.cache_config, vllm_config.load_config
        _check(vllm_config)
        found = {
            "software": text(api.software_versions(PACKAGES)),
            "environment": text(
                {
                    k: v
                    for k, v in os.environ.items()
                    if k.startswith("VLLM_") and any(word in k for word in ENVIRONMENT)
                }
            ),
            "device": api.device_identity(),
            "cache": text(plain(cache, _NOT_OF_CACHE)),
            "parallel": text(
                {name: plain(getattr(vllm_config.parallel_config, name, None)) for name in _OF_PARALLEL}
            ),
            "load": text(
                {
                    name: plain(getattr(load, name, None))
                    for name in ("load_format", "quantization", "model_loader_extra_config")
                }
            ),
            "kv cache": text(_kv_cache(kv_cache_config)),
            "geometry": text(
                [geometry.block_size, geometry.row_bytes, geometry.ranks, geometry.windows, chunk_tokens]
            ),
            "layers": text(geometry.layer_names),
            **_parts(vllm_config),
            **_model("model", vllm_config.model_config, load),
            **_drafter(vllm_config),
        }
    except _UnnamedError as error:
        return error.unnamed
    except UnsayableError as error:
        return Unnamed("configuration", f"vLLM's configuration cannot be told from others: {error}")
    return sorted(found.items())


def _check(vllm_config: Any) -> None:
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if algorithm not in CRYPTOGRAPHIC_HASHES:
        raise _UnnamedError(
            "hash_algorithm", f"keys made of {algorithm} hashes are not safe outside of the process"
        )
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise _UnnamedError("kv_scales", "KV is scaled by what this engine saw first (calculate_kv_scales)")
    media = getattr(vllm_config.model_config, "multimodal_config", None)
    hashed = getattr(media, "mm_processor_cache_gb", 1) or vllm_config.cache_config.enable_prefix_caching
    if media is not None and not hashed:
        raise _UnnamedError(
            "media_hash", "vLLM counts images and sounds instead of hashing them: set --mm-processor-cache-gb"
        )
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        raise _UnnamedError("weight_transfer", "the model's weights are replaced while it runs")
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        raise _UnnamedError(
            "sleep_mode", "the model's weights may be replaced while it sleeps (enable_sleep_mode)"
        )


def _parts(vllm_config: Any) -> dict[str, str]:
    """Parts of the configuration that are taken whole."""
    names = ("attention_config", "additional_config", "engram_config", "diffusion_config")
    found = {name: text(plain(getattr(vllm_config, name, None))) for name in names}
    # An adapter itself is in its requests' keys; these change what it does.
    lora = getattr(vllm_config, "lora_config", None)
    dtype, modules = getattr(lora, "lora_dtype", None), getattr(lora, "target_modules", None)
    if dtype not in (None, "auto", vllm_config.model_config.dtype) or modules:
        found["lora"] = text([plain(dtype), plain(modules)])
    return found


def _kv_cache(kv_cache_config: Any) -> dict[str, Any]:
    """Which layers are in which group, of what kind, and in which order they lie."""
    tensors = kv_cache_config.kv_cache_tensors
    return {
        "groups": [plain(group) for group in kv_cache_config.kv_cache_groups],
        "tensors": [
            plain(getattr(one, "layers", None) or getattr(one, "shared_by", None)) for one in tensors
        ],
        "layout": plain(getattr(kv_cache_config, "kv_cache_layout", None)),
    }


def _model(role: str, model: Any, load: Any) -> dict[str, str]:
    hf_config = model.hf_config.to_dict()
    return {
        f"{role} configuration": text(plain(model, _NOT_OF_MODEL)),
        f"{role} hf_config": text(plain(hf_config)),
        f"{role} files": _files(model, load, hf_config),
    }


def _drafter(vllm_config: Any) -> dict[str, str]:
    """A speculative model's own layers are in the KV too."""
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is None:
        return {}
    found = {"speculative": text(plain(speculative, _NOT_OF_DRAFTER))}
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None and draft.model != vllm_config.model_config.model:
        found |= _model(
            "drafter", draft, getattr(speculative, "draft_load_config", None) or vllm_config.load_config
        )
    return found


def _files(model: Any, load: Any, hf_config: Mapping[str, Any]) -> str:
    load_format = str(getattr(load.load_format, "value", load.load_format))
    if load_format not in LOAD_FORMATS:
        raise _UnnamedError("weights", f"weights of load_format {load_format} cannot be told from others")
    if getattr(model, "model_weights", ""):
        raise _UnnamedError("weights", "weights in an object storage cannot be told from others")
    elsewhere = sorted(name for name in hf_config if name.endswith("_model_id") and hf_config[name])
    code = [str(name) for name in (hf_config.get("auto_map") or {}).values()]
    if elsewhere or (model.trust_remote_code and any("--" in name for name in code)):
        raise _UnnamedError("weights", "a part of the model, or its code, is taken from another repository")
    place = _place(str(model.model), getattr(model, "revision", None), getattr(load, "download_dir", None))
    if place is None:
        raise _UnnamedError("weights", "the model's files are not found on this machine")
    try:
        return digest(place)
    except UnreadableError as error:
        raise _UnnamedError("weights", f"the model's files cannot be told from others: {error}") from None


def _place(name: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Where the model's files are: a folder or file, or in Hugging Face's cache. Nothing is downloaded."""
    if Path(name).exists():
        return Path(name)
    if os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return None
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, cache_dir=download_dir, local_files_only=True))
    except Exception:  # not there, no name of a repository, an older or newer library, ...
        return None
