"""The fields in which rows of calibration text come, and what is made of them.

`SCHEMAS` is the table, in the order in which they are tried: a row of several is of the first.
A document is a text, or a chat for the tokenizer's template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

from moe_fair.core.quote import clip, quote
from moe_fair.core.registry import nearest

Fields = Mapping[str, Any]
SYSTEM = ("system", "system_prompt")  # what the chat's first message says, beside the turns
# who speaks in ShareGPT's `from`, and in files made for LLaMA-Factory
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "system": "system",
    "function_call": "call", "tool": "tool", "function": "tool", "observation": "tool",
    "tool_response": "tool",
}  # fmt: skip
MAPPED = "read by --map"


@dataclass(frozen=True, slots=True)
class Chat:
    """The messages of one chat, each with its content as text, and the tools that it may call.

    Attributes:
        plain: its messages may be written one behind the other where there is no chat template.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    plain: bool = False

    @property
    def text(self) -> str:
        """The messages as plain text, with a blank line between them."""
        return "\n\n".join(m["content"] for m in self.messages)


Document = str | Chat


# a row -> its document, and the fields that it is made of
Read = Callable[[Fields], tuple[Document, set[str]]]


class Misfit(ValueError):
    """The fields are there, but hold something else than the schema has in them."""


@dataclass(frozen=True, slots=True)
class Schema:
    """A form of rows.

    Attributes:
        needs: fields that a row of it has.
        read: a row's document and the fields that it is made of; raises Misfit where these hold
            something else, so that further schemas are tried, and ValueError where they are broken.
        said: what a user should know of rows that are read like this.
    """

    needs: tuple[str, ...]
    read: Read
    said: str = ""

    @property
    def name(self) -> str:
        """As `instruction/output`."""
        return "/".join(self.needs)


def document(found: Fields, schemas: Sequence[Schema]) -> tuple[Document, set[str], Schema]:
    """What a row holds, the fields that it is made of, and its schema.

    Raises:
        ValueError: it is of none of the schemas, or broken.
    """
    misfit = None
    for schema in schemas:
        if any(found.get(f) is None for f in schema.needs):
            continue
        try:
            made, used = schema.read(found)
        except Misfit as e:
            misfit = misfit or (e if str(e) else None)
            continue
        whole(made if isinstance(made, str) else _written(made))
        return made, used, schema
    if misfit is not None:
        raise misfit
    raise ValueError(_unknown(found, schemas))


def _unknown(found: Fields, schemas: Sequence[Schema]) -> str:
    listed = clip(", ".join(map(str, list(found)[:20]))) or "none"
    if len(schemas) == 1:
        return f"no {schemas[0].name}; its fields are {listed}"
    for schema in schemas:
        if len(schema.needs) > 1 and all(f in found for f in schema.needs):
            return f'"{next(f for f in schema.needs if found[f] is None)}" has no value'
    fields = tuple(str(f)[:80] for f, value in found.items() if value is not None)[:20]
    return (
        f'neither "text" nor "messages" nor other known ones; its fields are {listed}'
        f"{_nearest(fields, tuple(s.needs for s in schemas))}; say which is what: "
        "--map user=FIELD,assistant=FIELD"
    )


@lru_cache(maxsize=64)  # the rows of a file have the same fields, and this takes milliseconds
def _nearest(fields: tuple[str, ...], known: tuple[tuple[str, ...], ...]) -> str:
    """`; nearest: a, b` for the fields that are most like these, or nothing."""

    def likeness(needs: tuple[str, ...]) -> float:
        return sum(max((_alike(n, f) for f in fields), default=0.0) for n in needs) / len(needs)

    near = max(known, key=likeness)
    return f"; nearest: {', '.join(near)}" if likeness(near) > 0.5 else ""


def _alike(name: str, field: str) -> float:
    return SequenceMatcher(None, name, field.lower()).ratio()


def whole(text: str) -> str:
    """A text that is Unicode: bytes that are not UTF-8 were read as halves of surrogate pairs.

    Raises:
        ValueError: it is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = ord(text[e.start])
        if 0xDC80 <= half <= 0xDCFF:
            raise ValueError("the text is not UTF-8") from None
        raise ValueError(f"a text holds half a surrogate pair (\\u{half:04x})") from None
    return text


def parse_json(text: str, what: str = "not JSON") -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is none; begins with `what`.
    """
    try:
        return json.loads(whole(text))
    except RecursionError:
        raise ValueError(f"{what}: nested too deeply") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{what}: {e.msg} (character {e.pos + 1})") from None
    except ValueError as e:
        raise ValueError(f"{what}: {clip(str(e))}") from None


def _written(chat: Chat) -> str:
    return json.dumps([chat.messages, chat.tools], ensure_ascii=False, default=str)


# messages that are there already


