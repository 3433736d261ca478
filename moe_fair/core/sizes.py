"""Sizes as people write them: `8B` parameters, `20GB`."""

from __future__ import annotations

import re

from moe_fair.core.quote import quote


def parse_size(text: str) -> tuple[str, int]:
    """`8B` or `1.5M` -> ("parameters", n); `20GB`, `16GiB` -> ("bytes", n).

    Raises:
        ValueError: neither form.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGTB]?)(i?)(B?)\s*", text)
    if found:
        number, prefix, binary, byte = found.groups()
        if not byte and not binary and prefix in ("K", "k", "M", "B", "T"):
            scale = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[prefix]
            return "parameters", round(float(number) * scale)
        if byte and prefix != "B":
            power = " kMGT".index(prefix.replace("K", "k") or " ")
            return "bytes", round(float(number) * (1024 if binary else 1000) ** power)
    raise ValueError(
        f"--size {quote(text)}: write parameters as 8B or 900M, bytes as 20GB or 16GiB"
    )


def parse_bytes(flag: str, text: str) -> int:
    """`20GB` or `16GiB` -> bytes.

    Raises:
        ValueError: another form.
    """
    try:
        unit, number = parse_size(text)
    except ValueError:
        unit, number = "", 0
    if unit != "bytes":
        raise ValueError(f"{flag} {quote(text)}: write bytes as 20GB or 16GiB")
    return number
