"""The whole default `prune` on one device, stage by stage: seconds, peak, tokens/s, share of bf16.

    python eval/make_full_size.py -o full               # Qwen1.5-MoE-A2.7B's shape, 28.6 GB
    python eval/bench_prune.py --model full --peak 989e12 --bandwidth 3.35e12       # an H100
    python eval/bench_prune.py --samples 64 --length 64                 # the reference model

A stage lasts from the line that begins it to the next one's. FLOPs are those of scaling_prune.py
(an upper bound for the repair: trainings that gain nothing end early), bytes those of the optimizer
alone; without --peak and --bandwidth no share is given. Peak memory is the device's own, the
model's weights included; a CPU keeps no such record.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scaling import Shape
from scaling_prune import STAGES, Run, optimizer_bytes

from moe_fair.core.recipe import Recipe
from moe_fair.engines.device import pick_device
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.pipelines import moe as pipeline

# how a stage's first line begins
BEGINS = {"calibrating on": "collection", "trying": "trials", "repairing": "repair",
          "cutting": "cut and verify"}  # fmt: skip


class Watch:
    """What a run says, as stages with their seconds and peaks."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.lines = device, list[str]()
        self.stages: list[dict[str, Any]] = []
        self._begin("start")

    def say(self, line: str) -> None:
        """One line of the run; it may begin a stage."""
        self.lines.append(line)
        for words, name in BEGINS.items():
            if line.startswith(words) and name not in {s["stage"] for s in self.stages}:
                self.end()
                self._begin(name)

    def end(self) -> None:
        """The last stage is over."""
        its = self.stages[-1]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            its["peak_bytes"] = torch.cuda.max_memory_allocated()
        its["seconds"] = time.perf_counter() - self._since

    def _begin(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._since = time.perf_counter()
        self.stages.append({"stage": name, "peak_bytes": None})


def main() -> None:
    """Measure and print one table."""
    args = _arguments()
    device = pick_device(args.device)
    given = {"model": args.model, "calibration": args.text, "samples": args.samples,
             "length": args.length, "experts": args.experts, "device": args.device,
             "dtype": args.dtype, "self_share": 0}  # fmt: skip
    recipe = Recipe().with_settings(given)
    watch = Watch(device)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        pipeline.prune(recipe, Path(folder) / "out", say=watch.say)
        watch.end()
    shape = shape_of(Checkpoint(args.model).config)
    run = run_of(args, watch.lines)
    repaired = with_copies(run, watch.lines)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; {args.model}, {run.tokens:,} tokens\n")
    print("| stage | seconds | peak, GB | tokens/s | TFLOP/s | of bf16 | GB/s | of bandwidth |")
    print("|---|---|---|---|---|---|---|---|")
    for its in watch.stages:
        its |= rates(its, shape, repaired if its["stage"] == "repair" else run, args)
        cells = [its["stage"], f"{its['seconds']:.1f}", _of(its["peak_bytes"], 1e9)]
        cells += [_of(its["tokens_per_second"]), _of(its["flops_per_second"], 1e12, 2)]
        cells += [_of(its["of_peak"], 0.01), _of(its["bytes_per_second"], 1e9)]
        print("| " + " | ".join([*cells, _of(its["of_bandwidth"], 0.01)]) + " |")
    if args.json:
        args.json.write_text(json.dumps({"device": name, "stages": watch.stages}, indent=1) + "\n")


def shape_of(config: Any) -> Shape:
    """The numbers of a qwen2_moe config.

    Raises:
        SystemExit: another type, whose terms are not written out.
    """
    if config.model_type != "qwen2_moe":
        raise SystemExit(f"{config.model_type}: scaling_prune.py knows qwen2_moe alone")
    c, head = config, config.hidden_size // config.num_attention_heads
    shared = c.shared_expert_intermediate_size // c.moe_intermediate_size
    return Shape(
        "model", c.num_hidden_layers, 0, c.hidden_size, c.moe_intermediate_size,
        c.intermediate_size, c.num_experts, c.num_experts_per_tok, shared, c.num_attention_heads,
        c.num_key_value_heads, head, head, c.vocab_size,
    )  # fmt: skip


def run_of(args: argparse.Namespace, lines: list[str]) -> Run:
    """The run's numbers, as far as it says them."""
    said = "\n".join(lines)
    plans = re.search(r"^trying (\d+) plans", said, re.MULTILINE)
    held = re.search(r"^held back to try plans on: (\d+)", said, re.MULTILINE)
    return Run(
        sequences=args.samples, length=args.length, kept=args.experts,
        plans=int(plans[1]) if plans else 0, tried=int(held[1]) if held else 0,
        step=max(1, 1024 // args.length),
    )  # fmt: skip


def with_copies(run: Run, lines: list[str]) -> Run:
    """The repair's own numbers: copies in the model's words are more sequences."""
    found = re.search(r"and (\d+) copies", "\n".join(lines))
    copies = int(found[1]) if found else 0
    return replace(run, sequences=run.sequences * (1 + copies), epochs=2 if copies >= 3 else 4)


def rates(
    its: dict[str, Any], shape: Shape, run: Run, args: argparse.Namespace
) -> dict[str, float | None]:
    """Per second, and as shares of what the device can do."""
    name, seconds = its["stage"], its["seconds"]
    terms = [t(shape, run) for n, t in STAGES.items() if n.partition(":")[0] == name]
    tokens = {"collection": run.sequences - run.tried, "trials": run.tried, "repair": run.sequences}
    speed = tokens[name] * run.length / seconds if name in tokens else None
    flops = sum(terms) / seconds if terms else None
    steps = shape.layers * run.epochs * (run.sequences // run.step)
    moved = optimizer_bytes(shape, run) * steps / seconds if name == "repair" else None
    return {
        "tokens_per_second": speed,
        "flops_per_second": flops,
        "of_peak": flops / args.peak if flops and args.peak else None,
        "bytes_per_second": moved,
        "of_bandwidth": moved / args.bandwidth if moved and args.bandwidth else None,
    }


def _of(value: float | None, unit: float = 1.0, digits: int = 1) -> str:
    if value is None:
        return "-"
    return f"{value / unit:,.{digits}f}" + (" %" if unit == 0.01 else "")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="eval/tiny-qwen2-moe")
    parser.add_argument("--text", default="eval/text/calibration")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--experts", type=int, default=40)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peak", type=float, help="FLOP/s in bfloat16 that the device promises")
    parser.add_argument("--bandwidth", type=float, help="bytes/s of its memory")
    parser.add_argument("--work", type=Path, help="where the result lies while it is made")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
