"""Models that only the tests of the CPU build need."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import prepare_model
from support import RunScript, hash_of

OTHER_MODELS = Path(__file__).with_name("other_models.py")


@pytest.fixture
def other_model(run_script: RunScript) -> Callable[[str], Path]:
    """`other_model(name)`: one of other_models.py, made once for each version of that script."""

    def make(name: str) -> Path:
        path = prepare_model.MODELS / f"{name}-{hash_of(OTHER_MODELS)}"
        if not path.exists():
            prepare_model.MODELS.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=prepare_model.MODELS, prefix="unfinished-") as folder:
                run_script(OTHER_MODELS, name, Path(folder) / "model")
                (Path(folder) / "model").rename(path)
        return path

    return make
