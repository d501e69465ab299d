"""`import lmcache` gives lmcache_rs where no LMCache is installed, and the real one wherever it is."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import lmcache_rs

COMPAT = Path(__file__).parents[2] / "compat"
QUICKSTART = """
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.integration.vllm.utils import ENGINE_NAME
LMCacheEngineBuilder.destroy(ENGINE_NAME)
LMCacheEngineBuilder.destroy(ENGINE_NAME)
print(ENGINE_NAME, LMCacheEngineBuilder.__module__)
"""
WHOSE = "import lmcache; print(getattr(lmcache, 'WHO', 'lmcache_rs'))"


class Environment:
    """A fresh virtual environment that also sees the packages of this one."""

    def __init__(self, folder: Path, *, lmcache_rs_too: bool = True):
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = str(folder / "bin" / "python")
        (self.site,) = folder.glob("lib/python3*/site-packages")
        if lmcache_rs_too:
            paths = [Path(lmcache_rs.__file__).parents[1], sysconfig.get_path("purelib")]
            (self.site / "seen.pth").write_text("".join(f"{path}\n" for path in paths))

    def run(self, code: str, *options: str) -> str:
        done = self.try_run(code, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def try_run(self, code: str, *options: str) -> subprocess.CompletedProcess[str]:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("LMCACHE", "PYTHON"))
        }
        return subprocess.run(
            [self.python, *options, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env=clean,
            cwd=self.site.parent,
        )

    def pip(self, *arguments: str) -> None:
        options = ["--python", self.python, "--disable-pip-version-check", "--quiet", "--no-input"]
        subprocess.run([sys.executable, "-m", "pip", *options, *arguments], check=True)

    def install(self, wheel: Path) -> None:
        self.pip("install", "--no-index", "--no-deps", "--force-reinstall", str(wheel))


def write_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    info = f"{name}-0.5.6.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.5.6\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    wheel = folder / f"{name}-0.5.6-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in [*files.items(), (f"{info}/RECORD", record)]:
            archive.writestr(path, text)
    return wheel


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> Path:
    """The wheel, built as pip builds it, without an index."""
    folder = tmp_path_factory.mktemp("wheel")
    options = [
        "--no-index",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        "--wheel-dir",
        str(folder),
    ]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(COMPAT)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> Path:
    """Something that is packaged as the real LMCache is."""
    files = {
        "lmcache/__init__.py": "WHO = 'the real one'\n",
        "lmcache/v1/__init__.py": "",
        "lmcache/v1/cache_engine.py": "WHO = 'the real one'\n",
    }
    return write_wheel(tmp_path_factory.mktemp("real"), "lmcache", files)


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "venv")


@pytest.fixture(scope="module")
def shimmed(tmp_path_factory, shim) -> Environment:
    """An environment with the shim alone, which no test changes."""
    made = Environment(tmp_path_factory.mktemp("shimmed") / "venv")
    made.install(shim)
    return made


def test_wheel_holds_nothing_called_lmcache(shim):
    with zipfile.ZipFile(shim) as archive:
        names = archive.namelist()
        (record,) = (name for name in names if name.endswith("/RECORD"))
        recorded = [line.split(",")[0] for line in archive.read(record).decode().splitlines()]
    assert sorted(names) == sorted(recorded)
    assert {name.split("/")[0] for name in names} == {
        "lmcache_rs_compat.py",
        "lmcache_rs_compat.pth",
        f"lmcache_rs_compat-{lmcache_rs.__version__}.dist-info",
    }


def test_version_is_that_of_lmcache_rs():
    project = tomllib.loads((COMPAT / "pyproject.toml").read_text())["project"]
    assert project["version"] == lmcache_rs.__version__


def test_builds_are_reproducible_and_the_sdist_builds_too(shim, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(COMPAT)
    backend = importlib.import_module("build_backend")
    monkeypatch.delitem(sys.modules, "build_backend")
    wheel = tmp_path / backend.build_wheel(str(tmp_path))
    assert wheel.read_bytes() == shim.read_bytes()
    sdist = tmp_path / backend.build_sdist(str(tmp_path))
    options = ["--no-index", "--no-deps", "--quiet", "--disable-pip-version-check"]
    out = tmp_path / "out"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(sdist)], check=True
    )
    assert [path.read_bytes() for path in out.iterdir()] == [shim.read_bytes()]


def test_quickstart_script(shimmed):
    done = shimmed.try_run(QUICKSTART)
    assert (done.returncode, done.stdout.strip()) == (0, "vllm-instance lmcache_rs.builder")
    assert done.stderr.count("No engine named vllm-instance lives in this process") == 2
    assert done.stderr.count("\n") == 2


def test_quickstart_script_beside_a_folder_called_lmcache(environment, shim):
    environment.install(shim)
    (environment.site.parent / "lmcache" / "v1").mkdir(parents=True)
    assert environment.run("import lmcache; print(lmcache.__file__)") == "None"
    assert environment.run(QUICKSTART) == "vllm-instance lmcache_rs.builder"


def test_every_name_forwards(shimmed):
    shimmed.run("""
