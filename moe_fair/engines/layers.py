"""One decoder layer's weights at a time: a model on the meta device whose layers come and go."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from moe_fair.engines.names import model_names
from moe_fair.engines.shards import StoredTensor, shard_files, stored_tensors

OUTSIDE = -1  # embeddings, final norm, head: what no decoder layer owns
READ_AHEAD = 8 * 2**20


class LayeredModel:
    """A causal language model of which only one decoder layer is in memory.

    Buffers that are computed (rotary tables) are there from the start; the weights outside the
    layers are loaded once; `layer(i)` brings one layer's weights and takes them away again.

    Args:
        folder: the checkpoint.
        config: its transformers config.
        dtype, device: of the weights in memory.
        trust_remote_code: as for transformers.

    Raises:
        ValueError: the model has no plain list of decoder layers, or tensors are missing.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        *,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> None:
        self.dtype, self.device = dtype, device
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        self.model.eval().requires_grad_(False)
        self.base = self.model.base_model
        if not isinstance(getattr(self.base, "layers", None), nn.ModuleList):
            raise ValueError(
                f"{type(self.base).__name__} has no list of decoder layers to stream; use "
                "--engine resident"
            )
        self._stored = self._group([t for f in shard_files(folder) for t in stored_tensors(f)])
        self._ahead: threading.Thread | None = None
        self.seconds = 0.0  # spent bringing weights in
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)
        self._load(OUTSIDE)
        self.model.tie_weights()
        self._check(self.model, skip=self.base.layers)

    def __len__(self) -> int:
        return len(self.base.layers)

    @contextmanager
    def layer(self, index: int, following: int | None = None) -> Iterator[nn.Module]:
        """The layer with its weights; on leaving they are dropped.

        Args:
            following: the layer that will be asked for next; its bytes are read into the page
                cache while this one computes.
        """
        self._load(index)
        layer = self.base.layers[index]
        self._check(layer)
        if following is not None:
            self._read_ahead(following)
        try:
            yield layer
        finally:
            for module in layer.modules():
                for name, p in module._parameters.items():
                    if p is not None:
                        empty = torch.empty_like(p, device="meta")
                        module._parameters[name] = nn.Parameter(empty, requires_grad=False)

    def _group(self, tensors: list[StoredTensor]) -> dict[int, list[StoredTensor]]:
        """Stored tensors by the decoder layer that owns them in the model."""
        name = model_names(self.model)
        prefix = next(n for n, m in self.model.named_modules() if m is self.base.layers) + "."
        known = self.model.state_dict()
        groups: dict[int, list[StoredTensor]] = {}
        for t in tensors:
            target = name(t.name)
            if target.startswith(prefix):
                index = int(target[len(prefix) :].split(".", 1)[0])
                groups.setdefault(index, []).append(t)
            elif target in known:
                groups.setdefault(OUTSIDE, []).append(t)
        return groups

    def _load(self, group: int) -> None:
        """Put one group's tensors into the model, by transformers' own conversion."""
        started = time.perf_counter()
        by_file: dict[Path, list[StoredTensor]] = {}
        for t in self._stored.get(group, []):
            by_file.setdefault(t.pieces[0].file, []).append(t)
        state: dict[str, Any] = {}
        for file, tensors in by_file.items():
            handle = safe_open(str(file), framework="pt", device="cpu")
            state |= {t.name: handle.get_slice(t.name) for t in tensors}
        with _no_bar():
            info, _ = convert_and_load_state_dict_in_model(
                self.model,
                state,
                LoadStateDictConfig(
                    device_map={"": self.device},
                    dtype=self.dtype,
                    dtype_plan=self.model._get_dtype_plan(self.dtype),
                    weight_mapping=copy.deepcopy(get_model_conversion_mapping(self.model)),
                ),
            )
        wrong = [*info.mismatched_keys, *info.conversion_errors]
        if wrong:
            raise ValueError(f"tensor {wrong[0]} of the checkpoint does not fit the model")
        for p in self.model.parameters():
            p.requires_grad_(False)
        self.seconds += time.perf_counter() - started

    def _check(self, module: nn.Module, skip: nn.Module | None = None) -> None:
        skipped = {id(p) for p in skip.parameters()} if skip is not None else set()
        missing = [n for n, p in module.named_parameters() if p.is_meta and id(p) not in skipped]
        if missing:
            raise ValueError(f"the checkpoint holds no weights for {missing[0]}")

    def _read_ahead(self, group: int) -> None:
        if self._ahead is not None:
            self._ahead.join()
        tensors = self._stored.get(group, [])
        self._ahead = threading.Thread(target=_touch, args=(tensors,), daemon=True)
        self._ahead.start()


def _touch(tensors: list[StoredTensor]) -> None:
    """Read byte ranges and forget them: they are then in the page cache."""
    buffer = bytearray(READ_AHEAD)
    handles: dict[Path, int] = {}
    try:
        for t in tensors:
            [piece] = t.pieces
            handle = handles.get(piece.file)
            if handle is None:
                handle = handles[piece.file] = os.open(piece.file, os.O_RDONLY)
            for start in range(0, piece.length, READ_AHEAD):
                part = memoryview(buffer)[: min(READ_AHEAD, piece.length - start)]
                os.preadv(handle, [part], piece.start + start)
    except OSError:
        pass  # the layer's own load will meet the fault and say so
    finally:
        for handle in handles.values():
            os.close(handle)


@contextmanager
def _no_bar() -> Iterator[None]:
    """transformers draws a bar per load; a layer at a time that is a screen full."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
