"""Whether a text is the one that it should be, and fit for what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_fair.core.domain_weights import domain_weights
from moe_fair.core.recipe import TEXT, Recipe
from moe_fair.core.say import Say
from moe_fair.core.units import Statistics
from moe_fair.moe.calibration_text import CalibrationSet, split
from moe_fair.pipelines.collection import methods_for
from moe_fair.pipelines.methods import Method, method
from moe_fair.pipelines.rivals import rivals
from moe_fair.pipelines.trial_text import split_holdout
from moe_fair.pipelines.unused_settings import Run


@dataclass(frozen=True)
class Earlier:
    """What an earlier stage left: the settings that made it, and the digest of its text."""

    what: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    digest: str | None = None

    @property
    def held_back(self) -> int:
        """Sequences of its text that its numbers have not seen."""
        return int(self.settings.get("held_back", 0))


def with_text_of(recipe: Recipe, earlier: Earlier) -> Recipe:
    """What of the text nobody named is that of the earlier stage."""
    left = [n for n in TEXT if n not in recipe.given and n in earlier.settings]
    theirs = earlier.settings.get("calibration")
    if "calibration" in recipe.given and list(recipe.calibration) != theirs:
        left = [n for n in left if n != "self_share"]  # of own text beside another
    if not left:
        return recipe
    found = {n: earlier.settings[n] for n in left}
    return recipe.with_settings({**found, "calibration_digest": recipe.calibration_digest})


def divided(
    recipe: Recipe, text: CalibrationSet, run: Run, earlier: Earlier, say: Say
) -> tuple[CalibrationSet, CalibrationSet | None]:
    """What the statistics see of the text, and what plans are tried on.

    Raises:
        ValueError: it is not the text that it should be.
    """
    check_digest("calibration", text, recipe)
    if run.collects:
        return split_holdout(recipe, text, say)
    held = earlier.held_back
    parts = split(text, held) if held < len(text.sequences) else (text, text)
    same = parts[0].digest == earlier.digest
    recorded = all(recipe.to_dict().get(n) == earlier.settings.get(n) for n in TEXT)
    if not same and recorded and earlier.digest is not None:
        raise ValueError(
            f"the calibration text is not that which the {earlier.what} made from: a file or data "
            "set has changed since; restore it, or calibrate again"
        )
    return text, parts[1] if same and run.tries else None


def check_digest(what: str, text: CalibrationSet, recipe: Recipe) -> None:
    """The text is the one that the recipe was recorded with."""
    check_same_text(what, text, getattr(recipe, f"{what}_digest"))


def check_same_text(what: str, text: CalibrationSet, wanted: str | None) -> None:
    """The text is the one of this digest, if there is one."""
    if wanted is not None and text.digest != wanted:
        raise ValueError(
            f"the {what} text is not the one of the recipe's {what}_digest: a file, a data set, "
            "the tokenizer or a setting of the text has changed; to run on it all the same, "
            f"remove the line {what}_digest from the recipe"
        )


def check_domains(
    recipe: Recipe, text: CalibrationSet, statistics: Statistics | None, run: Run
) -> None:
    """What depends on the text's domains can be done with these.

    Raises:
        ValueError: weights of a domain that is not there, or a method that compares domains.
    """
    if run.measures and statistics is not None and text.domains != statistics.domains:
        raise ValueError(
            f"removals are measured on text of {', '.join(text.domains)}, and the statistics are "
            f"of {', '.join(statistics.domains)}; give text of the same domains"
        )
    if not run.collects:
        return
    named = {f"--rivals {n}: ": r for n, r in rivals(recipe).items() if recipe.rivals is not None}
    named |= {f"--for {n}: ": r for n, r in methods_for(recipe).items()}
    methods = {name: method(its) for name, its in {"": recipe, **named}.items()}
    check_compared(text, recipe.weights, methods)


def check_compared(
    text: CalibrationSet, weights: Mapping[str, float] | None, methods: Mapping[str, Method]
) -> None:
    """Methods that compare domains have two or more of a text.

    Args:
        weights: of the domains.
        methods: by the words before what is wrong with one.

    Raises:
        ValueError: one has not, or a weight is of a domain that is not there.
    """
    compared = [w for w in domain_weights(text.domains, weights) if w > 0]
    for name, its in methods.items():
        scores = [c for c in its[:2] if c is not None and "sketch" in c.needs]
        if scores and len(compared) < 2:
            raise ValueError(
                f"{name}{scores[0].name} compares calibration domains and there are fewer than "
                "two: give -c name=text for each"
            )
