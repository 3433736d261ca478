"""What a row of calibration text holds.

A row is of one of the `schemas` and may name its `domain`. A row that cannot be used is handed on
with the reason, for whoever reads to count it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_fair.core.quote import clip, quote
from moe_fair.moe.schemas import SCHEMAS, Document, Schema, document, whole


@dataclass(frozen=True, slots=True)
class Row:
    """A row that can be used.

    Attributes:
        place: which of its file it is, as "line 3"; "" for the whole file.
        document: what it holds.
        domain: that it names; None where it names none or is not asked.
        unused: names of its other fields.
        said: what a user should know of how it was read.
    """

    place: str
    document: Document
    domain: str | None = None
    unused: tuple[str, ...] = ()
    said: str = ""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why not."""

    place: str
    why: str


def parse_row(
    found: Any, place: str, *, domains: bool = False, schemas: Sequence[Schema] = SCHEMAS
) -> Row | BadRow:
    """What a row holds: a table of fields, a text by itself, or the reason why it is neither.

    Args:
        domains: it may name its domain; otherwise the field is not looked at.
        schemas: those that it may be of.
    """
    try:
        if isinstance(found, str):
            return Row(place, whole(found))
        if isinstance(found, ValueError):
            raise found
        if not isinstance(found, Mapping):
            raise ValueError('expected an object with a "text" field')
        made, used, schema = document(found, schemas)
        domain = _domain(found) if domains else None
    except ValueError as e:
        return BadRow(place, str(e))
    used = {*used, "domain"} if domains else used
    unused = (clip(str(k), 40) for k, v in found.items() if k not in used and v is not None)
    return Row(place, made, domain, tuple(unused), schema.said)


def _domain(found: Mapping[str, Any]) -> str | None:
    name = found.get("domain")
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise ValueError(
            f'"domain" is {quote(name)} and must be a name; or name one for the whole file: '
            "--calibration name=FILE"
        )
    return None if name is None else whole(name)
