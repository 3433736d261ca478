"""A pretend CUDA device: the program runs on main memory, by CUDA's rules about devices.

    PRETEND_GPUS=2 PRETEND_BYTES=8e9 python tests/device/pretend.py tests/device/stages.py ...

A C++ stub tells torch that CUDA is there, so that devices, autograd's threads and
`torch.accelerator` behave; each tensor on `cuda:N` is a wrapper (`Pretend`) around a CPU tensor,
and one Python kernel for the whole CUDA dispatch key runs every operation on what is inside. It has
to be loaded before torch.

It catches tensors of two devices in one operation, `.numpy()` of a device's tensor and memory that
runs out, with what torch's caching allocator keeps. It counts (`COUNTS`), by the line of the
program: waits for the device, copies to it, kernel launches, float64 elements, live and peak bytes.
It does not see what kernels do wrong, speed, streams, or rounding on CUDA.
"""

from __future__ import annotations

import collections
import ctypes
import hashlib
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from pathlib import Path
from typing import Any

GPUS = int(os.environ.setdefault("PRETEND_GPUS", "1"))
BYTES = int(float(os.environ.get("PRETEND_BYTES", "80e9")))
CAPABILITY = (9, 0)
SOURCE = Path(__file__).with_name("pretend_cuda.cpp")
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")


def compiled() -> Path:
    """The stub, made once for this torch.

    Raises:
        FileNotFoundError: there is no g++.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parent
    key = f"{SOURCE.read_text()}{home}{home.stat().st_mtime}"
    name = hashlib.sha256(key.encode()).hexdigest()[:12]
    out = Path(tempfile.gettempdir()) / f"pretend-cuda-{name}.so"
    if not out.exists():
        made = out.with_suffix(f".{os.getpid()}")
        subprocess.run(
            ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", str(SOURCE),
             f"-L{home}/lib", "-ltorch_cpu", "-lc10", "-o", str(made)], check=True,
        )  # fmt: skip
        made.replace(out)
    for library in ("libc10.so", "libtorch_cpu.so"):  # before torch asks for its CUDA hooks
        ctypes.CDLL(str(home / "lib" / library), mode=ctypes.RTLD_GLOBAL)
    return out


assert "torch" not in sys.modules, "the pretend device comes before torch"
ctypes.CDLL(str(compiled()))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # optimizers import it: it must not meet a pretend CUDA
from torch import Tensor  # noqa: E402

torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) copies where we see it
CPU = torch.device("cpu")
storage_of = torch._C.TensorBase.untyped_storage


class Counts:
    """What was counted: table -> line of the program -> how often; and bytes of each device."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.tables: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self.live, self.peak = [0] * GPUS, [0] * GPUS
        self.reserved = [0] * GPUS  # as the caching allocator has it: never less until emptied
        self.owners: dict[tuple[int, int], list[int]] = {}
        self.refs: dict[int, Any] = {}

    def add(self, table: str, what: str, n: float = 1) -> None:
        with self.lock:
            self.tables[table][f"{what} @ {site()}"] += int(n)

    def total(self, table: str) -> int:
        return sum(self.tables[table].values())

    def clear(self) -> None:
        self.tables.clear()
        self.peak = list(self.live)

    def hold(self, inner: Tensor, index: int) -> None:
        """Count a tensor's memory until it is gone."""
        storage = inner.untyped_storage()
        key, size = (index, storage.data_ptr()), storage.nbytes()
        if not size:
            return
        with self.lock:
            have = self.owners.setdefault(key, [0, size])
            have[0] += 1
            over = have[0] == 1 and self.live[index] + size > BYTES
            if have[0] == 1:
                self.live[index] += size
                self.peak[index] = max(self.peak[index], self.live[index])
                self.reserved[index] = max(self.reserved[index], min(self.live[index], BYTES))
        ref = weakref.ref(inner, lambda r: self.drop(r, key))
        self.refs[id(ref)] = ref  # in a set two of one tensor would be compared, number by number
        if over:
            self.add("out of memory", str(size))
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU {index} has a "
                f"total capacity of {BYTES / 2**30:.2f} GiB (pretend device)"
            )

    def drop(self, ref: Any, key: tuple[int, int]) -> None:
        with self.lock:
            self.refs.pop(id(ref), None)
            if (have := self.owners.get(key)) is not None:
                have[0] -= 1
                if not have[0]:
                    self.live[key[0]] -= have[1]
                    del self.owners[key]


