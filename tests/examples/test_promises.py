"""What the Makefile and the READMEs promise: each target explained, each command of a README run by CI."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from support import ROOT

READMES = (ROOT / "README.md", ROOT / "examples" / "online" / "README.md")
# Commands of the READMEs that a test runs, if with smaller sizes, and which.
RUN_BY_TESTS = {
    ".venv/bin/python examples/offline.py": "test_examples.py::test_offline_quickstart",
    ".venv/bin/python examples/cpu_offload.py": "test_examples.py::test_benefit_script",
    ".venv/bin/python examples/restart.py": "test_restart_example.py::test_disk",
    "examples/online/serve.sh": "test_examples.py::test_online_quickstart",
    "examples/online/ask.sh": "test_examples.py::test_online_quickstart",
    ". .venv/bin/activate": "conftest.py::clean_environment puts its folder on the PATH",
}


def commands(readme: Path) -> list[str]:
    """The commands in the ```sh blocks of a README, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_readme_is_run_by_ci(readme: Path) -> None:
    found = commands(readme)
    assert found
    ci = (ROOT / ".ci" / "run").read_text()
    for command in found:
        assert command in ci or command.startswith(tuple(RUN_BY_TESTS)), f"nothing runs: {command}"


def test_the_first_commands_are_demo_and_test() -> None:
    assert commands(READMES[0])[:2] == ["make demo", "make test"]


def test_links_of_the_readmes_lead_somewhere() -> None:
    for readme in READMES:
        for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text()):
            assert (readme.parent / target).exists(), f"{readme}: {target}"


def test_make_help_explains_every_target() -> None:
    def shown_by(*words: str) -> str:
        # Without the MAKEFLAGS of a make around this test, which would change what is printed.
        command = ["make", *words]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}
        ).stdout

    shown = shown_by("help")
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))
    assert {"demo", "test", "lint", "bench", "wheel", "clean", "help", "compat"} <= targets
    explained = dict(re.findall(r"^  ([a-z-]+) +(\S.*\.)$", shown, re.MULTILINE))
    assert explained.keys() == targets
    assert shown_by() == shown
