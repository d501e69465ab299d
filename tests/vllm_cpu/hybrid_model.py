"""Writes a tiny Gemma 3 of random weights: sliding-window and full attention, so three KV cache groups.

python hybrid_model.py FOLDER
"""

import sys
from typing import Any

CONFIG: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "sliding_window": 64,
    "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
    "query_pre_attn_scalar": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**CONFIG), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, 1.0 if "embed" in name else weight.shape[1] ** -0.5)
    model.save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
