"""Loss changes by removals, layer by layer, each kept until the result is safe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_fair.core.output import digest, write_whole
from moe_fair.core.recipe import Recipe
from moe_fair.engines.device import pick_device
from moe_fair.engines.oom import lacking, out_of_memory, release
from moe_fair.engines.progress import Progress
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.engine_choice import weight_dtype
from moe_fair.moe.removal import RemovalLosses

Sets = dict[str, list[list[int]]]
LAYOUT = "batches by length"  # of the numbers in a layer's file


class Removals:
    """The loss change when each of some sets of experts leaves its layer; see `RemovalLosses`.

    Shape legend: D calibration domains, J batches, R sets of a layer.

    Args:
        recipe: how the model is run: batch_size, dtype, device.
        text: what is measured on.
        sets: block name -> the sets of experts to remove.
        work: where each layer's changes are kept; a run that was killed goes on at the next layer.

    Attributes:
        by_batch: block name -> [J, R] float64, changes of each batch's summed loss, as far as they
            are known.
        earlier: how many layers a killed run has left.
        loss: of the whole model, in nats; NaN before anything is known.
        tokens: how many predictions are measured.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Checkpoint,
        text: CalibrationSet,
        sets: Sets,
        work: Path | None,
    ) -> None:
        self.recipe, self.source, self.text, self.sets = recipe, source, text, sets
        self.batches = text.batches(recipe.batch_size)
        self.tokens = sum(int(b.mask[:, 1:].sum()) for b in self.batches)
        self.by_batch: dict[str, Tensor] = {}
        self.loss = math.nan
        layers = {b.name: b.layer for b in source.blocks}
        self._homes = {n: work / f"layer-{layers[n]:05d}.json" for n in sets} if work else {}
        for name, home in self._homes.items():
            self._read(name, home)
        self.earlier = len(self.by_batch)

    @property
    def changes(self) -> dict[str, Tensor]:
        """Block name -> [R] float64, changes of the mean loss, whichever were known before."""
        known = [n for n in self.sets if n in self.by_batch]
        return {n: self.by_batch[n].sum(0) / self.tokens for n in known}

    def by_domain(self, name: str) -> Tensor:
        """[D, R] float64, changes of each domain's summed loss, for one block."""
        domains = torch.tensor([b.domain for b in self.batches])
        found = self.by_batch[name]
        empty = found.new_zeros(len(self.text.domains), found.shape[1])
        return empty.index_add(0, domains, found)

    def measure(self, what: str, say: Callable[[str], None] = lambda _: None) -> None:
        """Whatever is not known yet; where memory runs out, with fewer sequences at a time.

        Args:
            what: said in front of the progress bar.

        Raises:
            ValueError: memory runs out with one sequence at a time.
        """
        most: int | None = None
        while missing := {n: s for n, s in self.sets.items() if n not in self.by_batch}:
            lack = self._attempt(what, missing, most)
            if lack is None:
                return
            release()  # outside of the handler, which held what had been allocated
            size = most or max(len(b.mask) for b in self.batches)
            if size == 1:
                raise ValueError(
                    f"out of memory: {lack}; there is nothing smaller to try than one sequence: "
                    "give a smaller --length or a device with more memory; the same command goes "
                    "on where it stopped"
                )
            most = size // 2
            say(f"out of memory ({lack}): again with {most} sequences at a time instead of {size}")

    def _attempt(self, what: str, missing: Sets, most: int | None) -> str | None:
        """The layers that are missing, one after another; what was lacking where memory ran out.

        Args:
            most: sequences at a time, None: whole batches.
        """
        parts = [(j, p) for j, b in enumerate(self.batches) for p in b.parts(most)]
        batch = torch.tensor([j for j, _ in parts])
        depth = self.source.config.get_text_config().num_hidden_layers
        with Progress(what, self.text.tokens * depth) as progress:
            try:
                model = self.source.load(self.recipe.dtype, self.recipe.device)
                losses = RemovalLosses(model, [p for _, p in parts], progress.visit)
                for name, change in losses.measure(missing):
                    whole = change.new_zeros(len(self.batches), change.shape[1])
                    self.by_batch[name] = whole.index_add(0, batch, change)
                    self.loss = losses.loss
                    if name in self._homes:
                        self._save(name)
            except Exception as e:
                if not out_of_memory(e):
                    raise
                return lacking(e)
        return None

    def _key(self, name: str) -> str:
        """What a layer's changes depend on."""
        device = pick_device(self.recipe.device)
        key = {
            "model": self.source.fingerprint, "text": self.text.digest, "sets": self.sets[name],
            "batch": self.recipe.batch_size, "device": device.type, "layout": LAYOUT,
            "dtype": str(weight_dtype(self.source, self.recipe.dtype, device)),
        }  # fmt: skip
        return digest(key)

    def _read(self, name: str, home: Path) -> None:
        """A layer's changes from an earlier run with the same settings."""
        try:
            found = json.loads(home.read_text())
            if found["key"] == self._key(name):
                self.by_batch[name] = torch.tensor(found["changes"], dtype=torch.float64)
                self.loss = float(found["loss"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # not there, or damaged: measured again

    def _save(self, name: str) -> None:
        home = self._homes[name]
        about = {"key": self._key(name), "loss": self.loss, "changes": self.by_batch[name].tolist()}
        write_whole(home, json.dumps(about))
