"""Running a checkpoint over text: statistics that survive a kill, and held-out losses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path

from moe_fair.core.units import STATISTICS_FILE, Statistics
from moe_fair.engines.batch import Batch
from moe_fair.evaluate import HeldoutLoss, heldout_loss
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.calibration import CalibrationSet
from moe_fair.moe.choose import Choice, choose, start, weight_dtype
from moe_fair.moe.collect import ExpertCollector
from moe_fair.moe.load import Checkpoint, pick_device
from moe_fair.progress import Progress
from moe_fair.recipe import Recipe, parse_bytes

Say = Callable[[str], None]


def collect(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    say: Say = lambda _: None,
    work: Path | None = None,
) -> Statistics:
    """Statistics of the calibration set, chunk by chunk.

    Args:
        work: where each chunk's statistics are kept until the result is safe; a run that was killed
            finds them there and goes on. Chunks of another model, text or setting are passed over.
    """
    say(
        f"calibrating on {len(text.sequences)} sequences, {text.tokens:,} tokens of "
        f"{', '.join(text.domains)}"
    )
    batches = text.batches(recipe.batch_size)
    chunks = [batches[i : i + recipe.save_every] for i in range(0, len(batches), recipe.save_every)]
    homes = [work / f"chunk-{i:05d}" if work else None for i in range(len(chunks))]
    fingerprint = {**source.fingerprint, "calibration": text.digest, "run": _run(recipe, source)}
    facts = _facts(recipe, source, text)
    parts = [_finished(home, chunk, fingerprint) for home, chunk in zip(homes, chunks, strict=True)]
    missing = [i for i, part in enumerate(parts) if part is None]
    if len(missing) < len(chunks):
        say(f"going on: {len(chunks) - len(missing)} of {len(chunks)} chunks were done before")
    if missing:
        chosen = choose_engine(recipe, source)
        say(f"engine: {chosen.engine} ({chosen.why})")
        left = sum(int(b.mask.sum()) for i in missing for b in chunks[i])
        total = left * passes(chosen, source, recipe.taylor)
        with Progress("calibrating", total) as progress:
            engine, model = start(
                source, chosen.engine, recipe.dtype, recipe.device, progress.visit
            )
            for i in missing:
                collector = ExpertCollector(
                    find_blocks(model),
                    source.groups,
                    text.domains,
                    taylor=recipe.taylor,
                    counterfactual=recipe.counterfactual,
                    u_score=recipe.u_score,
                )
                with collector:
                    engine.run(chunks[i], collector, backward=recipe.taylor)
                part = parts[i] = collector.statistics(fingerprint, facts)
                home = homes[i]
                if home is not None:
                    part.save(home)
        say("calibrated: " + ", ".join(f"{k} {v:.1f} s" for k, v in engine.seconds.items()))
    # always from the first to the last chunk, so that an interruption leaves no trace in the sums
    return reduce(Statistics.merge, (p for p in parts if p is not None))


def _finished(
    home: Path | None, chunk: Sequence[Batch], fingerprint: dict[str, str]
) -> Statistics | None:
    """A chunk's statistics from an earlier run with the same settings."""
    if home is None or not (home / STATISTICS_FILE).is_file():
        return None
    try:
        found = Statistics.load(home)
    except ValueError:  # damaged, or of another version: measured again
        return None
    ids = sorted(i for b in chunk for i in b.sequence_ids.tolist())
    same = found.fingerprint == fingerprint and found.sequence_ids.tolist() == ids
    return found if same else None


def _run(recipe: Recipe, source: Checkpoint) -> str:
    """The settings on which the numbers depend beside model and text."""
    dtype = weight_dtype(source, recipe.dtype, pick_device(recipe.device))
    kind = "taylor" if recipe.taylor else "forward"
    kind += " counterfactual" if recipe.counterfactual else ""
    kind += " u-score" if recipe.u_score else ""
    return f"{dtype} {kind} batch {recipe.batch_size} chunk {recipe.save_every}"


def _facts(recipe: Recipe, source: Checkpoint, text: CalibrationSet) -> dict[str, object]:
    dtype = weight_dtype(source, recipe.dtype, pick_device(recipe.device))
    run = {
        "model": recipe.model, "revision": recipe.revision, "calibration": list(recipe.calibration),
        "samples": len(text.sequences), "length": recipe.length, "seed": recipe.seed,
        "batch_size": recipe.batch_size, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    return {"calibration": run, "size": asdict(source.size), "model_type": source.config.model_type}


def discard(work: Path) -> None:
    """Forget what an earlier run left."""
    shutil.rmtree(work, ignore_errors=True)


def measure(recipe: Recipe, source: Checkpoint, text: CalibrationSet, what: str) -> HeldoutLoss:
    """Held-out loss of one checkpoint."""
    chosen = choose_engine(recipe, source)
    with Progress(what, text.tokens * passes(chosen, source, False)) as progress:
        engine, _ = start(source, chosen.engine, recipe.dtype, recipe.device, progress.visit)
        return heldout_loss(engine, text.batches(recipe.batch_size), text.domains)


def passes(chosen: Choice, source: Checkpoint, backward: bool) -> int:
    """How often an engine goes over the batches: for the progress bar."""
    layers = source.config.get_text_config().num_hidden_layers
    return layers * (2 if backward else 1) if chosen.engine == "streaming" else 1


def choose_engine(recipe: Recipe, source: Checkpoint) -> Choice:
    """The engine that runs this checkpoint here."""
    device = pick_device(recipe.device)
    limit = parse_bytes("--max-memory", recipe.max_memory) if recipe.max_memory else None
    item = weight_dtype(source, recipe.dtype, device).itemsize
    return choose(recipe.engine, source.size, item, device, limit)
