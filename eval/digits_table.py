"""Pruning methods on nets trained on digits or characters: accuracy after the cut and after tuning.

    python eval/train_digits.py -o digits
    python eval/digits_table.py --nets digits -o digits.jsonl
    python eval/digits_table.py --nets digits -o digits-oracle.jsonl --oracle

    python eval/digits_table.py --data characters --nets characters -o characters.jsonl

    python eval/digits_table.py --nets digits -o digits.jsonl --only resnet20 --target operations \
        --ratios .4 --methods taylor-fo taylor-so taylor-bn --units-per-step 5 --minibatches 10

Every (net, seed, method, target, ratio, epochs) is one line of the output file; a run that is
started again does what is missing. The tables at the end (alone with `--table`) give mean ±
standard deviation over seeds, and the lowest share of its dense net's accuracy that a net kept. A
method is `removal/allocator`, where ToD's protection is the gate Taylor, or one of
`vision/gradual.py`, whose units leave in training and are then cut. A ratio is the share of
channels or multiply-adds removed; fine-tuning after the cut is FAIR-Pruner's (SGD, learning rate
.001, momentum .9), and so is training while units leave; nets that were trained with AdamW are
fine-tuned with it.

`network-pruner` is a method too where that package is installed: its own scores, depths and cut, at
the tolerance whose removal comes closest to the ratio; and `torch-pruning/uniform` and `/global`
are: its own pruner with GroupTaylorImportance, given the images that the scores see. Fine-tuning is
the same for all.

With `--oracle`: correlation of criteria with the measured change of the loss when one unit leaves:
its mean over images, and the mean of its square, which Molchanov's criterion estimates; for scores
on 640 images, and on the 64 that the oracle saw.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from character_nets import ADAMW
from torch import nn
from train_digits import add_data, fresh, opened

from moe_fair.core.oracle import Oracle, agreement
from moe_fair.core.units import Statistics
from moe_fair.vision.accuracy import top1
from moe_fair.vision.collect import collect
from moe_fair.vision.criteria import criterion
from moe_fair.vision.data import Data, sample
from moe_fair.vision.finetune import Training, finetune
from moe_fair.vision.gradual import METHODS as GRADUAL
from moe_fair.vision.gradual import Schedule, remove_gradually
from moe_fair.vision.graph import Graph
from moe_fair.vision.load import load_weights
from moe_fair.vision.oracle import loss_changes
from moe_fair.vision.plan import Goal, Rules, make
from moe_fair.vision.proof import find_groups
from moe_fair.vision.size import Sizes
from moe_fair.vision.surgery import cut, cuts_of
from moe_fair.vision.unit_outputs import MeasureConfig

PEER = "network-pruner"
GROUP_TAYLOR = "torch-pruning"
METHODS = [
    "u-score/uniform", "u-score/tod", "l1/uniform", "l1/tod", "random/uniform", "random/tod",
]  # fmt: skip
CRITERIA = [
    "u-score", "taylor", "taylor-sq", "taylor-so", "taylor-logits", "taylor-logits-sq", "l1",
    "bn-scale", "random",
]  # fmt: skip
SAMPLES = 640
ORACLE_IMAGES = 64
Row = dict[str, Any]


def main() -> None:
    """Measure what is missing, then print the tables."""
    args = _arguments()
    rows = []
    if args.output.exists():
        rows = [json.loads(line) for line in args.output.read_text().splitlines()]
    done = {_key(r) for r in rows}
    data = opened(args.data, args.images)
    for file in [] if args.table else sorted(args.nets.glob("*.safetensors")):
        net, seed = file.stem.rsplit("-", 1)
        if (args.only and net not in args.only) or int(seed) >= args.seeds:
            continue
        model = fresh(net, int(seed), data)
        load_weights(model, file)
        measure = _oracle if args.oracle else _prune
        for row in measure(args, model, data, {"net": net, "seed": int(seed)}, done):
            rows.append(row)
            with args.output.open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    (_oracle_table if args.oracle else _table)(rows)


def _prune(
    args: argparse.Namespace, model: nn.Module, data: Data, where: Row, done: set
) -> Iterator[Row]:
    wanted = [
        {**where, "method": m, "target": args.target, "ratio": r, "epochs": args.epochs}
        for m in args.methods
        for r in args.ratios
    ]
    wanted = [w for w in wanted if _key(w) not in done]
    if not wanted:
        return
    # 32 images a class: fewer would leave some classes out
    x, y = sample(data.train, max(SAMPLES, 32 * len(data.train.classes)), where["seed"])
    graph = find_groups(model, x[:2])
    sizes = Sizes(model, graph.groups, x)
    before = top1(model, data.test, 128)
    scores: dict[str, Any] = {}
    for w in wanted:
        if w["method"] in GRADUAL:
            pruned, w["steps"] = _gradual(args, model, data, graph, sizes, w)
            w["schedule"] = [args.units_per_step, args.minibatches]
        elif w["method"] == PEER:
            try:
                if "peer" not in scores:
                    scores["peer"] = _peer_scores(model, data, where["seed"])
                pruned = _peer_cut(model, scores["peer"], w["ratio"], x)
            except Exception as e:  # another's code: whatever it raises is the finding
                yield {**w, "failed": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}
                continue
        elif w["method"].startswith(GROUP_TAYLOR):
            pruned = _group_taylor_cut(model, graph, x, y, w)
        else:
            if "ours" not in scores:
                scores["ours"] = _scores(model, graph, x, y, where["seed"], args.methods)
            pruned = _cut(model, graph, sizes, scores["ours"], w)
        cost = Sizes(pruned, (), x).whole
        found = {
            **w,
            "dense": before,
            "cut": top1(pruned, data.test, 128),
            "parameters": cost.parameters / sizes.whole.parameters,
            "operations": cost.operations / sizes.whole.operations,
        }
        if args.epochs:
            if args.data == "digits":  # a third faster; torch 2.13 crashed so on the characters
                pruned.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            training = _training(args, where)
            found["rate"] = training.rate
            found["tuned"] = top1(finetune(pruned, data.train, training), data.test, 128)
        yield found


def _training(args: argparse.Namespace, where: Row) -> Training:
    """As the net was trained: AdamW's preset, or SGD at --rate."""
    if where["net"] in ADAMW:
        return Training(args.epochs, optimizer="adamw", seed=where["seed"])
    return Training(args.epochs, learning_rate=args.rate, seed=where["seed"])


