"""Benchmarks through lm-eval's own API: the numbers are those of its command on the same files."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from transformers import AutoModelForCausalLM

from moe_fair.core.output import partial_path
from moe_fair.core.quote import first_line
from moe_fair.core.registry import nearest
from moe_fair.engines.auto import auto_class
from moe_fair.engines.device import pick_device, pick_dtype
from moe_fair.engines.processes import ALONE, Team, unlaunched
from moe_fair.evaluate.shared_model import SharedModel
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.side_files import needs_code

# the eight tasks of HC-SMoE's tables (arXiv 2410.08589); REAP (arXiv 2510.13999) took them over
EIGHT = (
    "arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande",
)  # fmt: skip
SUITES = {
    "hc-smoe": EIGHT,
    "reap-mc": EIGHT,
    # the small ones of the eight: about a tenth of the time
    "quick": ("arc_challenge", "arc_easy", "openbookqa", "rte", "winogrande"),
}


@dataclass(frozen=True)
class Benchmark:
    """How lm-eval is run; names as in its command.

    Attributes:
        tasks: names of tasks, groups and tags, or suites of ours, see `SUITES`.
        num_fewshot: examples before each question, for tasks that do not fix it.
        limit: items per task, or their share below 1.
        batch_size: sequences per batch, or `auto`.
        dtype: as `Checkpoint.load` takes it; `checkpoint` is what lm-eval's command does.
        device: cpu, cuda, ..., or `auto`.
        apply_chat_template: put questions into the model's chat template.
        include_path: a folder of task files, searched first.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: str = "8"
    dtype: str = "checkpoint"
    device: str = "auto"
    apply_chat_template: bool = False
    include_path: Path | None = None

    def __post_init__(self) -> None:
        if self.batch_size != "auto" and not (self.batch_size.isdigit() and int(self.batch_size)):
            raise ValueError(f"--batch-size {self.batch_size!r}: write a whole number, or auto")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"--limit {self.limit:g}: give a number of items, or a share below 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"--num-fewshot {self.num_fewshot} is below 0")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ValueError(f"--include-path {self.include_path}: no such directory")


def find_tasks(benchmark: Benchmark) -> tuple[list[str], TaskManager]:
    """lm-eval's names of the tasks, and the index that knows them.

    Raises:
        ValueError: an unknown task; names the nearest.
    """
    names = [n for t in benchmark.tasks for n in SUITES.get(t, (t,))]
    names = list(dict.fromkeys(names))
    if not names:
        raise ValueError(f"no --tasks given; a suite is one of {', '.join(SUITES)}")
    if benchmark.include_path is not None:
        # indexing lm-eval's thousands of task files takes seconds: only where they are needed
        manager = TaskManager(include_path=str(benchmark.include_path), include_defaults=False)
        if all(_complete(manager, n) for n in names):
            return names, manager
    path = benchmark.include_path
    manager = _own_index() if path is None else TaskManager(include_path=str(path))
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(
                f"no task {name!r}{nearest(name, [*SUITES, *manager.all_tasks])}; "
                "`lm_eval ls tasks` lists them, --include-path adds a folder"
            )
    return names, manager


@cache
def _own_index() -> TaskManager:
    """Of lm-eval's own task files: read once for the check of the names and every model."""
    return TaskManager()


def _complete(manager: TaskManager, name: str) -> bool:
    """The index holds the task and, of a group, every member."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    return all(_complete(manager, m) for m in members if isinstance(m, str))


def run(source: Checkpoint, benchmark: Benchmark, team: Team = ALONE) -> dict[str, Any]:
    """lm-eval's results of one model, with `samples`; the same in every process.

    Args:
        team: the processes that ask together; each runs its share of the batches on its own device.

    Raises:
        ValueError: an unknown task, or data that cannot be had.
    """
    names, manager = find_tasks(benchmark)
    device = pick_device(benchmark.device)
    dtype = pick_dtype(benchmark.dtype, device)
    source.shards  # noqa: B018  # downloaded, or told to be missing, before lm-eval starts
    model_args: dict[str, Any] = {
        "pretrained": str(source.path),
        "dtype": dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch."),
        # our own unequal checkpoints bring a modeling file, and no other is run: see Checkpoint
        "trust_remote_code": source.brings_model,
    }
    if needs_code(source.home):
        model_args["tokenizer"] = source.tokenizer()
    if team.size > 1 and device.type != "cpu" and device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    try:
        with _quiet_git(), unlaunched():
            model: Any = "hf"
            auto = auto_class(source.config)
            renamed = source.config.model_type != source.published.get("model_type")
            if team.size > 1 or auto is not AutoModelForCausalLM or renamed:
                size = {"batch_size": benchmark.batch_size, "device": str(device)}
                config = copy.deepcopy(source.config)
                model = SharedModel(team, auto, config=config, **model_args, **size)
            found = lm_eval.simple_evaluate(
                model=model,
                model_args=model_args,
                tasks=names,
                task_manager=manager,
                num_fewshot=benchmark.num_fewshot,
                limit=benchmark.limit,
                batch_size=benchmark.batch_size,
                device=str(device),
                apply_chat_template=benchmark.apply_chat_template,
                log_samples=True,
            )
            found["config"]["model"] = "hf"
            return found
    except OSError as e:
        raise ValueError(
            f"lm-eval could not run {', '.join(names)}: {first_line(e)}; its data sets come from "
            "the Hub (without a network: local tasks and --include-path)"
        ) from e


@contextmanager
def _quiet_git() -> Iterator[None]:
    """lm-eval asks git for a commit to record; outside of a repository git complains on screen."""
    stock = evaluator.get_git_commit_hash

    def ask() -> str | None:
        given = ["git", "describe", "--always"]
        try:
            return subprocess.run(given, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    evaluator.get_git_commit_hash = ask
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = stock


def save(results: Mapping[str, Any], folder: Path, name: str, samples: bool) -> Path:
    """Write lm-eval's JSON as `NAME.json`, and with `samples` one JSONL per task beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {k: v for k, v in results.items() if k != "samples"}
    path = folder / f"{name}.json"
    _write(path, [json.dumps(plain, indent=2, default=handle_non_serializable)])
    if samples:
        for task, items in results["samples"].items():
            lines = (_line(item) for item in items)
            _write(folder / f"{name}.samples_{task}.jsonl", lines)
    return path


def _line(item: Mapping[str, Any]) -> str:
    return json.dumps(item, default=handle_non_serializable, ensure_ascii=False)


def _write(path: Path, lines: Any) -> None:
    partial = partial_path(path)
    with partial.open("w", encoding="utf-8") as f:
        f.writelines(line + "\n" for line in lines)
    partial.replace(path)


def names(tasks: Sequence[str]) -> tuple[str, ...]:
    """Task names from lists as the command line takes them: `a,b`, repeated."""
    return tuple(n for t in tasks for n in t.replace(",", " ").split())
