"""Evaluating checkpoints: benchmarks and agreement, kept beside the model where `prune` made it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from moe_fair.core.output import claim
from moe_fair.core.recipe import Recipe
from moe_fair.core.say import Say
from moe_fair.engines.processes import current_team
from moe_fair.engines.progress import Progress
from moe_fair.evaluate.agreement import Agreements, agreement
from moe_fair.evaluate.compare import Row, compare
from moe_fair.evaluate.record import save_agreement, save_benchmarks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.engine_choice import start
from moe_fair.pipelines.calibrate import choose_engine, passes, room_of
from moe_fair.pipelines.checks import check_same_tokens
from moe_fair.pipelines.moe import heldout_set
from moe_fair.report.sources import FOLDER

if TYPE_CHECKING:
    from moe_fair.evaluate.benchmark import Benchmark

LOGITS = 2**28  # elements of the logits of one batch: a gigabyte in float32


def run_benchmarks(
    source: Checkpoint,
    baseline: Checkpoint | None,
    benchmark: Benchmark,
    *,
    folder: Path | None,
    log_samples: bool = False,
    say: Say = lambda _: None,
    quiet: Callable[[], AbstractContextManager] = nullcontext,
) -> list[Row]:
    """lm-eval's tasks on a model and, on the same items, on the one it was pruned from.

    Where several processes do it together, each runs its share; the first writes.

    Args:
        folder: where lm-eval's JSON (`lm-eval/`) and the table (`benchmarks.json`) go.
        log_samples: also write what was asked and answered, item by item.
        quiet: a context for the time in which lm-eval runs.
    """
    from moe_fair.evaluate import benchmark as lm_eval  # takes seconds to import

    team = current_team()
    lm_eval.find_tasks(benchmark)  # a wrong name fails before a model is loaded
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    sides = {"original": baseline, "pruned" if baseline else "model": source}
    results = {}
    for name, checkpoint in sides.items():
        if checkpoint is None:
            continue
        say(f"lm-eval: {', '.join(benchmark.tasks)} on {checkpoint.model}")
        with quiet():
            results[name] = lm_eval.run(checkpoint, benchmark, team)
        if folder is not None and team.first:
            path = lm_eval.save(results[name], folder / "lm-eval", f"{stamp}-{name}", log_samples)
            say(f"lm-eval's results: {path}")
    rows = compare(results["pruned" if baseline else "model"], results.get("original"))
    if folder is not None and team.first:
        save_benchmarks(folder, rows)
    return rows


def run_agreement(
    recipe: Recipe,
    source: Checkpoint,
    baseline: Checkpoint,
    folder: Path | None,
    say: Say = lambda _: None,
) -> Agreements:
    """How far a model agrees with the one it was pruned from, on the recipe's held-out text.

    Each model gets its own engine; --max-memory holds for each. Where several processes do it
    together, each runs its share of the batches; the first writes.

    Raises:
        ValueError: no text, or the two read text differently.
    """
    check_same_tokens(source, baseline)
    team = current_team()
    text = team.broadcast(lambda: heldout_set(recipe, source, say))
    if text is None:
        raise ValueError("--agreement needs text: give --heldout path/to/text.jsonl")
    vocabulary = source.config.get_text_config().vocab_size
    size = max(1, min(recipe.batch_size, LOGITS // (recipe.length * vocabulary)))
    engines = []
    with Progress("agreement", 0) as progress:
        for checkpoint in (baseline, source):
            chosen = team.broadcast(lambda c=checkpoint: choose_engine(recipe, c, team.node_size))  # type: ignore[misc]
            share = -(-text.tokens // team.size)
            progress.add(share * passes(chosen, checkpoint, False))
            engine, _ = start(
                checkpoint, chosen.engine, recipe.dtype, recipe.device, progress.visit,
                room=room_of(recipe),
            )  # fmt: skip
            engines.append(engine)
        original, pruned = engines
        found = agreement(original, pruned, text.batches(size), text.domains, team)
    if folder is not None and team.first:
        save_agreement(folder, found)
    return found


@contextmanager
def claimed(model: str, output: Path | None) -> Iterator[Path | None]:
    """Where results go: as asked, or the folder of ours in a checkpoint that `prune` wrote.

    Raises:
        ValueError: another run writes there, or it cannot be written.
    """
    own = Path(model) / FOLDER
    folder = output or (own if (own / "plan.json").is_file() else None)
    if folder is None:
        yield None
        return
    with claim(folder, new=False, first=current_team().first) as place:
        yield place.path