def _scores(
    model: nn.Module,
    graph: Graph,
    x: torch.Tensor,
    y: torch.Tensor,
    seed: int,
    methods: list[str],
) -> Statistics:
    others = (GROUP_TAYLOR, PEER)
    names = {m.split("/")[0] for m in methods if "/" in m and not m.startswith(others)}
    needs = {n for name in {*names, "taylor"} for n in criterion(name).needs}
    return collect(model, graph, x, y, needs=needs, watch=MeasureConfig(seed=seed))


def _cut(
    model: nn.Module, graph: Graph, sizes: Sizes, scores: Statistics, wanted: Row
) -> nn.Module:
    removal, allocator = wanted["method"].split("/")
    plan = make(
        graph.groups,
        criterion(removal)(scores),
        criterion("taylor")(scores) if allocator == "tod" else None,
        sizes,
        rules=Rules(allocator),
        goal=_goal(graph, sizes, wanted),
    )
    pruned = copy.deepcopy(model)
    cut(pruned, cuts_of(graph.groups, plan.kept))
    return pruned


def _gradual(
    args: argparse.Namespace, model: nn.Module, data: Data, graph: Graph, sizes: Sizes, wanted: Row
) -> tuple[nn.Module, int]:
    """The model cut after units left while it trained, and the number of steps that took."""
    pruned = copy.deepcopy(model)
    pruned.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan, steps = remove_gradually(
        pruned,
        graph,
        sizes,
        data.train,
        schedule=Schedule(wanted["method"], args.units_per_step, args.minibatches),
        training=Training(0, seed=wanted["seed"]),
        goal=_goal(graph, sizes, wanted),
        rules=Rules("global"),
    )
    cut(pruned, cuts_of(graph.groups, plan.kept))
    return pruned, len(steps)


