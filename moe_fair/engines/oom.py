"""Running out of memory: telling it from other errors, and giving back what can be given back."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re

from moe_fair.core.quote import first_line

# of torch's message, which goes on with what it has reserved and advice on its allocator
_CUDA = re.compile(
    r"Tried to allocate (\S+ \S+)\. GPU (\d+) has a total capacity of (\S+ \S+) of which (\S+ \S+)"
)
_LIBC = ctypes.CDLL(None) if os.name == "posix" else None


def out_of_memory(e: BaseException) -> bool:
    """This says that memory ran out, of a device or of the machine; libraries differ in how."""
    text = str(e)
    # the last: of cuBLAS, cuSOLVER and cuDNN, for memory of their own
    words = ("allocate memory", "out of memory", "can't start new thread", "_STATUS_ALLOC_FAILED")
    return (
        isinstance(e, MemoryError)
        or type(e).__name__ == "OutOfMemoryError"  # torch's: of CUDA and the like
        or (isinstance(e, OSError) and e.errno == errno.ENOMEM)
        or (isinstance(e, RuntimeError) and any(w in text for w in words))
    )


def lacking(e: BaseException) -> str:
    """What was lacking, in a few words."""
    found = _CUDA.search(str(e))
    if found:
        wanted, number, whole, free = found.groups()
        return f"{wanted} wanted, {free} of {whole} free on GPU {number}"
    return first_line(e)


def release() -> None:
    """Give back what nothing refers to any more: to the device, and to the system."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_memory()


def return_memory() -> None:
    """Give freed pages back to the system: glibc keeps them, and a layer's worth adds up."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)
