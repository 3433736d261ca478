"""Calibration text: where it comes from, its domains and weights, and its packing into sequences.

A source is written `[domain=]WHERE[:weight]`. WHERE is a local .txt, .jsonl or .parquet file, a
directory of such files (each its own domain), or a `datasets` id as `id[:config][@split]`. Lines of
a .jsonl file may name their domains themselves, in a field `domain`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_fair.engines.batch import Batch

SUFFIXES = (".txt", ".jsonl", ".parquet")
SHUFFLE_BUFFER = 10_000  # documents; a streamed dataset is shuffled within this window
LOCAL_FORM = (
    "give local text: --calibration name=path/to/text.jsonl (.txt, .jsonl, .parquet, a directory)"
)

Document = str | list[dict[str, str]]  # plain text, or the messages of one chat


@dataclass(frozen=True)
class Source:
    """One stream of documents.

    Attributes:
        where: local path or datasets id.
        domain: name of the calibration domain; by default the file's or data set's name.
        weight: share of the samples, relative to the other sources.
        config, split: of a data set on the Hub.
        only: of a file whose lines name their domains, those of this one.
    """

    where: str
    domain: str | None = None
    weight: float = 1.0
    config: str | None = None
    split: str = "train"
    only: str | None = None

    @property
    def local(self) -> bool:
        """A file or directory on this machine."""
        return Path(self.where).exists()

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.domain or Path(self.where).name.split(".")[0]


def parse_source(spec: str) -> Source:
    """Read `[domain=]WHERE[:weight]`.

    Raises:
        ValueError: nothing left to read from, or a weight that is not positive.
    """
    domain, _, rest = spec.rpartition("=") if re.match(r"[\w.+-]+=", spec) else ("", "", spec)
    weight = 1.0
    head, _, tail = rest.rpartition(":")
    if head and not Path(rest).exists() and re.fullmatch(r"-?\d*\.?\d+", tail):
        rest, weight = head, float(tail)
    if weight <= 0:
        raise ValueError(f"calibration source {spec!r}: the weight must be above 0")
    config, split = None, "train"
    if not Path(rest).exists():
        rest, _, given = rest.partition("@")
        rest, _, config_name = rest.partition(":")
        split, config = given or split, config_name or None
    if not rest:
        raise ValueError(f"calibration source {spec!r} names no text; write [domain=]path[:weight]")
    return Source(rest, domain or None, weight, config, split)


def expand(sources: Iterable[Source]) -> list[Source]:
    """Directories become their files, each its own domain unless one was named; files are checked.

    A .jsonl file whose lines name domains becomes one source for each, with equal shares, unless a
    domain was named for the whole of it.

    Raises:
        ValueError: a missing path, an empty directory or file, an unknown suffix, or a domain that
            is no text.
    """
    found: list[Source] = []
    for s in sources:
        path = Path(s.where)
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES)
            if not files:
                raise ValueError(f"{path}: no {', '.join(SUFFIXES)} file in this directory")
            found += [replace(s, where=str(f), weight=s.weight / len(files)) for f in files]
        elif path.suffix in SUFFIXES and not path.exists():
            raise ValueError(f"calibration file {path} does not exist")
        elif path.exists() and path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: calibration text must be one of {', '.join(SUFFIXES)}")
        else:
            found.append(s)
    for s in found:
        if s.local and Path(s.where).stat().st_size == 0:
            raise ValueError(f"calibration file {s.where} is empty")
    if not found:
        raise ValueError(f"no calibration text given; {LOCAL_FORM}")
    return [part for s in found for part in _by_domain(s)]


def _by_domain(source: Source) -> list[Source]:
    """A source, or one for every domain that its lines name."""
    path = Path(source.where)
    if source.domain is not None or not source.local or path.suffix != ".jsonl":
        return [source]
    names, named = set(), False
    for n, line in _lines(path):
        row = _json_row(line, path, n) if '"domain"' in line else {}
        names.add(_domain(row, source, n))
        named |= row.get("domain") is not None
    if not named:
        return [source]
    share = source.weight / len(names)
    return [replace(source, domain=n, only=n, weight=share) for n in sorted(names)]


def _domain(row: dict[str, Any], source: Source, number: int) -> str:
    """The domain that a line names, or that of its file."""
    name = row.get("domain")
    if name is None:
        return Path(source.where).name.split(".")[0]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            f'{source.where}, line {number}: "domain" is {name!r} and must be a name; or name one '
            "for the whole file: --calibration name=FILE"
        )
    return name


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, numbered from 1."""
    try:
        with path.open() as f:
            yield from ((n, line) for n, line in enumerate(f, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: cannot be read as calibration text: {e}") from e


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
        """Batches of one domain each, padded on the right to their longest sequence."""
        batches = []
        for domain in range(len(self.domains)):
            ids = [i for i, (_, d) in enumerate(self.sequences) if d == domain]
            for start in range(0, len(ids), batch_size):
                chosen = ids[start : start + batch_size]
                batches.append(_batch([self.sequences[i][0] for i in chosen], chosen, domain))
        return batches


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
    return _gather(expand(sources), tokenizer, samples, length, seed)


def windows(
    sources: Sequence[Source], tokenizer: Any, *, samples: int, length: int
) -> CalibrationSet:
    """Held-out text: the documents in their own order, cut into neighbouring windows."""
    return _gather(expand(sources), tokenizer, samples, length, None)


def _gather(
    sources: list[Source], tokenizer: Any, samples: int, length: int, seed: int | None
) -> CalibrationSet:
    if samples < 1 or length < 2:
        raise ValueError(f"--samples {samples} and --length {length}: at least 1 and 2 are needed")
    domains = tuple(dict.fromkeys(s.name for s in sources))
    sequences: list[tuple[tuple[int, ...], int]] = []
    notes = []
    for source, count in zip(sources, _shares([s.weight for s in sources], samples), strict=True):
        if count == 0:
            continue
        rows = _sequences(source, tokenizer, count, length, seed)
        if not rows:
            raise ValueError(
                f"{source.where}: too little text for one sample of {length} tokens; give more "
                "text or a smaller --length"
            )
        if len(rows) < count and seed is not None:
            notes.append(f"{source.where} holds {len(rows)} samples of the {count} asked for")
        sequences += [(row, domains.index(source.name)) for row in rows]
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
    source: Source, tokenizer: Any, count: int, length: int, seed: int | None
) -> list[tuple[int, ...]]:
    rows: list[tuple[int, ...]] = []
    start = _start_tokens(tokenizer)
    pending: list[int] = []
    for document in documents(source, seed):
        if isinstance(document, list):
            rows.append(_chat(tokenizer, document, source)[:length])
            if len(rows) >= count:
                return rows[:count]
            continue
        pending += _encode(tokenizer, document)
        if tokenizer.eos_token_id is not None:
            pending.append(tokenizer.eos_token_id)
        body = length - len(start)
        while len(pending) >= body:
            rows.append((*start, *pending[:body]))
            pending = pending[body:]
            if len(rows) == count:
                return rows
    return rows


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: a document longer than the model's context is expected, it is packed
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _start_tokens(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, for tokenizers that put one before every text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids and ids[0] == bos else []


def _chat(tokenizer: Any, messages: list[dict[str, str]], source: Source) -> tuple[int, ...]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{source.where} holds chats, but the tokenizer has no chat template")
    try:
        encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    except (
        Exception
    ) as e:  # the template is a program of the model's maker, and raises what it likes
        why = " ".join(str(e).split())
        raise ValueError(f"{source.where}: a chat does not fit the chat template: {why}") from e
    return tuple(encoded["input_ids"])


def documents(source: Source, seed: int | None) -> Iterator[Document]:
    """The documents of one source; shuffled by the seed, or in their own order without one."""
    if not source.local:
        yield from (_document(row, source) for row in _dataset_rows(source, seed))
        return
    docs = list(_local_documents(Path(source.where), source))
    if seed is not None:
        random.Random(f"{seed} {source.name}").shuffle(docs)
    yield from docs


def _local_documents(path: Path, source: Source) -> Iterator[Document]:
    try:
        if path.suffix == ".txt":
            yield path.read_text()
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            for row in pyarrow.parquet.read_table(path).to_pylist():
                yield _document(row, source)
        else:
            for n, line in _lines(path):
                row = _json_row(line, path, n)
                if source.only is None or _domain(row, source, n) == source.only:
                    yield _document(row, source)
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: cannot be read as calibration text: {e}") from e


def _json_row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}, line {number}: not JSON: {e}") from e
    if not isinstance(row, dict):
        raise ValueError(f'{path}, line {number}: expected an object with a "text" field')
    return row


def _document(row: dict[str, Any], source: Source) -> Document:
    for field in ("messages", "conversations"):
        chat = row.get(field)
        if (
            isinstance(chat, list)
            and chat
            and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in chat)
        ):
            return chat
    for field in ("text", "content"):
        if isinstance(row.get(field), str):
            if any("\ud800" <= c <= "\udfff" for c in row[field]):
                raise ValueError(f"{source.where}: a text holds half a surrogate pair (\\ud800)")
            return row[field]
    raise ValueError(
        f'{source.where}: a row has neither "text" nor "messages"; its fields are '
        f"{', '.join(map(str, row)) or 'none'}"
    )


def _dataset_rows(source: Source, seed: int | None) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        stream = load_dataset(source.where, source.config, split=source.split, streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        yield from stream
    except Exception as e:  # datasets raises many kinds; all mean the same to the user
        raise ValueError(
            f"calibration data {source.where!r}: no such local path, and the Hub did not give it "
            f"({type(e).__name__}); {LOCAL_FORM}"
        ) from e
