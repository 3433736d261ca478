"""What a recipe names, opened: the model's files and the texts, without any weights."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from moe_fair.core.recipe import Recipe
from moe_fair.core.say import Say
from moe_fair.engines.device import pick_device, pick_dtype
from moe_fair.moe.calibration_text import CalibrationSet, sample, windows
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import count_path
from moe_fair.moe.table_surgery import check_tables
from moe_fair.moe.text_sources import OWN, Source, parse_sources
from moe_fair.pipelines.checks import check_device_map, check_embedding, check_tokens
from moe_fair.pipelines.early_checks import given_model


def open_model(recipe: Recipe) -> Checkpoint:
    """The model's files, checked as far as they can be without loading weights."""
    model = given_model(recipe.model)
    pick_dtype(recipe.dtype, pick_device(recipe.device))
    source = Checkpoint(
        model,
        recipe.revision,
        recipe.trust_remote_code,
        recipe.allow_pickle,
        recipe.hash_layers or "keep",
    )
    source.scheme  # noqa: B018  # packed weights that cannot be unpacked: before any is downloaded
    check_device_map(recipe.device_map, recipe.engine, source)
    assert source.blocks  # known from the config alone: before weights are downloaded
    check_embedding(source)
    assert source.groups  # finds the experts in the files as well, or says what was looked for
    check_tables(source)
    count_path(source.config)
    if recipe.revision is not None and Path(model).is_dir():
        raise ValueError(
            f"--revision {recipe.revision}: {recipe.model} is a directory, which has no revisions; "
            "leave it out, or name the model on the Hub"
        )
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if limit and recipe.length > limit:
        raise ValueError(f"--length {recipe.length} is more than the model's {limit} positions")
    return source


def is_own(source: Source) -> bool:
    """The model's own text is meant; a file or directory of that name is that."""
    return source.where == OWN and not source.local


def own_beside(recipe: Recipe) -> int:
    """How many samples of own text are read beside the text that a recipe names."""
    return math.ceil((recipe.self_share or 0.0) * recipe.samples - 1e-9)


def calibration_set(
    recipe: Recipe,
    source: Checkpoint,
    say: Say,
    own: Path | None = None,
    given: CalibrationSet | None = None,
) -> CalibrationSet:
    """The calibration sequences of a recipe.

    Args:
        own: the file that `self` stands for.
        given: the sequences without own text beside them, where they were drawn before.
    """
    sources = parse_sources(recipe.calibration, recipe.map)
    if own is not None:
        sources = [replace(s, where=str(own)) if is_own(s) else s for s in sources]
    draw = partial(sample, tokenizer=source.tokenizer(), length=recipe.length, seed=recipe.seed)
    text = draw(sources, samples=recipe.samples) if given is None else replace(given, notes=())
    if own is not None and (count := own_beside(recipe)):
        text = beside(text, draw([Source(str(own), domain=OWN)], samples=count))
    for note in text.notes:
        say(f"note: {note}")
    check_tokens(text, source)
    return text


def beside(text: CalibrationSet, other: CalibrationSet) -> CalibrationSet:
    """The sequences of both, those of the second after those of the first."""
    domains = tuple(dict.fromkeys([*text.domains, *other.domains]))
    more = tuple((ids, domains.index(other.domains[d])) for ids, d in other.sequences)
    return CalibrationSet(domains, (*text.sequences, *more), (*text.notes, *other.notes))


def heldout_set(
    recipe: Recipe, source: Checkpoint, say: Say = lambda _: None
) -> CalibrationSet | None:
    """The held-out windows of a recipe, if it names any text."""
    if not recipe.heldout:
        return None
    text = windows(
        parse_sources(recipe.heldout, recipe.map),
        source.tokenizer(),
        samples=recipe.heldout_samples,
        length=recipe.length,
    )
    for note in text.notes:
        say(f"note: held-out text: {note}")
    check_tokens(text, source)
    return text
