"""Rows of a data set on the Hub, streamed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

from moe_fair.moe.left_out import LeftOut
from moe_fair.moe.row_files import SUFFIXES
from moe_fair.moe.rows import BadRow, Row, parse_row
from moe_fair.moe.schemas import SCHEMAS, Schema

SHUFFLE_BUFFER = 10_000  # documents; a streamed dataset is shuffled within this window
PATIENCE = 1000  # rows of which none can be used, before no more are asked for
SMALL_BUFFER = 1000  # where little is to be read
LOCAL_FORM = (
    f"give local text: --calibration name=path/to/text.jsonl ({', '.join(SUFFIXES)}, a directory)"
)


def hub_rows(
    where: str,
    config: str | None,
    split: str,
    seed: int | None,
    left_out: LeftOut,
    *,
    revision: str | None = None,
    schemas: Sequence[Schema] = SCHEMAS,
    little: bool = False,
) -> Iterator[Row]:
    """The rows of a data set that can be used.

    Args:
        seed: shuffles them; without one they stay in their own order.
        left_out: is told of the others.
        revision: branch, tag or commit; None: the main branch.
        schemas: those that rows may be of.
        little: as little is read as a seeded choice needs: the beginning of one shard.

    Raises:
        ValueError: the Hub does not give it, or none of its first rows can be used.
    """
    usable = 0
    for n, fields in enumerate(_stream(where, config, split, seed, revision, little), 1):
        found = parse_row(fields, f"row {n}", schemas=schemas)
        if isinstance(found, BadRow):
            left_out.row(where, found.place, found.why)
            if not usable and n >= PATIENCE:
                raise ValueError(f"{left_out.first_row}; nor can the next {n - 1} rows be used")
            continue
        usable += 1
        left_out.used(found)
        yield found


def _stream(
    where: str, config: str | None, split: str, seed: int | None, revision: str | None, little: bool
) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        stream = load_dataset(where, config, split=split, revision=revision, streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, **_extent(stream.shuffle, little))
        yield from stream
    except Exception as e:  # datasets raises many kinds; all mean the same to the user
        number = re.fullmatch(r"\d*\.?\d+", config or "")
        what = LOCAL_FORM
        if number:
            what = f"{config} is read as its config: a weight is written {where}@{split}:{config}"
        raise ValueError(
            f"calibration data {where!r}: no such local path, and the Hub did not give it "
            f"({type(e).__name__}); {what}"
        ) from e


def _extent(shuffle: Callable[..., Any], little: bool) -> dict[str, int]:
    """Within how much is shuffled; newer versions fill the buffer from ten shards unless told."""
    if not little:
        return {"buffer_size": SHUFFLE_BUFFER}
    one = {"max_buffer_input_shards": 1}
    known = signature(shuffle).parameters.keys() >= one.keys()
    return {"buffer_size": SMALL_BUFFER, **(one if known else {})}
