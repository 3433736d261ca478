"""What checks of engines found: lines of JSON, and the tables that docs/serving.md makes from them.

    python eval/serving/runs.py ROWS.jsonl          # print them
    python eval/serving/runs.py ROWS.jsonl --keep   # and put them into the runs.jsonl beside this

A row that is kept takes the place of the one of the same engine, family, counts and way of running.
Imported by the checks in engines' own environments too: it needs Python alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RUNS = Path(__file__).parent / "runs.jsonl"
COUNTS = {"model": "unpruned", "equal": "equal", "pruned": "unequal"}
# what makes a row another one, and by what they are sorted
KEY = ("engine", "family", "counts", "how", "against", "task")

Row = dict[str, Any]


def row(
    engine: str, version: str, folder: Path, which: str, found: Row, against: str, how: str = ""
) -> str:
    """A line for `runs.jsonl`; what was found is also left as FOLDER/ENGINE-WHICH.json.

    Args:
        engine: its key in serving/engines.yaml.
        folder: that `unequal.py` has made, by name of the family.
        which: of its checkpoints.
        found: `logprobs` of the prompt's tokens and the `greedy` continuation.
        against: transformers, or a checkpoint that the same engine was given before.
        how: what else it was started with.
    """
    (folder / f"{engine}-{which}.json").write_text(json.dumps(found))
    if against == "transformers":
        wanted = json.loads((folder / "expected.json").read_text())[which]
    else:
        wanted = json.loads((folder / f"{engine}-{against}.json").read_text())
    pairs = list(zip(found["logprobs"], wanted["logprobs"], strict=True))
    return json.dumps(
        {
            "engine": engine, "version": version, "date": datetime.date.today().isoformat(),
            "family": folder.name, "counts": COUNTS.get(which, which), "how": how,
            "against": against,
            "mean_difference": abs(sum(a - b for a, b in pairs)) / len(pairs),
            "largest_difference": max(abs(a - b) for a, b in pairs),
            "greedy_equal": found["greedy"] == wanted["greedy"],
        }
    )  # fmt: skip


def read(path: Path = RUNS) -> list[Row]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def keep(rows: Iterable[Row], path: Path = RUNS) -> None:
    """Put rows into the file, in place of those that they repeat."""
    found = {key(r): r for r in [*(read(path) if path.exists() else ()), *rows]}
    path.write_text("".join(f"{json.dumps(found[k])}\n" for k in sorted(found)))


def key(r: Row) -> tuple[str, ...]:
    """What makes a row another one."""
    return tuple(r.get(k, "") for k in KEY)


def likelihoods(rows: Sequence[Row], engine: str) -> list[tuple[str, ...]]:
    """Header and rows of an engine's checks of log-likelihoods and greedy tokens."""
    header = (
        "family", "experts per layer", "against", "largest difference", "of the mean",
        "greedy tokens", "version, date",
    )  # fmt: skip
    found = [
        (
            r["family"], ", ".join(filter(None, (r["counts"], r["how"]))), _against(r),
            f"{r['largest_difference']:.0e}", f"{r['mean_difference']:.0e}",
            "equal" if r["greedy_equal"] else "other", f"{r['version']}, {r['date']}",
        )
        for r in rows
        if r["engine"] == engine and "greedy_equal" in r and r["counts"] != "masked"
    ]  # fmt: skip
    return [header, *found]


def tasks(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Header and rows of lm-eval through a server."""
    header = (
        "task", "items", "moe-fair eval", "through the server",
        "largest difference of a log-likelihood", "answers", "version, date",
    )  # fmt: skip
    found = [
        (
            r["task"], str(r["items"]), *(f"{v:.6f}" for v in r["values"]),
            f"{r['largest_difference']:.0e}", "equal" if r["answers_equal"] else "other",
            f"{r['version']}, {r['date']}",
        )
        for r in rows
        if "task" in r
    ]  # fmt: skip
    return [header, *found]


def heads(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Header and rows of speculative decoding by a model's own MTP head."""
    header = (
        "family", "experts per layer", "greedy tokens", "drafted there", "by moe_fair",
        "accepted there", "by moe_fair", "version, date",
    )  # fmt: skip
    found = [
        (
            r["family"], r["counts"], "equal" if r["tokens_equal"] else "other",
            *map(str, (*r["drafted"], *r["accepted"])), f"{r['version']}, {r['date']}",
        )
        for r in rows
        if "drafted" in r
    ]  # fmt: skip
    return [header, *found]


def quantised(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Header and rows of losses before and after a quantiser."""
    header = (
        "experts per layer", "scheme", "before", "quantised", "loaded again by transformers",
        "bytes", "version, date",
    )  # fmt: skip
    found = [
        (
            r["counts"], r["how"], *(f"{v:.4f}" for v in r["losses"]),
            " -> ".join(f"{n / 1e6:.1f} MB" for n in r["bytes"]), f"{r['version']}, {r['date']}",
        )
        for r in rows
        if "losses" in r
    ]  # fmt: skip
    return [header, *found]


def _against(r: Row) -> str:
    return "the masked original, there" if r["against"] == "masked" else str(r["against"])


def main() -> None:
    """Print the rows, keep them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    rows = read(args.rows)
    for engine in dict.fromkeys(r["engine"] for r in rows):
        print(engine)
        for found in (likelihoods(rows, engine), heads(rows), tasks(rows), quantised(rows)):
            for line in found if len(found) > 1 else ():
                print(f"| {' | '.join(line)} |")
    if args.keep:
        keep(rows)


if __name__ == "__main__":
    main()
