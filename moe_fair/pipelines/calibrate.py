"""Running a checkpoint over text: statistics that survive a kill, and held-out losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial, reduce
from pathlib import Path

from torch import Tensor, nn

from moe_fair.core.output import Place, discard
from moe_fair.core.recipe import Recipe
from moe_fair.core.say import Say
from moe_fair.core.sizes import parse_bytes
from moe_fair.core.units import STATISTICS_FILE, Statistics
from moe_fair.engines.batch import Batch, Losses
from moe_fair.engines.device import pick_device
from moe_fair.engines.processes import ALONE, Team, is_first
from moe_fair.engines.progress import Progress
from moe_fair.evaluate import HeldoutLoss, heldout_loss
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.device_map import placement
from moe_fair.moe.engine_choice import Choice, choose, weight_dtype
from moe_fair.moe.mtp_head import HeadRunner
from moe_fair.moe.statistics import Collected, usual
from moe_fair.pipelines.mtp_heads import collects_heads, head_facts
from moe_fair.pipelines.oom_retry import Loading, RetryingEngine

# families whose names are not in a fingerprint where all are there, and the order of others
PLAIN = ("routing", "output_norms", "output_vectors", "weights")
NAMED = ("counterfactual", "u_score", "gram")


def collect(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    say: Say = lambda _: None,
    work: Path | None = None,
    team: Team = ALONE,
    *,
    collected: Collected | None = None,
) -> Statistics | None:
    """Statistics of the calibration set, chunk by chunk.

    Every process runs its share of a chunk's batches. The batches are the same for any number of
    processes and sums do not depend on their order (`core.exact_sum`), so neither do the results.

    Args:
        work: where each chunk's statistics are kept until the result is safe; a run that was killed
            finds them there and goes on, also with another number of processes. Chunks of another
            model, text or setting are passed over.
        team: the processes that do this together.
        collected: what is collected; by default what `calibrate` does where nothing is asked for.

    Returns:
        the statistics in the first process, None in the others.
    """
    collected = usual() if collected is None else collected
    say(
        f"calibrating on {len(text.sequences)} sequences, {text.tokens:,} tokens of "
        f"{', '.join(text.domains)}"
    )
    heads = collects_heads(recipe.mtp, source)
    if heads:
        say(f"MTP head {source.heads.name}: runs behind the model on the same text")
    batches = text.batches(recipe.batch_size)
    chunks = [batches[i : i + recipe.save_every] for i in range(0, len(batches), recipe.save_every)]
    homes = [work / f"chunk-{i:05d}" if work else None for i in range(len(chunks))]
    run = _run(recipe, source, collected, heads)
    fingerprint = {**source.fingerprint, "calibration": text.digest, "run": run}
    facts = _facts(recipe, source, text)
    parts: list[Statistics | None] = [None] * len(chunks)
    if team.first:
        sums = [n for n, s in collected.statistics().items() if s.kind == "sum"]
        pairs = zip(homes, chunks, strict=True)
        parts = [_finished(home, c, fingerprint, sums) for home, c in pairs]
    missing = team.broadcast(lambda: [i for i, part in enumerate(parts) if part is None])
    if len(missing) < len(chunks):
        say(f"going on: {len(chunks) - len(missing)} of {len(chunks)} chunks were done before")
    if missing:
        chosen = _chosen(recipe, source, team)
        say(f"engine: {chosen.engine} ({chosen.why})")
        if team.size > 1:
            say(_sharing(team, max(len(chunks[i]) for i in missing)))
        shares = {i: team.share(chunks[i], _cost) for i in missing}
        left = sum(int(b.mask.sum()) for share in shares.values() for b in share)
        total = left * passes(chosen, source, collected.backward)
        with Progress("calibrating", total) as progress:
            engine = RetryingEngine(loading(recipe), source, chosen, progress, team, say)
            if recipe.device_map:
                say(placement(engine.model))
            along = (recipe.dtype, recipe.device) if heads else None
            for i in missing:
                collector = engine.collect(
                    shares[i],
                    partial(_collector, source, text, collected, along),
                    backward=collected.backward,
                )
                own = collector.statistics(fingerprint, facts) if shares[i] else None
                part = team.reduce(own)
                home = homes[i]
                if part is not None:
                    part = parts[i] = part.rounded()
                    if home is not None:
                        part.save(home)
        read = sum(team.gather(engine.bytes_read))
        say(
            "calibrated: "
            + ", ".join(f"{k} {v:.1f} s" for k, v in engine.engine.seconds.items())
            + (f"; {read:,} bytes of weights read" if read else "")
        )
    if not team.first:
        return None
    # always from the first to the last chunk, so that an interruption leaves no trace in the sums
    return reduce(Statistics.merge, (p for p in parts if p is not None)).rounded()


def _collector(
    source: Checkpoint,
    text: CalibrationSet,
    collected: Collected,
    along: tuple[str, str] | None,
    model: nn.Module,
) -> ExpertCollector:
    """A new collector before a model.

    Args:
        along: --dtype and --device of the heads that run along; None where none do.
    """
    runner = None
    if along is not None:
        device = pick_device(along[1])
        runner = HeadRunner(source, model, weight_dtype(source, along[0], device), device)
    return ExpertCollector(
        [*find_blocks(model), *(runner.blocks if runner else ())],
        tuple(g for g in source.groups if runner or not g.follows),
        text.domains,
        collected,
        after=runner,
    )


def _cost(batch: Batch) -> float:
    """What a batch costs, up to a factor: its positions, padding included."""
    return float(batch.mask.numel())


def _sharing(team: Team, most: int) -> str:
    """How many processes work, for the screen."""
    working = min(team.size, most)
    text = f"{working} of {team.size} processes share the batches"
    if working < team.size:
        text += f"; a chunk has no more than {most} (a smaller --batch-size makes more of them)"
    return text


def _finished(
    home: Path | None, chunk: Sequence[Batch], fingerprint: dict[str, str], sums: Sequence[str]
) -> Statistics | None:
    """A chunk's statistics from an earlier run with the same settings.

    Args:
        sums: names of those that it holds, unless an earlier version made it.
    """
    if home is None or not (home / STATISTICS_FILE).is_file():
        return None
    try:
        found = Statistics.load(home)
    except ValueError:  # damaged, or of another version: measured again
        return None
    ids = sorted(i for b in chunk for i in b.sequence_ids.tolist())
    same = found.fingerprint == fingerprint and found.sequence_ids.tolist() == ids
    return found if same and all(map(found.holds, sums)) else None


def loading(recipe: Recipe) -> Loading:
    """How the models of a recipe are loaded."""
    return Loading(
        recipe.dtype, recipe.device, recipe.device_map, recipe.checkpointing, recipe.length,
        room_of(recipe),
    )  # fmt: skip


def room_of(recipe: Recipe) -> int | None:
    """Bytes that weights may take; None: what is usable of the free memory."""
    return parse_bytes("--max-memory", recipe.max_memory) if recipe.max_memory else None


def _run(recipe: Recipe, source: Checkpoint, collected: Collected, heads: bool) -> str:
    """The settings on which the numbers depend beside model and text."""
    dtype = weight_dtype(source, recipe.dtype, pick_device(recipe.device))
    kind = _kind(collected)
    kind += " mtp" if heads else ""
    return f"{dtype} {kind} batch {recipe.batch_size} chunk {recipe.save_every}"


def _kind(collected: Collected) -> str:
    """What was collected, in words; those that earlier versions had are as they were."""
    names = set(collected.names)
    kind = "taylor" if "taylor" in names else "backward" if collected.backward else "forward"
    rest = names - {"taylor", "alone"} - (set(PLAIN) if names.issuperset(PLAIN) else set())
    placed = sorted(rest, key=lambda n: (NAMED.index(n) if n in NAMED else len(NAMED), n))
    return " ".join([kind, *(n.replace("_", "-") for n in placed)])


def _facts(recipe: Recipe, source: Checkpoint, text: CalibrationSet) -> dict[str, object]:
    dtype = weight_dtype(source, recipe.dtype, pick_device(recipe.device))
    run: dict[str, object] = {
        "model": recipe.model, "revision": recipe.revision, "calibration": list(recipe.calibration),
        "samples": recipe.samples, "length": recipe.length, "seed": recipe.seed,
        "batch_size": recipe.batch_size, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    if text.held_back:
        run["held_back"] = text.held_back
    if recipe.self_share is not None:
        run["self_share"] = recipe.self_share
    if recipe.map is not None:
        run["map"] = dict(recipe.map)
    if recipe.for_ is not None:
        run["for_"] = list(recipe.for_)
    if source.hash_layers != "keep":
        run["hash_layers"] = source.hash_layers
    facts = {"calibration": run, "size": asdict(source.size)}
    if (heads := head_facts(source)) is not None:
        facts["mtp"] = heads
    return {**facts, "model_type": source.config.model_type}


def work_folder(place: Place, recipe: Recipe) -> Path:
    """Where chunks of statistics wait for the result; emptied first with --fresh."""
    folder = place.beside("calibrating")
    if recipe.fresh and is_first():
        discard(folder)
    return folder


def measure(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    what: str,
    team: Team = ALONE,
    say: Say = lambda _: None,
) -> HeldoutLoss:
    """Held-out loss of one checkpoint, the same in every process."""
    chosen = _chosen(recipe, source, team)
    batches = text.batches(recipe.batch_size)
    left = sum(int(b.mask.sum()) for b in team.share(batches, _cost))
    with Progress(what, left * passes(chosen, source, False)) as progress:
        engine = RetryingEngine(loading(recipe), source, chosen, progress, team, say)
        return heldout_loss(SharedLosses(engine, team), batches, text.domains)


class SharedLosses:
    """Losses of which every process measures its share of the batches.

    Args:
        engine: this process's own.
        team: all of them.
    """

    def __init__(self, engine: Losses, team: Team) -> None:
        self.engine, self.team = engine, team

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch, in order and in every process: losses and weights, see `Engine.losses`."""
        own = self.team.share(range(len(batches)), lambda i: _cost(batches[i]))
        measured = self.engine.losses([batches[i] for i in own])
        found = {
            i: (losses.cpu(), weights.cpu())
            for i, (losses, weights) in zip(own, measured, strict=True)
        }
        everything: dict[int, tuple[Tensor, Tensor]] = {}
        for part in self.team.gather(found):
            everything |= part
        yield from (everything[i] for i in range(len(batches)))


def _chosen(recipe: Recipe, source: Checkpoint, team: Team) -> Choice:
    """The engine of a pass over batches, the same in every process."""
    if recipe.device_map:
        return Choice("resident", f"spread by --device-map {recipe.device_map}")
    return team.broadcast(lambda: choose_engine(recipe, source, team.node_size))


def passes(chosen: Choice, source: Checkpoint, backward: bool) -> int:
    """How often an engine goes over the batches: for the progress bar."""
    layers = source.config.get_text_config().num_hidden_layers
    return layers * (2 if backward else 1) if chosen.engine == "streaming" else 1


def choose_engine(recipe: Recipe, source: Checkpoint, sharers: int = 1) -> Choice:
    """The engine that runs this checkpoint here, in each of `sharers` processes."""
    device = pick_device(recipe.device)
    item = weight_dtype(source, recipe.dtype, device).itemsize
    return choose(recipe.engine, source.size, item, device, room_of(recipe), sharers)
