"""The tables of criteria, allocators, repairs and settings in docs/, from where they are defined.

Those of docs/serving.md are made from what checks of engines have found, eval/serving/runs.jsonl.

    python docs/make_tables.py           # print them
    python docs/make_tables.py --write   # put them into their pages

What a rule is comes from its own docstring, what a setting is from its field. A test fails where a
page is out of date.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_fair.core.allocate import allocators, needs
from moe_fair.core.recipe import Recipe
from moe_fair.core.settings import key_of, settings_of
from moe_fair.moe.criteria import criteria
from moe_fair.moe.repairs import repairs
from moe_fair.moe.statistics import unasked

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "eval" / "serving"))
import runs  # noqa: E402

# what an allocator may need beside statistics -> what gives it
GIVEN_BY = {
    "protection": "protection scores, `--protection`",
    "costs": "measured cost curves, `--curves`",
}


def tables() -> Iterator[tuple[str, str, str]]:
    """Page, name and Markdown of each table."""
    header: tuple[str, ...] = ("criterion", "score of an expert", "collected with", "source")
    rows = [
        (
            f"`{name}`",
            first(c.score),
            f"`--for {name}`" if _asked_for(c) else "",
            c.source,
        )
        for name, c in criteria().items()
    ]
    yield "choosing.md", "criteria", _table(header, rows)
    header = ("`--allocate`", "budget", "needs")
    rows = [(f"`{name}`", first(a), _joined(_needed(name, a))) for name, a in allocators().items()]
    yield "choosing.md", "allocators", _table(header, rows)
    header = ("`--repair`", "what is fitted, and folded into tensors that are there")
    rows = [("`none`", "Nothing."), *((f"`{name}`", first(r)) for name, r in repairs().items())]
    yield "repair.md", "repairs", _table(header, rows)
    header = ("setting", "what it is", "default", "commands")
    rows = [
        (f"`{key_of(s.name)}`", s.about.help, s.usual, ", ".join(s.about.commands))
        for s in settings_of(Recipe).values()
    ]
    yield "settings.md", "settings", _table(header, rows)
    found = runs.read()
    for name in ("vllm", "mlx", "llama.cpp"):
        yield "serving.md", f"runs of {name}", _table(*_headed(runs.likelihoods(found, name)))
    yield "serving.md", "runs of MTP heads", _table(*_headed(runs.heads(found)))
    yield "serving.md", "runs of a server", _table(*_headed(runs.tasks(found)))
    yield "serving.md", "runs of quantisers", _table(*_headed(runs.quantised(found)))


def _asked_for(rule: Any) -> bool:
    """It needs a statistic that is not collected unasked."""
    return not unasked("always", "usual").issuperset(getattr(rule, "needs", ()))


def _needed(name: str, rule: Any) -> Iterator[str]:
    """What an allocator needs, and what gives it."""
    yield from (text for n, text in GIVEN_BY.items() if needs(rule, n))
    if _asked_for(rule):
        # with the criterion of its name, or the score that it stands for
        score = name if name in criteria() else f"{getattr(rule, 'removal', 'CRITERION')}/{name}"
        yield f"`calibrate --for {score}`"
    elif getattr(rule, "inputs", {}):
        yield f"{_joined(f'`{n}`' for n in rule.needs)}, collected unasked"


def first(rule: Any) -> str:
    """The first sentence of a docstring, without shapes and without where to read on."""
    text = " ".join((inspect.getdoc(rule) or "").split("\n\n")[0].split())
    cited = r"docs/methods\.md, section \d+"
    text = re.sub(rf"^\[[NU]\] |; {cited}|\s*\({cited}\)", "", text)
    text = re.split(r"(?<=\.)\s", text)[0].rstrip(":.")
    return f"{text[:1].upper()}{text[1:]}."


def replaced(page: str, name: str, table: str) -> str:
    """The page with this table between its two marks."""
    start, end = f"<!-- {name}: docs/make_tables.py -->\n", f"<!-- end of {name} -->"
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    assert after, f"the page has no {start.strip()} ... {end}"
    return before + start + table + end + after


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="into the pages")
    write = parser.parse_args().write
    for page, name, table in tables():
        if write:
            (DOCS / page).write_text(replaced((DOCS / page).read_text(), name, table))
        else:
            print(f"{page}: {name}\n{table}")


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in r] for r in lines)
    return "".join(f"| {' | '.join(r)} |\n" for r in escaped)


def _headed(lines: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return lines[0], lines[1:]


def _joined(words: Iterable[str]) -> str:
    return "; ".join(words)


if __name__ == "__main__":
    main()
