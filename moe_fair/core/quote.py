"""Values in messages: a line at most, however large the value is."""

from __future__ import annotations

import reprlib
from typing import Any

MOST = 80  # characters
ADVICE = 400  # of what a library says


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


def advice(e: BaseException) -> str:
    """An exception's text in one line, whole: what a library advises stands behind its first."""
    text = " ".join(str(e).split())
    return text if len(text) <= ADVICE else text[: ADVICE - 2].rstrip() + " …"


def first_line(e: BaseException) -> str:
    """The first line of an exception's text."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