def _goal(graph: Graph, sizes: Sizes, wanted: Row) -> Goal:
    left = 1 - wanted["ratio"]
    if wanted["target"] == "operations":
        return Goal(operations=int(sizes.whole.operations * left))
    return Goal(units=round(sum(g.size for g in graph.units) * left))


def _peer_scores(model: nn.Module, data: Data, seed: int) -> Any:
    """Its `get_metrics` on 64 images of each class; on a copy, which it changes."""
    from Network_Pruner import get_metrics
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(seed)
    images, labels = sample(data.train, SAMPLES, seed)
    loaded = TensorDataset(images, labels)
    loaded.classes = data.train.classes  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        return get_metrics(
            copy.deepcopy(model),
            DataLoader(loaded, batch_size=64),
            the_samplesize_for_compute_distance=SAMPLES // len(data.train.classes),
            results_save_path=f"{folder}/results.pkl",
        )


def _peer_cut(model: nn.Module, scores: Any, ratio: float, x: torch.Tensor) -> nn.Module:
    """Its cut at the tolerance that removes about this share of the channels."""
    from Network_Pruner import get_ratios, get_skeleton, prune

    total = sum(len(v) for k, v in scores.items() if k.startswith("D_") and k.endswith("s2b_idx"))
    levels = [i / 400 for i in range(401)]
    depths = {a: get_ratios(model, scores, ToD_level=a) for a in levels}
    best = min(levels, key=lambda a: abs(sum(depths[a]) - ratio * total))
    example = x[:2]
    skeleton = get_skeleton(copy.deepcopy(model), depths[best], example)
    with tempfile.TemporaryDirectory() as folder:
        pruned = prune(
            skeleton,
            copy.deepcopy(model),
            scores,
            depths[best],
            pruned_model_save_path=f"{folder}/pruned.pht",
            example_inputs=(example,),
        )
    return pruned[0] if isinstance(pruned, tuple) else pruned


def _group_taylor_cut(
    model: nn.Module, graph: Graph, x: torch.Tensor, y: torch.Tensor, wanted: Row
) -> nn.Module:
    """By Torch-Pruning's own pruner, every layer by the ratio or the least of all layers.

    What ours leaves whole it leaves, too: classifiers, streams under LayerNorm, attentions.
    """
    import torch_pruning

    pruned = copy.deepcopy(model)
    made = {m.module for g in graph.groups for m in g.members if m.side == "out"}
    pruner = torch_pruning.pruner.BasePruner(
        pruned,
        x[:2],
        importance=torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=wanted["ratio"],
        global_pruning=wanted["method"].endswith("/global"),
        ignored_layers=[
            m
            for n, m in pruned.named_modules()
            if isinstance(m, (nn.Linear, nn.Conv2d)) and n not in made
        ],
    )
    for images, labels in zip(x.split(128), y.split(128), strict=True):
        nn.functional.cross_entropy(pruned(images), labels, reduction="sum").backward()
    pruner.step()
    pruned.zero_grad(set_to_none=True)
    return pruned


def _oracle(
    args: argparse.Namespace, model: nn.Module, data: Data, where: Row, done: set
) -> Iterator[Row]:
    row: Row = {**where, "method": "oracle", "ratio": 0}
    if _key(row) in done:
        return
    x, y = sample(data.train, args.scored, where["seed"])
    graph = find_groups(model, x[:2])
    needs = {n for name in CRITERIA for n in criterion(name).needs}
    watch = MeasureConfig(seed=where["seed"])
    few_images = args.oracle_images
    many = collect(model, graph, x, y, needs=needs, watch=watch)
    few = collect(model, graph, x[:few_images], y[:few_images], needs=needs, watch=watch)
    changes = loss_changes(model, graph.groups, x[:few_images], y[:few_images])
    mean = {n: c.mean(0) for n, c in changes.items()}
    squared = {n: c.square().mean(0) for n, c in changes.items()}
    for name in CRITERIA:
        row[name] = {
            kind + of: asdict(agreement(criterion(name)(found).values, Oracle(changes, 0.0, 0)))
            for of, found in (("", many), (" of these", few))
            for kind, changes in (("change", mean), ("squared", squared))
        }
    yield row


def _key(row: Row) -> tuple:
    return (*(row[k] for k in ("net", "seed", "method", "ratio")), _target(row), row.get("epochs"))


