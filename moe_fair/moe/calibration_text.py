"""Calibration text: sequences of its sources' documents (`text_packing`), and batches of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from moe_fair.core.quote import clip
from moe_fair.engines.batch import Batch
from moe_fair.moe.left_out import LeftOut
from moe_fair.moe.schemas import MAPPED
from moe_fair.moe.text_packing import sequences_of
from moe_fair.moe.text_sources import Source, expand, read_parts

PADDING = 0.1  # most of a batch


@dataclass(frozen=True)
class CalibrationSet:
    """Token sequences, each of one domain.

    Attributes:
        domains: their names.
        sequences: (token ids, index of the domain), in the order of their sequence ids.
        notes: what the user should know, such as sources with less text than asked for.
        held_back: how many sequences were taken out of it, see `split`.
    """

    domains: tuple[str, ...]
    sequences: tuple[tuple[tuple[int, ...], int], ...]
    notes: tuple[str, ...] = ()
    held_back: int = 0

    @property
    def tokens(self) -> int:
        """Tokens over all sequences."""
        return sum(len(ids) for ids, _ in self.sequences)

    @property
    def digest(self) -> str:
        """Names the exact tokens."""
        text = json.dumps([self.domains, self.sequences])
        return hashlib.sha256(text.encode()).hexdigest()

    def batches(self, batch_size: int) -> list[Batch]:
        """Batches of one domain each, padded on the right to their longest sequence.

        Sequences of unequal length are put together by length, the longest first, and a batch has
        fewer of them where more than a tenth of it would be padding.
        """
        batches = []
        for domain in range(len(self.domains)):
            ids = [i for i, (_, d) in enumerate(self.sequences) if d == domain]
            ids.sort(key=lambda i: -len(self.sequences[i][0]))  # those of one length stay in order
            for chosen in _alike(ids, [len(self.sequences[i][0]) for i in ids], batch_size):
                batches.append(_batch([self.sequences[i][0] for i in chosen], chosen, domain))
        return batches


def _alike(ids: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Neighbours, at most so many, of which little would be padding; lengths do not ascend."""
    chosen: list[int] = []
    tokens = longest = 0
    for i, length in zip(ids, lengths, strict=True):
        area = longest * (len(chosen) + 1)
        if len(chosen) == most or (chosen and area - tokens - length > PADDING * area):
            yield chosen
            chosen, tokens = [], 0
        longest = length if not chosen else longest
        chosen.append(i)
        tokens += length
    if chosen:
        yield chosen


def evenly(text: CalibrationSet, count: int) -> list[int]:
    """Numbers of so many evenly spaced sequences, every domain in its proportion."""
    total = len(text.sequences)
    by_domain = sorted(range(total), key=lambda i: text.sequences[i][1])
    return sorted(by_domain[(2 * i + 1) * total // (2 * count)] for i in range(count))


def split(text: CalibrationSet, count: int) -> tuple[CalibrationSet, CalibrationSet]:
    """The text without `count` of its sequences, and those: every domain's last, in proportion.

    Documents are packed one behind the other, so the last sequences are of other documents than the
    first; of neighbouring ones in between that would not be so.
    """
    members = [
        [i for i, (_, d) in enumerate(text.sequences) if d == domain]
        for domain in range(len(text.domains))
    ]
    counts = _shares([len(m) for m in members], count)
    taken = {i for m, n in zip(members, counts, strict=True) for i in m[len(m) - n :]}
    left, held = (
        tuple(s for i, s in enumerate(text.sequences) if (i in taken) == here)
        for here in (False, True)
    )
    return replace(text, sequences=left, held_back=count), replace(text, sequences=held)


def _batch(rows: Sequence[Sequence[int]], ids: Sequence[int], domain: int) -> Batch:
    length = max(map(len, rows))
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return Batch(tokens, mask, torch.tensor(ids), domain)


def sample(
    sources: Sequence[Source], tokenizer: Any, *, samples: int, length: int, seed: int
) -> CalibrationSet:
    """Draw the calibration set: documents in seeded order, packed or one chat each.

    Args:
        samples: sequences over all sources, divided by their weights.
        length: tokens per packed sequence; the most of a chat.

    Raises:
        ValueError: text that cannot be read, or too little of it for one sequence.
    """
    return _gather(sources, tokenizer, samples, length, seed)


def windows(
    sources: Sequence[Source], tokenizer: Any, *, samples: int, length: int
) -> CalibrationSet:
    """Held-out text: the documents in their own order, cut into neighbouring windows."""
    return _gather(sources, tokenizer, samples, length, None)


def _gather(
    sources: Sequence[Source], tokenizer: Any, samples: int, length: int, seed: int | None
) -> CalibrationSet:
    if samples < 1 or length < 2:
        raise ValueError(f"--samples {samples} and --length {length}: at least 1 and 2 are needed")
    left_out: dict[str, LeftOut] = {}
    parts = expand(sources, left_out)
    shares = zip(parts, _shares([s.weight for s in parts], samples), strict=True)
    found: list[tuple[Source, list[tuple[int, ...]]]] = []
    notes, short = [], []
    for _, same in groupby(
        ((s, n) for s, n in shares if n), key=lambda x: (x[0].where, x[0].given)
    ):
        counts = dict(same)
        its = left_out[str(next(iter(counts)).given)]
        for source, rows in read_parts(list(counts), seed, its):
            count = counts[source]
            made = sequences_of(source, rows, tokenizer, count, length, its, seed)
            found.append((source, made))
            if not made:
                short.append(source.name)
            elif len(made) < count and seed is not None:
                notes.append(f"{source.where} holds {len(made)} samples of the {count} asked for")
    for given in dict.fromkeys(s.given for s, _ in found):
        if not any(rows for s, rows in found if s.given == given):
            raise ValueError(left_out[str(given)].nothing(str(given), length))
    if short:
        notes.append(
            f"too little text for one sample of {length} tokens, left out: {clip(', '.join(short))}"
        )
    domains = tuple(dict.fromkeys(s.name for s, rows in found if rows))
    unsampled = {s.name for s in parts} - {s.name for s, _ in found}
    if unsampled:
        notes.append(
            f"{len(unsampled)} of {len({s.name for s in parts})} domains get none of the {samples} "
            "samples; --samples gives more"
        )
    for given, its in left_out.items():
        notes += its.notes(given)
    asked = any(s.schemas[0].said == MAPPED for s in sources)
    if asked and not any(MAPPED in its.said for its in left_out.values()):
        notes.append("no row has the fields of --map")
    sequences = [(row, domains.index(s.name)) for s, rows in found for row in rows]
    return CalibrationSet(domains, tuple(sequences), tuple(notes))


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total` in these proportions, largest remainders first."""
    exact = [w / sum(weights) * total for w in weights]
    counts = [int(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
