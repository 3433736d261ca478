"""The tables of token ids in a checkpoint's files: read, checked, and rewritten for a cut.

Everything else that a cut changes is a range of the checkpoint's own bytes (`file_surgery`); these
small tensors get new values, by the router's rows as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_fair.engines.shards import StoredTensor, stored_tensors
from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.overlay import TYPES
from moe_fair.moe.token_table import remapped

NUMBERS = ("I64", "I32", "I16", "I8", "U8")


def check_tables(source: Checkpoint) -> None:
    """The tables can be rewritten, whatever the plan will be, and name experts that are there.

    Raises:
        ValueError: one is missing, in an unknown layout, or names others; or its router is.
    """
    for block, table, _ in _tables(source):
        ids = _read(table)
        if bool(((ids < 0) | (ids >= block.num_experts)).any()):
            raise ValueError(
                f"{source.model}: {table.name} names experts beyond 0..{block.num_experts - 1}; "
                "download or copy the checkpoint again"
            )


def new_tables(source: Checkpoint, kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Stored name -> the table after the cut, of every block that has one and is cut.

    Raises:
        ValueError: see `check_tables`.
    """
    return {
        table.name: remapped(_read(table), kept[block.name], _read(rows))
        for block, table, rows in _tables(source)
        if block.name in kept
    }


def with_tables(
    tensors: Iterable[StoredTensor], tables: Mapping[str, Tensor], folder: Path
) -> Iterator[StoredTensor]:
    """The tensors, with these values for those of these names; they lie in `folder` meanwhile."""
    new: dict[str, StoredTensor] = {}
    if tables:
        file = folder / "tables.safetensors"
        save_file(dict(tables), file)
        new = {t.name: t for t in stored_tensors(file)}
    for t in tensors:
        yield new.get(t.name, t)


def _tables(source: Checkpoint) -> Iterator[tuple[MoeBlock, StoredTensor, StoredTensor]]:
    """Every block with a table, the table as it is stored, and the router's rows."""
    blocks = [b for b in source.blocks if b.table is not None]
    if not blocks:
        return
    find = source.find
    stored = {find(t.name).name: t for t in source.tensors}
    for block in blocks:
        assert block.table is not None
        module, table, rows = block.table
        found = []
        for tensor, kinds in ((table, NUMBERS), (rows, tuple(TYPES))):
            name = f"{block.name}.{block.path(module, tensor)}"
            t, shape = stored.get(name), tuple(getattr(module, tensor).shape)
            if t is None:
                raise ValueError(f"{source.model}: its files hold no {name}; download it again")
            if t.dtype not in kinds or t.shape != shape:
                raise ValueError(
                    f"{source.model}: {t.name} is {t.dtype} {list(t.shape)}, expected "
                    f"{list(shape)} in one of {', '.join(kinds)}; use --hash-layers keep"
                )
            found.append(t)
        yield block, found[0], found[1]


def _read(t: StoredTensor) -> Tensor:
    with safe_open(t.pieces[0].file, framework="pt") as f:
        tensor: Tensor = f.get_tensor(t.name)
    return tensor
