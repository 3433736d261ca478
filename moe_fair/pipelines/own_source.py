"""`-c self`: the model's own text as a source of calibration text, by default and beside others."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from moe_fair.core.output import digest
from moe_fair.core.recipe import DEFAULT_CALIBRATION, Recipe
from moe_fair.core.say import Say
from moe_fair.engines.processes import Team
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.text_sources import OWN, expand, parse_source, parse_sources
from moe_fair.pipelines.opening import beside, calibration_set, is_own, own_beside
from moe_fair.pipelines.own_text import (
    OwnText,
    Unwritten,
    Wanted,
    facts_of,
    is_of,
    streamed,
    write_own_text,
)
from moe_fair.pipelines.rivals import chooses_itself

FILE = "self.jsonl"  # beside statistics and in the folder of a result
SELF_SHARE = 0.25  # of the text that is given: so much own text beside it
LEAST = 8  # windows of it: fewer are no text to choose by, and none is sampled unasked


def with_own_text(
    recipe: Recipe, source: Checkpoint, say: Say, team: Team, *,
    earlier: Mapping[str, object] | None = None,
) -> Recipe:  # fmt: skip
    """The recipe with own text: alone where no text is given, else beside that which is.

    Args:
        earlier: settings of an earlier stage, whose text is to be the same.

    Raises:
        ValueError: own text is asked for where it changes nothing.
    """
    given = "calibration" in recipe.given
    own = any(is_own(parse_source(s)) for s in recipe.calibration)
    if recipe.self_share and (own or not given):
        why = "-c self has a weight of its own, as self:2" if own else "no other text is given"
        raise ValueError(f"--self-share would change nothing: {why}; leave it out")
    if given and not own:
        recipe = _beside(recipe, source, say, team, earlier or {})
    elif not own and (recipe.server is not None or not streamed(recipe, source, team)):
        say("no calibration text is given: the model samples its own (-c self)")
        recipe = _reading(recipe, {"calibration": (OWN,)})
    elif not own:
        say(
            "note: no calibration text is given, and the model is streamed here, which samples "
            f"none: {DEFAULT_CALIBRATION} is read"
        )
    if recipe.server is not None and not _own_samples(recipe):
        raise ValueError(
            "--server would change nothing: no own text is sampled; add -c self, or leave it out"
        )
    return recipe


def _beside(
    recipe: Recipe, source: Checkpoint, say: Say, team: Team, earlier: Mapping[str, object]
) -> Recipe:
    """The recipe with the share of own text that is read beside the text it names."""
    asked = "self_share" in recipe.given
    recorded = recipe.calibration_digest is not None  # with no share: it was read alone
    recorded |= list(recipe.calibration) == earlier.get("calibration")
    if not asked and (recorded or not chooses_itself(recipe)):
        return recipe  # a method that is named reads the text that is given
    mixed = recipe if asked else _reading(recipe, {"self_share": SELF_SHARE})
    count = own_beside(mixed)
    if not count or (not asked and count < LEAST):
        return recipe
    if not asked and recipe.server is None and (why := _unwritable(mixed, source, team)):
        say(f"note: no own text beside the text that is given: {why}")
        return recipe
    say(
        f"own text: {count} samples beside the {recipe.samples} of the text that is given "
        "(--self-share 0 for none)"
    )
    return mixed


def _unwritable(recipe: Recipe, source: Checkpoint, team: Team) -> str:
    """Why the model samples no text here; empty where it does."""
    if streamed(recipe, source, team):
        return "the model is streamed here"
    try:
        text = wanted_text(recipe, source)
        assert text is not None
        assert text.author
    except ValueError as e:
        return str(e)
    return ""


def _reading(recipe: Recipe, settings: Mapping[str, object]) -> Recipe:
    """The recipe with these settings of its text; the digest stays that of what is read."""
    return recipe.with_settings({**settings, "calibration_digest": recipe.calibration_digest})


def wanted_text(recipe: Recipe, source: Checkpoint) -> OwnText | None:
    """The own text that a recipe reads; None where it reads none."""
    count = _own_samples(recipe)
    if not count:
        return None
    return OwnText(recipe, source, Wanted(recipe.length, recipe.seed, sequences=count))


def _own_samples(recipe: Recipe) -> int:
    """How many samples of own text a recipe reads, by `-c self` or beside other text."""
    sources = [parse_source(s) for s in recipe.calibration]
    own = [s.weight for s in sources if is_own(s)]
    if not own:
        return own_beside(recipe)
    share = sum(own) / sum(s.weight for s in sources)
    return min(recipe.samples, math.ceil(share * recipe.samples))


@contextmanager
def own_file(
    recipe: Recipe, source: Checkpoint, folder: Path | None, say: Say, team: Team
) -> Iterator[Path | None]:
    """The file of own text inside the context, sampled where it is not there; None for no own text.

    Args:
        folder: in which it is sampled, and found again; by default one that goes afterwards.

    Raises:
        ValueError: it cannot be sampled here, or another source cannot be read.
    """
    text = wanted_text(recipe, source)
    if text is None:
        yield None
        return
    name = digest(text.key)
    found = team.broadcast(lambda: _earlier(recipe, name))
    if found is not None:
        say(f"own text: that of {found}")
        yield found
        return
    text.check(team)
    others = [s for s in parse_sources(recipe.calibration, recipe.map) if not is_own(s)]
    if team.first and others:  # before it takes long
        expand(others)
    if folder is not None:
        write_own_text(text, folder / FILE, say, team)
        yield folder / FILE
        return
    with tempfile.TemporaryDirectory(prefix="moe_fair-self-") as temporary:
        write_own_text(text, Path(temporary) / FILE, say, team)
        yield Path(temporary) / FILE


def _earlier(recipe: Recipe, name: str) -> Path | None:
    """The same text, where it lies beside what an earlier stage made."""
    for given in (recipe.stats, recipe.plan):
        if given is not None:
            path = Path(given)
            file = (path if path.is_dir() else path.parent) / FILE
            if is_of(file, name):
                return file
    return None


def calibration_text(
    recipe: Recipe, source: Checkpoint, folder: Path | None, say: Say, team: Team
) -> tuple[CalibrationSet, dict[str, bytes]]:
    """The calibration sequences of a recipe, own text among them sampled first.

    Returns:
        the text, the same in every process; and the files of own text by name, to be kept.
    """
    kept, given = {}, None
    if own_beside(
        recipe
    ):  # what is wrong with the text that is given is said before any is sampled
        given = team.broadcast(lambda: calibration_set(recipe, source, say))
    try:
        with own_file(recipe, source, folder, say, team) as file:
            text = team.broadcast(lambda: calibration_set(recipe, source, say, file, given))
            if file is not None and team.first:
                kept = {f.name: f.read_bytes() for f in (file, facts_of(file))}
    except Unwritten as e:
        if given is None:
            raise
        say(f"note: the text that is given is read alone: {e}")
        text = given
    return text, kept


def text_to_come(
    recipe: Recipe, source: Checkpoint, say: Say, team: Team
) -> tuple[CalibrationSet, OwnText | None]:
    """The same for a dry run: own text that is not there is stood for by as many tokens.

    Returns:
        the text; and what would be sampled of it.
    """
    text = wanted_text(recipe, source)
    if text is None or _earlier(recipe, digest(text.key)) is not None:
        return calibration_text(recipe, source, None, say, team)[0], None
    text.check(team)
    count = text.wanted.sequences
    others = tuple(s for s in recipe.calibration if not is_own(parse_source(s)))
    rest, samples = CalibrationSet((), ()), recipe.samples
    if not own_beside(recipe):
        samples -= count
    if others and samples:
        part = replace(recipe, calibration=others, samples=samples, self_share=None)
        rest = calibration_set(part, source, say)
    names = [parse_source(s).name for s in recipe.calibration if is_own(parse_source(s))] or [OWN]
    stand_in = (text.author.start,) * recipe.length
    made = tuple((stand_in, i % len(names)) for i in range(count))
    return beside(rest, CalibrationSet(tuple(names), made)), text
