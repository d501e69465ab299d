"""Prints the version of a wheel, then what it requires here, one a line: wheel_requirements.py WHEEL [UNWANTED ...].

"torch==2.13.0+cpu" becomes "torch==2.13.0": the package index has no +cpu builds, vLLM's CPU build runs on the plain
one, and pip still takes a +cpu build where it knows of one.
"""

from __future__ import annotations

import email
import sys
import zipfile
from collections.abc import Iterator

from packaging.requirements import Requirement


def requirements(metadata: list[str], unwanted: list[str]) -> Iterator[str]:
    """The requirements that apply on this machine, less the unwanted, as pip takes them."""
    for line in metadata:
        requirement = Requirement(line)
        if requirement.name in unwanted:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        requirement.marker = None
        yield str(requirement).replace("+cpu", "") if requirement.name == "torch" else str(requirement)


def main() -> None:
    """Read the wheel named on the command line."""
    with zipfile.ZipFile(sys.argv[1]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    print(metadata["Version"])
    print(*requirements(metadata.get_all("Requires-Dist", []), sys.argv[2:]), sep="\n")


if __name__ == "__main__":
    main()
