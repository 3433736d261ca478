"""Making do with less memory: smaller batches, then one layer at a time.

A pass over batches that runs out of memory is made again from its start, with nothing kept of it:
first with batches cut in half, down to single sequences, then by the streaming engine, with whole
batches again and, where even these are too large, halves. Each step says so in one line.

What is measured is the same. A part of a batch keeps the batch's padding and sequence ids, sums are
added in float64 and Taylor rows belong to sequences, so a part gives what its rows gave before, as
far as the kernels do: a matrix product in float32 rounds otherwise for another number of rows. The
streaming engine with whole batches gives the same bits.

Of several processes each makes do for itself. Where they read layers together, in step, whoever has
done its share reads along until all have done theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from moe_fair.engines.batch import After, Batch, Engine, Observer
from moe_fair.engines.layer_calls import NotLayerwise
from moe_fair.engines.oom import lacking, out_of_memory, release
from moe_fair.engines.processes import ALONE, Team, aloud
from moe_fair.engines.progress import Progress
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.engine_choice import Choice, start, start_layerwise

T = TypeVar("T")


class Watching(Observer, Protocol):
    """An observer that is entered while an engine runs, and what goes on after its model."""

    @property
    def after(self) -> After | None: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: object) -> None: ...


W = TypeVar("W", bound=Watching)


@dataclass(frozen=True)
class Loading:
    """How a model is loaded, whichever engine runs it; the settings of these names.

    Attributes:
        length: of the sequences, for what is said where nothing smaller can be tried.
        room: bytes that weights may take; None: what is usable of the free memory.
    """

    dtype: str
    device: str
    device_map: str | None
    checkpointing: bool
    length: int
    room: int | None = None


class RetryingEngine:
    """An engine with its model, and what follows when its memory does not suffice.

    Args:
        chosen: the engine to begin with, the same in every process.
        team: the processes that run their shares at the same time.

    Attributes:
        most: sequences at a time; None: as many as a batch has.
    """

    engine: Engine
    model: nn.Module

    def __init__(
        self,
        loading: Loading,
        source: Checkpoint,
        chosen: Choice,
        progress: Progress,
        team: Team = ALONE,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.loading, self.source, self.progress = loading, source, progress
        self.team, self.say = team, say
        self.name = chosen.engine
        self.most: int | None = None
        self.fell = False  # from a resident model to streaming
        self.in_step = chosen.engine == "streaming" and team.size > 1
        self.seconds: dict[str, float] = {}
        lack = None
        try:
            self._start(team)
        except Exception as e:
            if self.name != "resident" or not out_of_memory(e):
                raise
            lack = lacking(e)
        if lack is not None:
            self._stream(lack)

    @property
    def bytes_read(self) -> int:
        """By this process, of the checkpoint's files."""
        return self.engine.bytes_read

    def collect(
        self,
        batches: Sequence[Batch],
        collector: Callable[[nn.Module], W],
        *,
        backward: bool,
    ) -> W:
        """Run the batches before a collector, a new one for every attempt."""

        def attempt(parts: Sequence[Batch]) -> W:
            found = collector(self.model)
            with found:
                self.engine.run(parts, found, backward=backward, after=found.after)
            return found

        return self._until_it_fits(batches, attempt)

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch, in main memory: losses and weights, see `Engine.losses`."""

        def attempt(parts: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
            return [(a.cpu(), b.cpu()) for a, b in self.engine.losses(parts)]

        measured = iter(self._until_it_fits(batches, attempt))
        for batch in batches:
            parts = [next(measured) for _ in batch.parts(self.most)]
            losses, weights = zip(*parts, strict=True)
            yield torch.cat(losses), torch.cat(weights)

    def logits(self, batches: Sequence[Batch], keep: Callable[[Batch, Tensor], T]) -> list[T]:
        """What is kept of the logits [B, L, V] of every batch, or of its parts, in order."""

        def attempt(parts: Sequence[Batch]) -> list[T]:
            return [keep(b, x) for b, x in zip(parts, self.engine.logits(parts), strict=True)]

        return self._until_it_fits(batches, attempt)

    def _until_it_fits(
        self, batches: Sequence[Batch], attempt: Callable[[Sequence[Batch]], T]
    ) -> T:
        done: T | None = None
        while True:
            parts = [] if done is not None else [p for b in batches for p in b.parts(self.most)]
            found, lack = None, None
            try:
                found = attempt(parts)
            except NotLayerwise as e:
                if not self.fell:
                    raise
                raise self._no_more(str(e)) from e
            except Exception as e:
                if not out_of_memory(e):
                    raise
                lack = lacking(e)
            # outside of the handler: the exception held all that the attempt had allocated
            done = found if done is None else done
            if all(self.team.gather(lack is None) if self.in_step else [lack is None]):
                assert done is not None
                return done
            if lack is not None:
                self._less(lack, max((len(p.mask) for p in parts), default=1))
                self.progress.add(sum(int(b.mask.sum()) for b in batches))

    def _less(self, lack: str, size: int) -> None:
        """The next smaller thing to try after `size` sequences at a time."""
        release()
        if size > 1:
            self.most = size // 2
            self._tell(
                f"out of memory ({lack}): again with {self.most} sequences at a time instead of "
                f"{size}; the statistics are the same"
            )
        elif self.name == "resident":
            self._stream(lack)
        else:
            raise self._no_more(lack)

    def _stream(self, lack: str) -> None:
        """From the model in memory to one layer at a time, each process by itself."""
        vars(self).pop("engine", None), vars(self).pop("model", None)
        release()
        self.name, self.most, self.fell = "streaming", None, True
        self._tell(
            f"out of memory ({lack}): again with the streaming engine, one layer at a time; the "
            "statistics are the same"
        )
        try:
            self._start(ALONE)
        except Exception as e:
            if isinstance(e, ValueError) or out_of_memory(e):
                raise self._no_more(lacking(e)) from e
            raise

    def _start(self, team: Team) -> None:
        self.engine, self.model = start(
            self.source,
            self.name,
            self.loading.dtype,
            self.loading.device,
            self.progress.visit,
            team,
            device_map=self.loading.device_map if self.name == "resident" else None,
            checkpointing=self.loading.checkpointing,
            room=self.loading.room,
        )
        self.seconds = self.engine.seconds

    def _no_more(self, lack: str) -> ValueError:
        return ValueError(
            f"out of memory: {lack}; there is nothing smaller to try than one sequence of "
            f"{self.loading.length} tokens with the {self.name} engine: give a smaller --length, "
            "--checkpointing, or a device with more memory; the same command goes on where it "
            "stopped"
        )

    def _tell(self, line: str) -> None:
        """By the first process as everything else; the others speak for themselves."""
        if self.team.first:
            self.say(line)
        else:
            aloud(f"{line} (process {self.team.rank} of {self.team.size})")


class NothingSmaller(Exception):
    """Memory runs out however little is tried; its text is the last that was said of it."""


def layerwise_until_it_fits(
    source: Checkpoint,
    engine: str,
    loading: Loading,
    progress: Progress,
    attempts: Sequence[tuple[str, Callable[[StreamingEngine], T]]],
    say: Callable[[str], None] = lambda _: None,
) -> T:
    """What the first attempt gives that finds memory enough, over a fresh original model each time.

    The first is made with the engine that was chosen, and where that was `resident` again a layer
    at a time; the others, a layer at a time, ask for less and less.

    Args:
        attempts: what is other than before, in words, and what is done with an engine.

    Raises:
        NothingSmaller: the last ran out of memory too.
    """
    engines = [engine, *(["streaming"] if engine == "resident" else [])]
    ladder = [(e, words, attempt) for words, attempt in attempts[:1] for e in engines]
    ladder += [(engines[-1], words, attempt) for words, attempt in attempts[1:]]
    for step, (name, _, attempt) in enumerate(ladder):
        running: StreamingEngine | None = None
        try:
            running = start_layerwise(
                source, name, loading.dtype, loading.device, progress.visit, room=loading.room
            )
            return attempt(running)
        except Exception as e:
            if not out_of_memory(e):
                raise
            lack = lacking(e)
        running = None  # outside of the handler: the exception held what the attempt had allocated
        release()
        if step + 1 < len(ladder):
            now, words, _ = ladder[step + 1]
            how = "one layer at a time" if now != name else words
            say(f"out of memory ({lack}): again {how}")
    raise NothingSmaller(lack)