def _target(row: Row) -> str:
    return str(row.get("target", "channels"))  # rows of before there was another


def _table(rows: list[Row]) -> None:
    for net, target in sorted({(r["net"], _target(r)) for r in rows}):
        mine = [r for r in rows if r["net"] == net and _target(r) == target]
        dense = {r["seed"]: r["dense"] for r in mine if "dense" in r}
        print(f"\n{net}: dense top-1 {_spread(list(dense.values()))} %; {target} removed\n")
        ratios = sorted({r["ratio"] for r in mine})
        heads = [f"{r:.0%} cut | tuned | least | parameters, multiply-adds | nets" for r in ratios]
        print(f"| method | {' | '.join(heads)} |")
        print("|---" * (1 + 5 * len(ratios)) + "|")
        groups: dict[tuple, list[Row]] = defaultdict(list)
        for r in mine:
            groups[r["method"], r["epochs"], r["ratio"]].append(r)
        order = [*METHODS, *GRADUAL]
        labels = sorted(
            {(m, e) for m, e, _ in groups},
            key=lambda x: (order.index(x[0]) if x[0] in order else len(order), x),
        )
        several = len({e for _, e in labels}) > 1
        for m, e in labels:
            cells = [_cells(groups[m, e, ratio]) for ratio in ratios]
            print(f"| {m}{f', {e} epochs' if several else ''} | {' | '.join(cells)} |")


def _cells(found: list[Row]) -> str:
    good = [r for r in found if "failed" not in r]
    if not good:
        return " | ".join(["fails" if found else "-", "-", "-", "-", "0"])
    sizes = (f"{statistics.mean(r[k] for r in good):.0%}" for k in ("parameters", "operations"))
    tuned = [r for r in good if "tuned" in r]
    least = f"{min(r['tuned'] / r['dense'] for r in tuned):.1%}" if tuned else "-"
    tops = [_spread([r["cut"] for r in good])]
    tops += [_spread([r["tuned"] for r in tuned]) if tuned else "-"]
    return " | ".join([*tops, least, ", ".join(sizes), str(len(good))])


def _oracle_table(rows: list[Row]) -> None:
    for net in sorted({r["net"] for r in rows}):
        mine = [r for r in rows if r["net"] == net]
        print(f"\n{net}, {len(mine)} seeds\n")
        heads = ["change: Pearson", "Spearman", "in layers", "change²: Pearson", "Spearman"]
        heads += [f"{h}, same images" for h in ("change: Pearson", "change²: Pearson")]
        print(f"| criterion | {' | '.join(heads)} |")
        print("|---" * (1 + len(heads)) + "|")
        for c in CRITERIA:
            picked = [
                [r[c][kind][what] for r in mine]
                for kind, what in (
                    ("change", "pearson"), ("change", "spearman"), ("change", "spearman_within"),
                    ("squared", "pearson"), ("squared", "spearman"),
                    ("change of these", "pearson"), ("squared of these", "pearson"),
                )
            ]  # fmt: skip
            cells = [f"{statistics.mean(p):.3f} ± {_deviation(p):.3f}" for p in picked]
            print(f"| {c} | {' | '.join(cells)} |")


def _spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.2f} ± {100 * _deviation(values):.2f}"


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", type=Path, default=Path("digits"), help="of train_digits.py")
    add_data(parser)
    parser.add_argument("--only", nargs="+", help="names of nets")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--target", choices=["channels", "operations"], default="channels")
    parser.add_argument("--units-per-step", type=int, default=5, help="of methods in training")
    parser.add_argument("--minibatches", type=int, default=30, help="of a step, likewise")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning; 0 measures the cut")
    parser.add_argument("--rate", type=float, help="of fine-tuning, in place of the paper's .001")
    parser.add_argument("--oracle", action="store_true")
    parser.add_argument("--scored", type=int, default=SAMPLES, help="images, beside the oracle")
    parser.add_argument(
        "--oracle-images", type=int, default=ORACLE_IMAGES, help="of those, seen by the oracle"
    )
    parser.add_argument("--table", action="store_true", help="print the tables, measure nothing")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