def _messages(field: str) -> Read:
    """Reads a list of messages with `role` and `content`, or ShareGPT's `from` and `value`."""

    def read(found: Fields) -> tuple[Document, set[str]]:
        given = _listed(found[field])
        if _turns(given, "role", "content"):
            chat = Chat([_message(m) for m in given], _tools(found.get("tools")))
            return chat, {field, "tools"}
        if _turns(given, "from", "value"):
            return _shared(found, given), {field, "tools", "system"}
        raise Misfit(f'"{field}" must be a list of messages with "role" and "content"')

    return read


def _listed(given: Any) -> Any:
    """Messages that are written as JSON, read; all else as it is."""
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            read = parse_json(given)
        except ValueError:
            return given
        return read if _turns(read, "role", "content") or _turns(read, "from", "value") else given
    return given


def _turns(given: Any, role: str, content: str) -> bool:
    return (
        isinstance(given, list)
        and bool(given)
        and all(
            isinstance(m, dict)
            and isinstance(m.get(role), str)
            and (content in m or bool(m.get("tool_calls")))
            for m in given
        )
    )


def _message(message: Fields) -> dict[str, Any]:
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


def _shared(found: Fields, turns: Iterable[Fields]) -> Chat:
    """A chat of ShareGPT's form.

    Tools that its system message lists already (between <tools> tags, as Hermes has them) are not
    handed to the template, which would list them once more.
    """
    messages = []
    for turn in turns:
        role, value = SPEAKERS.get(turn["from"].lower()), turn["value"]
        if role is None:
            raise ValueError(
                f'"from" is {quote(turn["from"])}{nearest(turn["from"], SPEAKERS)} and none of '
                f"{', '.join(SPEAKERS)}"
            )
        if not isinstance(value, str):
            raise ValueError(f'the "value" of a message is {quote(value)} and must be text')
        if role == "call":
            messages.append(_calling(_calls(value, "function_call")))
        else:
            messages.append({"role": role, "content": value})
    if messages[0]["role"] != "system":
        messages = _system(found, ("system",)) + messages
    listed = messages[0]["role"] == "system" and "<tools>" in messages[0]["content"]
    return Chat(messages, None if listed else _functions(found.get("tools")))


# tools and their calls


def _tools(found: Any) -> list[dict[str, Any]] | None:
    if isinstance(found, str):
        found = parse_json(found, '"tools" is not JSON')
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(t, dict) for t in found):
        raise ValueError(f'"tools" is {quote(found)} and must be a list of objects')
    return found


def _functions(found: Any) -> list[dict[str, Any]] | None:
    """Tools in the form that templates take; xLAM writes the bare function and its parameters."""
    if isinstance(found, str) and not found.strip():
        return None
    made = []
    for tool in _tools(found) or ():
        if "function" not in tool:
            given = tool.get("parameters")
            if isinstance(given, dict) and "properties" not in given:
                tool = {**tool, "parameters": {"type": "object", "properties": given}}
            tool = {"type": "function", "function": tool}
        made.append(tool)
    return made or None


def _calls(found: Any, field: str) -> list[dict[str, Any]]:
    """Tool calls: an object with `name` and `arguments`, or a list of them, or either as JSON."""
    if isinstance(found, str):
        found = parse_json(found, f'"{field}" is not JSON')
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise Misfit(f'"{field}" is {quote(found)} and must be calls with "name" and "arguments"')
    return calls


def _calling(calls: Iterable[Fields]) -> dict[str, Any]:
    made = [{"name": c["name"], "arguments": c.get("arguments") or {}} for c in calls]
    called = [{"type": "function", "function": call} for call in made]
    return {"role": "assistant", "content": "", "tool_calls": called}


def _called(found: Fields) -> tuple[Document, set[str]]:
    """xLAM: a question, and the calls that answer it."""
    calls = _calling(_calls(found["answers"], "answers"))
    messages = [*_system(found), _said("user", _text(found, "query")), calls]
    return Chat(messages, _functions(found.get("tools"))), {"query", "answers", "tools", *SYSTEM}


# one question and one answer, in fields of their own


def _text(found: Fields, field: str) -> str:
    if not isinstance(found[field], str):
        raise Misfit(f'"{field}" is {quote(found[field])} and must be text')
    return found[field]


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _system(found: Fields, fields: Iterable[str] = SYSTEM) -> list[dict[str, Any]]:
    given = next((found[f] for f in fields if isinstance(found.get(f), str) and found[f]), None)
    return [] if given is None else [_said("system", given)]


def _plain_text(field: str) -> Read:
    def read(found: Fields) -> tuple[Document, set[str]]:
        if not isinstance(found[field], str):
            raise Misfit
        return found[field], {field}

    return read


def _pair(user: str, assistant: str, more: str = "") -> Read:
    """Reads a question, perhaps with `more` behind it, and an answer."""

    def read(found: Fields) -> tuple[Document, set[str]]:
        asked, answer = _text(found, user), _text(found, assistant)
        if more and isinstance(found.get(more), str) and found[more]:
            asked += "\n\n" + found[more]
        messages = [*_system(found), _said("user", asked), _said("assistant", answer)]
        return Chat(messages, plain=True), {user, assistant, *SYSTEM, *([more] if more else [])}

    return read


