"""Which engines serve a checkpoint, by the table of facts `serving/engines.yaml`.

The table says what was run, what is known to fail and why, and where that is written; nothing here
knows an engine by name. In a checkout and an editable install it lies in `serving/` beside the
package, in a wheel in `moe_fair/serving/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from moe_fair.core.registry import pick
from moe_fair.core.yaml_file import read_yaml

RUN, NOT_RUN, NO = "yes", "not run", "no"  # what a verdict says
TABLE = "engines.yaml"
ALL = "all"  # in place of a list of types
DEVICES = "ep="  # after an engine's name and a colon: devices that share each layer's experts


@dataclass(frozen=True)
class Layout:
    """What of a checkpoint decides who serves it.

    Attributes:
        model_type: as the config has it.
        counts: routed experts of every layer, where they are known.
        equal: all layers have the same number.
        widths: name in the config -> a size that quantised kernels divide.
        quantised: the weights are.
        heads: of attention, which devices share by tensor parallelism; 0 where it is not known.
    """

    model_type: str
    counts: tuple[int, ...]
    equal: bool
    widths: Mapping[str, int] = field(default_factory=dict)
    quantised: bool = False
    heads: int = 0


@dataclass(frozen=True)
class Verdict:
    """What an engine does with a checkpoint.

    Attributes:
        engine: its key in the table; title: its name.
        serves: RUN (this type was served with such counts), NOT_RUN (nothing is known against it)
            or NO.
        versions: that were run.
        command: that serves it; empty with NO.
        by: what it takes beside the engine.
        why: of NO and NOT_RUN.
        notes: what else should be known.
    """

    engine: str
    title: str
    serves: str
    versions: str
    command: str
    by: str
    why: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """What a plan must keep to for some engines to serve it.

    Attributes:
        counts: those that a layer may keep; None for any.
        equal: all layers keep the same number.
    """

    counts: frozenset[int] | None = None
    equal: bool = False


@cache
def engines() -> dict[str, dict[str, Any]]:
    """The table: key of an engine -> its facts.

    Raises:
        ValueError: there is none; the package was not installed as it is built.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "serving", package.parent / "serving"):
        if (folder / TABLE).is_file():
            return read_yaml(folder / TABLE)
    raise ValueError(f"no serving/{TABLE} beside {package}; install moe_fair again")


def engine(name: str) -> dict[str, Any]:
    """The facts of an engine, of which more may be asked: see `asked`.

    Raises:
        ValueError: the table has none of that name; names the nearest.
    """
    return pick(engines(), asked(name)[0], "engine")


def asked(name: str) -> tuple[str, int]:
    """An engine's key and the devices of its expert parallelism, of `vllm:ep=8`; 1 where unsaid.

    Raises:
        ValueError: something else is asked for, or the engine is not known to share experts.
    """
    key, colon, more = name.partition(":")
    if not colon:
        return key, 1
    number = more.removeprefix(DEVICES)
    if not more.startswith(DEVICES) or not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f"--for {name}: write {key}, or {key}:{DEVICES}8 for eight devices that share each "
            "layer's experts (expert parallelism)"
        )
    if "expert_parallel" not in pick(engines(), key, "engine"):
        raise ValueError(f"--for {name}: whether {key} shares experts between devices is not known")
    return key, int(number)


def wanted(names: Sequence[str], model_type: str, most: int) -> Wanted:
    """What a plan must keep to for all of these engines to serve it.

    Args:
        most: experts of the largest layer.

    Raises:
        ValueError: no plan is served; says by whom, and why.
    """
    counts = frozenset(range(1, most + 1))
    for name in names:
        facts, devices = engine(name), asked(name)[1]
        if why := _no_type(facts, model_type):
            raise ValueError(f"--for {name}: {why}; leave it out of --for")
        counts &= {n for n in counts if not _no_count(facts, model_type, n, devices)}
    if not counts:
        raise ValueError(f"--for {','.join(names)}: no number of experts is taken by all of them")
    return Wanted(None if len(counts) == most else counts, bool(equal_only(names)))


def equal_only(names: Sequence[str]) -> list[str]:
    """Of these engines those that serve no layers of different sizes."""
    return [n for n in names if "refused" in engine(n)["unequal"]]


def verdicts(layout: Layout, out: str) -> list[Verdict]:
    """What every engine of the table does with a checkpoint.

    Args:
        out: its name in commands.
    """
    return [verdict(name, layout, out) for name in engines()]


def verdict(name: str, layout: Layout, out: str) -> Verdict:
    """What one engine does with a checkpoint; of its expert parallelism where that is asked for."""
    facts, (key, devices) = engine(name), asked(name)
    own = facts["equal" if layout.equal else "unequal"]
    serves, why = _judged(facts, own, layout, devices)
    command = (own.get("serve") or facts["serve"]).format(out=out)
    return Verdict(
        engine=key,
        title=facts["title"],
        serves=serves,
        versions=facts["tested"]["versions"],
        command="" if serves == NO else command,
        by="" if serves == NO else own.get("by", ""),
        why=why,
        notes=() if serves == NO else tuple(_notes(facts, layout)),
    )


def _judged(
    facts: Mapping[str, Any], own: Mapping[str, Any], layout: Layout, devices: int
) -> tuple[str, str]:
    kind = layout.model_type
    against = [_no_type(facts, kind), own.get("refused", "")]
    against += [_no_count(facts, kind, n, devices) for n in sorted({*layout.counts})]
    if why := next(filter(None, against), ""):
        return NO, why
    ran = own["run"] == ALL or kind in own["run"]
    if ran and not layout.quantised:
        return RUN, ""
    how = "equal" if layout.equal else "unequal"
    what = f"quantised {kind}" if layout.quantised else kind
    if kind not in facts["types"].get("has", [kind]):
        return NOT_RUN, f"whether it has models of type {kind} is not known"
    return NOT_RUN, f"{what} with {how} counts was not tried; nothing is known against it"


def _no_type(facts: Mapping[str, Any], kind: str) -> str:
    """Why an engine has no model of this type; empty where it may have one."""
    types = facts["types"]
    if types["others"] != "refused" or kind in types["has"]:
        return ""
    return f"{facts['title']} {facts['tested']['versions']} has no model of type {kind}"


def _no_count(facts: Mapping[str, Any], kind: str, count: int, devices: int) -> str:
    """Why an engine cannot take a layer of so many experts; empty where nothing is known."""
    if count % devices:
        return f"a layer has {count} experts, which {devices} devices do not divide"
    most = facts.get("most", {}).get("count", count)
    if count > most:
        return f"a layer has {count} experts, and {facts['title']} takes {most} at most"
    for rule in facts.get("counts", ()):
        if kind in rule["types"] and count not in rule["allowed"]:
            numbers = ", ".join(map(str, rule["allowed"]))
            return f"a layer has {count} experts, and {rule['where']} takes {numbers}"
    return ""


def _notes(facts: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    for rule in facts.get("widths", ()):
        odd = [f"{n} {w}" for n, w in layout.widths.items() if w % rule["multiple"]]
        if odd:
            yield f"{rule['for']} want multiples of {rule['multiple']}, not {', '.join(odd)}"
