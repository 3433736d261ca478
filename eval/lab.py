"""The quality lab: the default against the peers on three models, four budgets and five seeds.

    python eval/train_tiny_moe.py -o lab/mixtral --family mixtral --steps 2400
    python eval/train_tiny_moe.py -o lab/deepseek_v3 --family deepseek_v3 --steps 2400
    python eval/lab.py --models eval/tiny-qwen2-moe lab/mixtral lab/deepseek_v3 -o lab/lab.jsonl

`eval/compare.py` with this grid and the verdict that follows from it: the default's increase of the
held-out loss over that of the best peer without repair, of the best peer with the default's repair,
and of REAP, each with a uniform budget. `--repaired` measures the peers with repair too, which
takes hours. With `--unseen` a table sets the texts that methods are calibrated on side by side, on
domains that the given text holds and on others, and another the default and whatever peers were
measured with its repair:

    python eval/unseen_text.py -o lab/unseen
    python eval/lab.py --unseen lab/unseen --methods default default@self reap/uniform+distill

All other options are those of `eval/compare.py`; the findings are in `eval/LAB.md`.
"""

from __future__ import annotations

import math
import statistics as stats
import sys
from pathlib import Path

import compare

PEERS = ("frequency", "ean", "reap", "man", "msan", "mone", "aimer")
DEFAULT, REPAIR = "default", "distill"
MODELS = ("eval/tiny-qwen2-moe", "lab/mixtral", "lab/deepseek_v3")


def main() -> None:
    """Measure what is missing, then print the tables and the verdict."""
    made = compare.parser()
    made.description = __doc__
    made.add_argument("--repaired", action="store_true", help="the peers with repair, too")
    made.set_defaults(models=list(MODELS), output=Path("lab/lab.jsonl"))
    args = made.parse_args()
    if args.methods == compare.METHODS:
        args.methods = [DEFAULT, "counterfactual-agreed/global", *(f"{p}/uniform" for p in PEERS)]
        if args.repaired:
            args.methods += [f"{p}/uniform+{REPAIR}" for p in PEERS]
    rows = compare.measure(args)
    text = compare.tables(rows, args.methods, args.ratios, args.reference)
    text += "\n\n" + verdict(rows)
    if any(r.get("unseen") for r in rows):
        text += "\n\n" + texts(rows) + "\n\n" + same_repair(rows)
    print(text)
    if args.table:
        args.table.write_text(text + "\n")
    if args.csv:
        compare.write_csv(rows, args.csv)
    if args.plot:
        compare.plot(rows, args.methods, args.plot)


def verdict(rows: list[compare.Row]) -> str:
    """The default over the best peer in every cell, over the seeds that all were measured with."""
    cells = compare.cells_of(rows)
    plain = [f"{p}/uniform" for p in PEERS]
    repaired = [f"{p}+{REPAIR}" for p in plain]
    lines = [
        "### The default against the peers", "",
        "| model | removed | default | best peer | default / best | best repaired peer "
        "| default / best repaired | default / REAP | seeds |",
        "|---" * 9 + "|",
    ]  # fmt: skip
    shares: dict[str, list[float]] = {"best": [], "repaired": [], "reap": []}
    for model, ratio in dict.fromkeys((r["model"], r["ratio"]) for r in rows):
        found = {
            m: {r["seed"]: r["increase"] for r in cells.get((model, m, ratio), [])}
            for m in (DEFAULT, *plain, *repaired)
        }
        seeds = _common([found[m] for m in (DEFAULT, *plain)])
        if not seeds:
            continue
        mean = {m: stats.mean(found[m][s] for s in seeds) for m in (DEFAULT, *plain)}
        best = min(plain, key=lambda m: mean[m])
        line = [
            model, f"{100 * ratio:.3g} %", f"{mean[DEFAULT]:.4f}",
            f"{mean[best]:.4f} ({best.partition('/')[0]})", f"{mean[DEFAULT] / mean[best]:.3f}",
        ]  # fmt: skip
        shares["best"].append(mean[DEFAULT] / mean[best])
        shares["reap"].append(mean[DEFAULT] / mean["reap/uniform"])
        both = [s for s in _common([found[m] for m in repaired]) if s in found[DEFAULT]]
        if both:
            theirs = {m: stats.mean(found[m][s] for s in both) for m in repaired}
            best = min(repaired, key=lambda m: theirs[m])
            share = stats.mean(found[DEFAULT][s] for s in both) / theirs[best]
            shares["repaired"].append(share)
            line += [f"{theirs[best]:.4f} ({best.partition('/')[0]})", f"{share:.3f}"]
        else:
            line += ["-", "-"]
        lines.append(f"| {' | '.join(line)} | {shares['reap'][-1]:.3f} | {len(seeds)} |")
    for label, pick in (("geometric mean", _geometric), ("worst", max)):
        b, p, r = (f"{pick(v):.3f}" if v else "-" for v in shares.values())
        lines.append(f"| {label} | | | | {b} | | {p} | {r} | |")
    return "\n".join(lines)