def _continued(found: Fields) -> tuple[Document, set[str]]:
    """TRL's form: a text and how it goes on, or the messages of a chat and those behind them."""
    prompt, completion = (_listed(found[f]) for f in ("prompt", "completion"))
    used = {"prompt", "completion", "tools"}
    if all(_turns(part, "role", "content") for part in (prompt, completion)):
        chat = [_message(m) for m in (*prompt, *completion)]
        return Chat(chat, _tools(found.get("tools"))), used
    return _text(found, "prompt") + _text(found, "completion"), used - {"tools"}


def _preferred(found: Fields) -> tuple[Document, set[str]]:
    """The answer that was preferred, behind its prompt where it does not hold that itself."""
    asked = next((f for f in ("prompt", "question", "instruction") if found.get(f)), None)
    used = {"chosen", "rejected", *SYSTEM, *([asked] if asked else [])}
    chosen, prompt = _listed(found["chosen"]), _listed(found[asked]) if asked else None
    if isinstance(chosen, str):
        if not isinstance(prompt, str):
            return chosen, used
        turns = [*_system(found), _said("user", prompt), _said("assistant", chosen)]
        return Chat(turns, plain=True), used
    if not _turns(chosen, "role", "content"):
        raise Misfit(f'"chosen" is {quote(chosen)} and must be text or messages')
    messages = [_message(m) for m in chosen]
    if messages[0]["role"] == "assistant" and prompt:
        before = [_said("user", prompt)] if isinstance(prompt, str) else prompt
        if not _turns(before, "role", "content"):
            raise Misfit(f'"{asked}" is {quote(prompt)} and must be text or messages')
        messages = [*map(_message, before), *messages]
    if messages[0]["role"] != "system":
        messages = _system(found) + messages
    return Chat(messages), used


def _of(user: str, assistant: str, more: str = "") -> Schema:
    asked = f"{user} and {more}" if more else user
    said = f"a row is a chat of one turn: {asked} asked, {assistant} answered"
    return Schema((user, assistant), _pair(user, assistant, more), said)


SCHEMAS: tuple[Schema, ...] = (
    Schema(("messages",), _messages("messages")),
    Schema(("conversations",), _messages("conversations")),
    Schema(("text",), _plain_text("text")),
    Schema(("content",), _plain_text("content")),
    Schema(("conversation",), _messages("conversation")),  # WildChat, LMSYS-Chat
    Schema(("query", "answers"), _called, "a row is a question and the tool calls that answer it"),
    Schema(("chosen", "rejected"), _preferred, "of the answers of a row the chosen one is read"),
    _of("instruction", "output", "input"),  # Alpaca
    _of("instruction", "response", "context"),  # Dolly
    Schema(("prompt", "completion"), _continued, "a row is a prompt that its completion goes on"),
    _of("prompt", "response"),
    _of("question", "answer"),  # GSM8K
    _of("question", "response"),  # OpenOrca
    _of("query", "response"),  # MetaMathQA
    _of("problem", "solution"),  # NuminaMath, Magicoder
    _of("inputs", "targets"),  # Aya, P3
)

# what --map may say that a field is
ROLES = ("text", "messages", "system", "user", "assistant", "tools")
WANTED: tuple[Collection[str], ...] = ({"text"}, {"messages"}, {"user", "assistant"})


def mapped(fields: Mapping[str, str]) -> Schema:
    """The schema that --map describes: role -> field.

    Raises:
        ValueError: a role that there is not, or those of no document.
    """
    for role in fields:
        if role not in ROLES:
            raise ValueError(
                f"--map: {quote(role)}{nearest(role, ROLES)} is none of {', '.join(ROLES)}; write "
                "user=FIELD,assistant=FIELD"
            )
    main = set(fields) - {"system", "tools"}
    if main not in WANTED or ("text" in fields and len(fields) > 1):
        raise ValueError(
            f"--map {','.join(f'{r}={f}' for r, f in fields.items())}: give text, or messages, or "
            "user and assistant (and with the latter two system and tools, where there are any)"
        )

    def read(found: Fields) -> tuple[Document, set[str]]:
        row = {role: found[field] for role, field in fields.items()}
        if "text" in row:
            made: Document = _text(row, "text")
        elif "messages" in row:
            made, _ = _messages("messages")(row)
        else:
            made, _ = _pair("user", "assistant")(row)
            assert isinstance(made, Chat)
            tools = _functions(row.get("tools"))
            made = Chat(made.messages, tools, plain=tools is None)
        return made, set(fields.values())

    needs = tuple(f for r, f in fields.items() if r not in ("system", "tools"))
    return Schema(needs, lambda found: read({f: found.get(f) for f in fields.values()}), MAPPED)
