"""Calibration text that the model writes itself.

    x_1 … x_n ~ p(· | start of document)          base models, until the model ends the document
    q ~ p(· | what stands before a question),  a ~ p(· | … q …)          chat models (Magpie)

at temperature 1 and from the whole distribution, so that what the model knows comes as often as the
model thinks of it. Pruned on it, a model keeps more of what no calibration text of ours holds
(eval/LAB.md); for dense models it is published as self-calibration (Williams et al. 2024,
arXiv 2410.17170), and chats as Magpie (Xu et al. 2024, arXiv 2406.08464).

Documents are written in batches, each with a seed of its own, so that it makes no difference which
process writes which batch. What is kept is text: a tokenizer reads it nearly as it was drawn (97 %
of the reference model's tokens, more where a vocabulary is larger against what is rare in it).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from moe_fair.moe.chat_layout import ChatLayout, End, Messages, find_layout
from moe_fair.moe.text_loops import is_loop
from moe_fair.moe.text_writers import Continuation, Writer, decode, encode

DOCUMENTS = 64  # most of a batch
PLAIN = 4  # of a chat model every so many batches are plain documents
FURTHER = 0.3  # share of chats with a second question
SYSTEM = 0.2  # share of chats with a system message
QUESTION = 4  # a question may take this part of the length
AGAIN = 3  # rounds in which what cannot be used is written anew
TRIED = 16  # questions by which a chat model is known
PROMPTS = (
    "You are a helpful assistant.",
    "You are an expert. Answer precisely, and say what you are not sure of.",
    "You are a patient teacher who explains step by step, with examples.",
    "You are a programmer. Answer with working code and few words.",
    "Answer briefly.",
    "Answer in the language of the question.",
    "You are a careful writer and editor.",
    "You are a mathematician. Show every step of the solution.",
)


@dataclass(frozen=True)
class Row:
    """A document, or a chat.

    Attributes:
        fields: as they are saved: `text`, or `messages`.
        tokens: that it holds.
    """

    fields: dict[str, Any]
    tokens: int


@dataclass(frozen=True)
class Written:
    """One batch.

    Attributes:
        loops, unended: texts that ran in circles, and questions that had no end: written anew.
        missing: documents that are left out because they came out so every time.
    """

    rows: list[Row]
    loops: int = 0
    unended: int = 0
    missing: int = 0


@dataclass(frozen=True)
class Author:
    """What is known of a model before it writes.

    Attributes:
        start: the token that a document starts from; `start_name`: which one it is.
        ends: at which the model ends a document.
        layout: of its chat template; None for a base model.
        why: it is a base model, where it has a chat template.
        unseen: ids that stand for images, sounds and the like.
    """

    tokenizer: Any
    start: int
    start_name: str
    ends: tuple[End, ...]
    layout: ChatLayout | None
    why: str = ""
    unseen: tuple[int, ...] = ()

    @property
    def special(self) -> tuple[int, ...]:
        """Ids that a plain document does not hold."""
        return tuple(i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special)


def find_author(tokenizer: Any, config: Any, generation: dict[str, Any]) -> Author:
    """How this model starts and ends what it writes.

    A model whose own list of ends has the end of an answer by its chat template is a chat model, as
    far as its files say it; `writes_chats` asks the model.

    Args:
        config: the model's.
        generation: what lies in `generation_config.json`.

    Raises:
        ValueError: nothing says where a document starts.
    """
    text = config.get_text_config()
    candidates = {
        "the tokenizer's start of text": tokenizer.bos_token_id,
        "bos_token_id of generation_config.json": generation.get("bos_token_id"),
        "bos_token_id of config.json": getattr(text, "bos_token_id", None),
        "the tokenizer's end of text": tokenizer.eos_token_id,
        "the tokenizer's padding": tokenizer.pad_token_id,
    }
    known = {n: i for n, i in candidates.items() if isinstance(i, int) and i < len(tokenizer)}
    if not known:
        raise ValueError(
            "neither tokenizer nor config names a token that a document starts or ends with; give "
            "calibration text with -c"
        )
    name, start = next(iter(known.items()))
    ends: list[int] = []
    for found in (
        generation.get("eos_token_id"), getattr(text, "eos_token_id", None), tokenizer.eos_token_id,
    ):  # fmt: skip
        ends += found if isinstance(found, list) else [] if found is None else [found]
    layout, why = None, ""
    try:
        layout = find_layout(tokenizer)
    except ValueError as e:
        why = f"its chat template {e}"
    if layout is not None and layout.answer_end.token not in (None, *ends):
        why = f"it does not end its answers with {layout.answer_end.text}, as its template does"
        layout = None
    return Author(
        tokenizer, start, f"{name} ({decode(tokenizer, [start])})",
        tuple(End(decode(tokenizer, [i]), i) for i in dict.fromkeys(ends) if i < len(tokenizer)),
        layout, why, _unseen(config),
    )  # fmt: skip


def _unseen(config: Any) -> tuple[int, ...]:
    """Ids that stand for what is no text, by the config's names for them."""
    found = {
        v
        for k, v in config.to_dict().items()
        if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)
        and any(w in k for w in ("image", "video", "audio", "vision", "boi", "eoi"))
    }  # fmt: skip
    return tuple(sorted(found))


