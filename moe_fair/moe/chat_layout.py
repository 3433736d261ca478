"""How a chat template writes a conversation: what stands before and behind each turn.

A template is a program, so nothing is read in it: it is asked to render marked turns, and what
stands between the marks is what it puts there. That holds for a template of any form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

USER, ANSWER, SYSTEM = "Qq0mark", "Aa1mark", "Ss2mark"

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class End:
    """What ends a turn: a token by itself, or a text where that is no token.

    Attributes:
        text: as the template writes it, without white space around.
        token: its id; None where it is plain text.
    """

    text: str
    token: int | None


@dataclass(frozen=True)
class ChatLayout:
    """The structure of a tokenizer's chat template.

    Attributes:
        user_end, answer_end: what ends the user's and the model's turn.
        takes_system: there may be a system message.
    """

    tokenizer: Any
    user_end: End
    answer_end: End
    takes_system: bool

    def whole(self, messages: Messages) -> str:
        """A conversation as the template writes it."""
        return _render(self.tokenizer, messages)

    def before_user(self, messages: Messages) -> str:
        """All that stands before what the user says next."""
        whole = _render(self.tokenizer, [*messages, {"role": "user", "content": USER}])
        return whole[: whole.rindex(USER)]

    def before_answer(self, messages: Messages) -> str:
        """All that stands before the model's answer to the last message."""
        return _render(self.tokenizer, messages, add_generation_prompt=True)


def find_layout(tokenizer: Any) -> ChatLayout | None:
    """The layout of the tokenizer's chat template; None where it has none.

    Raises:
        ValueError: it has one that does not render a question and its answer in this order, or
            puts nothing between them.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
    try:
        whole = _render(tokenizer, turns)
        _, rest = whole.split(USER)
        between, after = rest.split(ANSWER)
        again = _render(tokenizer, turns[:1], add_generation_prompt=True)
        assert USER in again
    except Exception as e:  # a template is a program, and raises what it likes
        raise ValueError(f"does not render a question and its answer ({_line(e)})") from e
    user_end = _end(tokenizer, between)
    if user_end is None:
        raise ValueError("puts nothing between a question and its answer")
    answer_end = _end(tokenizer, after) or _end(tokenizer, tokenizer.eos_token or "")
    if answer_end is None:
        raise ValueError("puts nothing behind an answer, and the tokenizer has no end of text")
    return ChatLayout(tokenizer, user_end, answer_end, _takes_system(tokenizer))


def _takes_system(tokenizer: Any) -> bool:
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    try:
        return SYSTEM in _render(tokenizer, turns)
    except Exception:  # as Gemma's, which refuses one
        return False


def _end(tokenizer: Any, behind: str) -> End | None:
    """What a turn is ended by, from what stands behind it."""
    behind = behind.strip()
    if not behind:
        return None
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items()}
    found = max((t for t in added if t.strip() and behind.startswith(t)), key=len, default=None)
    if found is not None:
        return End(found, added[found])
    line = behind.split("\n")[0].strip()
    later = [line.index(t) for t in added if t.strip() and t in line]
    return End(line[: min(later, default=len(line))].strip(), None)


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], **more: Any) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **more))


def _line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__
