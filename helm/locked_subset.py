"""Print the part of requirements.lock, hashes and all, that the image or its build needs.

`runtime`: what the gateway runs with; `build`: what builds its two distributions. Follows the
lock's own "via" comments. Needs the standard library alone. What it forgets, pip refuses to go
without: `--require-hashes` takes no package that is not listed.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
_ROOTS: Final = {
    "payment-gateway (pyproject.toml)",
    "payment-gateway (pyproject.toml:telemetry)",
    "payment-gateway-stubs",
}


def read_lock(text: str) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Each package's lines by its name, and the names of what wants it."""
    blocks: dict[str, str] = {}
    wanted_by: dict[str, set[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"([a-z0-9][a-z0-9._-]*)==", line):
            name = match[1]
            blocks[name], wanted_by[name] = "", set()
        if not name:
            continue
        if match := re.match(r" +# +(?:via )?(\S.*)", line):
            if match[1] != "via":
                wanted_by[name].add(match[1])
        elif not line.strip().startswith("#"):
            blocks[name] += line + "\n"
    return blocks, wanted_by


def build_requirements() -> set[str]:
    """What both distributions name as their build's requirements."""
    names: set[str] = set()
    for path in (ROOT / "pyproject.toml", ROOT / "proto" / "pyproject.toml"):
        required = tomllib.loads(path.read_text(encoding="utf-8"))["build-system"]["requires"]
        names |= {re.split(r"[^A-Za-z0-9._-]", each)[0].lower() for each in required}
    return names


def subset(text: str, purpose: str) -> str:
    """The lock's part for `runtime` or `build`. Raises KeyError for a package it does not hold."""
    blocks, wanted_by = read_lock(text)
    if purpose == "build":
        found = build_requirements()
    else:
        found = {name for name, by in wanted_by.items() if by & _ROOTS}
    while more := {name for name, by in wanted_by.items() if by & found} - found:
        found |= more
    return "".join(blocks[name] for name in sorted(found))


if __name__ == "__main__":
    if sys.argv[1:] not in (["runtime"], ["build"]):
        sys.exit("usage: locked_subset.py runtime|build")
    print(subset((ROOT / "requirements.lock").read_text(encoding="utf-8"), sys.argv[1]), end="")
