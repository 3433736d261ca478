"""Calibration text: where it comes from, its domains and weights, and its packing into sequences.

A source is written `[domain=]WHERE[:weight]`. WHERE is a local file (see `rows`), a directory of
such files (each its own domain), a preset's name (see `presets`), or a `datasets` id as
`id[:config][@split]`. Rows of a file may name their domains themselves, in a field `domain`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from moe_fair.core.quote import clip, quote
from moe_fair.engines.batch import Batch
from moe_fair.moe.hub_rows import LOCAL_FORM, hub_rows
from moe_fair.moe.left_out import LeftOut, survey
from moe_fair.moe.presets import is_preset, preset
from moe_fair.moe.row_files import SUFFIXES, files_in, kind
from moe_fair.moe.rows import Row
from moe_fair.moe.schemas import MAPPED, SCHEMAS, Chat, Schema, mapped
from moe_fair.moe.shuffled_rows import rows_as_they_lie, rows_in_order

MOST_DOMAINS = 256  # every sum is kept once for each
LONG = 2**20  # characters; a longer document is tokenised as far as it is needed
PADDING = 0.1  # most of a batch
NO_TEMPLATE = "the tokenizer has no chat template: messages are written as plain text"


@dataclass(frozen=True)
class Source:
    """One stream of documents.

    Attributes:
        where: local path or datasets id.
        domain: name of the calibration domain; by default the file's or data set's name.
        weight: share of the samples, relative to the other sources.
        config, split: of a data set on the Hub.
        only: of a file whose rows name their domains, those of this one.
        own: the file's own domain, where another of the directory has its name.
        given: the directory, file or preset that it is a part of, as it was given.
        revision: of a preset's data set.
        schemas: those that its rows may be of.
        numbers: of a file, those of its rows that can be used; `expand` fills them in.
    """

    where: str
    domain: str | None = None
    weight: float = 1.0
    config: str | None = None
    split: str = "train"
    only: str | None = None
    own: str | None = None
    given: str | None = None
    revision: str | None = None
    schemas: tuple[Schema, ...] = SCHEMAS
    numbers: array[int] | None = field(default=None, compare=False, repr=False)

    @property
    def local(self) -> bool:
        """A file or directory on this machine."""
        return self.revision is None and os.path.exists(self.where)

    @property
    def own_name(self) -> str:
        """The domain of rows that name none."""
        return self.own or Path(self.where).name.split(".")[0]

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.domain or self.own_name


def parse_sources(specs: Iterable[str], fields: Mapping[str, str] | None = None) -> list[Source]:
    """Read `[domain=]WHERE[:weight]`, of each.

    Args:
        fields: what --map says of their rows: role -> field.

    Raises:
        ValueError: see `parse_source` and `mapped`.
    """
    schemas = SCHEMAS if fields is None else (mapped(fields), *SCHEMAS)
    return [replace(parse_source(s), schemas=schemas) for s in specs]


def parse_source(spec: str) -> Source:
    """Read `[domain=]WHERE[:weight]`.

    What precedes the first `=` is the domain where it looks like a name, and the number behind the
    last `:` is the weight; behind a data set's id only where a config or split stands between, for
    the first `:` is the config's. What is there as a path is that path, whatever is in its name.

    Raises:
        ValueError: nothing left to read from, or a weight that is not positive.
    """
    domain, rest = "", spec
    if not os.path.exists(spec) and (found := re.match(r"([\w.+-]+)=", spec)):
        domain, rest = found[1], spec[found.end() :]
    weight: float | None = None
    head, _, tail = rest.rpartition(":")
    if head and not os.path.exists(rest):
        local = os.path.exists(head) or kind(Path(head)) is not None or is_preset(head)
        if re.fullmatch(r"-?\d*\.?\d+", tail) and (local or ":" in head or "@" in head):
            rest, weight = head, float(tail)
        elif local:
            raise ValueError(
                f"calibration source {quote(spec)}: the weight {quote(tail)} is not a number"
            )
    if weight is not None and not 0 < weight <= 1e18:
        raise ValueError(f"calibration source {quote(spec)}: the weight must be above 0")
    config, split = None, "train"
    if not os.path.exists(rest):
        rest, _, given = rest.partition("@")
        rest, _, config_name = rest.partition(":")
        split, config = given or split, config_name or None
    if not rest:
        raise ValueError(
            f"calibration source {quote(spec)} names no text; write [domain=]path[:weight]"
        )
    return Source(rest, domain or None, 1.0 if weight is None else weight, config, split)


def expand(sources: Iterable[Source], left_out: dict[str, LeftOut] | None = None) -> list[Source]:
    """Directories become their files, each its own domain unless one was named; files are checked.

    A file whose rows name domains becomes one source for each, with equal shares, unless a domain
    was named for the whole of it. Each file is read through once.

    Args:
        left_out: is told what of each source (`given`) cannot be used.

    Raises:
        ValueError: a missing path, an unknown suffix, a file or directory without a row that can be
            used, or too many domains.
    """
    left_out = {} if left_out is None else left_out
    found: list[Source] = []
    for s in sources:
        s = replace(s, given=s.given or s.where)
        own = left_out.setdefault(str(s.given), LeftOut())
        path = Path(s.where)
        if s.local and is_preset(s.where):
            own.said["what lies here under this name is read, not the preset"] = None
        if os.path.isdir(path):
            found += _directory(s, path, own)
        elif not s.local and is_preset(s.where):
            found += _preset(s, own)
        elif not s.local and kind(path) is not None:
            raise ValueError(f"calibration file {path} does not exist")
        elif not s.local:
            found.append(s)
        elif kind(path) is None:
            raise ValueError(
                f"{path}: calibration text must be one of {', '.join(SUFFIXES)}, or such with .gz"
            )
        elif path.is_file() and not path.stat().st_size:
            raise ValueError(f"calibration file {path} is empty")
        else:
            found += _by_domain(s, survey(path, own, domains=s.domain is None, schemas=s.schemas))
    if not found:
        raise ValueError(f"no calibration text given; {LOCAL_FORM}")
    names = {s.name for s in found}
    if len(names) > MOST_DOMAINS:
        most = Counter(s.given for s in found).most_common(1)[0][0]
        raise ValueError(
            f"{most}: {len(names):,} calibration domains, and statistics are kept for at most "
            f"{MOST_DOMAINS}; name one for all of it: --calibration NAME={most}"
        )
    return found


def _directory(source: Source, folder: Path, left_out: LeftOut) -> list[Source]:
    """A source for each file of a directory that can be used, or for each of its domains."""
    files, others = files_in(folder)
    left_out.others += others
    if not files:
        raise ValueError(f"{folder}: no {', '.join(SUFFIXES)} file in this directory")
    texts = [f for f in files if kind(f) == ".txt"]
    pooled = len(texts) > MOST_DOMAINS
    if pooled:
        left_out.said[f"{len(texts):,} .txt files are one domain, each a document of it"] = None
        files = [folder, *(f for f in files if kind(f) != ".txt")]
    usable = {}
    for f in files:
        try:
            usable[f] = survey(f, left_out, domains=source.domain is None, schemas=source.schemas)
        except ValueError as e:
            left_out.file(str(e))
    if not usable:
        raise ValueError(
            f"{folder}: none of its {len(files)} files can be used; {left_out.first_file}"
        )
    folders: dict[str, set[Path]] = {}
    for f in usable:
        folders.setdefault(f.name.split(".")[0], set()).add(f.parent)
    found = []
    for f, domains in usable.items():
        name = f.name.split(".")[0]
        own = None
        if f == folder:
            own = folder.resolve().name
        elif len(folders[name]) > 1:
            own = (f.parent.relative_to(folder) / name).as_posix()
        part = replace(source, where=str(f), weight=source.weight / len(usable), own=own)
        found += _by_domain(part, domains)
    return found


def _by_domain(source: Source, domains: Mapping[str | None, array[int]]) -> list[Source]:
    """A source, or one for every domain that its rows name."""
    if source.domain is not None or set(domains) == {None}:
        return [replace(source, numbers=domains[None])]
    named: dict[str, array[int]] = {}
    for domain, numbers in domains.items():
        name = source.own_name if domain is None else domain
        named[name] = array("q", sorted([*named.get(name, ()), *numbers]))
    weight = source.weight / len(named)
    return [
        replace(source, domain=n, only=n, weight=weight, numbers=named[n]) for n in sorted(named)
    ]


def _preset(source: Source, left_out: LeftOut) -> list[Source]:
    """A source for each data set of a preset; all of them are one domain."""
    sets = preset(source.where)
    for s in sets:
        name = s.id if s.config is None else f"{s.id}:{s.config}"
        left_out.said[f"{name}@{s.split} of {s.revision[:12]} ({s.licence})"] = None
    total = sum(s.share for s in sets)
    return [
        replace(
            source, where=s.id, config=s.config, split=s.split, revision=s.revision,
            domain=source.name, weight=source.weight * s.share / total, schemas=(s.schema,),
        )
        for s in sets
    ]  # fmt: skip


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
            made = _sequences(source, rows, tokenizer, count, length, its)
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
) -> list[tuple[int, ...]]:
    made: list[tuple[int, ...]] = []
    start = _start_tokens(tokenizer)
    body = length - len(start)
    pending: list[int] = []
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
                made.append(chat[:length])
            if len(made) >= count:
                return made[:count]
            continue
        needed = (count - len(made)) * body - len(pending)
        pending += _encode(tokenizer, document, needed)
        if tokenizer.eos_token_id is not None:
            pending.append(tokenizer.eos_token_id)
        at = 0
        while len(pending) - at >= body:
            made.append((*start, *pending[at : at + body]))
            at += body
            if len(made) == count:
                return made
        pending = pending[at:]
    return made


def _encode(tokenizer: Any, text: str, needed: int) -> list[int]:
    """The tokens of a text; of a very long one, those of a part with more than are needed.

    How a text begins is tokenised without regard to what comes much later, so the tokens that are
    used are those of the whole text.
    """
    # verbose=False: a document longer than the model's context is expected, it is packed
    for end in (max(LONG, 8 * needed), len(text)):
        ids = tokenizer(text[:end], add_special_tokens=False, verbose=False)["input_ids"]
        if end >= len(text) or len(ids) > needed + LONG // 8:
            break
    return ids


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


def read_parts(
    parts: Sequence[Source], seed: int | None, left_out: LeftOut
) -> Iterator[tuple[Source, Iterable[Row]]]:
    """The rows of the parts of one file, or of data sets.

    Args:
        parts: sources with the same `where`.
        seed: shuffles them; without one they stay in their own order.
        left_out: is told what of a data set cannot be used; of files `expand` has told it.
    """
    for part in parts:
        rows: Iterable[Row]
        if part.numbers is None:
            rows = hub_rows(
                part.where, part.config, part.split, seed, left_out, revision=part.revision,
                schemas=part.schemas, little=part.revision is not None,
            )  # fmt: skip
        elif seed is None:
            rows = _local(rows_as_they_lie, part, part.numbers)
        else:
            order = part.numbers[:]
            random.Random(f"{seed} {part.name}").shuffle(order)
            rows = _local(rows_in_order, part, order)
        yield part, rows


def _local(read: Callable[..., Iterator[Row]], part: Source, numbers: array[int]) -> Iterator[Row]:
    domains = part.only is not None
    return read(Path(part.where), numbers, domains=domains, schemas=part.schemas)
