"""Which engine runs a model here: whole in memory where it fits, else a layer at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_fair.core.plan import ModelSize
from moe_fair.engines.batch import Engine, Visit
from moe_fair.engines.device import pick_device, pick_dtype
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.memory import free_memory, usable_memory
from moe_fair.engines.processes import ALONE, Team
from moe_fair.engines.resident import ResidentEngine
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.device_map import offloaded

ENGINES = ("auto", "resident", "streaming")
WAITING = 0.25  # of free main memory: inputs of layers, on their way through a model on a device


@dataclass(frozen=True)
class Choice:
    """An engine's name, and why it was chosen."""

    engine: str
    why: str


def choose(
    engine: str,
    size: ModelSize,
    item_bytes: int,
    device: torch.device,
    max_memory: int | None,
    sharers: int = 1,
) -> Choice:
    """Resident where the weights fit in the usable memory of the device, else streaming.

    Args:
        engine: `auto`, or the name that the user gave.
        item_bytes: bytes of one weight in memory.
        max_memory: bytes that may be used; by default 70 % of what is free.
        sharers: processes that want this much each of the machine's main memory.

    Raises:
        ValueError: an unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine!r} is none of {', '.join(ENGINES)}")
    if engine != "auto":
        return Choice(engine, "as asked")
    need = size.parameters * item_bytes
    usable = max_memory if max_memory is not None else usable_memory(device, sharers)
    weights, room = f"{need / 1e9:.1f} GB of weights", f"{usable / 1e9:.1f} GB usable on {device}"
    if need <= usable:
        return Choice("resident", f"{weights} fit in {room}")
    return Choice("streaming", f"{weights} do not fit in {room}: one layer at a time")


def start(
    source: Checkpoint,
    engine: str,
    dtype: str,
    device: str,
    visit: Visit,
    team: Team = ALONE,
    *,
    device_map: str | None = None,
    checkpointing: bool = False,
    room: int | None = None,
) -> tuple[Engine, torch.nn.Module]:
    """The engine with its model, and that model for observers to attach to.

    Args:
        team: the processes that run their shares at the same time; those on one machine share the
            reading of every layer where it is streamed.
        device_map, checkpointing: of the resident engine; what is offloaded is checkpointed anyway.
        room: bytes that weights may take, as in `choose`; a streamed layer whose packed experts
            would take more keeps them packed.
    """
    where = pick_device(device)
    if engine == "resident":
        model = source.load(dtype, device, device_map)
        again = checkpointing or offloaded(model)
        return ResidentEngine(model, visit=visit, checkpointing=again), model
    layered = LayeredModel(
        source.path,
        source.config,
        dtype=weight_dtype(source, dtype, where),
        device=where,
        trust_remote_code=source.brings_model,
        team=team,
        packing=source.packing,
        room=room,
    )
    return StreamingEngine(layered, host_bytes=_apart(where, team), visit=visit), layered.model


def start_layerwise(
    source: Checkpoint,
    engine: str,
    dtype: str,
    device: str,
    visit: Visit,
    *,
    room: int | None = None,
) -> StreamingEngine:
    """What goes through the model a layer at a time, whether it is in memory or streamed."""
    found, model = start(source, engine, dtype, device, visit, room=room)
    if isinstance(found, StreamingEngine):
        return found
    return StreamingEngine(LoadedLayers(model), visit=visit)


def _apart(device: torch.device, team: Team) -> int:
    """Bytes of main memory for what waits in a run on a device that has memory of its own."""
    if device.type == "cpu":
        return 0
    return int(free_memory(torch.device("cpu"), team.node_size) * WAITING)


def weight_dtype(source: Checkpoint, dtype: str, device: torch.device) -> torch.dtype:
    """The data type that weights have in memory."""
    picked = pick_dtype(dtype, device)
    if isinstance(picked, torch.dtype):
        return picked
    return source.config.get_text_config().dtype or source.config.dtype or torch.float32
