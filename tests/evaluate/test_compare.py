"""Paired comparison of two models against other implementations and other ways to compute it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moe_fair.evaluate.compare import MOST_SUBTASKS, Row, compare
from moe_fair.evaluate.record import load_benchmarks, save_benchmarks
from moe_fair.report.numbers import benchmark_table


def results(
    tasks: dict[str, list[Any]],
    metric: str = "acc",
    groups: dict[str, list[str]] | None = None,
    values: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The parts of lm-eval's results that are read, made of per-item values."""
    groups = groups or {}
    found = {t: values[t] if values else float(np.mean(v)) for t, v in tasks.items()}
    for group, members in groups.items():
        found[group] = float(np.mean([x for m in members for x in tasks.get(m, [])] or [np.nan]))
    return {
        "results": {t: {"alias": t, f"{metric},none": v, f"{metric}_stderr,none": 0.01}
                    for t, v in found.items() if not math.isnan(v)},
        "group_subtasks": {**groups, **({} if groups else {t: [] for t in tasks})},
        "n-samples": {t: {"original": len(v), "effective": len(v)} for t, v in tasks.items()},
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {t: {metric: metric == "acc"} for t in found},
        "samples": {
            t: [{"doc_id": i, "doc_hash": f"{t}{i}", "filter": "none", metric: x}
                for i, x in enumerate(v)]
            for t, v in tasks.items()
        },
    }  # fmt: skip


