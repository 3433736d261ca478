"""Values in messages: a line at most, however large the value is."""

from __future__ import annotations

import reprlib
from typing import Any

MOST = 80  # characters


def quote(value: Any, most: int = MOST) -> str:
    """The value as Python writes it, cut to so many characters; a huge one is not written out."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict = 2, 4, 4, 4
    short.maxset = short.maxfrozenset = short.maxarray = short.maxdeque = 4
    short.maxstring = short.maxother = short.maxlong = most
    if isinstance(value, int) and value.bit_length() > 4096:  # Python refuses to write it
        return f"a number of {value.bit_length()} bits"
    return clip(short.repr(value), most)


def clip(text: str, most: int = MOST) -> str:
    """The text on one line, of so many characters at most."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else line[: most - 3] + "..."
