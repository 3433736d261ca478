"""Whether a pruned checkpoint is what its plan says: files, code, tensors, and every kept expert.

Nothing here cuts: which bytes belong to which expert is worked out again from the plan and the two
checkpoints' own layouts. Bytes are read in pieces, so memory does not depend on the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moe_fair.core.manifest import (
    FOLDER,
    MANIFEST,
    check_files,
    check_result,
    write_manifest,
)
from moe_fair.core.plan import Plan
from moe_fair.engines.shards import StoredTensor
from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.moe.tensor_slicing import LAST_NUMBER, ExpertTensor
from moe_fair.pipelines.compared_bytes import (
    Bytes,
    Reading,
    Wrong,
    check_finite,
    check_same,
    check_table,
)
from moe_fair.report.sources import load_healing, load_repairs, saved_as
from moe_fair.vision.checkpoint import PRUNED_FILE
from moe_fair.vision.verify import can_build, check_cuts, check_model, zeros_of

if TYPE_CHECKING:  # what is heavy is imported where it is used: an image classifier needs none
    from moe_fair.moe.checkpoint_source import Checkpoint


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        ok: nothing is wrong; None where it was not looked at.
        detail: what was found, or the first thing that is wrong.
    """

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class Verified:
    """What became of every check of one pruned checkpoint."""

    output: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return all(c.ok is not False for c in self.checks)

    @property
    def wrong(self) -> str:
        """What is, in one line."""
        return "; ".join(f"{c.name}: {c.detail}" for c in self.checks if c.ok is False)


def verify(
    output: Path,
    original: Checkpoint | None = None,
    *,
    hashes: bool = True,
    trust_remote_code: bool = False,
) -> Verified:
    """Check a pruned checkpoint, of a language model or of an image classifier.

    Args:
        output: the directory that `prune` wrote.
        original: the model it was pruned from, to compare every expert with.
        hashes: read every file again for its sha256; `prune`, which has just written the list,
            does not.
        trust_remote_code: build an image classifier whose model function is not a known library's;
            load a tokenizer that is code.

    Raises:
        ValueError: `output` is no pruned checkpoint, or `original` not the one it was pruned from.
    """
    if (output / PRUNED_FILE).is_file():
        if original is not None:
            raise ValueError(
                f"--against compares experts, and {output} is an image classifier: leave it out"
            )
        return _verify_vision(output, hashes, trust_remote_code)
    check_result(output)
    path = output / FOLDER / "plan.json"
    checks = [_check("files", lambda: check_files(output, hashes=hashes))]
    plan: Plan | None = None
    repairs: list[LayerRepair] = []
    healed = False
    try:
        plan, repairs = Plan.load(path), load_repairs(output / FOLDER / "repair.json") or []
        healing = load_healing(output / FOLDER / "heal.json")
        healed = healing is not None and not healing.refused
    except ValueError as e:
        checks.append(Check("plan", False, str(e)))
    if plan is not None and original is not None and not _pruned_from(plan, original):
        raise ValueError(
            f"{output} was pruned from another model than {original.model}; give the one it was "
            "pruned from, as it was then"
        )
    from moe_fair.pipelines.companions import check_code, check_config, check_files_beside

    checks.append(_check("code", lambda: check_code(output, original, trust_remote_code)))
    if plan is None or checks[-1].ok is False:  # a model that is not known cannot be looked into
        return Verified(output, tuple(checks))
    from moe_fair.moe.checkpoint_source import Checkpoint

    stored = saved_as(output)
    made, cut = plan, plan.fingerprint.get("hash_layers", "keep")
    found = Checkpoint(str(output), trust_remote_code=trust_remote_code, hash_layers=cut)
    if original is not None:
        source = original.with_hash_layers(cut)
        # of hash layers that an earlier run has cut too
        counts = dict((source.published.get("moe_fair") or {}).get("experts", {}))
        counts |= {b.name: b.num_experts for b in source.blocks}
        counts |= {name: len(made.kept[name]) for name in counts if name in made.kept}
        left = {
            b.name: len(made.kept.get(b.name, range(b.num_experts)))
            for b in source.heads.blocks
            if made.mtp != "drop"
        }
        look = partial(check_config, counts, source, output, left, stored)
        checks.append(_check("config", look))
        beside = partial(check_files_beside, output, source, found)
        checks.append(_check("side files", beside))
    checks.append(_check("tensors", lambda: _tensors(made, found, stored is None)))
    if checks[-1].ok:
        checks.append(_check("repairs", lambda: _repairs(repairs, healed, found)))
    if checks[-1].ok and original is not None:
        before = original.with_hash_layers(cut)
        look = partial(_experts, made, repairs, healed, before, found, stored)
        checks.append(_check("experts", look))
    elif original is None:
        text = "not compared; --against ORIGINAL compares them byte by byte"
        checks.append(Check("experts", None, text))
    return Verified(output, tuple(checks))


