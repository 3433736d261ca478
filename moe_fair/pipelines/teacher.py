"""The original's predictions for healing, written before the pruned model is loaded.

Chunk by chunk, each in a file of its own, so that a killed run goes on at the next one. Every
process asks for its share of the sequences, and keeps that share's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_fair.core.recipe import Recipe
from moe_fair.core.say import Say
from moe_fair.engines.batch import Batch
from moe_fair.engines.processes import Team
from moe_fair.engines.progress import Progress
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.greedy_text import beginnings, continuations
from moe_fair.moe.healing_text import HealingText, batches_of
from moe_fair.moe.predictions import Predictions, top_predictions
from moe_fair.pipelines.calibrate import choose_engine, loading, passes
from moe_fair.pipelines.oom_retry import RetryingEngine

PARTS = ("ids", "log_p", "rest")
WRITTEN = "continuations"


class Teacher:
    """Predictions and greedy continuations of the original.

    Args:
        folder: where they lie.
        key: what they depend on; files of another are written anew.
        team: the processes that share the text.
    """

    def __init__(self, folder: Path, key: str, text: HealingText, team: Team, each: int) -> None:
        self.folder, self.key, self.text, self.team = folder, key, text, team
        mine = {*text.teaching(team), *text.judged_by(team)}
        every = sorted({*text.judging, *(i for step in text.steps for i in step)})
        # as many chunks in every process: where layers are streamed, all read them together
        chunks = [every[i : i + each] for i in range(0, len(every), each)]
        self.chunks = [[i for i in chunk if i in mine] for chunk in chunks]
        self.files = {i: self._file(c) for c, chunk in enumerate(self.chunks) for i in chunk}

    def write(self, recipe: Recipe, source: Checkpoint, say: Say) -> None:
        """Ask the original for all that is not there yet; its memory is free again then.

        Raises:
            MemoryError: there is too little of it, here or in another process.
        """
        files = [self._file(c) for c in range(len(self.chunks))] + [self._file(WRITTEN)]
        there = [all(x) for x in zip(*self.team.gather([self._is_ours(f) for f in files]))]  # noqa: B905
        if all(there):
            return
        chosen = self.team.broadcast(lambda: choose_engine(recipe, source, self.team.node_size))
        say(f"the original's predictions, engine: {chosen.engine}")
        left = [c for c, done in enumerate(there[:-1]) if not done]
        tokens = sum(self.text.length(i) for c in left for i in self.chunks[c])
        lack = None
        with Progress("original's predictions", tokens * passes(chosen, source, False)) as progress:
            engine = RetryingEngine(loading(recipe), source, chosen, progress, self.team, say)
            try:
                self._ask(engine, left, not there[-1], recipe.batch_size)
            except ValueError as e:
                # others that read layers in step with this process would wait for it
                if not str(e).startswith("out of memory") or engine.in_step:
                    raise
                lack = str(e)
        if lost := [x for x in self.team.gather(lack) if x is not None]:
            raise MemoryError(lost[0].removeprefix("out of memory: ").partition(";")[0])

    def _ask(self, engine: RetryingEngine, left: Sequence[int], writes: bool, most: int) -> None:
        """Write what is missing: chunks, and whether continuations are."""
        for c in left:
            mine = self.chunks[c]
            batches = batches_of(self.text.text, mine, most) if mine else []
            self._save(self._file(c), dict(_rows(engine.logits(batches, _predicted))))
        if writes:
            written = continuations(
                lambda batch, n: torch.cat(engine.logits([batch], lambda _, x: _first(x, n))),
                beginnings(self.text),
                most,
            )
            self._save(self._file(WRITTEN), {WRITTEN: written})

    def wanted(self, number: int) -> Predictions:
        """Behind each token of a sequence but the last."""
        with safe_open(self.files[number], framework="pt") as f:
            return Predictions(*(f.get_tensor(f"{part} {number}") for part in PARTS))

    def written(self) -> Tensor:
        """[B, WRITTEN] how the original goes on from `beginnings`."""
        with safe_open(self._file(WRITTEN), framework="pt") as f:
            return f.get_tensor(WRITTEN)

    def discard(self) -> None:
        """Forget this process's files."""
        for file in {*self.files.values(), self._file(WRITTEN)}:
            file.unlink(missing_ok=True)

    def _file(self, chunk: int | str) -> Path:
        name = chunk if isinstance(chunk, str) else f"{chunk:05d}"
        return self.folder / f"original-{name}-{self.team.rank}-of-{self.team.size}.safetensors"

    def _is_ours(self, file: Path) -> bool:
        """It is whole, and of this key."""
        if not file.is_file():
            return False
        try:
            with safe_open(file, framework="pt") as f:
                return (f.metadata() or {}).get("key") == self.key
        except (SafetensorError, OSError):
            return False

    def _save(self, file: Path, tensors: dict[str, Tensor]) -> None:
        temporary = file.with_suffix(".partial")
        save_file(tensors, temporary, {"key": self.key})
        temporary.rename(file)


def _first(logits: Tensor, count: int) -> Tensor:
    """[B, count] the tokens ranked first behind the last so many positions."""
    return logits[:, -count:].argmax(-1).cpu()


def _predicted(batch: Batch, logits: Tensor) -> list[tuple[int, Predictions]]:
    """Of each sequence by its number, without padding."""
    found = top_predictions(logits).to(torch.device("cpu"))
    lengths = batch.mask.sum(1).tolist()
    rows = zip(
        batch.sequence_ids.tolist(), lengths, found.ids, found.log_p, found.rest, strict=True
    )
    return [(i, Predictions(*(t[: n - 1].contiguous() for t in parts))) for i, n, *parts in rows]


def _rows(
    batches: Sequence[Sequence[tuple[int, Predictions]]],
) -> list[tuple[str, Tensor]]:
    """Name in the file, and tensor."""
    return [
        (f"{part} {i}", getattr(found, part).clone())
        for rows in batches
        for i, found in rows
        for part in PARTS
    ]
