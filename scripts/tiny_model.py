"""Makes a tiny Llama of random weights, for tests that must notice wrong KV.

vLLM's own dummy weights are so small that the output does not depend on the KV at all: a cache could return anything.
These have the scale of real ones, so a single swapped block changes the words.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 64
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape (out, in) of every weight."""
    vocab, inner = CONFIG["vocab_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for layer in range(CONFIG["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
                "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
                "post_attention_layernorm": (HIDDEN,),
                "mlp.gate_proj": (inner, HIDDEN),
                "mlp.up_proj": (inner, HIDDEN),
                "mlp.down_proj": (HIDDEN, inner),
            }.items()
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocab, HIDDEN)}


def make_tiny_model(path: Path, seed: int = 0) -> Path:
    """Make the model in folder `path` unless it is there, and return the folder. It has no tokenizer."""
    if path.exists():
        return path
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes().items():
        if len(shape) == 1:
            weights[name] = np.ones(shape, dtype=np.float32)
            continue
        # Queries and keys get twice the usual scale: attention then looks at few tokens, not at an average.
        gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
        scale = 1.0 if "embed" in name else gain / shape[1] ** 0.5
        weights[name] = random.standard_normal(shape, dtype=np.float32) * np.float32(scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="unfinished-") as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        (made / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
        try:
            made.rename(path)
        except OSError:  # another process was quicker
            if not path.exists():
                raise
    return path


def main() -> None:
    """Make the model in the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(make_tiny_model(parser.parse_args().folder))


if __name__ == "__main__":
    main()
