"""A model that only the tests of the CPU build need."""

from pathlib import Path

import pytest

from support import RunScript


@pytest.fixture
def hybrid_model(tmp_path: Path, run_script: RunScript) -> Path:
    """A model with several KV cache groups."""
    run_script(Path(__file__).with_name("hybrid_model.py"), tmp_path / "hybrid")
    return tmp_path / "hybrid"