def site() -> str:
    """The nearest line of moe_fair."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/moe_fair/" in name and "site-packages" not in name:
            return f"{name.rpartition('/moe_fair/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


COUNTS = Counts()

# the host reads the shape of their result, or an error
WAITS = {
    "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "repeat_interleave.Tensor", "_linalg_check_errors", "is_nonzero", "linalg_matrix_rank",
}  # fmt: skip
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot", "addmv"}
TAKES_CPU_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
VIEWS = {
    "view", "t", "transpose", "permute", "slice", "select", "expand", "unsqueeze", "squeeze",
    "detach", "alias", "as_strided", "_unsafe_view", "unbind", "split", "split_with_sizes",
    "diagonal", "unfold", "_reshape_alias", "lift_fresh", "chunk", "narrow",
}  # fmt: skip


def is_pretend(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"


def inner_of(x: Any) -> Tensor:
    """The CPU tensor; of a plain parameter that was given one as its data, or of its views."""
    inner: Tensor = storage_of(x).inner
    place = (x.size(), x.stride(), x.storage_offset())
    if place == (inner.size(), inner.stride(), inner.storage_offset()):
        return inner
    return inner.detach().as_strided(*place)


class Pretend(Tensor):
    """A tensor on `cuda:N` whose numbers lie in main memory."""

    @staticmethod
    def __new__(cls, inner: Tensor, index: int = 0) -> Any:
        if inner.is_conj() or inner.is_neg():  # lazy bits that a wrapper does not carry
            inner = inner.resolve_conj().resolve_neg()
        made: Any = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=torch.device("cuda", index),
            requires_grad=False,
        )  # fmt: skip
        # `p.data = q`, as Module.to does it, leaves a plain parameter with this storage
        storage_of(made).inner = made.inner = inner
        COUNTS.hold(inner, index)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    # `p.data = q` may have made it a CPU tensor since

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({inner_of(self) if is_pretend(self) else None!r}, device={self.device})"

    def tolist(self) -> Any:
        if not is_pretend(self):
            return torch._C.TensorBase.tolist(self)
        COUNTS.add("waits", "tolist")
        return inner_of(self).tolist()

    def data_ptr(self) -> int:
        return inner_of(self).data_ptr() if is_pretend(self) else torch._C.TensorBase.data_ptr(self)

    def untyped_storage(self) -> Any:
        return storage_of(inner_of(self)) if is_pretend(self) else storage_of(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                new: Tensor = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                new = torch.nn.Parameter(new, self.requires_grad)
            memo[id(self)] = new.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # as CUDA's tensors do: they are pickled with their device
        inner = inner_of(self) if is_pretend(self) else self.detach().as_subclass(Tensor)
        return rebuilt, (inner, self.device.index, isinstance(self, torch.nn.Parameter))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def rebuilt(inner: Tensor, index: int | None, parameter: bool) -> Any:
    made = inner if index is None else Pretend(inner, index)
    return torch.nn.Parameter(made, False) if parameter else made


rebuilt.__module__ = Pretend.__module__ = "pretend"  # to be pickled by, also as a program
sys.modules.setdefault("pretend", sys.modules[__name__])
torch.serialization.add_safe_globals([rebuilt])


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation by CUDA's rules."""
    name = func._schema.name.split("::")[1]
    full = name + ("." + func._schema.overload_name if func._schema.overload_name else "")
    if name == "copy_":
        return copy(*args)
    if name == "_to_copy":
        return move(func, args[0], kwargs)
    if name == "_local_scalar_dense":
        COUNTS.add("waits", "item")
        return func(inner_of(args[0]))
    devices: list[int] = []
    known: dict[int, Any] = {}  # what goes in, as what comes out may be the same

    def opened(x: Any) -> Any:
        if is_pretend(x):
            devices.append(x.device.index)
            known[id(inner := inner_of(x))] = x
            return inner
        return type(x)(map(opened, x)) if type(x) in (list, tuple) else x

    own, named = opened(list(args)), {k: opened(v) for k, v in kwargs.items()}
    check(name, full, devices, [t for t in flat((args, kwargs)) if isinstance(t, Tensor)])
    target = named.get("device")
    if target is not None and (target := torch.device(target)).type == "cuda":
        devices, named["device"] = [index_of(target)], CPU
        target = None
    tensors = [t for t in flat((own, named)) if isinstance(t, Tensor)]
    if name not in VIEWS:
        wait(name, full, tensors)
    if name == "histc" and not own[0].is_floating_point():  # CUDA counts integers, a CPU does not
        out = func(own[0].float(), *own[1:], **named).to(own[0].dtype)
    else:
        out = func(*own, **named)
    if target is not None:
        return out  # asked for elsewhere, as empty_like(device="meta")
    index = devices[0] if devices else 0

    def closed(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(map(closed, x)) if isinstance(x, list) else tuple(map(closed, x))
        if not isinstance(x, Tensor) or x.device.type != "cpu":
            return x
        given = known.get(id(x))
        if given is None:
            return Pretend(x, index)
        if given.size() != x.size():  # in place, or with out=, and resized
            given.data = Pretend(x, index)
        return given

    if name not in VIEWS:
        COUNTS.add("launches", name)
        outs = [t for t in flat(out) if isinstance(t, Tensor)]
        if any(t.dtype == torch.float64 for t in (*tensors, *outs)):
            COUNTS.add("float64", name, max(t.numel() for t in (*tensors, *outs)))
    return closed(out)


def check(name: str, full: str, devices: list[int], given: list[Tensor]) -> None:
    """All on one device, but for numbers, and indices where CUDA takes them from the host.

    Raises:
        RuntimeError: as torch's.
    """
    if not devices or name.startswith(("_foreach", "_fused")):
        return
    other = {f"cuda:{i}" for i in devices}
    for t in given:
        index = name in TAKES_CPU_INDEX and not t.is_floating_point()
        number = t.dim() == 0 and name not in ("cat", "stack")
        if t.device.type == "cpu" and not number:
            if index:
                COUNTS.add("to device", f"{full} index")
            else:
                other.add("cpu")
    if len(other) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(other))}! (pretend device; operation {full})"
        )


