"""The scripts that set things up: what they skip, how they fail, and that the tiny model is fit for its purpose."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import demo
import progress
import setup_env
from support import ROOT, RunScript


def test_a_command_that_fails_is_tried_again_then_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "RETRY_PAUSE_S", 0)
    log = tmp_path / "log"
    code = "print('the reason'); raise SystemExit(3)"
    with pytest.raises(progress.CommandError) as caught:
        progress.run("doing it", (sys.executable, "-c", code), log, attempts=2)
    message = str(caught.value)
    assert message.startswith("doing it\n")
    assert all(part in message for part in (sys.executable, "exit status: 3", "    the reason", str(log)))
    assert log.read_text().count("\nthe reason\n") == 2
    assert "trying again (2 of 2)" in capsys.readouterr().out


def test_progress_is_shown_while_a_command_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import time; print('step 1', flush=True); time.sleep(0.7)"
    progress.run("waiting", (sys.executable, "-c", code), tmp_path / "log", every_s=0.3)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "- waiting"
    assert shown[-1].endswith(" s  step 1")


def test_a_step_is_done_once_for_each_key(tmp_path: Path) -> None:
    env = setup_env.Environment(tmp_path)
    done = []
    assert env.step("wheel", "a", lambda: done.append("a"))
    assert not env.step("wheel", "a", lambda: done.append("again"))
    assert env.step("wheel", "b", lambda: done.append("b"))
    assert done == ["a", "b"]

    def fails() -> None:
        raise progress.CommandError("no")

    with pytest.raises(progress.CommandError):
        env.step("wheel", "c", fails)
    assert env.done() == {"wheel": "b"}


def test_the_digest_sees_names_and_contents_of_sources_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    source = tmp_path / "python" / "a.py"
    source.parent.mkdir()
    source.write_text("1")
    seen = {setup_env.digest([tmp_path / "python"])}
    source.write_text("2")
    seen.add(setup_env.digest([tmp_path / "python"]))
    source.rename(source.with_name("b.py"))
    after = setup_env.digest([tmp_path / "python"])
    seen.add(after)
    assert len(seen) == 3
    made = tmp_path / "python" / "__pycache__"
    made.mkdir()
    (made / "b.pyc").write_text("x")
    (tmp_path / "python" / "_core.so").write_text("x")
    assert setup_env.digest([tmp_path / "python"]) == after


def test_another_folder_is_never_cleared(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(progress.CommandError, match="no virtual environment"):
        setup_env.make_venv(setup_env.Environment(tmp_path))
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(("cores", "text"), [({0}, "0"), ({0, 1}, "0-1"), ({0, 1, 2, 5, 7, 8}, "0-2,5,7-8")])
def test_cores_are_named_as_vllm_wants_them(
    cores: set[int], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.os, "sched_getaffinity", lambda _: cores)
    assert demo.cpu_list() == text


def test_no_file_names_a_machine_or_a_registry() -> None:
    for folder in ("scripts", "examples", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                text = path.read_text()
                assert not any(word in text for word in ("/root/", "/home/", "pypi.org", "crates.io")), path


@pytest.mark.vllm
def test_the_output_of_the_tiny_model_depends_on_early_tokens(
    run_script: RunScript, tiny_model: Path
) -> None:
    code = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=1024,
          kv_cache_memory_bytes=16 << 20, enable_prefix_caching=False)
prompts = [[i] + [(7 * j * j) % 4000 + 3 for j in range(400)] for i in range(3, 11)]
sampling = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
print(json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""
    output = run_script(code, tiny_model, in_process=True).stdout
    words = json.loads(next(line for line in output.splitlines() if line.startswith("[[")))
    # Prompts that differ in their first token only, whose KV a cache would bring: most must differ in what follows.
    assert len({tuple(answer) for answer in words}) >= 6
