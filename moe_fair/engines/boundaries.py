"""Every layer's inputs from the forward until the backward asks for them: on the device while there
is room, then in main memory, then in files of a temporary directory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

Key = tuple[int, int]  # layer, batch


class Boundaries:
    """Tensors by key. Use as a context manager, which takes the files away.

    Args:
        device_bytes: so many stay where they are.
        host_bytes: so many of a device that has its own memory are brought to main memory.
    """

    def __init__(self, device_bytes: int, host_bytes: int = 0) -> None:
        self._room = {"device": device_bytes, "host": host_bytes}
        self._memory: dict[Key, tuple[str, Tensor]] = {}
        self._files: dict[Key, tuple[Path, torch.dtype, torch.Size]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Boundaries:
        return self

    def __exit__(self, *exception: object) -> None:
        self._memory.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep it, wherever there is room."""
        size, tensor = tensor.numel() * tensor.element_size(), tensor.detach()
        apart = tensor.device.type != "cpu"
        for place in ("device", "host") if apart else ("device",):
            if size <= self._room[place]:
                self._room[place] -= size
                self._memory[key] = (place, tensor.cpu() if place == "host" else tensor)
                return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="moe_fair-activations-")
        path = Path(self._folder.name) / f"{key[0]}-{key[1]}"
        tensor.contiguous().view(torch.uint8).cpu().numpy().tofile(path)
        self._files[key] = (path, tensor.dtype, tensor.shape)

    def pop(self, key: Key, device: torch.device) -> Tensor:
        """It, on the device, and no longer here."""
        if key in self._memory:
            place, tensor = self._memory.pop(key)
            self._room[place] += tensor.numel() * tensor.element_size()
            return tensor.to(device)
        path, dtype, shape = self._files.pop(key)
        tensor = torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype).view(shape)
        path.unlink()
        return tensor.to(device)
