"""docs/troubleshooting.md quotes lines that the code writes."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
OTHERS = ("Unsupported connector type", "Cannot re-initialize CUDA", "LMCACHE_…")
"""Lines of vLLM and torch, and what stands for many."""


def test_what_you_see_is_what_the_code_says() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    seen = [row.split("|")[1] for row in page.splitlines() if row.startswith("| ") and "---" not in row]
    quoted = [text for cell in seen for text in re.findall(r"`([^`]+)`", cell)]
    quoted = [text.split(": 0")[0] for text in quoted if not text.startswith(OTHERS)]
    assert len(quoted) > 12
    code = "".join(file.read_text() for file in sorted((ROOT / "python").rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # lines that are written in several pieces
    assert [text for text in quoted if text not in code] == []
