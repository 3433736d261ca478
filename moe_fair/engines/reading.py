"""How a layer's bytes come from the disk: read ahead, and once per machine for all its processes.

One process maps the checkpoint's own files, and a thread touches the next layer's bytes while this
one computes. Of several processes on a machine the first copies each layer's byte ranges into a
file in memory (memfd), as a safetensors file of its own, and the others map that through /proc: the
disk is read once, nothing has to be sent, and whatever happens the memory goes with the processes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_fair.engines.processes import ALONE, Team
from moe_fair.engines.shard_writer import write_shard
from moe_fair.engines.shards import StoredTensor, stored_tensors

READ_AHEAD = 8 * 2**20


class Reader:
    """Where the tensors of a group (a layer) are to be read from.

    Attributes:
        bytes: that this process has asked of the checkpoint's files.
        groups: how many have been brought.
    """

    def __init__(self) -> None:
        self.bytes = self.groups = 0
        self._thread: threading.Thread | None = None

    def bring(self, group: int, tensors: Sequence[StoredTensor]) -> Sequence[StoredTensor]:
        """The tensors as they are to be read now."""
        self.groups += 1
        self.bytes += sum(t.bytes for t in tensors)
        return tensors

    def ahead(self, group: int, tensors: Sequence[StoredTensor]) -> None:
        """Read bytes that `bring` will ask for next, while something else computes."""
        self._wait()
        self._start(_touch, tensors)

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        """Beside what computes; not at all where memory is too short for a thread of its own."""
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # `bring` reads what has not been read ahead
            return
        self._thread = thread

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class SharedReader(Reader):
    """The same for several processes on a machine, which all ask for the same groups in one order.

    Args:
        team: the processes; those of this machine share.
    """

    def __init__(self, team: Team) -> None:
        super().__init__()
        self.team = team
        self._copies: dict[int, int] = {}  # group -> file in memory, in the first process
        self._fault: OSError | None = None

    def bring(self, group: int, tensors: Sequence[StoredTensor]) -> Sequence[StoredTensor]:
        """The tensors in memory; waits for the other processes of the machine."""
        path = None
        if self.team.node_rank == 0:
            self._wait()
            if self._fault is not None:
                raise self._fault
            if group not in self._copies:
                self._copy(group, tensors)
            path = f"/proc/{os.getpid()}/fd/{self._copies[group]}"
        path = self.team.broadcast_on_node(path)
        assert path is not None
        self.groups += 1
        self._drop_others(group)  # everybody has come here, so all have done with the last one
        return stored_tensors(Path(path))

    def ahead(self, group: int, tensors: Sequence[StoredTensor]) -> None:
        """The machine's first process copies while all compute."""
        if self.team.node_rank == 0:
            self._wait()
            self._start(self._try_copy, group, tensors)

    def _try_copy(self, group: int, tensors: Sequence[StoredTensor]) -> None:
        try:
            self._copy(group, tensors)
        except OSError as e:  # told by the main thread
            self._fault = e

    def _copy(self, group: int, tensors: Sequence[StoredTensor]) -> None:
        if group in self._copies:
            return
        file = os.memfd_create(f"moe_fair-{group}")
        try:
            write_shard(tensors, Path(f"/proc/self/fd/{file}"), self._count)
        except BaseException:
            os.close(file)
            raise
        self._copies[group] = file

    def _count(self, size: int) -> None:
        self.bytes += size

    def _drop_others(self, group: int) -> None:
        for other in [g for g in self._copies if g != group]:
            os.close(self._copies.pop(other))


def reader(team: Team = ALONE) -> Reader:
    """The reader for this machine; where files in memory are unknown, each process reads all."""
    if team.node_size > 1 and hasattr(os, "memfd_create"):
        return SharedReader(team)
    return Reader()


def _touch(tensors: Sequence[StoredTensor]) -> None:
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
