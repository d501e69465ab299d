"""Writes a LoRA adapter of random weights for the tiny model, large enough to change its output.

python adapters.py FOLDER SEED
"""

import json
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

import tiny_model

RANK = 8
MODULES = {"q_proj": tiny_model.HEADS, "v_proj": tiny_model.KV_HEADS}


def main() -> None:
    folder, seed = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True)
    source = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    weights = {}
    for layer in range(tiny_model.CONFIG["num_hidden_layers"]):
        for module, heads in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            hidden, out = tiny_model.HIDDEN, heads * tiny_model.HEAD_DIM
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, hidden, generator=source) * hidden**-0.5
            weights[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=source)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(MODULES)}
    config |= {"task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
