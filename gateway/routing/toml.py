"""TOML as callers send it: read in time and memory that grow with its length alone."""

import re
import tomllib
from typing import Any, Final

KEY_PARTS_MAX: Final = 8
"""Parts of one dotted key; no file of ours needs more than half. The standard library keeps every
beginning of a key: for one of 64 KiB it took a minute, in which nobody else was served."""

# The tokens of TOML 1.0 as far as they tell where a dotted key is: comments, strings of four kinds,
# blanks, the parts of a key and the dots between them. What is not closed is taken to the end of
# its line, or of the text: the reader refuses it. Possessive, so that nothing is looked at twice.
_TOKEN: Final = re.compile(
    r"#[^\n]*+"
    r'|"""(?:[^"\\]|\\[\s\S]|"{1,2}(?!"))*+(?:"{3,5}+|\\?\Z)'
    r"|'''(?:[^']|'{1,2}(?!'))*+(?:'{3,5}+|\Z)"
    r"""|(?P<part>"(?:[^"\\\n]|\\[^\n])*+"?+|'[^'\n]*+'?+|[A-Za-z0-9_-]++)"""
    r"|(?P<blank>[ \t]++)"
    r"|(?P<dot>\.)"
    r"|[\s\S]"
)


def read_toml(text: str) -> dict[str, Any]:
    """The document of a text. Raises ValueError, which says what is wrong with it."""
    parts, after_dot = 0, False
    for token in _TOKEN.finditer(text):
        if token.lastgroup == "blank":
            continue
        if token.lastgroup == "part":
            parts = parts + 1 if after_dot else 1
            if parts > KEY_PARTS_MAX:
                raise ValueError(f"a key has more than {KEY_PARTS_MAX} parts")
        after_dot = token.lastgroup == "dot"
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
