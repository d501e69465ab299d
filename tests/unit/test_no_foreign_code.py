"""A gate over our own sources: nothing that could run what somebody else wrote, no pickle, no unchecked YAML."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

MODULES = {
    *("cloudpickle", "code", "codeop", "copyreg", "dill", "joblib", "marshal", "pickle", "shelve", "shutil"),
    *("runpy", "socket", "subprocess", "urllib", "http", "requests", "webbrowser", "zmq", "ctypes"),
}
CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
METHODS = {
    *("os.system", "os.popen", "os.execv", "os.spawnv", "os.posix_spawn"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    *("torch.load", "numpy.load", "np.load", "json.JSONDecoder"),
}
SOURCES = sorted([*(ROOT / "python").rglob("*.py"), *(ROOT / "compat").rglob("*.py")])


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (f"line {node.lineno}: import {n}" for n in names if n.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call) and dotted(node.func) in CALLS | METHODS:
            yield f"line {node.lineno}: {dotted(node.func)}"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name in (
            "__reduce__",
            "__setstate__",
        ):
            yield f"line {node.lineno}: {node.name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_foreign_is_run(path: Path) -> None:
    found = list(offences(ast.parse(path.read_text())))
    # The build backend of the compat distribution runs on the builder's machine only; urllib.parse reads text.
    allowed = {"build_backend.py": ("import shutil",), "remote.py": ("import urllib.parse",)}.get(
        path.name, ()
    )
    assert not [offence for offence in found if not offence.endswith(allowed or ("\0",))]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import os\nos.system('x')",
        "eval('1')",
        "import yaml\nyaml.load(x)",
        "import torch\ntorch.load(x)",
        "class A:\n    def __reduce__(self): ...",
        "import urllib.request",
    ],
)
def test_the_gate_sees_it(code: str) -> None:
    assert list(offences(ast.parse(code)))
