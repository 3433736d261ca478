"""Repair after removal: each layer is fitted to the original model's layer on calibration text.

Two streams walk through the layers: one of the original model, one of the pruned one, in which
every layer sees what the repaired layers before it hand on. At an MoE layer the block is cut in
place, and its experts' down projections are fitted so that the pruned layer's OUTPUT comes near the
original layer's: what earlier layers got wrong is made good as far as this one can. Where the
routed output does not simply add to the layer's output, it is fitted to the original's routed
output instead. Everything folds into tensors that are there, so the checkpoint stays stock.

Shape legend: T tokens, K top-k, D model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_fair.engines.batch import Batch
from moe_fair.engines.layer_calls import SEVERAL, LayerCall, NotLayerwise
from moe_fair.engines.memory import usable_memory
from moe_fair.engines.oom import lacking, out_of_memory, release, return_memory
from moe_fair.engines.packing.experts import PackedExperts
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.block_recorder import BlockRecorder
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.domain_folds import domain_folds
from moe_fair.moe.hidden_states import HiddenStates
from moe_fair.moe.judging import judges
from moe_fair.moe.layer_distillation import Distillation, distill_layer, epochs_for
from moe_fair.moe.layer_examples import BlockExamples, Examples, Kinds, LayerExamples
from moe_fair.moe.layer_fit import FitText, fit_layer, precise
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.moe.layer_split import split_of, uptake
from moe_fair.moe.overlay import original_tensors
from moe_fair.moe.repacking import Repacking, StoredLayer
from moe_fair.moe.repaired_layer import changed_tensors, earlier_repair, put_merged, save_repair
from moe_fair.moe.repairs import Repair, check_repairable, repair
from moe_fair.moe.routed_output import write_down
from moe_fair.moe.surgery import cut_block

MOST_PARTS = 16  # in which experts are trained where memory is short
TRAINED = 24  # bytes of a weight in training: float32 with its moments, gradients, the best so far


class Repairer:
    """Repairs the layers of a model while it is cut.

    Args:
        engine: over the ORIGINAL model; its blocks are cut in place as the walk goes on.
        kept: block name -> ids that stay.
        kind: name of the repair.
        folder: where each layer's new tensors are written, one safetensors file a layer; a walk
            that was killed takes up what it finds there with the same `key`.
        key: everything the result depends on: plan, text, settings.
        sparing: what is not in use lies in main memory, hidden activations are computed again, and
            experts are trained in parts where all of them do not fit.
        repacking: of a checkpoint whose weights are packed; layers are judged as they are stored.
        merged: folder of merged layers (`merge.write_merged`), where experts are merged: a layer
            that is cut is given these before it is repaired.

    Raises:
        ValueError: no such repair, or experts that cannot be repaired.
    """

    def __init__(
        self,
        engine: StreamingEngine,
        kept: Mapping[str, Sequence[int]],
        kind: str,
        *,
        folder: Path | None = None,
        key: str = "",
        sparing: bool = False,
        repacking: Repacking | None = None,
        merged: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.repacking, self.merged, self.say = repacking, merged, say
        self.engine, self.kept, self.folder, self.key = engine, kept, folder, key
        self.sparing = sparing
        self.kind: Repair = repair(kind)
        self.trains = bool(getattr(self.kind, "trains", False))
        self.blocks = {b.layer: b for b in find_blocks(engine.model) if b.name in kept}
        for b in self.blocks.values():
            check_repairable(self.kind, b.experts)

    @torch.no_grad()
    def run(self, batches: Sequence[Batch]) -> list[LayerRepair]:
        """Walk once over the batches; returns what was done, in layer order."""
        layered = self.engine.layered
        kinds = Kinds(batches, judges, layered.device)
        batches = [b.to(layered.device) for b in batches]
        calls, first = self.engine.embed(batches)
        if first[0].dim() != 3:
            raise NotLayerwise(SEVERAL.format(type(self.engine.model).__name__))
        original = HiddenStates(first, layered.device, apart=self.sparing)
        pruned = original.branch()
        del first
        done: list[LayerRepair] = []
        depth = len(layered)
        for i in range(depth):
            with layered.layer(i, i + 1 if i + 1 < depth else None) as layer:
                step = [row[i] for row in calls]
                if i in self.blocks:
                    done.append(
                        self._layer(layer, self.blocks[i], step, batches, kinds, original, pruned)
                    )
                    continue
                for j, _ in enumerate(self.engine.visit("repairing", i, batches)):
                    same = original.same(pruned, j)
                    original[j] = step[j].run(layer, original[j])
                    if same:
                        pruned.follow(original, j)
                    else:
                        pruned[j] = step[j].run(layer, pruned[j])
        return done

    def _layer(
        self,
        layer: nn.Module,
        block: MoeBlock,
        calls: Sequence[LayerCall],
        batches: Sequence[Batch],
        kinds: Kinds,
        original: HiddenStates,
        pruned: HiddenStates,
    ) -> LayerRepair:
        """Cut and repair one layer; both streams go past it."""
        share = uptake(layer, block, calls[0], original[0])
        split = split_of(layer, block.block, calls[0], original[0])
        watch = BlockRecorder(block)
        wanted = self._empty()  # the original's routed output, where the layer's will not do
        for j, _ in enumerate(self.engine.visit("repairing", block.layer, batches)):
            with watch:
                original[j] = calls[j].run(layer, original[j])
            if share is None:
                wanted.append(watch.y)
        originals = original_tensors(block, self.kept[block.name][0])
        self._cut(block)
        found = earlier_repair(self.folder, self.key, block) if self.folder else None
        if found is not None:
            for j in range(len(batches)):
                pruned[j] = calls[j].run(layer, pruned[j])
            return found
        text = FitText(kinds, self._left_out(block, batches), self.sparing)
        given = self._empty()  # what the block of a split layer is given; its rest is in `pruned`
        changes = torch.zeros(2, dtype=torch.float32, device=self.engine.layered.device)

        def out(j: int) -> Tensor:
            """Of the pruned layer, once the loop below has left its rest in the stream."""
            if split is None:
                return calls[j].run(layer, pruned[j])
            return pruned[j] + split.run(given[j])

        stored = StoredLayer(self.repacking, block, kinds) if self.repacking is not None else None
        for j in range(len(batches)):
            came = pruned[j]
            if split is None:
                with watch:
                    rest = calls[j].run(layer, pruned[j])
            else:  # from here on a rest, to which the block adds
                changes += kinds.change(j, original[j], pruned[j])
                x, rest = split.parts(calls[j], pruned[j])
                given.append(x)
                pruned[j] = rest
                # where the experts' output simply adds, it is what the fit is about
                with watch if share is None else watch.silent():
                    rest = rest + split.run(x)
            if stored is not None:  # of a split layer the rest lacks what the experts give
                stored.only_cut(j, came, rest if split is None else out(j), original[j])
            if share is None:
                target = wanted[j].flatten(0, -2)
            else:  # the difference of two streams is small beside them: not in their own type
                target = (precise(original[j]) - precise(rest)).flatten(0, -2) / share
                if split is None:
                    target += watch.y
            text.add(j, batches[j].domain, watch, target)
        found, on_all = fit_layer(block, self.kind, *text.joined(), keep=not self.sparing)
        if self.trains:
            examples: Examples
            if split is None:
                examples = LayerExamples(layer, calls, kinds, pruned, original)
            else:
                learned, judged = changes.tolist()
                work = (learned, judged)
                examples = BlockExamples(split, kinds, given, pruned, original, work)
            found = self._trained(found, examples, block, epochs_for(batches))
        if on_all is not None and not found.epoch and stored is None:
            write_down(block.experts, on_all)
        if stored is not None:  # by what judges, which has not taught what is judged
            runs = ((j, out(j), original[j]) for j in range(len(batches)))
            found = stored.settle(found, changed_tensors(block, found), runs)
        if self.folder is not None:
            packed = stored.tensors if stored else {}
            save_repair(self.folder, self.key, block, found, originals, packed)
        return_memory()
        for j in range(len(batches)):
            pruned[j] = out(j)
        return found

    def _empty(self) -> HiddenStates:
        return HiddenStates((), self.engine.layered.device, apart=self.sparing)

    def _cut(self, block: MoeBlock) -> None:
        """Leave the kept experts, as merging made them, in the values that can be stored."""
        cut_block(block, self.kept[block.name])
        if self.merged is not None:
            put_merged(block, self.merged, self.repacking)
        if self.repacking is not None:
            self.repacking.round(block)

    def _left_out(self, block: MoeBlock, batches: Sequence[Batch]) -> set[int]:
        """Domains whose text chooses a layer's ridge in place of teaching: others for each layer.

        Empty where no part of the domains can be left out.
        """
        sizes: Counter[int] = Counter()
        for b in batches:
            sizes[b.domain] += len(b.mask)
        folds = domain_folds(sizes)
        return folds[sorted(self.blocks).index(block.layer) % len(folds)] if folds else set()

    def _trained(
        self, found: LayerRepair, examples: Examples, block: MoeBlock, epochs: int
    ) -> LayerRepair:
        """Train the block; where its float32 weights and moments do not fit, parts one by one.

        Where no part fits either, what was fitted stands.
        """
        done = Distillation(0.0, 0.0, 0)
        part, parts = 0, parts_for(block, self.engine.layered.device)
        if parts > MOST_PARTS:
            self.say(f"{block.name}: its packed experts are too large to train here: fitted alone")
            return found
        while part < parts:
            lack = None
            try:
                now = distill_layer(examples, block, epochs=epochs, part=(part, parts))
                done = replace(now, before=done.before or now.before, epoch=done.epoch or now.epoch)
                part += 1
            except Exception as e:
                if not out_of_memory(e) or not self.sparing:
                    raise
                lack = lacking(e)
            if lack is not None:  # outside of the handler, which held what had been allocated
                release()
                part, parts = 0, 2 * parts
                if parts > MOST_PARTS:
                    self.say(
                        f"{block.name}: out of memory ({lack}): fitted, and trained no further"
                    )
                    break
                what = f"its experts are trained in {parts} parts"
                self.say(f"{block.name}: out of memory ({lack}): {what}")
        return replace(found, epoch=done.epoch, tuned_before=done.before, tuned_after=done.after)


def parts_for(block: MoeBlock, device: torch.device) -> int:
    """In how many parts experts are trained that stay packed since memory is short; else in one."""
    packed = [p for p in block.experts.parameters() if isinstance(p, PackedExperts)]
    weights, parts = sum(p.numel() for p in packed), 1
    if packed:
        # in the model's own type, once all are trained, and a gradient of all
        item, room = 2 * packed[0].itemsize, usable_memory(device)
        while parts <= MOST_PARTS and weights * (item + TRAINED / parts) > room:
            parts *= 2
    return parts
