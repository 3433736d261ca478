"""Text that a model writes by itself, to calibrate on what it knows without any data set.

A base model writes documents from its start-of-document token until it ends them. A chat model is
shown what its template puts in front of a user's words, writes the question itself, and answers it
(Magpie, arXiv 2406.08464); some chats go on for a second turn, some begin with a system prompt, and
a share of its text are plain documents. Drawn at temperature 1 with nothing cut off, so that the
text is the model's own distribution (self-calibration: arXiv 2410.17170).

Every batch has a seed of its own: a batch is the same whichever run makes it.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_fair.core.quote import clip

ROWS = 32  # documents of a batch
PLAIN = 4  # of a chat model every so manieth batch is of plain documents
SECOND = 3  # every so manieth batch of chats has a second turn
SYSTEM = 4  # every so manieth batch of chats begins with one of these
PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful programmer. Answer with code where it helps.",
    "Answer briefly and precisely.",
    "You are a patient teacher who explains step by step.",
)
MARK = "\u2042mark\u2042"  # stands for a message's content while a template is looked at
GRAM, LOOPS = 4, 0.5  # a text whose 4-grams are repeats by more than half goes in circles
SHORTEST = 48  # tokens; a shorter text is no evidence of a circle


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around messages.

    Attributes:
        before: the first user's content, by system prompt ("": none).
        after_user, after_answer: directly behind their content.
    """

    before: dict[str, str]
    after_user: str
    after_answer: str


@dataclass(frozen=True)
class Voice:
    """How a model is made to write.

    Attributes:
        start: the token that documents begin with.
        ends: tokens with which it ends what it writes.
        turns: of a chat model; None: it writes documents.
    """

    start: int
    ends: frozenset[int]
    turns: Turns | None


@dataclass
class Batch:
    """What one batch brought.

    Attributes:
        rows: of a JSONL file: `{"text": ...}` or `{"messages": [...]}`.
        tokens: that the model wrote in them.
        replaced: texts that were left out because they go in circles or are empty.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    replaced: int = 0


def start_token(tokenizer: Any, config: Any) -> int:
    """The token that documents begin with, or what stands between them.

    Raises:
        ValueError: the model has none.
    """
    text = config.get_text_config()
    ends = [tokenizer.eos_token_id, getattr(text, "eos_token_id", None)]
    for given in (tokenizer.bos_token_id, getattr(text, "bos_token_id", None), *ends):
        for token in given if isinstance(given, list) else [given]:
            if token is not None:
                return int(token)
    raise ValueError(
        "the model names neither a start nor an end of documents to sample from: its tokenizer has "
        "no bos_token and no eos_token"
    )


def voice(tokenizer: Any, config: Any, generation: Any = None) -> Voice:
    """How this model writes: chats where it was trained to end an answer as its template does.

    Base models often come with the template of their chat sibling and never end a turn.

    Args:
        config: the model's.
        generation: what its generation_config.json says, where there is one: chat models name the
            end of a turn there.

    Raises:
        ValueError: no token to begin with, or a template that does not write what it is given.
    """
    ends: set[int] = set()
    for given in (
        tokenizer.eos_token_id,
        getattr(config.get_text_config(), "eos_token_id", None),
        (generation or {}).get("eos_token_id"),
    ):
        ends.update(given if isinstance(given, list) else [] if given is None else [given])
    found = turns(tokenizer)
    if found is not None and found.after_answer.strip():
        stop = stops(tokenizer, found.after_answer)
        found = found if stop & ends else None
    return Voice(start_token(tokenizer, config), frozenset(ends), found)


def stops(tokenizer: Any, after: str) -> set[int]:
    """The special token that a template writes directly behind a message, if it is one."""
    ids = tokenizer(after.strip(), add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return {ids[0]} & special if ids else set()


def turns(tokenizer: Any) -> Turns | None:
    """What the chat template writes around a user's and an assistant's words; None without one.

    Raises:
        ValueError: a template that does not write what it is given.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    first = {"role": "user", "content": MARK}
    answer = {"role": "assistant", "content": MARK}
    before = {"": _split(tokenizer, [first])[0]}
    for prompt in PROMPTS:
        try:
            before[prompt] = _split(tokenizer, [{"role": "system", "content": prompt}, first])[0]
        except ValueError:  # a template without system prompts
            break
    question = {"role": "user", "content": "?"}
    return Turns(
        before, _split(tokenizer, [first, {"role": "assistant", "content": "!"}])[1],
        _split(tokenizer, [question, answer])[1],
    )  # fmt: skip


def _split(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, str]:
    """What a template writes before and behind the mark."""
    try:
        shown = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as e:  # a program of the model's maker, which raises what it likes
        raise ValueError(f"the chat template fails: {clip(str(e), 200)}") from e
    before, mark, after = shown.partition(MARK)
    if not mark:
        raise ValueError("the chat template leaves out what a message says")
    return before, after