def wait(name: str, full: str, tensors: list[Tensor]) -> None:
    """What the host waits for, and what CUDA has no kernel for."""
    if name in PRODUCTS and not (tensors[0].is_floating_point() or tensors[0].is_complex()):
        raise NotImplementedError(f"\"{name}_cuda\" not implemented for '{tensors[0].dtype}'")
    masks = name in TAKES_CPU_INDEX and any(t.dtype == torch.bool for t in tensors[1:])
    if name in WAITS or full in WAITS or masks:
        COUNTS.add("waits", full + (" by mask" if masks else ""))


def flat(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        for y in x:
            yield from flat(y)
    elif isinstance(x, dict):
        yield from flat(list(x.values()))
    else:
        yield x


def copy(to: Any, source: Any, *_: Any) -> Any:
    a, b = (inner_of(x) if is_pretend(x) else x for x in (to, source))
    if is_pretend(to) and is_pretend(source):
        COUNTS.add("launches", "copy_")
    elif is_pretend(to):
        COUNTS.add("to device", "copy_")
    else:
        COUNTS.add("waits", "copy_ to host")
    a.copy_(b)
    return to


def move(func: Any, x: Any, kwargs: dict[str, Any]) -> Any:
    inner = inner_of(x) if is_pretend(x) else x
    target = torch.device(kwargs.get("device") or x.device)
    named = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
    if target.type == "meta":
        return func(inner, **named, device=target)
    if target.type != "cuda":
        if is_pretend(x):
            COUNTS.add("waits", "to host")
        return func(inner, **named)
    COUNTS.add("launches" if is_pretend(x) else "to device", "to")
    if torch.float64 in (inner.dtype, kwargs.get("dtype")):
        COUNTS.add("float64", "to", inner.numel())
    return Pretend(func(inner, **named), index_of(target))


def index_of(device: Any = None) -> int:
    if isinstance(device, int):
        return device
    found = None if device is None else torch.device(device).index
    return int(torch._C._accelerator_getDeviceIndex() if found is None else found)


LIBRARY = torch.library.Library("_", "IMPL", "CUDA")
LIBRARY.fallback(lambda func, *args, **kwargs: run(func, args, kwargs), "CUDA")
ATEN = torch.library.Library("aten", "IMPL")  # composite for every device: no fallback sees them
ATEN.impl("copy_", lambda to, source, non_blocking=False: copy(to, source), "CUDA")


def made_here(name: str) -> None:
    """A factory that torch composes of an empty tensor and a kernel that resizes it."""
    packet, _, overload = name.partition(".")
    func = getattr(getattr(torch.ops.aten, packet), overload or "default")
    ATEN.impl(name, lambda *args, **kwargs: run(func, args, kwargs), "CUDA")


for _name in ("arange", "arange.start", "arange.start_step", "linspace", "randperm", "abs",
              "randperm.generator", "eye", "eye.m", "range", "range.step"):  # fmt: skip
    made_here(_name)


def empty_cache() -> None:
    COUNTS.reserved = list(COUNTS.live)


class Stream:
    device, cuda_stream, stream_id, device_index, device_type = torch.device("cuda", 0), 0, 0, 0, 1

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, *_: Any) -> Any:
        return types.SimpleNamespace(synchronize=lambda: None)


