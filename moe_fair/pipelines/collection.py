"""What a run collects: it follows from what is asked of it.

`prune` collects what its method, its rivals and its reduction need, and the families that cost
nothing, so that other plans can be made of its statistics. `calibrate` collects the usual ones, or
with `--for` exactly what some methods need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType

from moe_fair.core.allocate import allocator, needs
from moe_fair.core.recipe import Recipe, flag
from moe_fair.core.units import Statistics
from moe_fair.moe import merge, ream
from moe_fair.moe.criteria import criterion
from moe_fair.moe.statistics import Collected, collecting, families, names_of, statistics, unasked
from moe_fair.pipelines.methods import Method, method, method_name
from moe_fair.pipelines.rivals import with_method

DEFAULT = "default"  # of --for: what is collected without it
REDUCTIONS = {m.name: m for m in (merge, ream)}  # of --reduce, and of --for: what it needs
# settings of earlier versions, for one release, and the families of their names: those that are
# left out where they are false, and those that are collected where they are true
USUAL, MORE = ("taylor", "counterfactual"), ("u_score", "gram", "alone")
# why an option takes no method that needs measured costs
WITHOUT_COSTS = {
    "--rivals": "it needs measured costs, which rivals are not given",
    "--for": "cost curves are measured with --curves {}",
}


def named(recipe: Recipe, name: str) -> Recipe:
    """The recipe with a method that `--for` names.

    Raises:
        ValueError: it is no such method.
    """
    return with_method(recipe, name, "--for", "a repair needs no statistics; leave it out here")


def reduction(name: str) -> ModuleType:
    """What makes a plan's experts merge, with `needs` and `merging(plan, statistics, weights)`."""
    return REDUCTIONS[name]


def needed(recipe: Recipe) -> set[str]:
    """Names of the statistics that a recipe's method needs."""
    return needs_of(method(recipe), recipe.reduce)


def needs_of(its: Method, reduce: str) -> set[str]:
    """Names of the statistics that a method needs, with this --reduce."""
    removal, protection, rule = its
    found = {n for c in (removal, protection) if c is not None for n in c.needs}
    found |= set(getattr(allocator(rule), "needs", ()))
    return found | set(REDUCTIONS[reduce].needs if reduce in REDUCTIONS else ())


def for_prune(recipe: Recipe, rivals: Iterable[Recipe] = ()) -> Collected:
    """What `prune` collects."""
    return _with_earlier(recipe, unasked("always").union(*map(needed, (recipe, *rivals))))


def for_calibrate(recipe: Recipe, rivals: Mapping[str, Recipe] | None = None) -> Collected:
    """What `calibrate` collects, see `asked`."""
    return asked(recipe, rivals or {}).collected


@dataclass(frozen=True)
class Asked:
    """What `calibrate` is asked for.

    Attributes:
        methods: the recipe's own, and those that it names by --rivals and --for, under these words
            for an error's beginning.
        tries: plans of rivals are to be tried, named or not.
        collected: the statistics that all of them need.
    """

    methods: Mapping[str, Method]
    tries: bool
    collected: Collected


def asked(recipe: Recipe, rivals: Mapping[str, Recipe]) -> Asked:
    """What `calibrate` is asked for by its settings.

    Raises:
        ValueError: `--for` or `--rivals` names no method, or one whose numbers are not collected by
            it.
    """
    for name in (*USUAL, *MORE) if recipe.for_ is not None else ():
        value = getattr(recipe, name)
        if value or (name in USUAL and value is False):
            said = flag(name if value else f"no_{name}")
            raise ValueError(f"give --for or {said}, not both: --for says what is collected")
    named = {f"--for {n}: ": its for n, its in methods_for(recipe).items()}
    tried = {f"--rivals {n}: ": its for n, its in rivals.items()}
    methods = _methods({"": recipe, **tried, **named})
    found = [needs_of(m, recipe.reduce) for n, m in methods.items() if n or recipe.for_ is None]
    if recipe.curves is not None:
        found.append(set(criterion(recipe.curves).needs))
    if recipe.for_ is None:
        collected = _with_earlier(recipe, unasked("always", "usual").union(*found))
    else:
        others = {n: set(m.needs) for n, m in REDUCTIONS.items()}
        others[DEFAULT] = unasked("always", "usual")
        collected = collecting(set().union(*found, *(others.get(n, ()) for n in recipe.for_)))
    if recipe.rivals is None:
        methods = {n: m for n, m in methods.items() if n not in tried}
    return Asked(methods, bool(rivals), collected)


def _methods(recipes: Mapping[str, Recipe]) -> dict[str, Method]:
    """The methods of recipes, by the words before what is wrong with one."""
    found = {}
    for label, its in recipes.items():
        try:
            found[label] = removal, _, rule = method(its)
        except ValueError as e:
            raise ValueError(f"{label}{e}") from e
        why = WITHOUT_COSTS.get(label.partition(" ")[0])
        if why is not None and needs(allocator(rule), "costs"):
            raise ValueError(f"{label}{why.format(removal.name)}")
    return found


def methods_for(recipe: Recipe) -> dict[str, Recipe]:
    """Name -> recipe of each method that `--for` names."""
    return {n: named(recipe, n) for n in recipe.for_ or () if n not in (DEFAULT, *REDUCTIONS)}


def check_needs(recipe: Recipe) -> None:
    """What the method needs is not left out.

    Raises:
        ValueError: it is; says by which flag.
    """
    for name in sorted(needed(recipe)):
        out = _left_out(recipe, name)
        if out is not None:
            raise ValueError(f"method {as_asked(recipe)} needs {name}, which {out} leaves out")


def check_held(held: Statistics, recipe: Recipe, later: Iterable[str] = ()) -> None:
    """Statistics hold what the method needs.

    Args:
        later: what is measured after this.

    Raises:
        ValueError: they do not; says which is missing, and what collects it.
    """
    missing = sorted(n for n in needed(recipe) - set(later) if not held.holds(n))
    if missing:
        name = as_asked(recipe)
        raise ValueError(
            f"method {name} needs {', '.join(missing)}, which these statistics do not hold; "
            f"collect it with `moe-fair calibrate --for {name}`"
        )


def as_asked(recipe: Recipe) -> str:
    """A recipe's method in the words of `--for`."""
    removal, protection, rule = method(recipe)
    if recipe.removal is None and recipe.protection is None and recipe.allocate is None:
        names = [method_name(recipe)]
    else:
        costs = needs(allocator(rule), "costs")
        names = [removal.name if costs else f"{removal.name}/{rule}"]
        names += [protection.name] if protection is not None else []
    return ",".join([*names, *([recipe.reduce] if recipe.reduce in REDUCTIONS else [])])


def _left_out(recipe: Recipe, statistic: str) -> str | None:
    """The flag by which this statistic is not collected, if it is not."""
    known = statistics().get(statistic)
    for name in USUAL:
        gradient = name == "taylor" and known is not None and known.needs_backward
        if getattr(recipe, name) is False and (gradient or statistic in families()[name].names):
            return flag(f"no_{name}")
    return None


def _with_earlier(recipe: Recipe, asked: set[str]) -> Collected:
    """With the families that settings of earlier versions add, and without those they leave out."""
    more = names_of(*(n for n in (*USUAL, *MORE) if getattr(recipe, n)))
    without = [n for n in USUAL if getattr(recipe, n) is False]
    return collecting(asked | more, without, backward=recipe.taylor is not False)
