"""Sources of calibration text: how they are written, and the rows of each.

A source is written `[domain=]WHERE[:weight]`. WHERE is a local file (see `rows`), a directory of
such files (each its own domain), `self` (see `self_text`), a preset's name (see `presets`), or a
`datasets` id as `id[:config][@split]`. Rows of a file may name their domains themselves, in a
field `domain`.
"""

from __future__ import annotations

import os
import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moe_fair.core.quote import quote
from moe_fair.moe.hub_rows import LOCAL_FORM, hub_rows
from moe_fair.moe.left_out import LeftOut, survey
from moe_fair.moe.presets import is_preset, preset
from moe_fair.moe.row_files import SUFFIXES, files_in, kind
from moe_fair.moe.rows import Row
from moe_fair.moe.schemas import SCHEMAS, Schema, mapped
from moe_fair.moe.shuffled_rows import rows_as_they_lie, rows_in_order

OWN = "self"  # text that the model samples itself, see `self_text`
MOST_DOMAINS = 256  # every sum is kept once for each


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
        local = (
            os.path.exists(head) or kind(Path(head)) is not None or head == OWN or is_preset(head)
        )
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
        elif not s.local:
            check_there(s)
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


def check_there(source: Source) -> None:
    """What can only be a path, and no data set's id, is there.

    Raises:
        ValueError: it is not.
    """
    where = source.where
    path = kind(Path(where)) is not None or where.startswith((".", "/", "~"))
    if (path or where.count("/") > 1) and not source.local:
        raise ValueError(f"calibration file {where} does not exist")


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
