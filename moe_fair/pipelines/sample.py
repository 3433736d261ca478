"""Text sampled from a model, as a file: what `-c` takes, and what a person can open."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moe_fair.core.lock import release, take
from moe_fair.core.output import digest, partial_path, write_whole
from moe_fair.core.recipe import Recipe
from moe_fair.engines.progress import Progress
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.self_text import ROWS, Batch, Writer, batches, voice
from moe_fair.pipelines.calibrate import Say, choose_engine
from moe_fair.pipelines.opening import open_model


@dataclass(frozen=True)
class Sampled:
    """What was written.

    Attributes:
        output: the file.
        rows, tokens: texts, and tokens that the model wrote in them.
        chats: of the rows, how many are chats.
        replaced: texts that were left out because they go in circles or are empty.
    """

    output: Path
    rows: int
    tokens: int
    chats: int
    replaced: int


def sample(recipe: Recipe, output: Path, tokens: int, *, say: Say = lambda _: None) -> Sampled:
    """Write text that the model makes up, in JSON lines; a killed run goes on at the next batch.

    Args:
        recipe: the model, how it is run, `length` (the most tokens of a text) and `seed`.
        output: a new .jsonl file.
        tokens: that the model shall have written, at the least.

    Raises:
        ValueError: the file cannot be written, or the model cannot be sampled from here.
    """
    with _claimed(output):
        source = open_model(recipe)
        tokenizer = source.tokenizer()
        how = voice(tokenizer, source.config, _generation(source))
        start = tokenizer.convert_ids_to_tokens(how.start)
        _check_fits(recipe, source)
        key = digest({
            **source.fingerprint, "seed": recipe.seed, "length": recipe.length,
            "dtype": recipe.dtype, "device": recipe.device, "rows": ROWS,
        })  # fmt: skip
        work = partial_path(output)
        done = _earlier(work, key)
        got = sum(b.tokens for b in done)
        what = "chats by its own template, and documents" if how.turns else "documents"
        say(f"sampling {tokens:,} tokens: {what} from {start!r}, temperature 1, nothing cut off")
        if done:
            say(f"going on: {len(done)} batches, {got:,} tokens, were there before")
        if got < tokens:
            writing = partial(Writer, tokenizer=tokenizer, voice=how, length=recipe.length)
            done += _sample(recipe, source, writing, work, key, tokens, done)
        rows = [row for b in done for row in b.rows]
        write_whole(output, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        work.unlink(missing_ok=True)
    return Sampled(
        output, len(rows), sum(b.tokens for b in done), sum("messages" in r for r in rows),
        sum(b.replaced for b in done),
    )  # fmt: skip


def _sample(
    recipe: Recipe, source: Checkpoint, writing: Callable[..., Writer], work: Path, key: str,
    tokens: int, done: list[Batch],
) -> list[Batch]:  # fmt: skip
    """The batches that are missing, each kept as it is made."""
    got, made = sum(b.tokens for b in done), []
    model = source.load(recipe.dtype, recipe.device)
    model.eval()
    writer = writing(model, seed=recipe.seed)
    with (
        work.open("a" if done else "w", encoding="utf-8") as f,
        Progress("sampling", tokens - got) as progress,
    ):
        if not done:
            f.write(json.dumps({"key": key}) + "\n")
        for _, batch in batches(writer, tokens - got, len(done)):
            f.write(json.dumps(asdict(batch), ensure_ascii=False) + "\n")
            f.flush()
            made.append(batch)
            progress.advance("sampling", batch.tokens)
    return made


def _generation(source: Checkpoint) -> Any:
    """What generation_config.json says; nothing where there is none."""
    try:
        found = json.loads((Path(source.path) / "generation_config.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _check_fits(recipe: Recipe, source: Checkpoint) -> None:
    chosen = choose_engine(recipe, source)
    if chosen.engine != "resident":
        raise ValueError(
            "a model writes one token after another and has to be in memory as a whole "
            f"({chosen.why}); sample on a machine that holds it, or calibrate on text (-c FILE)"
        )


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """Inside, the file is this run's to write."""
    if output.suffix != ".jsonl":
        raise ValueError(f"output {output}: rows are written as .jsonl; name it so")
    if output.exists() or output.is_symlink():
        raise ValueError(f"output {output} is there already; give another, or remove it first")
    if not output.parent.is_dir():
        raise ValueError(f"output {output}: no directory {output.parent}; make it first")
    if partial_path(output).is_symlink():
        raise ValueError(f"{partial_path(output)} is a link, and the run works there; remove it")
    lock = output.with_name(f"{output.name}.lock")
    take(lock, output)
    try:
        yield
    finally:
        release(lock)


def _earlier(work: Path, key: str) -> list[Batch]:
    """What a killed run has made with the same model and settings."""
    try:
        # not splitlines, to which a text's own U+2028 is the end of a line; what stands behind the
        # last end is what a killed run was writing
        first, *lines = work.read_text(encoding="utf-8").split("\n")[:-1]
        if json.loads(first) != {"key": key}:
            return []
        found = [Batch(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError):
        return []
    # "a" goes on behind what is whole
    write_whole(work, "".join(f"{line}\n" for line in (first, *lines)))
    return found