def writes_chats(author: Author, writer: Writer, length: int, seed: int) -> bool:
    """Whether the model ends what it writes in the user's place, as only one trained on chats does.

    A base model may come with a template that was never used on it.
    """
    if author.layout is None:
        return False
    prompt = encode(author.tokenizer, author.layout.before_user([]))
    prompts = [prompt] * TRIED
    most = max(16, length // QUESTION)
    ends = _turn_ends(author, author.layout.user_end)
    found = writer.write(prompts, most, ends, _seed(seed, -1, 0), author.unseen)
    return sum(c.ended for c in found) >= TRIED / 2


def write_batch(
    author: Author, writer: Writer, *, index: int, documents: int, length: int, seed: int
) -> Written:
    """One batch of documents or chats, the same whoever writes it.

    Args:
        index: which batch; decides with `seed` what is in it.
        length: most tokens of a document.
    """
    chats = author.layout is not None and index % PLAIN != PLAIN - 1
    rows: list[Row | None] = [None] * documents
    loops = unended = 0
    for again in range(AGAIN + 1):
        open_ = [i for i, row in enumerate(rows) if row is None]
        if not open_:
            break
        write = _chats if chats else _documents
        made = write(author, writer, len(open_), length, _seed(seed, index, again))
        for i, (row, loop) in zip(open_, made, strict=True):
            rows[i] = row
            loops += loop
            unended += row is None and not loop
    whole = [row for row in rows if row is not None]
    return Written(whole, loops, unended, documents - len(whole))


Made = tuple[Row | None, bool]  # the row; and where there is none, whether it ran in circles


def _documents(author: Author, writer: Writer, count: int, length: int, seed: int) -> list[Made]:
    never = (*author.special, *author.unseen)
    ends = {e.token for e in author.ends}
    found = writer.write(
        [[author.start]] * count, length - 1, author.ends, seed, [i for i in never if i not in ends]
    )
    loops = _loops(found)
    return [
        (None, loop) if loop or not c.text.strip() else
        (_document(author, _whole(c.text)), False)
        for c, loop in zip(found, loops, strict=True)
    ]  # fmt: skip


@dataclass
class _Talk:
    """A chat as it grows.

    Attributes:
        further: it shall have a second question.
        raw: the whole of it as text, where it holds tokens that messages cannot.
        open: the last turn has its end, so that another may follow.
        loop: a turn ran in circles.
    """

    messages: Messages
    further: bool
    raw: str | None = None
    open: bool = True
    loop: bool = False


def _document(author: Author, text: str) -> Row:
    """A plain row, with as many tokens as it is read as, and the end of text behind them."""
    return Row({"text": text}, len(encode(author.tokenizer, text)) + 1)


def _chats(author: Author, writer: Writer, count: int, length: int, seed: int) -> list[Made]:
    """Chats of one or two questions; those whose first question does not end are none."""
    layout, draw = author.layout, random.Random(seed)
    assert layout is not None
    talks = []
    for _ in range(count):
        system = [{"role": "system", "content": draw.choice(PROMPTS)}]
        given = layout.takes_system and draw.random() < SYSTEM
        talks.append(_Talk(system if given else [], draw.random() < FURTHER))
    for turn in range(4):
        going = [t for t in talks if t.open and (turn < 2 or t.further)]
        _turn(author, writer, going, turn % 2 == 0, length, seed + turn)
    return [_finished(author, talk, length) for talk in talks]


def _turn(
    author: Author, writer: Writer, talks: list[_Talk], asks: bool, length: int, seed: int
) -> None:
    """Add the user's or the model's turn to chats, as far as there is room; closes the others."""
    layout, tokenizer = author.layout, author.tokenizer
    assert layout is not None
    before = layout.before_user if asks else layout.before_answer
    texts = [before(t.messages) for t in talks]
    prompts = [encode(tokenizer, t) for t in texts]
    going = [i for i, p in enumerate(prompts) if len(p) <= length - 2]
    for talk in talks:
        talk.open = False
    if not going:
        return
    most = max(length - len(prompts[i]) for i in going)
    end = layout.user_end if asks else layout.answer_end
    found = writer.write(
        [prompts[i] for i in going],
        min(most, max(16, length // QUESTION)) if asks else most,
        _turn_ends(author, end), seed, author.unseen,
    )  # fmt: skip
    for i, c, loop in zip(going, found, _loops(found), strict=True):
        talk, content = talks[i], _whole(c.text).strip()
        special = bool(set(author.special) & set(c.ids))
        talk.loop |= loop
        if loop or not content or (asks and (special or not c.ended)):
            continue
        if special:  # as tokens that open a channel: kept as they stand
            talk.raw = texts[i] + _whole(c.text) + end.text
            continue
        talk.messages.append({"role": "user" if asks else "assistant", "content": content})
        talk.open = c.ended


def _finished(author: Author, talk: _Talk, length: int) -> Made:
    """A chat's row; none where it has no answer, or runs in circles."""
    assert author.layout is not None
    messages = talk.messages
    while messages and messages[-1]["role"] != "assistant" and talk.raw is None:
        messages.pop()
    if talk.loop or (not messages and talk.raw is None):
        return None, talk.loop
    text = talk.raw
    fields: dict[str, Any] = {"text": text}
    if text is None:
        text, fields = author.layout.whole(messages), {"messages": messages}
    return Row(fields, min(length, len(encode(author.tokenizer, text)))), False


def _turn_ends(author: Author, end: End) -> tuple[End, ...]:
    return (end, *(e for e in author.ends if e.token != end.token))


def _loops(found: Sequence[Continuation]) -> list[bool]:
    known = [c.entropy for c in found if c.entropy is not None]
    usual = median(known) if known else None
    return [is_loop(c.ids, c.entropy, usual) for c in found]


def _whole(text: str) -> str:
    """A text without the half character at which it was cut off."""
    return text.rstrip("\ufffd")


def _seed(seed: int, index: int, again: int) -> int:
    digest = hashlib.sha256(f"own text {seed} {index} {again}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
