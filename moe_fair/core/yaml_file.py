"""Settings in YAML, read by one reader: a value has one meaning and is no larger than its text.

Aliases are refused: a few lines of them stand for more than any memory holds, and settings are flat
enough to be written out. So are keys that are given twice, and numbers that YAML 1.1 reads
otherwise than a person does (050 is 40 there, 1:30 is 90) or that are none (.nan, .inf).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from moe_fair.core.quote import clip, quote

LARGEST_FILE = 2**20  # bytes; settings are a few lines
# what a value that does not fit its tag makes PyYAML's own code run into
ERRORS = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


class WithoutAliases(yaml.SafeLoader):
    """Plain values, each written where it is used."""

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ConstructorError(
                None, None, f"an alias (*{clip(event.anchor, 40)}); write the value out",
                event.start_mark,
            )  # fmt: skip
        return super().compose_node(parent, index)


class _Strict(WithoutAliases):
    """Also refuses what can be read in two ways."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, MappingNode) else ():
            if isinstance(key, ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _refusal(key, f"{quote(key.value)} is given twice; leave one out")
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        text = str(self.construct_scalar(node)).replace("_", "").lstrip("+-")
        if not re.fullmatch(r"0|[1-9][0-9]*|0x[0-9a-fA-F]+|0b[01]+", text):
            raise _refusal(
                node, f"{quote(node.value)} can be read in two ways; write a number without "
                "leading zeros or colons, or text in quotes",
            )  # fmt: skip
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> float:
        text = str(self.construct_scalar(node))
        found = math.nan if ":" in text else super().construct_yaml_float(node)
        if not math.isfinite(found):
            raise _refusal(node, f"{quote(node.value)} is not a finite number")
        return found


def _refusal(node: Node, why: str) -> ConstructorError:
    return ConstructorError(None, None, why, node.start_mark)


_Strict.add_constructor("tag:yaml.org,2002:int", _Strict.construct_yaml_int)
_Strict.add_constructor("tag:yaml.org,2002:float", _Strict.construct_yaml_float)
# 1e-3 is a number to everybody but YAML 1.1
_Strict.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+"), list("-+0123456789")
)


def read_yaml(path: Path) -> Any:
    """What a YAML (or JSON) file holds.

    Raises:
        ValueError: it is no YAML, too large for settings, or one of its values has no one meaning;
            says which line.
    """
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"{path} has {size:,} bytes; settings have {LARGEST_FILE:,} at most")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as e:
        raise ValueError(f"{path} is not YAML that can be used: {_why(e)}") from e
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text holds.

    Args:
        where: what it is called in the error.

    Raises:
        ValueError: see `read_yaml`.
    """
    try:
        return yaml.load(text, Loader=_Strict)
    except ERRORS as e:
        raise ValueError(f"{where} is not YAML that can be used: {_why(e)}") from e


def _why(e: BaseException) -> str:
    """The problem and its line."""
    mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", None)
    text = clip(str(problem or e) or type(e).__name__, 200)
    return f"line {mark.line + 1}: {text}" if mark is not None else text