def drawn(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two models' right and wrong answers, alike but not the same."""
    draw = np.random.default_rng(seed)
    a = draw.random(n) < 0.6
    return a.astype(float), np.where(draw.random(n) < 0.15, ~a, a).astype(float)


def test_right_and_wrong_items() -> None:
    """McNemar against its definition by counting, the error against scipy's."""
    a, b = drawn(120, 0)
    (row,) = compare(results({"t": b.tolist()}), results({"t": a.tolist()}))
    won, lost = int(((b == 1) & (a == 0)).sum()), int(((b == 0) & (a == 1)).sum())
    assert won != lost
    uneven = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    assert row.p == pytest.approx(min(1, 2 * uneven / 2 ** (won + lost)), rel=1e-12)
    assert row.test == "McNemar"
    assert row.difference == pytest.approx((won - lost) / 120, abs=1e-12)
    assert row.stderr == pytest.approx(stats.sem(b - a), rel=1e-12)
    assert row.stderr < math.hypot(stats.sem(a), stats.sem(b))  # what pairing is for
    assert (row.items, row.original, row.pruned) == (120, a.mean(), b.mean())


def test_equal_models() -> None:
    a, _ = drawn(50, 1)
    (row,) = compare(results({"t": a.tolist()}), results({"t": a.tolist()}))
    assert (row.difference, row.stderr, row.p) == (0, 0, 1)


def test_other_means_by_paired_t() -> None:
    draw = np.random.default_rng(2)
    a = draw.normal(size=80)
    b = a + draw.normal(0.1, 0.5, size=80)
    (row,) = compare(results({"t": b.tolist()}, "score"), results({"t": a.tolist()}, "score"))
    wanted = stats.ttest_rel(b, a)
    assert row.test == "paired t"
    assert row.p == pytest.approx(wanted.pvalue, rel=1e-9)
    assert row.stderr == pytest.approx((b - a).mean() / wanted.statistic, rel=1e-9)


@pytest.mark.parametrize("metric", ["bits_per_byte", "byte_perplexity", "word_perplexity"])
def test_summed_likelihoods_against_the_jackknife(metric: str) -> None:
    """No mean over items: its error is checked by leaving out one item after the other."""
    draw = np.random.default_rng(3)
    n = 300
    weight = draw.integers(200, 1500, n).astype(float)
    lls = [-weight * draw.normal(0.9, 0.1, n)]
    lls.append(lls[0] - weight * draw.normal(0.02, 0.05, n))

    def value(ll: np.ndarray, keep: np.ndarray) -> float:
        rate = -ll[keep].sum() / weight[keep].sum()
        return rate / math.log(2) if metric == "bits_per_byte" else math.exp(rate)

    everything = np.ones(n, dtype=bool)
    sides = [
        results({"t": list(zip(ll, weight, strict=True))}, metric,
                values={"t": value(ll, everything)})
        for ll in lls
    ]  # fmt: skip
    (row,) = compare(sides[1], sides[0])
    left_out = []
    for i in range(n):
        keep = everything.copy()
        keep[i] = False
        left_out.append(value(lls[1], keep) - value(lls[0], keep))
    spread = np.array(left_out) - np.mean(left_out)
    assert row.stderr == pytest.approx(math.sqrt((n - 1) / n * (spread**2).sum()), rel=0.01)
    assert row.difference == pytest.approx(value(lls[1], everything) - value(lls[0], everything))
    assert row.p == pytest.approx(2 * stats.t.sf(abs(row.difference / row.stderr), n - 1), rel=0.01)
    assert row.test == "paired t"


def test_a_value_that_is_no_mean_of_its_items_gets_no_error() -> None:
    a, b = drawn(30, 4)
    sides = [results({"t": x.tolist()}, "f1", values={"t": 0.123}) for x in (a, b)]
    (row,) = compare(sides[1], sides[0])
    assert (row.stderr, row.p, row.test) == (None, None, None)
    assert row.difference == 0


def test_other_items_are_refused() -> None:
    a, b = drawn(20, 5)
    with pytest.raises(ValueError, match="task t: the two models were not run on the same items"):
        compare(results({"t": b.tolist()}), results({"t": a[:-1].tolist()}))


@pytest.mark.parametrize("subtasks", [3, MOST_SUBTASKS + 1])
def test_groups(subtasks: int) -> None:
    """A group pools its subtasks' items, and stands alone where they are many."""
    names = [f"g_{i}" for i in range(subtasks)]
    pairs = {n: drawn(40, i) for i, n in enumerate(names)}
    pruned, original = (
        results({n: p[side].tolist() for n, p in pairs.items()}, groups={"g": names})
        for side in (1, 0)
    )
    rows = compare(pruned, original)
    expected = ["g", *names] if subtasks == 3 else ["g"]
    assert [r.task for r in rows] == expected
    assert [r.depth for r in rows] == [0] + [1] * (len(rows) - 1)
    a, b = (np.concatenate([p[side] for p in pairs.values()]) for side in (0, 1))
    assert rows[0].items == 40 * subtasks
    assert rows[0].stderr == pytest.approx(stats.sem(b - a), rel=1e-12)


def test_the_average_is_that_of_the_tasks() -> None:
    pairs = {f"t{i}": drawn(60 + i, i) for i in range(8)}
    pruned, original = (results({n: p[side].tolist() for n, p in pairs.items()}) for side in (1, 0))
    *rows, average = compare(pruned, original)
    assert average.task == "average of 8"
    assert average.pruned == pytest.approx(np.mean([r.pruned for r in rows]))
    assert average.difference == pytest.approx(np.mean([r.difference for r in rows]))
    errors = [stats.sem(p[1] - p[0]) for p in pairs.values()]
    assert average.stderr == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / 8)
    assert average.p is None
    assert "average of 1" not in [r.task for r in compare(results({"t": [1.0, 0.0]}))]


def test_one_model_alone() -> None:
    (row,) = compare(results({"t": [1.0, 0.0, 1.0]}))
    assert (row.original, row.difference, row.p) == (None, None, None)
    table = benchmark_table([row])
    assert table.header == ("task", "metric", "items", "value", "± stderr")
    assert table.rows == (("t", "acc ↑", "3", "0.6667", "0.0100"),)


def test_rows_are_kept_until_measured_again(tmp_path: Path) -> None:
    old, other = (Row(t, "acc", 0, 10, 0, True, 0.5, 0.1) for t in ("a", "b"))
    new = Row("a", "acc", 0, 20, 0, True, 0.6, 0.1, 0.7, 0.1, -0.1, 0.05, 0.04, "McNemar")
    save_benchmarks(tmp_path, [old, other])
    assert save_benchmarks(tmp_path, [new]) == [new, other]
    assert load_benchmarks(tmp_path) == [new, other]
    assert load_benchmarks(tmp_path / "elsewhere") is None
    (tmp_path / "benchmarks.json").write_text('{"rows": [{"task": 1}]}')
    with pytest.raises(ValueError, match="not a table of ours"):
        load_benchmarks(tmp_path)
