"""CPU time of the U-Score against the paper's own package, on VGG16 with batch normalisation.

    python eval/bench_uscore.py --peer-python PEER/bin/python

PEER is an environment of its own with `pip install torch==2.13.0 network-pruner==2.16`. Both sides
score the same random-weight VGG16 on the same images (10 classes, 32 × 32), each in its own process
on one thread, with 128 directions; what is compared is the CPU time of the process inside the
scoring calls. The peer takes about twenty minutes; `--layers` scores fewer of the 13 convolutions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_surgery import peak_of
from safetensors.torch import save_file

from moe_fair.vision import collect, zoo
from moe_fair.vision.graph import Graph
from moe_fair.vision.proof import find_groups
from moe_fair.vision.unit_outputs import MeasureConfig, u_scores

PEER = Path(__file__).parent / "peers" / "network_pruner_scores.py"
CLASSES = 10


def main() -> None:
    """Measure both sides, or one of them in a process of its own."""
    args = _arguments()
    if args.only_ours:
        print(json.dumps(ours(args)))
        return
    rows = {}
    for limit in args.memory:
        command = [sys.executable, __file__, "--only-ours", "--memory", str(limit)]
        command += ["--images", str(args.images), "--layers", str(args.layers)]
        found = _last_json(command)
        rows[limit] = found
        print(
            f"moe_fair, projections of one pass in {limit} MiB: U {found['u_cpu']:.2f} s CPU "
            f"({found['u_wall']:.2f} s), R {found['r_cpu']:.2f} s; peak memory of U "
            f"{found['peak'] / 2**20:.0f} MiB over the model's and images'",
            flush=True,
        )
    if args.peer_python:
        peer = _peer(args)
        best = rows[args.memory[0]]
        print(
            f"network-pruner {peer['version']}: U {peer['u_cpu']:.2f} s CPU "
            f"({peer['u_wall']:.2f} s), R {peer['r_cpu']:.2f} s\n"
            f"ratio of CPU time: U {peer['u_cpu'] / best['u_cpu']:.1f} ×, "
            f"R {peer['r_cpu'] / best['r_cpu']:.1f} ×"
        )


def problem(count: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The model, and images whose classes differ."""
    torch.manual_seed(0)
    model = zoo.vgg16_bn(CLASSES).eval()
    labels = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, 3, 32, 32)
    return model, centres[labels] + 0.5 * torch.randn(count, 3, 32, 32), labels


def ours(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of U and of R, and the memory that U took beyond what was there."""
    torch.set_num_threads(1)
    model, images, labels = problem(args.images)
    found = find_groups(model, images)
    graph = Graph(found.groups[: args.layers])
    watch = MeasureConfig(memory=args.memory[0] << 20)
    order = torch.argsort(labels, stable=True)
    images, labels = images[order], labels[order]
    u_scores(model, Graph(found.groups[:1]), images[::32], labels[::32], watch)  # warms up
    wall, cpu = time.perf_counter(), time.process_time()
    peak = peak_of(lambda: u_scores(model, graph, images, labels, watch))
    u_wall, u_cpu = time.perf_counter() - wall, time.process_time() - cpu
    cpu = time.process_time()
    collect.taylor(model, graph, images, labels, watch)
    return {"u_wall": u_wall, "u_cpu": u_cpu, "r_cpu": time.process_time() - cpu, "peak": peak}


def _peer(args: argparse.Namespace) -> dict[str, float]:
    model, images, labels = problem(args.images)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    with tempfile.TemporaryDirectory() as folder:
        save_file(model.state_dict(), Path(folder) / "weights.safetensors")
        save_file({"images": images, "labels": labels}, Path(folder) / "images.safetensors")
        return _last_json([args.peer_python, str(PEER), folder, *names[: args.layers]])


def _last_json(command: list[str]) -> dict[str, float]:
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    # what it says on the way goes to the screen: the times so far are of use if it is stopped
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=paths)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="interpreter of the peer's environment")
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--memory", type=int, nargs="+", default=[1024, 64], help="MiB")
    parser.add_argument("--only-ours", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
