"""Names and messages as a terminal may show them: no character that moves or colours anything."""

from __future__ import annotations

import unicodedata

# others than letters that turn the order of what follows
TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
UNSEEN = {"Cc", "Cs", "Zl", "Zp"}  # controls, halves of characters, ends of lines


def printable(text: object) -> str:
    r"""One line of text: controls, ends of lines and the like as escapes, `\x1b`.

    Args:
        text: a string, or a path or name to be shown as one.
    """
    return "".join(c if _shows(c) else c.encode("unicode_escape").decode() for c in str(text))


def _shows(c: str) -> bool:
    return unicodedata.category(c) not in UNSEEN and unicodedata.bidirectional(c) not in TURNING
