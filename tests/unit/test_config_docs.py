"""docs/configuration.md is what the tables say."""

import subprocess
import sys
from pathlib import Path

from lmcache_rs.config.docs import document
from lmcache_rs.config.model import honoured_keys

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_page_is_up_to_date():
    assert PAGE.read_text() == document(), "run: python -m lmcache_rs.config.docs > docs/configuration.md"


def test_page_has_every_honoured_key():
    lines = document().splitlines()
    for key in honoured_keys().values():
        assert (
            sum(line.startswith(f"| `{key.name}` |") and f"`{key.variable}`" in line for line in lines) == 1
        )


def test_module_prints_the_page():
    command = [sys.executable, "-W", "error", "-m", "lmcache_rs.config.docs"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == document()
