"""What tests share: two small models, a way to run scripts in processes of their own, and the rules of the markers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import prepare_model
import tiny_model as tiny_model_script
from progress import CommandError
from support import RunScript, lack, require_markers


def pytest_runtest_setup(item: pytest.Item) -> None:
    """See `require_markers`."""
    require_markers(item)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A Llama of 4 layers with random weights whose output depends on the KV; float32, without a tokenizer.

    Its name holds a hash of what makes it, so that a change of the script makes a new one.
    """
    version = hash_of(Path(tiny_model_script.__file__))
    return tiny_model_script.make_tiny_model(prepare_model.MODELS / f"tiny-{version}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, with its tokenizer."""
    try:
        prepare_model.prepare()
    except CommandError as error:
        lack(f"SmolLM2 could not be downloaded: {error}")
    return prepare_model.SMOLLM2


def hash_of(path: Path) -> str:
    """A short name for a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """A RunScript that keeps its files in the test's own folder."""
    return RunScript(tmp_path)
