"""Compare allocators on trained models: held-out loss after real cuts, and what curves predicted.

    python eval/allocation.py --models eval/tiny-qwen2-moe=eval/text MODEL=TEXT -o eval/allocation

TEXT holds `calibration` and `heldout`. Statistics and cost curves lie in the output folder once
they are measured, every cut is a line of `losses.jsonl`, and a run that is started again does what
is missing. At the end: one table per share removed (also `table.md`).
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch

from moe_fair import pipeline
from moe_fair.core.units import Statistics
from moe_fair.costing import measure_curves
from moe_fair.engines.resident import ResidentEngine
from moe_fair.evaluate import heldout_loss
from moe_fair.moe.load import Checkpoint
from moe_fair.moe.surgery import cut
from moe_fair.recipe import Recipe

ALLOCATORS = ("uniform", "global", "curves", "tod", "tod-curves", "fisher")


class Subject:
    """One model, its texts, and the losses measured so far."""

    def __init__(self, spec: str, args: argparse.Namespace) -> None:
        path, _, text = spec.partition("=")
        self.name, self.args = Path(path).name, args
        self.recipe = Recipe(
            model=path,
            calibration=(f"{text}/calibration",),
            heldout=(f"{text}/heldout",),
            samples=args.samples,
            length=args.length,
            heldout_samples=args.heldout_samples,
            engine="resident",
            seed=args.seed,
        )
        self.source: Checkpoint = pipeline.open_model(self.recipe)
        self.heldout = pipeline.heldout_set(self.recipe, self.source)
        self.model = self.source.load(self.recipe.dtype, self.recipe.device).eval()
        self.statistics: dict[str, Statistics] = {}

    def measured(self, score: str) -> Statistics:
        """Statistics with the cost curves of one removal score."""
        if score not in self.statistics:
            home = self.args.output / f"{self.name}-{self.args.seed}"
            if not (home / "recipe.yaml").exists():
                pipeline.calibrate(self.recipe, home, print)
            kept = self.args.output / f"{self.name}-{self.args.seed}-{score}"
            if not kept.exists():
                text = pipeline.calibration_set(self.recipe, self.source, print)
                base = Statistics.load(home)
                measure_curves(self.recipe, self.source, text, base, score, None, print).save(kept)
            self.statistics[score] = Statistics.load(kept)
        return self.statistics[score]

    def loss(self, kept: dict[str, list[int]] | None) -> float:
        """Held-out loss with these experts left."""
        model = self.model if kept is None else copy.deepcopy(self.model)
        if kept is not None:
            cut(model, kept)
        assert self.heldout is not None
        batches = self.heldout.batches(self.recipe.batch_size)
        return heldout_loss(ResidentEngine(model), batches, self.heldout.domains).mean

    def run(self, score: str, allocate: str, ratio: float) -> dict[str, Any]:
        """One line of the record."""
        removal = {} if allocate == "fisher" else {"removal": score}
        plan = pipeline.plan(
            self.measured(score),
            self.recipe.with_settings({"allocate": allocate, "ratio": ratio, **removal}),
        )
        counts = [len(g.kept) for g in plan.groups]
        return {
            "kept": counts,
            "predicted": plan.explanation.get("predicted_change"),
            "loss": self.loss(plan.kept),
        }


def main() -> None:
    """Measure what is missing, then print the tables."""
    args = _arguments()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    record = args.output / "losses.jsonl"
    rows = [json.loads(x) for x in record.read_text().splitlines()] if record.exists() else []
    done = {_key(r) for r in rows}
    subjects = [Subject(spec, args) for spec in args.models]
    wanted = [(s, None, None, 0.0) for s in subjects] + [
        (s, score, a, ratio)
        for score in args.scores
        for ratio in args.ratios
        for s in subjects
        for a in ALLOCATORS
        if a != "fisher" or score == args.scores[0]
    ]
    for subject, score, allocate, ratio in wanted:
        row = {
            "model": subject.name, "score": score, "allocate": allocate, "ratio": ratio,
            "seed": args.seed, "heldout": args.heldout_samples,
        }  # fmt: skip
        if _key(row) in done:
            continue
        assert score is None or allocate is not None
        row |= subject.run(score, allocate, ratio) if score else {"loss": subject.loss(None)}
        rows.append(row)
        with record.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    text = tables([r for r in rows if r["heldout"] == args.heldout_samples])
    print(text)
    (args.output / "table.md").write_text(text + "\n")


def tables(rows: list[dict[str, Any]]) -> str:
    """Increase of the held-out loss; beside `curves` what they predicted."""
    original = {(r["model"], r["seed"]): r["loss"] for r in rows if r["score"] is None}
    models = list(dict.fromkeys(r["model"] for r in rows))
    lines = []
    for ratio in sorted({r["ratio"] for r in rows} - {0.0}):
        lines += ["", f"{ratio:.0%} removed:", ""]
        lines += [
            "| score, allocation | " + " | ".join(models) + " |",
            "|---" * (1 + len(models)) + "|",
        ]
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for r in rows:
            if r["ratio"] == ratio and r["score"]:
                text = f"{r['loss'] - original[r['model'], r['seed']]:.4f}"
                if r["allocate"] == "curves":
                    text += f" (predicted {r['predicted']:.4f})"
                cells.setdefault((r["score"], r["allocate"]), {})[r["model"]] = text
        for (score, allocate), found in cells.items():
            name = "fisher" if allocate == "fisher" else f"{score}, {allocate}"
            lines.append(f"| {name} | " + " | ".join(found.get(m, "-") for m in models) + " |")
    return "\n".join(lines).strip()


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("model", "score", "allocate", "ratio", "seed", "heldout"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL=TEXT")
    parser.add_argument("--scores", nargs="+", default=["taylor-sq", "counterfactual"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--heldout-samples", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/allocation"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
