"""Two models on the same benchmark items: difference, its standard error, and a paired test.

Both models answer the same items, so the difference is judged item by item, which is far sharper
than comparing two standard errors. For a mean (accuracy) the difference of item i is
d_i = pruned_i - original_i. For a metric of summed log-likelihoods (bits per byte, perplexities)
d_i is the item's influence on the difference of the two metrics, to first order. With n items

    standard error = sqrt(n / (n - 1) · Σ (d_i - mean d)²) / n        (of the mean of d)

    McNemar, exact: items that one model gets right and the other wrong are b and c;
                    p = P(Binomial(b + c, 1/2) is at least as uneven), two-sided
    paired t:       t = mean d / standard error, n - 1 degrees of freedom, two-sided

McNemar is used where every item is right or wrong, paired t elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# lm-eval's metrics of summed log-likelihoods: value = f(-Σ ll / Σ weight), and f' at that value
_RATE = {
    "bits_per_byte": (lambda x: x / math.log(2), lambda x: 1 / math.log(2)),
    "byte_perplexity": (math.exp, math.exp),
    "word_perplexity": (math.exp, math.exp),
}
MOST_SUBTASKS = 12  # a group with more is one line
AVERAGED = "acc"  # the metric of the last line, as the published averages have it


@dataclass(frozen=True)
class Row:
    """One metric of one task.

    Attributes:
        task, metric: lm-eval's names; a filter other than `none` follows the metric's name.
        depth: 1 for the subtasks of the group above, else 0.
        items: benchmark items behind the numbers.
        fewshot: examples before each question, or None where subtasks differ.
        higher_is_better: None where lm-eval does not say.
        pruned, original: the values; pruned_stderr, original_stderr: lm-eval's standard errors.
        difference: pruned - original; stderr: of the difference, paired.
        p: two-sided probability of a difference as large without any; test: which test says so.
    """

    task: str
    metric: str
    depth: int
    items: int
    fewshot: int | None
    higher_is_better: bool | None
    pruned: float
    pruned_stderr: float | None
    original: float | None = None
    original_stderr: float | None = None
    difference: float | None = None
    stderr: float | None = None
    p: float | None = None
    test: str | None = None


def compare(pruned: Mapping[str, Any], original: Mapping[str, Any] | None = None) -> list[Row]:
    """Rows of a table from lm-eval's results, with their samples, of one or two models.

    Raises:
        ValueError: the two were not run on the same items.
    """
    rows = []
    for task, depth in _order(pruned):
        for key in pruned["results"][task]:
            if _is_metric(key):
                rows.append(_row(pruned, original, task, depth, key))
    if average := _average([r for r in rows if r.depth == 0 and r.metric == AVERAGED]):
        rows.append(average)
    return rows


def _order(results: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(task, depth) as the table lists them: a group above its subtasks, if those are few."""
    groups = {g: m for g, m in results["group_subtasks"].items() if m}
    members = {m for ms in groups.values() for m in ms}

    def walk(name: str, depth: int) -> Iterator[tuple[str, int]]:
        measured = any(map(_is_metric, results["results"].get(name, ())))
        if measured:
            yield name, depth
        if len(_leaves(groups, name)) <= MOST_SUBTASKS or not measured:
            for member in groups.get(name, ()):
                yield from walk(member, depth + measured)

    for name in dict.fromkeys([*groups, *results["results"]]):
        if name not in members:
            yield from walk(name, 0)


