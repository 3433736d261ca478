"""What a row of calibration text holds.

A row has a `text` (or `content`), or `messages` (or `conversations`) and perhaps `tools`, and may
name its `domain`. A row that cannot be used is handed on with the reason, for whoever reads to
count it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_fair.core.quote import clip, quote

TEXT, CHAT = ("text", "content"), ("messages", "conversations")


@dataclass(frozen=True, slots=True)
class Chat:
    """The messages of one chat, each with its content as text, and the tools that it may call."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


Document = str | Chat


@dataclass(frozen=True, slots=True)
class Row:
    """A row that can be used.

    Attributes:
        place: which of its file it is, as "line 3"; "" for the whole file.
        document: what it holds.
        domain: that it names; None where it names none or is not asked.
        unused: names of its other fields.
    """

    place: str
    document: Document
    domain: str | None = None
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why not."""

    place: str
    why: str


def parse_row(found: Any, place: str, *, domains: bool = False) -> Row | BadRow:
    """What a row holds: a table of fields, a text by itself, or the reason why it is neither."""
    try:
        if isinstance(found, str):
            return Row(place, _whole(found))
        if isinstance(found, ValueError):
            raise found
        if not isinstance(found, Mapping):
            raise ValueError('expected an object with a "text" field')
        document, used = _document(found)
        domain = _domain(found) if domains else None
    except ValueError as e:
        return BadRow(place, str(e))
    used = {*used, "domain"} if domains else used
    unused = (clip(str(k), 40) for k, v in found.items() if k not in used and v is not None)
    return Row(place, document, domain, tuple(unused))


def _document(found: Mapping[str, Any]) -> tuple[Document, set[str]]:
    """A row's text or chat, and the fields that it is made of."""
    chats = [f for f in CHAT if _is_chat(found.get(f))]
    if chats:
        tools = _tools(found.get("tools"))
        chat = Chat([_message(m) for m in found[chats[0]]], tools)
        _whole(json.dumps([chat.messages, tools], ensure_ascii=False, default=str))
        return chat, {chats[0], "tools"}
    for field in TEXT:
        if isinstance(found.get(field), str):
            return _whole(found[field]), {field}
    if given := [f for f in CHAT if found.get(f) is not None]:
        raise ValueError(f'"{given[0]}" must be a list of messages with "role" and "content"')
    raise ValueError(
        'neither "text" nor "messages"; its fields are '
        f"{clip(', '.join(map(str, list(found)[:20]))) or 'none'}"
    )


def _is_chat(found: Any) -> bool:
    return (
        isinstance(found, list)
        and bool(found)
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and ("content" in m or m.get("tool_calls"))
            for m in found
        )
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates of text models take it: one text, and no fields without a value.

    Templates that take parts write them one behind the other; so they are joined.
    """
    given = {k: v for k, v in message.items() if v is not None or k == "content"}
    content = given.get("content")
    if isinstance(content, list):
        given["content"] = "".join(map(_part, content))
    elif not isinstance(content, str) and not (content is None and given.get("tool_calls")):
        raise ValueError(f'the "content" of a message is {quote(content)} and must be text')
    return given


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        if isinstance(part.get("text"), str):
            return part["text"]
        raise ValueError("a part of a message holds no text")
    name = part.get("type") if isinstance(part, Mapping) else part
    raise ValueError(f"a part of a message is {quote(name)}, and only text is read")


def _tools(found: Any) -> list[dict[str, Any]] | None:
    if isinstance(found, str):
        found = parse_json(found, '"tools" is not JSON')
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(t, dict) for t in found):
        raise ValueError(f'"tools" is {quote(found)} and must be a list of objects')
    return found


def _domain(found: Mapping[str, Any]) -> str | None:
    name = found.get("domain")
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise ValueError(
            f'"domain" is {quote(name)} and must be a name; or name one for the whole file: '
            "--calibration name=FILE"
        )
    return None if name is None else _whole(name)


def _whole(text: str) -> str:
    """A text that is Unicode: bytes that are not UTF-8 were read as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = ord(text[e.start])
        if 0xDC80 <= half <= 0xDCFF:
            raise ValueError("the text is not UTF-8") from None
        raise ValueError(f"a text holds half a surrogate pair (\\u{half:04x})") from None
    return text


def parse_json(text: str, what: str = "not JSON") -> Any:
    try:
        return json.loads(_whole(text))
    except RecursionError:
        raise ValueError(f"{what}: nested too deeply") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{what}: {e.msg} (character {e.pos + 1})") from None
    except ValueError as e:
        raise ValueError(f"{what}: {clip(str(e))}") from None
