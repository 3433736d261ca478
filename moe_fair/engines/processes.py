"""Several processes of one run: who am I, my share, one result, and stopping together.

`accelerate launch`, `torchrun` or Slurm start the same command several times and say by environment
variables who is who. Each process runs its share of the batches on its own device; the first one
decides, writes and speaks. Nothing but this file knows torch.distributed, and everything that
travels lies in main memory, so that gloo serves every kind of device. One process alone is `ALONE`,
which costs nothing.

A process that fails or is killed ends all: every process watches for it in a thread of its own,
which also sees signals while the main thread waits for the others in C code.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from moe_fair.engines.watch import (
    HEARTBEAT_SECONDS,
    HEARTBEAT_TIMEOUT,
    Watch,
    clone,
    end_now,
    print_now,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from moe_fair.core.units import Statistics

T = TypeVar("T")
RENDEZVOUS_TIMEOUT = 600.0  # seconds that all processes may take to arrive
FOREVER = timedelta(days=365)  # the watch decides who is lost, not a collective's time-out
PIECE = 2**25  # elements sent at a time
# by which torch, accelerate and MPI know that there are several processes
LAUNCHER = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)  # fmt: skip


def processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first() -> bool:
    """This process speaks and writes. Known from the environment, before anything is set up."""
    return int(os.environ.get("RANK") or 0) == 0 or processes() == 1


def stay_alone() -> None:
    """Forget the launcher: for what the first process does by itself."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


@contextmanager
def unlaunched() -> Iterator[None]:
    """Inside, libraries that look for a launcher find none: each process has a model of its own."""
    given = {n: os.environ.pop(n) for n in LAUNCHER if n in os.environ}
    try:
        yield
    finally:
        os.environ.update(given)


@dataclass(frozen=True)
class Team:
    """The processes of a run as one of them sees it.

    Attributes:
        rank, size: of this process, of how many.
        node_rank, node_size: the same among the processes on this machine.
    """

    rank: int = 0
    size: int = 1
    node_rank: int = 0
    node_size: int = 1
    node: ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """This process decides, writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
        """This process's items: the dearest first, each to whoever has the least to do so far."""
        loads = [0.0] * self.size
        mine: list[int] = []
        for i in sorted(range(len(items)), key=lambda i: (-cost(items[i]), i)):
            owner = min(range(self.size), key=lambda r: (loads[r], r))
            loads[owner] += cost(items[i])
            if owner == self.rank:
                mine.append(i)
        return [items[i] for i in sorted(mine)]

    def broadcast(self, make: Callable[[], T]) -> T:
        """What the first process makes, in every process."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        box = [make() if self.first else None]
        with _contact():
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def gather(self, item: T) -> list[T]:
        """Everybody's item, in the order of ranks, in every process."""
        if self.size == 1:
            return [item]
        import torch.distributed as dist

        box: list[Any] = [None] * self.size
        with _contact():
            dist.all_gather_object(box, item)
        return box

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Everybody's tensors added up, in place and to the same bits in every process."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        for t in tensors:
            for piece in _pieces(t):
                own = piece.cpu()
                parts = [torch.empty_like(own) for _ in range(self.size)]
                with _contact():
                    dist.all_gather(parts, own)
                total = parts[0]
                for part in parts[1:]:  # in the order of ranks
                    total += part
                piece.copy_(total)

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """The first process's tensors, in place in every process."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for t in tensors:
            for piece in _pieces(t):
                own = piece.cpu()
                with _contact():
                    dist.broadcast(own, src=0)
                piece.copy_(own)

    def broadcast_on_node(self, item: T) -> T:
        """The item of this machine's first process, once all on this machine have come here."""
        if self.node_size == 1:
            return item
        import torch.distributed as dist

        box: list[Any] = [None] * self.node_size
        with _contact():
            dist.all_gather_object(box, item, group=self.node)
        return box[0]

    def reduce(self, statistics: Statistics | None) -> Statistics | None:
        """Everybody's statistics merged, in the first process; None in the others.

        Pairs, then pairs of pairs: as many rounds as the number of processes has binary digits.

        Args:
            statistics: of this process's share; None for no share.
        """
        step = 1
        while step < self.size:
            if self.rank % (2 * step) == step:
                _send(statistics, self.rank - step)
                return None
            if self.rank + step < self.size:
                other = _receive(self.rank + step)
                if statistics is None:
                    statistics = other
                elif other is not None:
                    statistics = statistics.merge(other)
            step *= 2
        return statistics


ALONE = Team()
_team = ALONE
_watch: Watch | None = None


