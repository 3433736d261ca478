"""One decoder layer's weights at a time: a model on the meta device whose layers come and go."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    dot_natural_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from moe_fair.engines.auto import auto_class
from moe_fair.engines.decoder import find_decoder
from moe_fair.engines.empty_weights import without_weights
from moe_fair.engines.memory import usable_memory
from moe_fair.engines.names import Destination, destinations
from moe_fair.engines.oom import out_of_memory, return_memory
from moe_fair.engines.packing import LazyWeight, Packing
from moe_fair.engines.packing.experts import Matrix, PackedExperts
from moe_fair.engines.processes import ALONE, Team
from moe_fair.engines.reading import reader
from moe_fair.engines.shards import StoredTensor, shard_files, stored_tensors

OUTSIDE = -1  # embeddings, final norm, head: what no decoder layer owns
SYNCHRONOUS = "HF_DEACTIVATE_ASYNC_LOAD"


class LayeredModel:
    """A causal language model of which only one decoder layer is in memory.

    Buffers that are computed (rotary tables) are there from the start; `layer(i)` brings one
    layer's weights and takes them away again, `outside()` does the same with the embeddings, final
    norm and head.

    Args:
        folder: the checkpoint.
        config: its transformers config.
        dtype, device: of the weights in memory.
        trust_remote_code: as for transformers.
        team: processes that go through the layers at the same time; see `reading`.
        tensors: name in the checkpoint -> the stored tensor that is read as it, which may be stored
            under another name; by default all of the checkpoint as they are.
        packing: its packed weights, which are unpacked as they are read; where a layer of them is
            larger, unpacked, than what memory is usable, its experts stay packed until they are
            used (see `packing.experts`).
        room: bytes that are usable; None: what is usable of the free memory.

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
        team: Team = ALONE,
        tensors: Mapping[str, StoredTensor] | None = None,
        packing: Packing | None = None,
        room: int | None = None,
    ) -> None:
        self.dtype, self.device, self.packing = dtype, device, packing
        with without_weights():
            self.model = auto_class(config).from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        self.model.eval().requires_grad_(False)
        try:
            self.decoder = find_decoder(self.model)
        except ValueError as e:
            raise ValueError(f"{e} to stream; use --engine resident") from e
        self._destinations: dict[str, Destination] = {}
        if tensors is None:
            tensors = {t.name: t for f in shard_files(folder) for t in stored_tensors(f)}
        self._own_names = {name: t.name for name, t in tensors.items()}
        self._stored = self._group([t.renamed(name) for name, t in tensors.items()])
        self.reader = reader(team)
        self._stays_packed = False
        if packing is not None:
            if room is None:
                room = usable_memory(device, team.node_size)
            self._stays_packed = max(map(self._unpacked_bytes, self._stored.values())) > room
        self.seconds = 0.0  # spent bringing weights in
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)

    @property
    def bytes_read(self) -> int:
        """What this process has asked of the checkpoint's files."""
        return self.reader.bytes

    def __len__(self) -> int:
        return len(self.decoder.layers)

    @contextmanager
    def in_step(self, groups: Sequence[int]) -> Iterator[None]:
        """What is to bring these groups, in this order, as do all who read together.

        Whoever runs out of memory on the way still takes part in the rest of the reading: the
        others wait for it at every layer.

        Args:
            groups: indices of layers, or OUTSIDE.
        """
        done = self.reader.groups
        try:
            yield
        except Exception as e:
            if not out_of_memory(e):
                raise
            for group in groups[self.reader.groups - done :]:
                self.reader.bring(group, self._stored.get(group, []))
            raise

    @contextmanager
    def layer(self, index: int, following: int | None = None) -> Iterator[nn.Module]:
        """The layer with its weights; on leaving they are dropped.

        Args:
            following: the layer that will be asked for next; its bytes are read into the page
                cache while this one computes.
        """
        layer = self.decoder.layers[index]
        try:
            self._load(index)
            self._check(layer, prefix=f"{self._prefix}{index}.")
            if following is not None:
                self.reader.ahead(following, self._stored.get(following, []))
            yield layer
        finally:
            _empty(layer)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Embeddings, final norm and head with their weights; on leaving they are dropped."""
        try:
            self._load(OUTSIDE)
            self.model.tie_weights()
            self._check(self.model, skip=self.decoder.layers)
            yield
        finally:
            _empty(self.model)

    def _group(self, tensors: list[StoredTensor]) -> dict[int, list[StoredTensor]]:
        """Stored tensors by the decoder layer that owns them in the model."""
        find = destinations(self.model)
        prefix = next(n for n, m in self.model.named_modules() if m is self.decoder.layers) + "."
        self._prefix = prefix
        known = self.model.state_dict()
        groups: dict[int, list[StoredTensor]] = {}
        for t in tensors:
            name = self.packing.owner_name(t.name) if self.packing else t.name
            target = find(name)
            self._destinations[name] = target
            if target.name.startswith(prefix):
                index = int(target.name[len(prefix) :].split(".", 1)[0])
                groups.setdefault(index, []).append(t)
            elif target.name in known:
                groups.setdefault(OUTSIDE, []).append(t)
        return groups

    def _load(self, group: int) -> None:
        """Put one group's tensors into the model."""
        started = time.perf_counter()
        handles: dict[Path, Any] = {}
        state: dict[str, Any] = {}
        for t in self.reader.bring(group, self._stored.get(group, [])):
            [piece] = t.pieces
            if piece.file not in handles:
                handles[piece.file] = safe_open(str(piece.file), framework="pt", device="cpu")
            state[t.name] = handles[piece.file].get_slice(self._own_names[t.name])
        if self.packing:
            state = self.packing.unpacked(state, self.device)
        self._stack_experts(state)
        self._convert(state)
        for p in self.model.parameters():
            p.requires_grad_(False)
        return_memory()
        self.seconds += time.perf_counter() - started

    def _stack_experts(self, state: dict[str, Any]) -> None:
        """Fused tensors that are plain stacks, filled one expert's matrix at a time.

        transformers' own conversion gives the same bytes, but holds all matrices, their stacks and
        the joined tensor at once. What is placed here leaves `state`.
        """
        groups: dict[str, list[tuple[str, Destination]]] = {}
        for name in state:
            target = self._destinations[name]
            if target.part is not None:
                groups.setdefault(target.name, []).append((name, target))
        for fused_name, members in groups.items():
            module_name, _, tensor = fused_name.rpartition(".")
            module = self.model.get_submodule(module_name)
            old = module._parameters[tensor]
            assert old is not None
            if len(members) != len(old) * members[0][1].parts:
                continue  # transformers' own conversion will say what is missing
            members.sort(key=lambda m: (m[1].part, dot_natural_key(m[0])))
            where = members[0][1]
            rows = (old.shape[1] // where.parts, *old.shape[2:])
            for name, _ in members:
                if tuple(state[name].get_shape()) != rows:
                    raise ValueError(f"tensor {name} of the checkpoint does not fit the model")
            matrices = [state.pop(name) for name, _ in members]
            packed = self._stays_packed and all(isinstance(m, LazyWeight) for m in matrices)
            fused = (self._packed if packed else self._filled)(matrices, old, where.parts)
            module._parameters[tensor] = nn.Parameter(fused, requires_grad=False)

    def _filled(self, matrices: Sequence[Any], old: Tensor, parts: int) -> Tensor:
        """[E, ...] of so many parts of every expert, all first parts first; each is read here.

        Args:
            old: the parameter that it will be, on the meta device.
        """
        fused = torch.empty(old.shape, dtype=old.dtype, device=self.device)
        for place, matrix in enumerate(matrices):
            fused[place % len(old)].chunk(parts)[place // len(old)].copy_(matrix[:])
        return fused

    def _packed(self, matrices: Sequence[LazyWeight], old: Tensor, parts: int) -> Tensor:
        """The same, of matrices that stay packed."""
        experts = [[m.brought() for m in matrices[e :: len(old)]] for e in range(len(old))]
        shape = old.shape[1:]
        return PackedExperts.of([Matrix(e, shape, old.dtype, self.device) for e in experts])

    def _unpacked_bytes(self, tensors: Sequence[StoredTensor]) -> int:
        """Of a group in memory."""
        assert self.packing is not None
        return sum(map(self.packing.numel, tensors)) * self.dtype.itemsize

    def _convert(self, state: dict[str, Any]) -> None:
        """Everything else, by transformers' own conversion."""
        with _without_threads():
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

    def _check(self, module: nn.Module, skip: nn.Module | None = None, prefix: str = "") -> None:
        skipped = {id(p) for p in skip.parameters()} if skip is not None else set()
        missing = [n for n, p in module.named_parameters() if p.is_meta and id(p) not in skipped]
        if missing:
            raise ValueError(f"the checkpoint holds no weights for {prefix}{missing[0]}")


def _empty(root: nn.Module) -> None:
    """Put every parameter back on the meta device; a shared one stays shared."""
    emptied: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for name, p in module._parameters.items():
            if p is not None and not p.is_meta:
                empty = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
                module._parameters[name] = emptied.setdefault(id(p), empty)


@contextmanager
def _without_threads() -> Iterator[None]:
    """transformers loads with threads, whose memory pools keep what they freed; and draws a bar."""
    from transformers.utils import logging

    bar, threads = logging.is_progress_bar_enabled(), os.environ.get(SYNCHRONOUS)
    logging.disable_progress_bar()
    os.environ[SYNCHRONOUS] = "1"
    try:
        yield
    finally:
        if bar:
            logging.enable_progress_bar()
        if threads is None:
            del os.environ[SYNCHRONOUS]
        else:
            os.environ[SYNCHRONOUS] = threads
