"""Repair after removal: each layer is fitted to the original model's layer on calibration text.

Two streams walk through the layers: one of the original model, one of the pruned one, in which
every layer sees what the repaired layers before it hand on. At an MoE layer the block is cut in
place, and its experts' down projections are fitted so that the pruned layer's OUTPUT comes near the
original layer's: what earlier layers got wrong is made good as far as this one can. Where the
routed output does not simply add to the layer's output, it is fitted to the original's routed
output instead. Everything folds into tensors that are there, so the checkpoint stays stock.

Text that has not taught decides how strongly a fit is regularised, and whether it helps: that of
domains which are left out, others for each layer, where there are several; then a held-out share of
the sequences.

Shape legend: T tokens, K top-k, D model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moe_fair.engines.batch import Batch
from moe_fair.engines.memory import usable_memory
from moe_fair.engines.oom import lacking, out_of_memory, release, return_memory
from moe_fair.engines.packing.experts import PackedExperts, as_stored
from moe_fair.engines.shard_writer import write_shard
from moe_fair.engines.streaming import LayerCall, NotLayerwise, StreamingEngine
from moe_fair.moe.block_recorder import BlockRecorder
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.domain_folds import domain_folds
from moe_fair.moe.hidden_states import HiddenStates
from moe_fair.moe.layer_distillation import Distillation, distill_layer, epochs_for
from moe_fair.moe.layer_examples import BlockExamples, Examples, Kinds, LayerExamples
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.moe.layer_split import split_of
from moe_fair.moe.overlay import ORIGINAL, layer_file, original_tensors
from moe_fair.moe.repacking import PACKED, Repacking, StoredLayer
from moe_fair.moe.repairs import Repair, check_repairable, repair
from moe_fair.moe.routed_output import RoutedOutput, read_down, write_down
from moe_fair.moe.surgery import cut_block

HELD_OUT = 5  # every fifth sequence judges the fits
MOST_PARTS = 16  # in which experts are trained where memory is short
TRAINED = 24  # bytes of a weight in training: float32 with its moments, gradients, the best so far
ROUNDING = 1e-10  # an error below this is no error
PROBE = 0.1  # a change of the routed output, relative to it, that shows how the layer takes it up
# (tokens, target, ridges, start) -> each ridge with its down projections [E, F, D]
Fits = Callable[..., Iterator[tuple[float, Tensor]]]
REPAIR_FORMAT = "moe_fair.repair/2"


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
            raise NotLayerwise(
                f"{type(self.engine.model).__name__}: layers carry several streams of hidden "
                "states, which no repair is made for; use --repair none"
            )
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
        # the original layer's output, or its routed output
        wanted = HiddenStates((), self.engine.layered.device, apart=self.sparing)
        for j, _ in enumerate(self.engine.visit("repairing", block.layer, batches)):
            with watch:
                original[j] = calls[j].run(layer, original[j])
            if share is None:
                wanted.append(watch.y)
        originals = original_tensors(block, self.kept[block.name][0])
        cut_block(block, self.kept[block.name])
        if self.merged is not None:
            put_merged(block, self.merged, self.repacking)
        if self.repacking is not None:
            self.repacking.round(block)
        found = self._earlier(block)
        if found is not None:
            for j in range(len(batches)):
                pruned[j] = calls[j].run(layer, pruned[j])
            return found
        text = _Text(kinds, self._left_out(block, batches), self.sparing)
        given = HiddenStates((), self.engine.layered.device, apart=self.sparing)
        changes = torch.zeros(2, dtype=torch.float32, device=self.engine.layered.device)

        def out(j: int) -> Tensor:
            """Of the pruned layer, once the loop below has left its rest in the stream."""
            if split is None:
                return calls[j].run(layer, pruned[j])
            return pruned[j] + split.run(given[j])

        stored = None
        if self.repacking is not None:
            stored = StoredLayer(self.repacking, block, kinds)
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
        found, on_all = _fit(block, self.kind, *text.joined(), keep=not self.sparing)
        if self.trains:
            examples: Examples
            if split is None:
                examples = LayerExamples(layer, calls, kinds, pruned, original)
            else:
                learned, judged = changes.tolist()
                work = (learned, judged)
                examples = BlockExamples(split, kinds, given, pruned, original, work)
            tuned = self._train(examples, block, epochs_for(batches))
            found = replace(
                found, epoch=tuned.epoch, tuned_before=tuned.before, tuned_after=tuned.after
            )
        if on_all is not None and not found.epoch and stored is None:
            write_down(block.experts, on_all)
        if stored is not None:  # by what judges, which has not taught what is judged
            runs = ((j, out(j), original[j]) for j in range(len(batches)))
            found = stored.settle(found, changed_tensors(block, found), runs)
        self._save(block, found, originals, stored.tensors if stored else {})
        return_memory()
        for j in range(len(batches)):
            pruned[j] = out(j)
        return found

    def _left_out(self, block: MoeBlock, batches: Sequence[Batch]) -> set[int]:
        """Domains whose text chooses a layer's ridge in place of teaching: others for each layer.

        Empty where no part of the domains can be left out.
        """
        sizes: Counter[int] = Counter()
        for b in batches:
            sizes[b.domain] += len(b.mask)
        folds = domain_folds(sizes)
        return folds[sorted(self.blocks).index(block.layer) % len(folds)] if folds else set()

    def _train(self, examples: Examples, block: MoeBlock, epochs: int) -> Distillation:
        """Train the block; where its float32 weights and moments do not fit, parts one by one.

        Where no part fits either, what was fitted stands.
        """
        done = Distillation(0.0, 0.0, 0)
        part, parts = 0, parts_for(block, self.engine.layered.device)
        if parts > MOST_PARTS:
            self.say(f"{block.name}: its packed experts are too large to train here: fitted alone")
            return done
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
        return done

    def _path(self, block: MoeBlock) -> Path | None:
        return layer_file(self.folder, block) if self.folder else None

    def _save(
        self,
        block: MoeBlock,
        done: LayerRepair,
        originals: dict[str, Tensor],
        packed: Mapping[str, Tensor],
    ) -> None:
        path = self._path(block)
        if path is None:
            return
        changed = changed_tensors(block, done)
        tensors = {n: p.detach() for n, p in changed.items()}
        tensors |= {ORIGINAL + n: originals[n] for n in changed}
        tensors |= {PACKED + n: t for n, t in packed.items()}
        about = {"format": REPAIR_FORMAT, "key": self.key, "done": json.dumps(asdict(done))}
        temporary = path.with_suffix(".partial")
        # those of wide numbers first, so that each lies where its type may
        stored = sorted(tensors.items(), key=lambda x: -x[1].itemsize)
        write_shard([as_stored(n, t) for n, t in stored], temporary, metadata=about)
        temporary.rename(path)

    def _earlier(self, block: MoeBlock) -> LayerRepair | None:
        """What a killed run did to this layer, put into the block."""
        path = self._path(block)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as f:
                header = f.metadata() or {}
                if header.get("format") != REPAIR_FORMAT or header.get("key") != self.key:
                    return None
                done = LayerRepair(**json.loads(header["done"]))
                new = {n: f.get_tensor(n) for n in changed_tensors(block, done)}
        except (SafetensorError, OSError, ValueError, TypeError):
            return None  # damaged: fitted again
        for name, p in changed_tensors(block, done).items():
            p.data.copy_(new[name])
        return done


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


def changed_tensors(block: MoeBlock, done: LayerRepair) -> dict[str, nn.Parameter]:
    """Name in the model -> parameter, of what a repair changed."""
    every = {f"{block.name}.{n}": p for n, p in block.block.named_parameters()}
    if done.epoch:
        return every
    if done.repair == "none":
        return {}
    down = ("down_proj", "down_proj_bias")
    changed = {id(p) for n, p in block.experts.named_parameters() if n in down}
    return {n: p for n, p in every.items() if id(p) in changed}


def put_merged(block: MoeBlock, folder: Path, repacking: Repacking | None) -> None:
    """Give a block that was cut what its experts are merged into, as the result will hold it."""
    path = layer_file(folder, block)
    if not path.is_file():  # of this layer none are
        return
    every = {f"{block.name}.{n}": p for n, p in block.block.named_parameters()}
    with safe_open(path, framework="pt") as f:
        for name in (n for n in f.keys() if not n.startswith(ORIGINAL)):  # noqa: SIM118
            values = f.get_tensor(name)
            if repacking is not None and name in repacking:
                values = repacking.pack(name, values)[0]
            every[name].data.copy_(values)


def judges(batch: Batch) -> Tensor:
    """[B] which sequences judge the fits instead of teaching them."""
    return batch.sequence_ids % HELD_OUT == HELD_OUT - 1


def teaching(batches: Sequence[Batch]) -> list[Batch]:
    """What is left of the batches without the sequences that judge."""
    left = []
    for b in batches:
        stays = ~judges(b)
        if bool(stays.any()):
            ids, mask, sequences = (t[stays] for t in (b.input_ids, b.mask, b.sequence_ids))
            left.append(Batch(ids, mask, sequences, b.domain))
    return left


def uptake(layer: nn.Module, block: MoeBlock, call: LayerCall, hidden: Tensor) -> float | None:
    """c where the layer's output takes up a change δ of the routed output as c·δ; None elsewhere.

    1 in most families, a residual multiplier in some, None behind a norm.
    """
    watch = BlockRecorder(block)
    with watch:
        out = call.run(layer, hidden)
    y = watch.y
    if y.numel() != out.numel():
        return None
    change = PROBE * y.roll(1, 0)
    with watch.adding(change):
        moved = call.run(layer, hidden)
    wide, d = change.double(), (moved.double() - out.double()).view_as(y)
    c = float((wide * d).sum() / wide.square().sum())
    rest = float((d - c * wide).norm() / d.norm())
    # what float rounding of the sum leaves; behind a norm it is of order one
    near = 1e-3 if y.dtype in (torch.float32, torch.float64) else 0.1
    return c if rest < near and c != 0 else None


class _Text:
    """What went into the pruned layer's experts, and what should come out.

    Args:
        left: domains whose text comes last of what teaches.
        apart: it lies in main memory until it is joined.
    """

    def __init__(self, kinds: Kinds, left: Collection[int], apart: bool) -> None:
        self.kinds, self.left, self.apart = kinds, left, apart
        # what teaches, of other domains and of these; then what judges
        self._parts: list[list[tuple[Tensor, ...]]] = [[], [], []]

    def add(self, j: int, domain: int, watch: BlockRecorder, target: Tensor) -> None:
        part: tuple[Tensor, ...] = (watch.x, watch.index, watch.weights, target)
        self.device = target.device
        for judging in (False, True):
            if self.kinds.counts[judging][j]:
                kept = tuple(self.kinds.some(t, j, judging) for t in part)
                place = 2 if judging else int(domain in self.left)
                self._parts[place].append(tuple(t.cpu() for t in kept) if self.apart else kept)

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int]]:
        """Those that teach, then those that judge; how many teach, of other domains and of all."""
        others, left = (sum(len(part[0]) for part in parts) for parts in self._parts[:2])
        columns = zip(*(part for parts in self._parts for part in parts), strict=True)
        x, ids, weights, target = (torch.cat(t).to(self.device) for t in columns)
        self._parts.clear()
        return x, ids, weights, target, (others, others + left)


def _fit(
    block: MoeBlock,
    kind: Repair,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    target: Tensor,
    counts: tuple[int, int],
    *,
    keep: bool = True,
) -> tuple[LayerRepair, Tensor | None]:
    """Choose the ridge on text that the fits have not seen, and write the fit into the block.

    Where some of what teaches is of domains that are left out, they choose the ridge, and whether
    there is a fit at all; else the held-out tokens do, who judge the fit in any case.

    Args:
        counts: so many tokens teach, without the domains that are left out and with them; the
            rest judge.
        keep: of the experts' hidden activations what is small, see `RoutedOutput`.

    Returns:
        what was done, and the down projections that were fitted to all tokens: what judges has
        taught them, so that nothing that comes after can be compared with them.
    """
    target = precise(target)
    others, learn = counts
    if not 0 < learn < len(x):
        # too few sequences to hold one out: every fifth token, weaker evidence
        judge = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
        order = torch.argsort(judge.to(torch.uint8), stable=True)
        x, ids, weights, target = x[order], ids[order], weights[order], target[order]
        others = learn = len(x) - len(x) // HELD_OUT
    routed = RoutedOutput(block.experts, x, ids, weights, keep=keep)
    fitting, judging = routed.split(learn)
    path: Fits = getattr(kind, "path", None) or partial(_one_by_one, kind)

    def chosen(
        teach: RoutedOutput, judge: RoutedOutput, at: int, end: int
    ) -> tuple[float, float, float, Tensor | None]:
        """The error before and with the best ridge, that and its fit.

        Args:
            at: so many tokens teach; those from here to `end` judge.
        """
        before = error(judge.output(read_down(block.experts)), target[at:end])
        after, ridge, best = float("inf"), 0.0, None
        for tried, w in path(teach, target[:at], kind.ridges):
            now = error(judge.output(w), target[at:end])
            if (now, tried) < (after, ridge):
                after, ridge, best = now, tried, w if keep else w.cpu()
        return before, after, ridge, best

    if 0 < others < learn:
        elsewhere, after, ridge, best = chosen(*fitting.split(others), others, learn)
        before = error(judging.output(read_down(block.experts)), target[learn:])
        if best is not None and after < elsewhere:
            [(_, w)] = path(fitting, target[:learn], [ridge], best)
            after, best = error(judging.output(w), target[learn:]), w if keep else w.cpu()
        else:
            best = None
    else:
        before, after, ridge, best = chosen(fitting, judging, learn, len(x))
    if best is None or not after < before or before < ROUNDING:
        return LayerRepair(block.name, "none", 0.0, before, before), None
    [(_, w)] = path(routed, target, [ridge], best)
    w = w.to(next(p.dtype for p in block.experts.parameters()))  # as it will be written
    write_down(block.experts, best)
    return LayerRepair(block.name, kind.name, ridge, before, after), w if keep else w.cpu()


def _one_by_one(
    kind: Repair,
    routed: RoutedOutput,
    target: Tensor,
    ridges: Sequence[float],
    _: Tensor | None = None,
) -> Iterator[tuple[float, Tensor]]:
    """Each ridge with its fit, none of which knows of another."""
    for ridge in ridges:
        yield ridge, kind.fit(routed, target, ridge)


def precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def error(y: Tensor, target: Tensor) -> float:
    """‖target - y‖² / ‖target‖²; NaN never passes for small."""
    sums = [(target - y).square().sum(dtype=torch.float64)]
    sums.append(target.square().sum(dtype=torch.float64))
    wrong, size = torch.stack(sums).tolist()  # both at once: a device is waited for
    e = wrong / max(size, 1e-300)
    return e if e == e else float("inf")