def current_team() -> Team:
    """The processes of this run; formed on the first call where a launcher started several.

    Raises:
        ValueError: the launcher's variables are incomplete, or the others do not come.
    """
    global _team, _watch
    if processes() > 1 and _watch is None:
        _watch = _meet()
        _team = _form(_watch)
    return _team


def _meet() -> Watch:
    """Find the others by the launcher's store, and begin to watch them."""
    import torch.distributed as dist
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    missing = [v for v in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(v)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {processes()} but {missing[0]} is not set; start several processes "
            "with `accelerate launch` or `torchrun`"
        )
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is in use already; call moe_fair before init_process_group, or "
            "start it as a program of its own: torchrun -m moe_fair"
        )
    try:
        store, rank, size = next(
            iter(rendezvous("env://", timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT)))
        )
        store = PrefixStore("moe_fair", store)
        own = {"pid": os.getpid(), "host": socket.gethostname(), "node": _node_name()}
        store.set(f"member/{rank}", json.dumps(own))
        members = [json.loads(store.get(f"member/{r}")) for r in range(size)]
    except (RuntimeError, ValueError) as e:
        raise ValueError(
            f"not all of the {processes()} processes came within {RENDEZVOUS_TIMEOUT:.0f} s "
            f"({' '.join(str(e).split())[:200]})"
        ) from e
    return Watch(store, rank, members)


def _form(watch: Watch) -> Team:
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore

    rank, members = watch.rank, watch.members
    store = PrefixStore("gloo", clone(watch.store))
    watch.start()
    with _contact():
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=len(members), timeout=FOREVER
        )
        nodes: dict[str, list[int]] = {}
        for r, m in enumerate(members):
            nodes.setdefault(m["node"], []).append(r)
        groups = {n: dist.new_group(ranks, timeout=FOREVER) for n, ranks in nodes.items()}
    name = members[rank]["node"]
    place = nodes[name].index(rank)
    if torch.accelerator.is_available() and not os.environ.get("ACCELERATE_USE_CPU"):
        torch.accelerator.set_device_index(place % torch.accelerator.device_count())
    return Team(rank, len(members), place, len(nodes[name]), groups[name])


def _node_name() -> str:
    """What all processes of one launcher on one machine have in common."""
    return f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}"


def finish() -> None:
    """Leave together: nobody takes the store away while another still needs it."""
    global _team, _watch
    if _watch is None:
        return
    import torch.distributed as dist

    _watch.leave()
    _team.gather(None)
    _watch.stop()
    dist.destroy_process_group()
    _team, _watch = ALONE, None


def fail(message: str, say: Callable[[str], None], code: int) -> int:
    """Say why this process ends, once for all processes, and end the others. Returns the code.

    Args:
        message: one line.
        say: prints it.
    """
    if _watch is None:  # alone, or not yet met: nobody else can know
        say(message)
        return code
    if not _team.first:
        time.sleep(
            4 * HEARTBEAT_SECONDS
        )  # what all meet, such as bad input, the first process says
    if _watch.claim(message):
        say(message if _team.first else f"{message} (process {_watch.describe(_watch.rank)})")
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(4 * HEARTBEAT_SECONDS)  # the others look before a launcher takes the store away
    end_now(code)


def aloud(line: str) -> None:
    """One line on the screen, from whichever process this is."""
    sys.stdout.flush()
    print_now(line)


@contextmanager
def _contact() -> Iterator[None]:
    """Talk to the others; where one is gone, the watch knows who and ends this process."""
    try:
        yield
    except RuntimeError as e:
        time.sleep(HEARTBEAT_TIMEOUT + 4 * HEARTBEAT_SECONDS)
        raise ValueError(f"lost contact with the other processes: {e}") from e


def _send(statistics: Statistics | None, to: int) -> None:
    import torch.distributed as dist

    header, tensors = statistics.pack() if statistics is not None else ({}, {})
    shapes = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    with _contact():
        dist.send_object_list([header, shapes], dst=to)
        for t in tensors.values():
            for piece in _pieces(t.contiguous()):
                dist.send(piece, dst=to)


def _receive(sender: int) -> Statistics | None:
    import torch
    import torch.distributed as dist

    from moe_fair.core.units import Statistics

    box: list[Any] = [None, None]
    with _contact():
        dist.recv_object_list(box, src=sender)
        header, shapes = box
        tensors = {n: torch.empty(shape, dtype=dtype) for n, (dtype, shape) in shapes.items()}
        for t in tensors.values():
            for piece in _pieces(t):
                dist.recv(piece, src=sender)
    return Statistics.unpack(header, tensors) if header else None


def _pieces(t: Tensor) -> Iterator[Tensor]:
    flat = t.view(-1)
    for start in range(0, flat.numel(), PIECE):
        yield flat[start : start + PIECE]