class Writer:
    """Samples text from a model in memory.

    Args:
        model: that `generate`s.
        tokenizer: the model's.
        voice: how it is made to write.
        length: the most tokens of a text.
        seed: decides all that is drawn.
    """

    def __init__(self, model: Any, tokenizer: Any, voice: Voice, length: int, seed: int) -> None:
        self.model, self.tokenizer, self.length, self.seed = model, tokenizer, length, seed
        self.start, self.ends, self.turns = voice.start, voice.ends, voice.turns

    def batch(self, number: int) -> Batch:
        """The batch of this number: the same for the same model, length and seed."""
        device = next(self.model.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(random.Random(f"{self.seed} {number}").getrandbits(63))
            if self.turns is None or number % PLAIN == PLAIN - 1:
                return self._documents()
            return self._chats(number - number // PLAIN)

    def _documents(self) -> Batch:
        found = Batch()
        for ids in self._continue([[self.start]] * ROWS, self.ends, self.length - 1):
            self._take(found, ids, {"text": self.tokenizer.decode(ids)})
        return found

    def _chats(self, number: int) -> Batch:
        assert self.turns is not None
        system = PROMPTS[number // SYSTEM % len(PROMPTS)] if number % SYSTEM == SYSTEM - 1 else ""
        system = system if system in self.turns.before else ""
        given = [{"role": "system", "content": system}] if system else []
        chats: list[list[dict[str, str]]] = [list(given) for _ in range(ROWS)]
        written: list[list[int]] = [[] for _ in range(ROWS)]
        open_ = list(range(ROWS))
        for turn in range(2 if number % SECOND == SECOND - 1 else 1):
            for role in ("user", "assistant"):
                prompts = [self._prompt(chats[i], system, role, turn) for i in open_]
                room = [self.length - len(p) for p in prompts]
                open_ = [i for i, r in zip(open_, room, strict=True) if r > 1]
                prompts = [p for p, r in zip(prompts, room, strict=True) if r > 1]
                if not open_:
                    break
                after = self.turns.after_user if role == "user" else self.turns.after_answer
                most = min(r for r in room if r > 1) if role == "assistant" else self.length // 4
                ends = self.ends | stops(self.tokenizer, after)
                texts = self._continue(prompts, ends, max(1, min(most, self.length)))
                said = []
                for i, ids in zip(open_, texts, strict=True):
                    content = self._content(ids, after)
                    if content:
                        written[i] += ids
                        chats[i].append({"role": role, "content": content})
                        said.append(i)
                open_ = said
        found = Batch()
        for chat, ids in zip(chats, written, strict=True):
            while chat and chat[-1]["role"] != "assistant":
                chat.pop()  # a question without an answer
            self._take(found, ids if chat else [], {"messages": chat})
        return found

    def _prompt(
        self, chat: Sequence[dict[str, str]], system: str, role: str, turn: int
    ) -> list[int]:
        """The ids behind which the model writes what this role says next."""
        assert self.turns is not None
        if role == "assistant":
            shown = self.tokenizer.apply_chat_template(
                list(chat), tokenize=False, add_generation_prompt=True
            )
        elif turn == 0:
            shown = self.turns.before[system]
        else:
            shown = _split(self.tokenizer, [*chat, {"role": "user", "content": MARK}])[0]
        return list(self.tokenizer(shown, add_special_tokens=False)["input_ids"])

    def _content(self, ids: Sequence[int], after: str) -> str:
        """A message's words: as far as the template's own begin."""
        shown = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        end = after.strip()
        return (shown.split(end)[0] if end else shown).strip()

    def _take(self, found: Batch, ids: Sequence[int], row: dict[str, Any]) -> None:
        if not ids or goes_in_circles(ids):
            found.replaced += 1
            return
        found.rows.append(row)
        found.tokens += len(ids)

    def _continue(
        self, prompts: Sequence[Sequence[int]], ends: Collection[int], most: int
    ) -> list[list[int]]:
        """What the model writes behind each, without the token that ended it."""
        from transformers import GenerationConfig

        device = next(self.model.parameters()).device
        width = max(map(len, prompts))
        pad = self.start
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for i, p in enumerate(prompts):
            ids[i, width - len(p) :] = torch.tensor(p)
            mask[i, width - len(p) :] = 1
        usual = self.model.generation_config
        # the maker's own settings (top_k, repetition_penalty, ...) would fill what is not said
        self.model.generation_config = GenerationConfig()
        try:
            made = self.model.generate(
                ids.to(device), attention_mask=mask.to(device),
                generation_config=GenerationConfig(
                    do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=most,
                    eos_token_id=sorted(ends) or None, pad_token_id=pad, use_cache=True,
                ),
            )  # fmt: skip
        finally:
            self.model.generation_config = usual
        texts = []
        for row in made[:, width:].tolist():
            end = next((i for i, t in enumerate(row) if t in ends), len(row))
            texts.append(row[:end])
        return texts


def goes_in_circles(ids: Sequence[int]) -> bool:
    """More than half of a text's 4-grams have been there before."""
    if len(ids) < SHORTEST:
        return False
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) > LOOPS


def batches(writer: Writer, tokens: int, first: int = 0) -> Iterator[tuple[int, Batch]]:
    """Batches from a number on, until there are so many tokens.

    Raises:
        ValueError: nothing that can be used comes of four batches in a row.
    """
    number, got, empty = first, 0, 0
    while got < tokens:
        made = writer.batch(number)
        yield number, made
        got, number = got + made.tokens, number + 1
        empty = 0 if made.rows else empty + 1
        if empty == 4:
            raise ValueError(
                f"nothing that the model writes can be used: {made.replaced} of {ROWS} texts of "
                "the last batch are empty or go in circles; calibrate on text instead (-c FILE)"
            )