def _verify_vision(output: Path, hashes: bool, trusted: bool) -> Verified:
    checks = [_check("files", lambda: check_files(output, hashes=hashes))]
    if zeros_of(output) is None:
        checks.append(_check("cuts", lambda: check_cuts(output)))
    if checks[-1].ok and not trusted and not can_build(output):
        text = "not built: it runs code of its own; --trust-remote-code builds it"
        checks.append(Check("model", None, text))
    elif all(c.ok for c in checks):  # a model that was changed is not built
        build = partial(check_model, output, trust_remote_code=trusted)
        checks.append(_check("model", build))
    return Verified(output, tuple(checks))


def list_files(output: Path, original: Checkpoint) -> Verified:
    """Write the missing manifest of a result, once all but the hashes has been checked.

    Args:
        original: the model it was pruned from: what is listed is then known to be right.

    Raises:
        ValueError: as `verify`, or there is a manifest.
    """
    if (output / MANIFEST).exists():
        raise ValueError(
            f"{output} has its {MANIFEST}, and --write would hide what has changed since; verify "
            "without --write"
        )
    trusted = original.trust_remote_code
    found = verify(output, original, trust_remote_code=trusted)
    if any(c.ok is False for c in found.checks[1:]):
        return found
    write_manifest(output)
    return verify(output, original, trust_remote_code=trusted)


