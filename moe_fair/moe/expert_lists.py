"""What in a config names single experts, or has an entry for each: renumbered with the cut.

Quantisers name modules that they left alone (`modules_to_not_convert`, `ignore`), some families
keep a number per expert, and ERNIE 4.5 repeats the number of experts in `moe_capacity`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.tensor_slicing import LAST_NUMBER, ExpertTensor

# lists whose entries repeat the number of experts
REPEATED = ("moe_capacity",)
NUMBER = re.compile(r"(?:\\?\.)(\d+)(?=\\?\.|$)")  # in a name, or in a regular expression of one
FROM_LAYER = re.compile(r"^.*?(?=(?:layers|blocks|h)\.\d+\.)")


def renumbered(
    config: dict[str, Any],
    parts: Mapping[str, ExpertTensor],
    blocks: Sequence[MoeBlock],
    kept: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """The config with the names of experts as they are after the cut; those that left are dropped.

    Args:
        parts: stored name -> what it is, see `file_surgery.classify`.
        kept: block name -> ids that stay.
    """
    lists = _Lists(parts, blocks, kept)
    return {k: lists.of(v, k) for k, v in config.items()}


class _Lists:
    """The walk through one config."""

    def __init__(
        self,
        parts: Mapping[str, ExpertTensor],
        blocks: Sequence[MoeBlock],
        kept: Mapping[str, Sequence[int]],
    ) -> None:
        self.size = blocks[0].num_experts
        self.counts = {len(kept.get(b.name, range(b.num_experts))) for b in blocks}
        self.layers = len({b.layer for b in blocks})
        self.place = {b: {e: i for i, e in enumerate(ids)} for b, ids in kept.items()}
        self.owner = {
            _tail(f"{b.name}.{n}."): b.name
            for b in blocks
            for n, m in b.block.named_modules()
            if m is b.experts
        }
        for name, part in parts.items():
            if part.expert is not None:
                self.owner[_tail(LAST_NUMBER.match(name)[1])] = part.block  # type: ignore[index]

    def of(self, value: Any, key: str) -> Any:
        """A value after the cut."""
        if isinstance(value, dict):
            return {
                new: self.of(v, str(k))
                for k, v in value.items()
                if (new := self.name(k) if isinstance(k, str) else k) is not None
            }
        if not isinstance(value, list):
            return value
        if key in REPEATED:
            return [max(self.counts) if v == self.size else v for v in value]
        if "expert" in key and len(value) == self.size != self.layers and len(set(value)) == 1:
            return value[: max(self.counts)]
        found = [self.name(v) if isinstance(v, str) else self.of(v, key) for v in value]
        return [v for v in found if v is not None]

    def name(self, text: str) -> str | None:
        """A module's name after the cut; None where its expert left."""
        for match in NUMBER.finditer(text):
            head = text[: match.start(1)].replace("\\.", ".").removeprefix("re:").lstrip("^")
            block = self.owner.get(_tail(head))
            if block is None or block not in self.place:
                continue
            new = self.place[block].get(int(match[1]))
            return None if new is None else f"{text[: match.start(1)]}{new}{text[match.end(1) :]}"
        return text


def _tail(head: str) -> str:
    """The end of a module's name from its layer on: wrappers put different prefixes before it."""
    return FROM_LAYER.sub("", head)