def _leaves(groups: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """The tasks of a group, those of the groups in it as well; a task is its own leaf."""
    if name not in groups:
        return [name]
    return [leaf for member in groups[name] for leaf in _leaves(groups, member)]


def _is_metric(key: str) -> bool:
    name, comma, _ = key.partition(",")
    return bool(comma) and not name.endswith("_stderr")


def _row(
    pruned: Mapping[str, Any], original: Mapping[str, Any] | None, task: str, depth: int, key: str
) -> Row:
    metric, _, filtered = key.partition(",")
    groups = {g: m for g, m in pruned["group_subtasks"].items() if m}
    tasks = _leaves(groups, task)
    row = Row(
        task=task,
        metric=metric if filtered == "none" else f"{metric}, {filtered}",
        depth=depth,
        items=sum(pruned["n-samples"][t]["effective"] for t in tasks),
        fewshot=pruned["n-shot"].get(task),
        higher_is_better=pruned["higher_is_better"].get(task, {}).get(metric),
        pruned=pruned["results"][task][key],
        pruned_stderr=_number(pruned["results"][task].get(f"{metric}_stderr,{filtered}")),
    )
    if original is None:
        return row
    value = original["results"][task][key]
    row = replace(
        row,
        original=value,
        original_stderr=_number(original["results"][task].get(f"{metric}_stderr,{filtered}")),
        difference=row.pruned - value,
    )
    pairs = _pairs(pruned, original, tasks, metric, filtered)
    stderr, p, test = _paired(metric, pairs, row)
    return replace(row, stderr=stderr, p=p, test=test)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None  # lm-eval writes "N/A"


def _pairs(
    pruned: Mapping[str, Any],
    original: Mapping[str, Any],
    tasks: Sequence[str],
    metric: str,
    filtered: str,
) -> list[tuple[Any, Any]]:
    """(original, pruned) value of the metric for every item of the tasks."""
    pairs = []
    for task in tasks:
        sides = []
        for results in (original, pruned):
            kept = [s for s in results["samples"].get(task, ()) if s["filter"] == filtered]
            sides.append({(s["doc_id"], s["doc_hash"]): s.get(metric) for s in kept})
        if sides[0].keys() != sides[1].keys():
            raise ValueError(f"task {task}: the two models were not run on the same items")
        pairs += [(value, sides[1][item]) for item, value in sides[0].items()]
    return pairs


def _paired(
    metric: str, pairs: Sequence[tuple[Any, Any]], row: Row
) -> tuple[float | None, float | None, str | None]:
    """Standard error of the difference, p and the test; None where items do not explain it."""
    from scipy import stats  # a second to import, and a report without benchmarks needs none

    n = len(pairs)
    if n < 2 or any(a is None or b is None for a, b in pairs):
        return None, None, None
    if metric in _RATE:
        d = _influence(metric, pairs)
    elif all(isinstance(x, (int, float, np.number)) for pair in pairs for x in pair):
        a, b = np.array(pairs, dtype=np.float64).T
        if not math.isclose(float(b.mean()), row.pruned, rel_tol=1e-9, abs_tol=1e-12):
            return None, None, None  # not the mean of its items: a weighted group, an F1
        d = b - a
        if set(np.unique([a, b])) <= {0.0, 1.0}:
            won, lost = int((d > 0).sum()), int((d < 0).sum())
            p = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
            return float(d.std(ddof=1) / math.sqrt(n)), float(p), "McNemar"
    else:
        return None, None, None
    stderr = float(d.std(ddof=1) / math.sqrt(n))
    t = d.mean() / stderr if stderr else 0.0
    return stderr, float(2 * stats.t.sf(abs(t), n - 1)), "paired t"


def _influence(metric: str, pairs: Sequence[tuple[Any, Any]]) -> np.ndarray:
    """[n] how much each item moves the difference; its mean is the difference to first order.

    The metric is f(r) with r = -Σ ll / Σ w. Item i moves r by (-ll_i - r·w_i) / mean w, around r.
    """
    value, slope = _RATE[metric]
    sides = []
    for side in (0, 1):
        ll, w = np.array([pair[side] for pair in pairs], dtype=np.float64).T
        r = -ll.sum() / w.sum()
        sides.append(value(r) + slope(r) * (-ll - r * w) / w.mean())
    return sides[1] - sides[0]


def _average(rows: Sequence[Row]) -> Row | None:
    """The plain mean over tasks, as published averages are; its tasks' errors are independent."""
    if len(rows) < 2:
        return None

    def mean(values: Sequence[float | None]) -> float | None:
        return None if None in values else float(np.mean([v for v in values if v is not None]))

    def spread(values: Sequence[float | None]) -> float | None:
        if None in values:
            return None
        return math.sqrt(sum(v**2 for v in values if v is not None)) / len(values)

    pruned = mean([r.pruned for r in rows])
    assert pruned is not None
    return Row(
        task=f"average of {len(rows)}",
        metric=AVERAGED,
        depth=0,
        items=sum(r.items for r in rows),
        fewshot=rows[0].fewshot if len({r.fewshot for r in rows}) == 1 else None,
        higher_is_better=True,
        pruned=pruned,
        pruned_stderr=spread([r.pruned_stderr for r in rows]),
        original=mean([r.original for r in rows]),
        original_stderr=spread([r.original_stderr for r in rows]),
        difference=mean([r.difference for r in rows]),
        stderr=spread([r.stderr for r in rows]),
    )
