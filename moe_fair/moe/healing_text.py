"""What healing reads: which sequences teach in which step, which judge, and who runs which.

The sequences that judge repairs judge here, and teach nothing. The others are dealt out to as many
places as a step has sequences; every epoch shuffles each place's own, and each process has the same
places in all steps, so that it needs the original's predictions for its share of the text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moe_fair.engines.batch import Batch
from moe_fair.engines.processes import Team
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.judging import HELD_OUT

STEP_TOKENS = 4096  # about so many tokens to a step
JUDGES = 64  # most sequences that judge, every domain in its proportion


@dataclass(frozen=True)
class HealingText:
    """Numbers of a calibration set's sequences.

    Attributes:
        steps: the sequences of every step, by place.
        judging: those that judge.
    """

    text: CalibrationSet
    steps: tuple[tuple[int, ...], ...]
    judging: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Over all steps."""
        return sum(self.length(i) for step in self.steps for i in step)

    def length(self, number: int) -> int:
        """Tokens of a sequence."""
        return len(self.text.sequences[number][0])

    def teaching(self, team: Team) -> list[int]:
        """The sequences that this process ever learns from."""
        return sorted({i for step in self.steps for i in step[team.rank :: team.size]})

    def judged_by(self, team: Team) -> list[int]:
        """The sequences that this process judges by."""
        return list(self.judging[team.rank :: team.size])


def healing_text(text: CalibrationSet, tokens: int, seed: int) -> HealingText:
    """Steps over a text until so many tokens are used up.

    Raises:
        ValueError: nothing is left to teach, some domain has no sequence that judges, or the tokens
            are fewer than those of a sequence.
    """
    numbers = range(len(text.sequences))
    judging = [i for i in numbers if i % HELD_OUT == HELD_OUT - 1]
    learn = [i for i in numbers if i % HELD_OUT != HELD_OUT - 1]
    heard = {text.sequences[i][1] for i in judging}
    for domain, name in enumerate(text.domains):
        if domain not in heard:
            raise ValueError(
                f"--heal: every {HELD_OUT}th sequence judges, and {name} has none among them, so "
                "that nobody would know whether it worsens; give more --samples"
            )
    judging = _some(judging, [text.sequences[i][1] for i in judging])
    mean = sum(len(text.sequences[i][0]) for i in learn) / len(learn)
    if tokens < mean:
        raise ValueError(f"--heal {tokens} is less than one sequence of {mean:.0f} tokens")
    places = max(1, min(round(STEP_TOKENS / mean), int(tokens // mean), len(learn) // 8))
    order = torch.Generator().manual_seed(seed)
    own = [learn[place::places] for place in range(places)]
    steps: list[tuple[int, ...]] = []
    used = 0
    while True:
        shuffled = [
            [its[i] for i in torch.randperm(len(its), generator=order).tolist()] for its in own
        ]
        for step in zip(*shuffled, strict=False):
            used += sum(len(text.sequences[i][0]) for i in step)
            if used > tokens and steps:
                return HealingText(text, tuple(steps), tuple(judging))
            steps.append(step)


def _some(judging: Sequence[int], domains: Sequence[int]) -> list[int]:
    """Evenly spaced ones of each domain, one at least."""
    found = []
    for domain in sorted(set(domains)):
        its = [i for i, d in zip(judging, domains, strict=True) if d == domain]
        count = min(len(its), max(1, JUDGES * len(its) // len(judging)))
        found += [its[(2 * k + 1) * len(its) // (2 * count)] for k in range(count)]
    return sorted(found)


def batches_of(text: CalibrationSet, numbers: Sequence[int], most: int) -> list[Batch]:
    """Batches of these sequences, at most so many in each, of whichever domains."""
    rows = tuple((text.sequences[i][0], 0) for i in numbers)
    made = CalibrationSet(("",), rows).batches(most)
    ids = torch.tensor(numbers)
    return [replace(b, sequence_ids=ids[b.sequence_ids]) for b in made]
