"""Calibration text: documents of its sources (`text_sources`), drawn and packed into sequences."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from moe_fair.core.quote import clip
from moe_fair.engines.batch import Batch
from moe_fair.moe.left_out import LeftOut
from moe_fair.moe.rows import Row
from moe_fair.moe.schemas import MAPPED, Chat
from moe_fair.moe.text_sources import Source, expand, read_parts

LONG = 2**20  # characters; a longer document is tokenised as far as it is needed
PART = 2**16  # characters; of a longer document that is drawn from a part is tokenised
PADDING = 0.1  # most of a batch
NO_TEMPLATE = "the tokenizer has no chat template: messages are written as plain text"


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
            made = _sequences(source, rows, tokenizer, count, length, its, seed)
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


def _sequences(
    source: Source,
    rows: Iterable[Row],
    tokenizer: Any,
    count: int,
    length: int,
    left_out: LeftOut,
    seed: int | None,
) -> list[tuple[int, ...]]:
    """So many sequences: a chat each, or text of `length` tokens.

    Text is packed, document behind document. Where it is drawn (there is a seed), a document that
    fills several sequences gives one of them, any, and its end is packed with what follows; the
    others are taken where there are too few documents. Of two texts of one size that of more
    documents makes the better plan and the better repair (eval/LAB.md).
    """
    made = _Drawn(count)
    start, eos = _start_tokens(tokenizer), tokenizer.eos_token_id
    body = length - len(start)
    pending: list[int] = []
    order = None if seed is None else random.Random(f"{seed} {source.name} within documents")
    template = getattr(tokenizer, "chat_template", None)
    for row in rows:
        document = row.document
        if isinstance(document, Chat) and document.plain and not template:
            left_out.said[NO_TEMPLATE] = None
            document = document.text
        if isinstance(document, Chat):
            try:
                chat = _chat(tokenizer, document, source, left_out)
            except _Unfit as e:
                left_out.row(source.where, row.place, str(e))
            else:
                left_out.cut += len(chat) > length
                made.add([chat[:length]])
        else:
            tokens = _encode(tokenizer, document, made.wanted * body, order)
            tokens += [eos] if eos is not None else []
            if order is not None and len(tokens) >= body:
                whole = len(tokens) // body * body
                made.add([(*start, *tokens[i : i + body]) for i in range(0, whole, body)], order)
                tokens = tokens[whole:]
            pending += tokens
            at = 0
            while len(pending) - at >= body:
                made.add([(*start, *pending[at : at + body])])
                at += body
            pending = pending[at:]
        if len(made) >= count:
            break
    return made.sequences()


class _Drawn:
    """Sequences, one of a document; and others of it, for where there are too few documents."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._first: list[tuple[int, int, tuple[int, ...]]] = []  # document, place in it, tokens
        self._more: list[list[tuple[int, int, tuple[int, ...]]]] = []
        self._kept = 0  # sequences in `_more`

    def __len__(self) -> int:
        return len(self._first)

    @property
    def wanted(self) -> int:
        """Sequences that the next document must be able to give: all that no other could, and its
        part of what is missing."""
        missing = self.count - len(self._first)
        return max(missing - self._kept, -(-missing // (1 + len(self._more))))

    def add(self, windows: Sequence[tuple[int, ...]], order: random.Random | None = None) -> None:
        """A document's; without an order the first of them counts, and there are no others."""
        its = [(len(self._first), place, w) for place, w in enumerate(windows)]
        if order is not None:
            order.shuffle(its)
        self._first.append(its[0])
        if its[1:]:
            self._more.append(its[1:])
            self._kept += len(its) - 1
        if self._kept > 2 * self.count:
            self._level(self.count)

    def _level(self, most: int) -> None:
        """Of every document as many others as of any, but for those that are short of them."""
        low, high = 0, max(map(len, self._more))
        while low < high:  # the largest number with which there are not too many
            middle = (low + high + 1) // 2
            if sum(min(len(d), middle) for d in self._more) <= most:
                low = middle
            else:
                high = middle - 1
        self._more = [d[:low] for d in self._more]
        self._kept = sum(map(len, self._more))

    def sequences(self) -> list[tuple[int, ...]]:
        """At most `count`, those of one document beside one another."""
        found = self._first[: self.count]
        depth = 0
        while len(found) < self.count and any(len(d) > depth for d in self._more):
            found += [d[depth] for d in self._more if len(d) > depth][: self.count - len(found)]
            depth += 1
        return [w for _, _, w in sorted(found, key=lambda x: x[:2])]


def _encode(
    tokenizer: Any, text: str, needed: int, order: random.Random | None = None
) -> list[int]:
    """The tokens of a text; of a very long one, those of a part with more than are needed.

    How a text begins is tokenised without regard to what comes much later, so the tokens that are
    used are those of the whole text, where they are from its beginning: without an order.
    """
    span, enough, at = max(LONG, 8 * needed), needed + LONG // 8, 0
    if order is not None:
        span, enough = max(PART, 8 * needed), needed
        at = order.randrange(len(text) - span) if len(text) > span else 0
    # verbose=False: a document longer than the model's context is expected, it is packed
    for part in (text[at : at + span], text):
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if len(part) == len(text) or len(ids) > enough:
            break
    return list(ids)


def _start_tokens(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, for tokenizers that put one before every text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids and ids[0] == bos else []


class _Unfit(Exception):
    """A chat that the template does not take."""


def _chat(tokenizer: Any, chat: Chat, source: Source, left_out: LeftOut) -> tuple[int, ...]:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ValueError(
            f"{source.where} holds chats, but the tokenizer has no chat template; give plain text, "
            "or rows of one question and answer (as prompt/response), which are written as text"
        )
    if chat.tools and "tools" not in str(template):
        left_out.fields["tools (the chat template has no place for them)"] = None
    try:
        return _templated(tokenizer, chat.messages, chat.tools)
    except (
        Exception
    ) as e:  # the template is a program of the model's maker, and raises what it likes
        other = [_other_arguments(m) for m in chat.messages]
        if other != chat.messages:
            # what it said to the messages as they are is what counts
            with suppress(Exception):
                return _templated(tokenizer, other, chat.tools)
        raise _Unfit(f"a chat does not fit the chat template: {clip(str(e), 200)}") from e


def _templated(tokenizer: Any, messages: Any, tools: Any) -> tuple[int, ...]:
    encoded = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True)
    return tuple(encoded["input_ids"])


def _other_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its calls as JSON in place of an object, or the reverse.

    Templates differ in which they take: DeepSeek's adds them to a text, GLM's goes through them.
    """
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        given = function.get("arguments")
        if isinstance(given, str):
            given = json.loads(given)
        elif isinstance(given, dict):
            given = json.dumps(given, ensure_ascii=False)
        other = {**function, "arguments": given}
        calls.append({**call, "function": other} if "function" in call else other)
    return {**message, "tool_calls": calls} if calls else message
