"""What becomes of a model's heads for multi-token prediction: they are cut, dropped or kept.

`cut`: the head's experts leave by its own scores, as many as the layers lose on average: its loss
is another one (of the token after next), so its scores are not weighed against theirs.
`drop`: its tensors leave, and the config promises none. `keep`: it stays whole, which a config with
one number of experts for everything cannot say; so counts must differ anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_fair.core.criterion import Criterion
from moe_fair.core.plan import ModelSize, Plan
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Scores, Statistics
from moe_fair.moe.criteria import criterion

if TYPE_CHECKING:  # a plan is made without transformers
    from moe_fair.moe.checkpoint_source import Checkpoint

UNIFORM = ("uniform", "naee")  # allocators that keep the same number everywhere
# for a head, where what a criterion needs is measured of the layers alone
INSTEAD = ("counterfactual-agreed", "reap", "aimer")


def collects_heads(mtp: str | None, source: Checkpoint) -> bool:
    """The heads run along when statistics are gathered, with this choice for them."""
    return mtp in (None, "cut") and bool(source.heads.blocks)


def head_facts(source: Checkpoint) -> dict[str, Any] | None:
    """What a plan must know of the heads; None without tensors and without a promise of any."""
    heads = source.heads
    if not heads.tensors and not heads.promised:
        return None
    size = heads.size(source.packing.numel if source.packing else None)
    return {
        "name": heads.name, "parameters": size.parameters, "bytes": size.bytes,
        "experts": heads.with_experts, "why": heads.why, "promised": heads.promised,
    }  # fmt: skip


def choose_heads(
    recipe: Recipe, facts: Mapping[str, Any] | None, rule: str, *, measured: bool = True
) -> str | None:
    """`cut`, `drop` or `keep`; None where the checkpoint has no head.

    Args:
        facts: see `head_facts`.
        rule: name of the allocator.
        measured: there are statistics of it.

    Raises:
        ValueError: what the recipe says cannot be done; says why.
    """
    if not facts or not facts["bytes"]:
        return None
    if not facts["experts"]:
        return recipe.mtp if recipe.mtp == "drop" else "keep"
    why = facts["why"] or (None if measured else "these statistics hold none of it")
    choice = recipe.mtp or ("drop" if why else "cut")
    if choice == "cut" and why:
        raise ValueError(
            f"--mtp cut: the MTP head {facts['name']} cannot be cut: {why}; use --mtp drop, or "
            "calibrate with --mtp cut where its structure is known"
        )
    if choice == "keep" and rule in UNIFORM:
        raise ValueError(
            f"--mtp keep: with --allocate {rule} the config has one number of experts for layers "
            f"and MTP head, and {facts['name']} would have more; use --mtp cut or drop, or an "
            "--allocate whose counts differ (global)"
        )
    return choice


def check_heads(recipe: Recipe, source: Checkpoint, plan: Plan) -> None:
    """A plan that was made before says what becomes of the heads, and the recipe nothing else.

    Raises:
        ValueError: it does not.
    """
    if plan.mtp is None and source.heads.with_experts:
        raise ValueError(
            f"the plan does not say what becomes of the MTP head {source.heads.name}; make it "
            "again with `moe-fair plan` from statistics of this version"
        )
    if recipe.mtp not in (None, plan.mtp) and source.heads.tensors:
        raise ValueError(
            f"--mtp {recipe.mtp}: the --plan says {plan.mtp}; leave --mtp out, or make the plan "
            "again"
        )


def size_without(size: ModelSize, choice: str | None, facts: Mapping[str, Any] | None) -> ModelSize:
    """The model's size before experts leave, without heads that are dropped."""
    if choice != "drop" or facts is None:
        return size
    return ModelSize(size.parameters - facts["parameters"], size.bytes - facts["bytes"])


def head_scores(
    rule: Criterion, statistics: Statistics, weights: Mapping[str, float] | None
) -> tuple[Scores, str]:
    """Scores of all groups, and the name of the criterion that scored the heads' experts."""
    body = rule(statistics.without_following(), weights)
    following = tuple(g for g in statistics.groups if g.follows)
    if not following:
        return body, rule.name
    view = statistics.view(following[0], weights)
    fed = [c for c in (rule, *map(criterion, INSTEAD)) if all(n in view for n in c.needs)]
    used = fed[0] if fed else rule  # which then says what is missing
    own = used(replace(statistics, groups=following), weights)
    return Scores(rule.name, body.values | own.values), used.name


def with_heads(
    plan: Plan,
    size: ModelSize,
    choice: str | None,
    facts: Mapping[str, Any] | None,
    scored: str,
    asked: str | None,
) -> Plan:
    """The plan with the line that says what becomes of the heads.

    Args:
        asked: the recipe's own word.
        size: of the whole model before.
        scored: the criterion by which the heads' experts stay.
    """
    if facts is None:
        line = f"--mtp {asked}: these statistics know of no MTP head"
        return replace(plan, notes=[*plan.notes, line]) if asked else plan
    line = _line(plan, choice, facts, scored)
    return replace(plan, before=size, mtp=choice, notes=[*plan.notes, line])


def _line(plan: Plan, choice: str | None, facts: Mapping[str, Any], scored: str) -> str:
    name = f"MTP head {facts['name']}"
    if choice is None:
        return (
            f"the config promises {facts['promised']} MTP head(s), and no file holds their "
            "tensors; the result's config promises none"
        )
    if choice == "drop":
        why = f" ({facts['why']})" if facts["why"] else ""
        return (
            f"{name}: dropped{why}, {facts['parameters']:,} parameters; the result's config "
            "promises none"
        )
    if choice == "keep":
        if not facts["experts"]:
            return f"{name}: has no routed experts and stays as it is"
        return f"{name}: kept whole; the config's number of experts is still that of its layer"
    kept = [g for g in plan.groups if g.follows]
    counts = ", ".join(f"{len(g.kept)} of {g.size}" for g in kept)
    equal = "" if plan.uniform else "; with unequal counts vLLM with moe-fair-vllm runs it"
    return (
        f"{name}: cut, {counts} experts kept (the layers' mean) by its own scores ({scored}); "
        f"plans are tried and layers repaired without it{equal}"
    )