def texts(rows: list[compare.Row]) -> str:
    """Mean increase over domains of a kind by the text that was calibrated on, and the worst.

    Each over what the same method comes to with the given text, on the seeds that both were
    measured with.
    """
    cells = compare.cells_of(rows)
    lines = [
        "### The text that is calibrated on", "",
        "| model | removed | method | domains of the given text | other domains | the worst | all "
        "| all / given text | seeds |",
        "|---" * 9 + "|",
    ]  # fmt: skip
    shares: dict[str, list[float]] = {}
    for (model, method, ratio), found in cells.items():
        given = {r["seed"]: r for r in cells.get((model, method.partition("@")[0], ratio), [])}
        both = [r for r in found if r.get("unseen") and r["seed"] in given]
        if not both:
            continue
        mine, theirs = (_by_kind(v) for v in (both, [given[r["seed"]] for r in both]))
        shown = "-"
        if "@" in method and theirs[3] > 0 < mine[3]:
            shares.setdefault(method, []).append(mine[3] / theirs[3])
            shown = f"{mine[3] / theirs[3]:.3f}"
        values = " | ".join(f"{v:.4f}" for v in mine)
        lines.append(
            f"| {model} | {100 * ratio:.3g} % | {method} | {values} | {shown} | {len(both)} |"
        )
    for method, found_shares in shares.items():
        lines.append(f"| geometric mean | | {method} | | | | | {_geometric(found_shares):.3f} | |")
    return "\n".join(lines)


def same_repair(rows: list[compare.Row]) -> str:
    """The default beside every peer that was measured with its repair, on both kinds of domains.

    Means over domains of a kind, on the seeds that all methods of a cell were measured with. A
    share of the best peer is left out where one of the two is not above zero.
    """
    cells = compare.cells_of([r for r in rows if r.get("unseen")])
    ours = sorted({m for _, m, _ in cells if m.partition("@")[0] == DEFAULT})
    names = [*ours, *sorted({m for _, m, _ in cells if m.partition("@")[0].endswith(f"+{REPAIR}")})]
    ratios = " | ".join(f"{own} / best peer" for own in ours)
    lines = [
        "### The default against peers with its repair", "",
        f"| model | removed | domains | {' | '.join(names)} | {ratios} | seeds |",
        "|---" * (4 + len(names) + len(ours)) + "|",
    ]  # fmt: skip
    shares: dict[tuple[str, str], list[float]] = {}
    for model, ratio in dict.fromkeys((m, r) for m, _, r in cells):
        found = {n: {r["seed"]: r for r in cells.get((model, n, ratio), [])} for n in names}
        seeds = _common([dict.fromkeys(f, 0.0) for f in found.values() if f])
        if not seeds:
            continue
        means = {n: _by_kind([f[s] for s in seeds]) for n, f in found.items() if f}
        for i, kind in enumerate(("given text's", "others")):
            theirs = {n: m[i] for n, m in means.items() if n not in ours}
            best = min(theirs, key=lambda n: theirs[n], default=None)
            line = [f"{means[n][i]:.4f}" if n in means else "-" for n in names]
            line = [f"**{v}**" if n == best else v for n, v in zip(names, line, strict=True)]
            for own in ours:
                share = _share(means[own][i], theirs[best]) if best and own in means else None
                shares.setdefault((kind, own), []).extend([share] if share else [])
                line.append(f"{share:.3f}" if share else "-")
            cell = f"{model} | {100 * ratio:.3g} % | {kind} | {' | '.join(line)} | {len(seeds)}"
            lines.append(f"| {cell} |")
    for kind in ("given text's", "others"):
        both = [shares.get((kind, own)) for own in ours]
        shown = " | ".join(f"{_geometric(b):.3f}" if b else "-" for b in both)
        lines.append(f"| geometric mean | | {kind} | {' | ' * (len(names) - 1)} | {shown} | |")
    return "\n".join(lines)


def _share(mine: float, theirs: float) -> float | None:
    """The one over the other, where both are above zero."""
    return mine / theirs if mine > 0 < theirs else None


def _by_kind(rows: list[compare.Row]) -> tuple[float, float, float, float]:
    """Means over seeds: of the given text's domains, of others, of the worst of all, of all."""
    seen = [list(r["domains"].values()) for r in rows]
    other = [list(r["unseen"].values()) for r in rows]
    both = [a + b for a, b in zip(seen, other, strict=True)]
    return (
        stats.mean(map(stats.mean, seen)), stats.mean(map(stats.mean, other)),
        stats.mean(map(max, both)), stats.mean(map(stats.mean, both)),
    )  # fmt: skip


def _common(found: list[dict[int, float]]) -> list[int]:
    return sorted(set.intersection(*(set(f) for f in found))) if found else []


def _geometric(values: list[float]) -> float:
    return math.exp(stats.mean(map(math.log, values)))


if __name__ == "__main__":
    sys.exit(main())