import lmcache, lmcache.v1, lmcache.v1.cache_engine as engine, lmcache.v1.config as config, lmcache_rs
import lmcache.integration.vllm.utils as utils
import lmcache_rs.v1.cache_engine as ours, importlib.util
assert engine.LMCacheEngineBuilder is ours.LMCacheEngineBuilder and lmcache.v1.cache_engine is engine
assert config.LMCacheEngineConfig.from_defaults(chunk_size=7).chunk_size == 7
assert lmcache.__version__ == lmcache_rs.__version__ and lmcache.__lmcache_rs__ is True
assert "LMCacheEngineBuilder" in dir(engine) and engine.__name__ == "lmcache.v1.cache_engine"
assert ours.__spec__.name == ours.__name__ == "lmcache_rs.v1.cache_engine"
from lmcache.integration.vllm.utils import *
assert ENGINE_NAME == utils.ENGINE_NAME
try: engine.nope
except AttributeError as error: assert "has no attribute 'nope'" in str(error)
else: raise SystemExit("nope was found")
try: from lmcache.v1 import nope
except ImportError as error: assert "nope" in str(error)
else: raise SystemExit("nope was imported")
""")


@pytest.mark.parametrize("name", ["lmcache.v1.storage_backend", "lmcache.utils", "lmcache.v1.cache_engine.x"])
def test_what_is_not_provided_says_what_is(shimmed, name):
    error = shimmed.try_run(f"import {name}").stderr.splitlines()[-1]
    assert error.startswith(f"ModuleNotFoundError: No module named '{name}'")
    if not name.endswith(".x"):  # below a module that is no package Python asks nobody
        assert (
            "provides only lmcache.v1.cache_engine, lmcache.v1.config, lmcache.integration.vllm.utils"
            in error
        )


def test_the_start_of_python_stays_cheap(shimmed, tmp_path):
    code = "import sys; print(sorted(m for m in sys.modules))"
    bare = Environment(tmp_path / "venv")
    loaded = set(eval(shimmed.run(code))) - set(eval(bare.run(code)))
    assert loaded == {"lmcache_rs_compat"}


def test_finder_is_installed_once_and_last(shimmed):
    shimmed.run("""
import sys, lmcache_rs_compat
before = list(sys.meta_path)
lmcache_rs_compat.install()
assert sys.meta_path == before and type(before[-1]).__module__ == "lmcache_rs_compat"
""")


def test_is_shim(shimmed, real, tmp_path):
    shimmed.run("""
import importlib.util, sys
from lmcache_rs_compat import is_shim
assert is_shim("lmcache") and is_shim(importlib.util.find_spec("lmcache")) and "lmcache" not in sys.modules
import lmcache, lmcache.v1.cache_engine, json
assert is_shim(lmcache) and is_shim("lmcache") and is_shim(lmcache.v1.cache_engine)
assert not any(map(is_shim, (json, "json", json.__spec__, None, "no_such", "lmcache.no", "", "__main__")))
""")


def test_without_lmcache_rs_there_is_no_lmcache_and_no_noise(shim, tmp_path):
    bare = Environment(tmp_path / "venv", lmcache_rs_too=False)
    bare.install(shim)
    assert bare.try_run("print(1)").stderr == ""
    assert bare.run("import importlib.util; print(importlib.util.find_spec('lmcache'))") == "None"
    assert (
        bare.try_run("import lmcache").stderr.splitlines()[-1]
        == "ModuleNotFoundError: No module named 'lmcache'"
    )


@pytest.mark.parametrize("first", ["shim", "real"])
def test_the_real_one_wins_and_each_leaves_the_other_whole(environment, shim, real, first):
    for wheel in (shim, real) if first == "shim" else (real, shim):
        environment.install(wheel)
    assert environment.run(WHOSE) == "the real one"
    assert environment.run("from lmcache.v1.cache_engine import WHO; print(WHO)") == "the real one"
    missing = environment.try_run("import lmcache.v1.config").stderr.splitlines()[-1]
    assert missing == "ModuleNotFoundError: No module named 'lmcache.v1.config'"
    assert environment.run(
        "import lmcache_rs_compat as c, lmcache; print(c.is_shim(lmcache), c.is_shim('lmcache'))"
    ) == ("False False")
    environment.pip("uninstall", "--yes", "lmcache-rs-compat" if first == "shim" else "lmcache")
    if first == "shim":
        assert environment.run(WHOSE) == "the real one"
        assert not list(environment.site.glob("lmcache_rs*"))
    else:
        assert environment.run(WHOSE) == "lmcache_rs"
        assert not (environment.site / "lmcache").exists()


def test_a_real_one_whose_finder_comes_later_wins(shimmed):
    # As an editable installation's may, in a .pth that is read after ours.
    shimmed.run("""
import sys
from importlib.machinery import ModuleSpec
class Later:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return ModuleSpec("lmcache", None, origin="real", is_package=True) if name == "lmcache" else None
sys.meta_path.append(Later)
import lmcache
assert lmcache.__spec__.origin == "real"
""")


def test_a_folder_on_the_path_wins(shimmed, tmp_path):
    (tmp_path / "lmcache").mkdir()
    (tmp_path / "lmcache" / "__init__.py").write_text("WHO = 'a checkout'\n")
    assert shimmed.run(f"import sys; sys.path.append({str(tmp_path)!r}); {WHOSE}") == "a checkout"
