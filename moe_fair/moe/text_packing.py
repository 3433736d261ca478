"""Sequences of tokens from a source's rows: text packed, chats through the model's template."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from moe_fair.core.quote import clip
from moe_fair.moe.left_out import LeftOut
from moe_fair.moe.rows import Row
from moe_fair.moe.schemas import Chat
from moe_fair.moe.text_sources import Source

LONG = 2**20  # characters; a longer document is tokenised as far as it is needed
PART = 2**16  # characters; of a longer document that is drawn from a part is tokenised
NO_TEMPLATE = "the tokenizer has no chat template: messages are written as plain text"


def sequences_of(
    source: Source,
    rows: Iterable[Row],
    tokenizer: Any,
    count: int,
    length: int,
    left_out: LeftOut,
    seed: int | None,
) -> list[tuple[int, ...]]:
    """So many sequences: a chat each, or text of `length` tokens.

    Text is packed, document behind document. Where it is drawn (there is a seed), a document that
    fills several sequences gives one of them, any, and its end is packed with what follows; the
    others are taken where there are too few documents. Of two texts of one size that of more
    documents makes the better plan and the better repair (eval/LAB.md).
    """
    made = _Drawn(count)
    start, eos = _start_tokens(tokenizer), tokenizer.eos_token_id
    body = length - len(start)
    pending: list[int] = []
    order = None if seed is None else random.Random(f"{seed} {source.name} within documents")
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
                made.add([chat[:length]])
        else:
            tokens = _encode(tokenizer, document, made.wanted * body, order)
            tokens += [eos] if eos is not None else []
            if order is not None and len(tokens) >= body:
                whole = len(tokens) // body * body
                made.add([(*start, *tokens[i : i + body]) for i in range(0, whole, body)], order)
                tokens = tokens[whole:]
            pending += tokens
            at = 0
            while len(pending) - at >= body:
                made.add([(*start, *pending[at : at + body])])
                at += body
            pending = pending[at:]
        if len(made) >= count:
            break
    return made.sequences()


class _Drawn:
    """Sequences, one of a document; and others of it, for where there are too few documents."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._first: list[tuple[int, int, tuple[int, ...]]] = []  # document, place in it, tokens
        self._more: list[list[tuple[int, int, tuple[int, ...]]]] = []
        self._kept = 0  # sequences in `_more`

    def __len__(self) -> int:
        return len(self._first)

    @property
    def wanted(self) -> int:
        """Sequences that the next document must be able to give: all that no other could, and its
        part of what is missing."""
        missing = self.count - len(self._first)
        return max(missing - self._kept, -(-missing // (1 + len(self._more))))

    def add(self, windows: Sequence[tuple[int, ...]], order: random.Random | None = None) -> None:
        """A document's; without an order the first of them counts, and there are no others."""
        its = [(len(self._first), place, w) for place, w in enumerate(windows)]
        if order is not None:
            order.shuffle(its)
        self._first.append(its[0])
        if its[1:]:
            self._more.append(its[1:])
            self._kept += len(its) - 1
        if self._kept > 2 * self.count:
            self._level(self.count)

    def _level(self, most: int) -> None:
        """Of every document as many others as of any, but for those that are short of them."""
        low, high = 0, max(map(len, self._more))
        while low < high:  # the largest number with which there are not too many
            middle = (low + high + 1) // 2
            if sum(min(len(d), middle) for d in self._more) <= most:
                low = middle
            else:
                high = middle - 1
        self._more = [d[:low] for d in self._more]
        self._kept = sum(map(len, self._more))

    def sequences(self) -> list[tuple[int, ...]]:
        """At most `count`, those of one document beside one another."""
        found = self._first[: self.count]
        depth = 0
        while len(found) < self.count and any(len(d) > depth for d in self._more):
            found += [d[depth] for d in self._more if len(d) > depth][: self.count - len(found)]
            depth += 1
        return [w for _, _, w in sorted(found, key=lambda x: x[:2])]


def _encode(
    tokenizer: Any, text: str, needed: int, order: random.Random | None = None
) -> list[int]:
    """The tokens of a text; of a very long one, those of a part with more than are needed.

    How a text begins is tokenised without regard to what comes much later, so the tokens that are
    used are those of the whole text, where they are from its beginning: without an order.
    """
    span, enough, at = max(LONG, 8 * needed), needed + LONG // 8, 0
    if order is not None:
        span, enough = max(PART, 8 * needed), needed
        at = order.randrange(len(text) - span) if len(text) > span else 0
    # verbose=False: a document longer than the model's context is expected, it is packed
    for part in (text[at : at + span], text):
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if len(part) == len(text) or len(ids) > enough:
            break
    return list(ids)


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
