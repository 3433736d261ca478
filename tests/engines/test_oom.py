"""Words for what was lacking."""

from __future__ import annotations

import pytest

from moe_fair.engines.oom import lacking

# as an H100 gave it, torch 2.11
CUDA = (
    "CUDA out of memory. Tried to allocate 9.62 GiB. GPU 0 has a total capacity of 79.18 GiB of "
    "which 2.59 GiB is free. Including non-PyTorch memory, this process has 76.58 GiB memory in "
    "use. Of the allocated memory 75.10 GiB is allocated by PyTorch, and 0.9 GiB is reserved"
)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (CUDA, "9.62 GiB wanted, 2.59 GiB of 79.18 GiB free on GPU 0"),
        ("DefaultCPUAllocator: can't allocate memory\nmore", "DefaultCPUAllocator: can't allocate "
         "memory"),
        ("", "MemoryError"),
    ],
)  # fmt: skip
def test_what_was_lacking(said: str, words: str) -> None:
    assert lacking(MemoryError(said)) == words
