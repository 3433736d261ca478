"""What of a name reaches a terminal."""

from __future__ import annotations

import os

import pytest

from moe_fair.core.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Qwen/Qwen1.5-MoE α, 日本, é", "Qwen/Qwen1.5-MoE α, 日本, é"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("a\nmoe-fair: error: b\r\tc", "a\\nmoe-fair: error: b\\r\\tc"),
        ("\x9b2J\x7f\x00", "\\x9b2J\\x7f\\x00"),
        ("a\u202egpj.exe\u2066\u2029", "a\\u202egpj.exe\\u2066\\u2029"),
        (os.fsdecode(b"\xff"), "\\udcff"),
    ],
)
def test_one_line_of_letters(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()
