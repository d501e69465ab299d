"""Requests that must not share KV: by vLLM's own hashes, and in the real engine, also where a prompt is one tail."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import ROOT, RunScript
from vllm_scenarios import Run, Steps, connector, generate

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

KEYS = Path(__file__).with_name("identity_keys.py")


@pytest.mark.parametrize("tokens", [7, 40])
def test_each_field_of_the_identity_changes_every_key(tokens: int, run_script: RunScript) -> None:
    """7 tokens are less than a block: one tail, which has no parent that could tell the fields.

    The script fails if Rust hashes a block in another way than vLLM.
    """
    (line,) = [x for x in run_script(KEYS, tokens).stdout.splitlines() if x.startswith("KEYS ")]
    found, again = json.loads(line.removeprefix("KEYS "))
    assert found == again
    assert {len(keys) for keys in found.values()} == {tokens // 16 + 1}
    # The last token is in the last key only, as it should be.
    same_start = found.pop("another last token")
    assert same_start[:-1] == found["plain"][:-1]
    assert same_start[-1] != found["plain"][-1]
    every = [key for keys in found.values() for key in keys]
    assert len(set(every)) == len(every)


SHORT, LONG = [[1, 20]], [[2, 200]]
SHORT_BESIDE_IMAGE = [[1, 10]]


def test_identities_in_the_real_engine(
    run_scenario: Callable[..., Run], run_script: RunScript, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("adapters.py")
    for name in ("a", "b"):
        run_script(script, tmp_path / name, name, env={"PYTHONPATH": str(ROOT / "scripts")})
    adapter = {name: ["adapter", number, str(tmp_path / name)] for number, name in ((1, "a"), (2, "b"))}
    identities: list[dict[str, Any]] = [
        {},
        {"salt": "adapter"},
        {"adapter": adapter["a"]},
        {"adapter": adapter["b"]},
        {"params": {"lmcache.tag.x": "1"}},
    ]
    steps: Steps = [generate(SHORT, LONG, **identity) for identity in identities * 2]
    steps += [("embed", {"seed": seed, "count": count}) for seed in (1, 2, 1, 2) for count in (20, 200)]
    llm = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "enable_prompt_embeds": True}
    run = run_scenario(steps, connector=connector(), llm=llm)
    count = len(identities)
    tokens = run.tokens()
    for i in range(count):
        assert run.cached(i) == [0, 0], identities[i]
        assert run.cached(count + i) == [19, 199], identities[i]
        assert tokens[i] == tokens[count + i], identities[i]
    plain, salted, one, other, tagged = tokens[:count]
    assert plain == salted == tagged
    assert len({str(t) for t in (plain, one, other)}) == 3, "the adapters change the tokens"
    embedded = [run.cached(2 * count + i) for i in range(8)]
    assert embedded == [[0]] * 4 + [[19], [199]] * 2
    assert tokens[2 * count : 2 * count + 4] == tokens[2 * count + 4 :]


def test_images_in_the_real_engine(
    run_scenario: Callable[..., Run], other_model: Callable[[str], Path]
) -> None:
    """An image is 16 tokens, the same ones for all images: only vLLM's extra keys tell what was seen.

    With the short text all is one tail.
    """
    first, second = (
        [("see", {"image": image, "prompt": text}) for text in (SHORT_BESIDE_IMAGE, LONG)] for image in (1, 2)
    )
    model, llm = other_model("images"), {"skip_tokenizer_init": False, "max_model_len": 2048}
    expected = run_scenario([*first, *second], model=model, llm=llm).tokens()
    assert len({str(tokens) for tokens in expected}) == 4, "the images change the tokens"
    steps: Steps = [*first, *second, *first, *second, ("swap_prompts", {}), *first]
    run = run_scenario(steps, connector=connector(), model=model, llm=llm)
    *right, swapped_short, swapped_long = run.tokens()
    assert right == expected * 2
    assert [run.cached(i) for i in range(8)] == [[0]] * 4 + [[16 + 10], [16 + 200]] * 2
    assert [swapped_short, swapped_long] == expected[2:], "the control: the other image's KV gives its tokens"
