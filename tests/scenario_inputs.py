"""What the requests of a scenario are made of, and steps that give the model more than tokens."""

import random
from typing import Any

VOCABULARY = 4096


def tokens_of(pieces: list[list[int]]) -> list[int]:
    tokens: list[int] = []
    for seed, count in pieces:
        source = random.Random(seed)
        tokens += [source.randrange(3, VOCABULARY) for _ in range(count)]
    return tokens


def told(outputs: list[Any]) -> dict[str, Any]:
    return {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "cached": [cached(o) for o in outputs],
    }


def cached(output: Any) -> int:
    """Tokens that were not computed. vLLM counts the last one too where a load beside its steps brought its block."""
    prompt = output.prompt_token_ids
    return min(output.num_cached_tokens, len(prompt) - 1) if prompt else output.num_cached_tokens


class Inputs:
    """Random embeddings and images."""

    llm: Any
    sampling: Any

    def embed(self, seed: int, count: int) -> dict[str, Any]:
        """Generate from random prompt embeddings of the model's size."""
        import torch

        size = self.llm.llm_engine.model_config.get_hidden_size()
        embeds = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
        return told(self.llm.generate({"prompt_embeds": embeds}, self.sampling(8), use_tqdm=False))

    def see(self, image: int, prompt: list[list[int]]) -> dict[str, Any]:
        """Generate from a random image of this seed and a text."""
        import numpy
        from PIL import Image

        pixels = numpy.random.default_rng(image).integers(0, 256, (56, 56, 3), dtype=numpy.uint8)
        request = {
            "prompt_token_ids": [1, *tokens_of(prompt)],
            "multi_modal_data": {"image": Image.fromarray(pixels)},
        }
        return told(self.llm.generate(request, self.sampling(8), use_tqdm=False))
