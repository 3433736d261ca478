"""lm-eval's model, its batches dealt out: the answers of the stock class, to the last digit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from places import MODEL
from transformers import AutoConfig, AutoModelForCausalLM

from moe_fair.engines.processes import Team
from moe_fair.evaluate.shared_model import SharedModel

TEXT = (
    "def area(width, height):\n    return width * height\n\nThe borrow checker rejects a program "
    "because the value was moved. A tuple is an ordered list of values, separated by commas."
)
ASK = Callable[[HFLM], list[Any]]


@dataclass(frozen=True)
class Threads(Team):
    """Processes that are threads: what they tell each other is told."""

    box: list[Any] = field(default_factory=lambda: [None, None])
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=100))

    def gather(self, item: Any) -> list[Any]:
        self.box[self.rank] = item
        self.barrier.wait()
        found = list(self.box)
        self.barrier.wait()
        return found


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def choices(lm: HFLM) -> list[Any]:
    """Two answers of one token each to most questions: these share one pass."""
    asked = [(TEXT[: 7 * i + 4], a) for i in range(7) for a in (" the", " a", " width * height")]
    return lm.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)


def rolling(lm: HFLM) -> list[Any]:
    """Texts of one to five windows."""
    asked = [(TEXT[: 40 * i + 10],) for i in range(5)]
    return lm.loglikelihood_rolling(requests("loglikelihood_rolling", asked), disable_tqdm=True)


def written(lm: HFLM) -> list[Any]:
    """Two ways to stop, five texts each."""
    stops: list[dict[str, Any]] = [
        {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        {"until": ["."], "max_gen_toks": 6, "do_sample": False},
    ]
    asked = [(TEXT[: 9 * i + 5], stops[i % 2]) for i in range(10)]
    return lm.generate_until(requests("generate_until", asked), disable_tqdm=True)


def counted(lm: HFLM, ask: ASK) -> tuple[list[Any], int]:
    """What it answers, and how many sequences its model has seen."""
    seen = 0

    def count(module: Any, given: Any, keywords: Any) -> None:
        nonlocal seen
        seen += len(given[0] if given else keywords["input_ids"])

    handle = lm.model.register_forward_pre_hook(count, with_kwargs=True)
    found = ask(lm)
    handle.remove()
    return found, seen


@pytest.fixture(scope="module")
def models() -> tuple[HFLM, list[SharedModel]]:
    given: dict[str, Any] = {
        "pretrained": str(MODEL), "dtype": "float32", "device": "cpu", "batch_size": 2,
        "max_length": 24,
    }  # fmt: skip
    config = AutoConfig.from_pretrained(MODEL)
    first = Threads(0, 2)
    team = [first, Threads(1, 2, box=first.box, barrier=first.barrier)]
    return HFLM(**given), [SharedModel(m, AutoModelForCausalLM, config, **given) for m in team]


@pytest.mark.parametrize("ask", [choices, rolling, written])
def test_each_process_runs_its_share(models: tuple[HFLM, list[SharedModel]], ask: ASK) -> None:
    stock, shared = models
    want, all_of_it = counted(stock, ask)
    with ThreadPoolExecutor(2) as pool:
        (first, some), (second, rest) = pool.map(lambda lm: counted(lm, ask), shared)
    assert first == second == want
    assert some + rest == all_of_it
    assert max(some, rest) < 0.7 * all_of_it


def test_nothing_for_the_second_process(models: tuple[HFLM, list[SharedModel]]) -> None:
    def one(lm: HFLM) -> list[Any]:
        return lm.loglikelihood(requests("loglikelihood", [(TEXT, " the")]), disable_tqdm=True)

    with ThreadPoolExecutor(2) as pool:
        (first, some), (second, rest) = pool.map(lambda lm: counted(lm, one), models[1])
    assert first == second == one(models[0])
    assert (some, rest) == (1, 0)
