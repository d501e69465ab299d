"""Writes a tiny model of random weights whose KV is of another kind: python other_models.py NAME FOLDER.

As in scripts/tiny_model.py the weights have the scale of real ones, so that the output depends on the KV.
"""

import sys
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
WINDOW = 100
"""Of the attention that has one, in tokens: not a multiple of a block."""
MODELS: dict[str, dict[str, Any]] = {
    # One cache group, whose blocks vLLM drops when they leave the window.
    "sliding": {"model_type": "mistral", "num_hidden_layers": 4, "sliding_window": WINDOW},
    # Three cache groups of two layers: two with a window, one without.
    "hybrid": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "sliding_window": WINDOW,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
        "query_pre_attn_scalar": 16,
    },
    # Groups of different size: three layers with a window, two without.
    "uneven": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 5,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        "query_pre_attn_scalar": 16,
    },
    # Multi-head latent attention: one latent vector a token instead of keys and values.
    "mla": {
        "model_type": "deepseek_v2",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
}

CONFIG_ONLY: dict[str, dict[str, Any]] = {
    # Two layers with recurrent state, two with attention. Runs with vLLM's dummy weights.
    "recurrent": {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "dtype": "bfloat16",
    },
}

IMAGES = "images"
"""BLIP-2: an image becomes IMAGE_TOKENS tokens before the text. Comes with a tokenizer and an image processor."""
IMAGE_TOKENS = 16
IMAGE_SIZE = 56


def images_model() -> Any:
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {key: COMMON[key] for key in ("vocab_size", "hidden_size", "num_attention_heads")}
    text |= {"model_type": "opt", "num_hidden_layers": 4, "ffn_dim": 512, "word_embed_proj_dim": 256}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    config = Blip2Config(
        text_config=text | {"activation_function": "gelu", "max_position_embeddings": 2048},
        vision_config=tower | {"image_size": IMAGE_SIZE, "patch_size": 14},
        qformer_config=tower | {"vocab_size": 100, "encoder_hidden_size": 64},
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=COMMON["vocab_size"] - 1,
        tie_word_embeddings=False,
    )
    return Blip2ForConditionalGeneration(config)


def save_images_processor(folder: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Blip2Processor, BlipImageProcessor, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(COMMON["vocab_size"] - 1)} | {"<image>": COMMON["vocab_size"] - 1}
    splitting = Tokenizer(models.WordLevel(words, unk_token="w0"))
    splitting.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "w1", "eos_token": "w2", "pad_token": "w0", "unk_token": "w0"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=splitting, additional_special_tokens=["<image>"], **special
    )
    image_processor = BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    Blip2Processor(image_processor, tokenizer, num_query_tokens=IMAGE_TOKENS).save_pretrained(folder)


def main() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name, folder = sys.argv[1:]
    torch.manual_seed(0)
    if name == IMAGES:
        save(images_model(), folder)
        save_images_processor(folder)
        return
    config = AutoConfig.for_model(**(COMMON | (MODELS | CONFIG_ONLY)[name]))
    if name in CONFIG_ONLY:
        config.save_pretrained(folder)
        return
    save(AutoModelForCausalLM.from_config(config, dtype=torch.float32), folder)


def save(model: Any, folder: str) -> None:
    import torch

    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            # Queries and keys get twice the usual scale: attention then looks at few tokens, not at an average.
            gain = 2.0 if "q_proj" in parameter or "k_proj" in parameter else 1.0
            if weight.dim() == 2:
                weight.normal_(0, 1.0 if "embed" in parameter else gain * weight.shape[1] ** -0.5)
            elif parameter == "query_tokens":
                weight.normal_()
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