def set_device(device: Any) -> int:
    before = index_of()
    if index_of(device) >= 0:
        torch._C._accelerator_setDeviceIndex(index_of(device))
    return before


def pretend_cuda() -> None:
    """`torch.cuda` as of a machine that has devices."""
    properties = types.SimpleNamespace(
        name="Pretend", total_memory=BYTES, major=CAPABILITY[0], minor=CAPABILITY[1],
        multi_processor_count=132, is_integrated=False, uuid="0", gcnArchName="",
    )  # fmt: skip
    given: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: GPUS, "current_device": index_of,
        "_lazy_init": lambda: None, "init": lambda: None, "is_initialized": lambda: True,
        "mem_get_info": lambda d=None: (BYTES - COUNTS.reserved[index_of(d)], BYTES),
        "memory_allocated": lambda d=None: COUNTS.live[index_of(d)],
        "memory_reserved": lambda d=None: COUNTS.reserved[index_of(d)],
        "max_memory_allocated": lambda d=None: COUNTS.peak[index_of(d)],
        "max_memory_reserved": lambda d=None: COUNTS.reserved[index_of(d)],
        "reset_peak_memory_stats": lambda d=None: setattr(COUNTS, "peak", list(COUNTS.live)),
        "empty_cache": empty_cache, "synchronize": lambda d=None: COUNTS.add("waits", "all"),
        "get_device_name": lambda d=None: "Pretend", "ipc_collect": lambda: None,
        "get_device_properties": lambda d=None: properties,
        "get_device_capability": lambda d=None: CAPABILITY,
        "is_bf16_supported": lambda *_, **__: True, "memory_stats": lambda d=None: {},
        "set_device": set_device, "_exchange_device": set_device,
        "_maybe_exchange_device": set_device, "is_current_stream_capturing": lambda: False,
        "current_stream": lambda d=None: Stream(), "default_stream": lambda d=None: Stream(),
        "Stream": Stream, "stream": lambda s: Stream(), "_is_in_bad_fork": lambda: False,
        "manual_seed": lambda s: None, "manual_seed_all": lambda s: None,
        "get_rng_state": lambda d=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()] * GPUS,
        "set_rng_state": lambda s, d=None: None, "set_rng_state_all": lambda s: None,
    }  # fmt: skip
    for name, value in given.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getDeviceCount = lambda: GPUS


def apply(self: Any, fn: Any, recurse: bool = True) -> Any:
    """`Module._apply` with new parameters: setting `.data` would leave wrappers without a class.

    Parameters that modules share stay shared.
    """
    outermost = not hasattr(MOVED, "seen")
    if outermost:
        MOVED.seen = {}
    try:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for name, p in self._parameters.items():
            if p is not None:
                if id(p) not in MOVED.seen:
                    with torch.no_grad():
                        moved = fn(p)
                    new = p
                    if moved is not p:
                        new = torch.nn.Parameter(moved.detach(), p.requires_grad)
                    MOVED.seen[id(p)] = p, new
                self._parameters[name] = MOVED.seen[id(p)][1]
        for name, b in self._buffers.items():
            if b is not None:
                self._buffers[name] = fn(b)
    finally:
        if outermost:
            del MOVED.seen
    return self


pretend_cuda()
MOVED = threading.local()
torch.nn.Module._apply = apply  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.modules["pretend"] = sys.modules["__main__"]
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