def _pruned_from(plan: Plan, original: Checkpoint) -> bool:
    return plan.fingerprint.get("model") == original.fingerprint["model"]


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (Wrong, ValueError, OSError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        # a damaged config or table breaks whatever reads it, here or in transformers
        return Check(name, False, " ".join(str(e).split()))


def _tensors(plan: Plan, found: Checkpoint, as_it_came: bool) -> str:
    """The plan's counts are those of the config and of the tensors, and the sizes add up.

    Args:
        as_it_came: weights are stored as the original's: the plan knows their bytes, too.
    """
    from moe_fair.moe.table_surgery import check_tables

    blocks = {b.name: b for b in [*found.blocks, *found.heads.blocks]}
    for name, kept in plan.kept.items():
        if name not in blocks:
            raise Wrong(f"the plan names {name}, which the model does not have")
        if blocks[name].num_experts != len(kept):
            raise Wrong(
                f"{name}: {len(kept)} experts in the plan, {blocks[name].num_experts} in the config"
            )
    known = plan.after if as_it_came else replace(plan.after, bytes=found.size.bytes)
    if found.size != known:
        raise Wrong(
            f"{found.size.parameters:,} parameters in {found.size.bytes:,} bytes, planned "
            f"{plan.after.parameters:,} in {plan.after.bytes:,}"
        )
    kinds: dict[tuple[str, str], list[tuple[int, StoredTensor]]] = {}
    tensors = {t.name: t for t in found.tensors}
    for stored, part in found.parts.items():  # raises where a block's experts are not complete
        if part.expert is not None:
            kind = LAST_NUMBER.sub(r"\g<1>*\g<3>", stored)
            kinds.setdefault((part.block, kind), []).append((part.expert, tensors[stored]))
    check_tables(found)
    for (block, kind), members in kinds.items():
        if sorted(e for e, _ in members) != list(range(blocks[block].num_experts)):
            raise Wrong(f"{kind}: not one for each of {blocks[block].num_experts} experts")
        if len({(t.dtype, t.shape) for _, t in members}) > 1:
            raise Wrong(f"{kind}: the experts differ in shape or data type")
    experts = sum(map(len, plan.kept.values()))
    return f"{len(tensors)} tensors, {experts} experts in {len(plan.groups)} layers, as planned"


def _repairs(repairs: Sequence[LayerRepair], healed: bool, found: Checkpoint) -> str:
    """What repairs and healing changed is finite."""
    changed = repaired_names(repairs, found.blocks)
    layers = len({n for n, _ in changed.values()})
    changed |= dict.fromkeys(_healed_names(healed, found), ("", "heal"))
    count = 0
    with Reading() as reading:
        for t in found.tensors:
            if found.weight_place(t.name) in changed:
                count += 1
                check_finite(t, reading)
    if not changed:
        return "none"
    what = "healed end to end" if healed else f"of {layers} layers"
    return f"{count} tensors {what}, all finite"


def _healed_names(healed: bool, found: Checkpoint) -> Iterator[str]:
    """Names in the model of what healing changed."""
    from moe_fair.moe.healed_weights import healed_parameters

    yield from healed_parameters(found.skeleton) if healed else ()


def repaired_names(
    repairs: Sequence[LayerRepair], blocks: Sequence[MoeBlock]
) -> dict[str, tuple[str, str]]:
    """Name in the model -> (block, repair), of the tensors that the repairs changed.

    Raises:
        ValueError: a repair of a block that the model does not have.
    """
    from moe_fair.moe.repaired_layer import changed_tensors

    named = {b.name: b for b in blocks}
    changed: dict[str, tuple[str, str]] = {}
    for done in repairs:
        if done.name not in named:
            raise ValueError(f"repair.json names {done.name}, which the model does not have")
        changed |= dict.fromkeys(changed_tensors(named[done.name], done), (done.name, done.repair))
    return changed


def _experts(
    plan: Plan,
    repairs: Sequence[LayerRepair],
    healed: bool,
    original: Checkpoint,
    found: Checkpoint,
    stored: str | None,
) -> str:
    """Every tensor holds the bytes of the original's kept experts, but for what was repaired.

    Args:
        stored: as what, where that is not what the original's are; then they are near these.
    """
    from moe_fair.moe.table_surgery import new_tables

    changed = repaired_names(repairs, original.blocks)
    changed |= dict.fromkeys(_healed_names(healed, original), ("", "heal"))
    merged = _merged_names(plan, original)
    if stored is not None:
        from moe_fair.pipelines.verify_converted import check_experts

        tables = new_tables(original, plan.kept)
        return check_experts(plan, original, found, changed, merged, tables)
    place = original.weight_place
    left = {t.name: t for t in found.tensors}
    dropped = {t.name for t in original.heads.tensors} if plan.mtp == "drop" else set()
    tables = new_tables(original, plan.kept)
    same, size, repaired, joined = 0, 0, 0, 0
    with Reading() as reading:
        for t in original.tensors:
            if t.name in dropped:
                continue
            want = _wanted(t, original.parts.get(t.name), plan.kept)
            if want is None:
                continue
            name, shape, ranges = want
            new = left.pop(name, None)
            if new is None:
                raise Wrong(f"{name} is missing")
            if (new.dtype, new.shape) != (t.dtype, shape):
                raise Wrong(
                    f"{name} is {new.dtype} {list(new.shape)}, expected {t.dtype} {list(shape)}"
                )
            if t.name in tables:
                check_table(tables[t.name], new, reading)
                continue
            if place(t.name) in changed:
                repaired += 1
                continue
            part = original.parts.get(t.name)
            if place(t.name) in merged and part is not None:
                own = merged[place(t.name)]
                if part.expert is None or part.expert in own:
                    joined += 1
                    continue
            check_same(t, ranges, new, reading)
            same, size = same + 1, size + new.bytes
    if left:
        raise Wrong(f"{min(left)} is not in the original")
    text = f"{same} tensors, {size:,} bytes, are bitwise the original's"
    text += f"; {joined} hold merged experts" if joined else ""
    text += f"; {len(tables)} tables of token ids name the remaining experts" if tables else ""
    done = "repaired or healed" if healed else "repaired"
    return text + (f"; {repaired} were {done}" if repaired else "")


def _merged_names(plan: Plan, original: Checkpoint) -> dict[str, set[int]]:
    """Name in the model -> experts into which others were merged, of the experts' tensors."""
    into = {g.name: {int(e) for e in g.merged} for g in plan.groups if g.merged}
    return {
        f"{b.name}.{b.path(b.experts, n)}": into[b.name]
        for b in original.blocks
        if b.name in into
        for n, _ in b.experts.named_parameters()
    }


def _wanted(
    t: StoredTensor, part: ExpertTensor | None, kept: Mapping[str, Sequence[int]]
) -> tuple[str, tuple[int, ...], Bytes] | None:
    """An original tensor's name, shape and byte ranges in the result; None where it left."""
    if part is None or part.block not in kept:
        return t.name, t.shape, [(0, t.bytes)]
    ids = kept[part.block]
    if part.expert is not None:
        if part.expert not in ids:
            return None
        head, _, tail = LAST_NUMBER.match(t.name).groups()  # type: ignore[union-attr]
        return f"{head}{ids.index(part.expert)}{tail}", t.shape, [(0, t.bytes)]
    length = t.shape[part.dim]
    one, rest = t.bytes // length * (length // part.experts), length % part.experts
    ranges = [(e * one, one) for e in ids]
    if rest:  # beside the experts' rows
        ranges.append((part.experts * one, t.bytes - part.experts * one))
    count = len(ids) * (length // part.experts) + rest
    return t.name, (*t.shape[: part.dim], count, *t.shape[part.dim + 1 :]), ranges
