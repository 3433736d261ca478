"""`-c self`: the model's own text as a source of calibration text, by default and beside others."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
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
from moe_fair.pipelines.opening import calibration_set, is_own
from moe_fair.pipelines.own_text import OwnText, Wanted, facts_of, is_of, streamed, write_own_text

FILE = "self.jsonl"  # beside statistics and in the folder of a result
SELF_SHARE = 0.0  # of the samples, where other text is given


def with_own_text(
    recipe: Recipe, source: Checkpoint, say: Say, team: Team, *, earlier: Sequence[str] = ()
) -> Recipe:
    """The recipe with own text among its sources: alone where none is given, else a share.

    Args:
        earlier: sources of an earlier stage, whose text is to be the same.

    Raises:
        ValueError: own text is asked for where it changes nothing.
    """
    given = "calibration" in recipe.given
    own = any(is_own(parse_source(s)) for s in recipe.calibration)
    share, asked = recipe.self_share, "self_share" in recipe.given
    if asked and (own or not given):
        why = "-c self has a weight of its own, as self:2" if own else "no other text is given"
        raise ValueError(f"--self-share would change nothing: {why}; leave it out")
    if own or (given and not asked and list(recipe.calibration) == list(earlier)):
        pass
    elif not given:
        if recipe.server is not None or not streamed(recipe, source, team):
            say("no calibration text is given: the model samples its own (-c self)")
            return _reading(recipe, (OWN,))
        say(
            "note: no calibration text is given, and the model is streamed here, which samples "
            f"none: {DEFAULT_CALIBRATION} is read"
        )
    elif (share := SELF_SHARE if share is None else share) > 0:
        if asked or recipe.server is not None or not streamed(recipe, source, team):
            weight = sum(parse_source(s).weight for s in recipe.calibration) * share / (1 - share)
            sources = (*recipe.calibration, f"{OWN}:{weight:.12g}")
            return _reading(recipe, sources)
        say("note: no own text beside the text that is given: the model is streamed here")
    if recipe.server is not None and not own:
        raise ValueError(
            "--server would change nothing: no own text is sampled; add -c self, or leave it out"
        )
    return recipe


def _reading(recipe: Recipe, sources: tuple[str, ...]) -> Recipe:
    """The recipe with these sources, which say the share; its digest is that of their text."""
    digest = recipe.calibration_digest
    settings = {"calibration": sources, "self_share": None, "calibration_digest": digest}
    return recipe.with_settings(settings)


def wanted_text(recipe: Recipe, source: Checkpoint) -> OwnText | None:
    """The own text among a recipe's sources; None where there is none."""
    sources = [parse_source(s) for s in recipe.calibration]
    own = [s.weight for s in sources if is_own(s)]
    if not own:
        return None
    share = sum(own) / sum(s.weight for s in sources)
    count = min(recipe.samples, math.ceil(share * recipe.samples))
    return OwnText(recipe, source, Wanted(recipe.length, recipe.seed, sequences=count))


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
    if team.first and len(recipe.calibration) > 1:  # before it takes long
        expand(s for s in parse_sources(recipe.calibration, recipe.map) if not is_own(s))
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
    with own_file(recipe, source, folder, say, team) as file:
        text = team.broadcast(lambda: calibration_set(recipe, source, say, file))
        kept = {}
        if file is not None and team.first:
            kept = {f.name: f.read_bytes() for f in (file, facts_of(file))}
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
    rest = CalibrationSet((), ())
    if others and count < recipe.samples:
        part = replace(recipe, calibration=others, samples=recipe.samples - count)
        rest = calibration_set(part, source, say)
    names = [parse_source(s).name for s in recipe.calibration if is_own(parse_source(s))]
    domains = tuple(dict.fromkeys([*rest.domains, *names]))
    stand_in = (text.author.start,) * recipe.length
    made = [(stand_in, domains.index(names[i % len(names)])) for i in range(count)]
    return replace(rest, domains=domains, sequences=(*rest.sequences, *made)), text
