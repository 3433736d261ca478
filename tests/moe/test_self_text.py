"""Text that a model samples itself: from its whole distribution, by seed, without loops."""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from typing import Any

import pytest
import torch
from places import CALIBRATION, MODEL
from tiny import tiny_model

from moe_fair.moe.chat_layout import End
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.self_text import AGAIN, Author, find_author, write_batch
from moe_fair.moe.text_loops import is_loop, repeats
from moe_fair.moe.text_writers import Continuation, ModelWriter


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return Checkpoint(str(MODEL))


@pytest.fixture(scope="module")
def author(source: Checkpoint) -> Author:
    said = json.loads((MODEL / "generation_config.json").read_text())
    return find_author(source.tokenizer(), source.config, said)


@pytest.fixture(scope="module")
def writer(source: Checkpoint, author: Author) -> ModelWriter:
    return ModelWriter(source.load("float32", "cpu"), author.tokenizer)


def test_where_a_document_starts(author: Author) -> None:
    assert (author.start, author.ends) == (0, (End("<|endoftext|>", 0),))
    assert author.start_name == "bos_token_id of generation_config.json (<|endoftext|>)"


@pytest.mark.slow
def test_the_texts_follow_the_seed_alone(author: Author, writer: ModelWriter) -> None:
    """Not what was drawn before, and nothing that is drawn afterwards follows from it."""
    torch.manual_seed(1)
    one = write_batch(author, writer, index=0, documents=3, length=24, seed=0)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)
    assert write_batch(author, writer, index=0, documents=3, length=24, seed=0) == one
    assert write_batch(author, writer, index=1, documents=3, length=24, seed=0) != one
    assert write_batch(author, writer, index=0, documents=3, length=24, seed=1) != one


def test_saved_text_is_read_nearly_as_it_was_drawn(author: Author, writer: ModelWriter) -> None:
    found = writer.write([[author.start]] * 6, 64, author.ends, 0, ())
    same = total = 0
    for c in found:
        again = author.tokenizer(c.text, add_special_tokens=False)["input_ids"]
        blocks = SequenceMatcher(None, c.ids, again, autojunk=False).get_matching_blocks()
        same += sum(b.size for b in blocks)
        total += len(c.ids)
    assert same / total > 0.95


def test_loops_are_told_from_texts(author: Author) -> None:
    assert repeats([1, 2, 3, 4] * 20) > 0.9
    assert is_loop([1, 2, 3, 4] * 20)
    assert is_loop([*range(100), *([7] * 60)], entropy=0.1, usual=3.0)
    assert not is_loop([*range(100), *([7] * 60)], entropy=2.5, usual=3.0)
    assert not is_loop([7] * 20)  # too short to say
    wrong = total = 0
    for file in sorted(CALIBRATION.glob("*.jsonl")):
        for line in file.read_text().splitlines()[:40]:
            ids = author.tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
            wrong += is_loop(ids[:256])
            total += 1
    assert wrong <= 0.03 * total


class Recorded:
    """A random model that writes no more than a few tokens, so that it repeats itself."""

    def __init__(self, tokens: int) -> None:
        source = Checkpoint(str(MODEL))
        tokenizer = source.tokenizer()
        model: Any = tiny_model(
            "qwen2_moe", vocab_size=len(tokenizer), num_hidden_layers=1, hidden_size=16
        )
        head = torch.nn.Linear(16, len(tokenizer))
        head.weight.data[:] = 0
        head.bias.data[:] = -30.0
        head.bias.data[1000 : 1000 + tokens] = 0
        model.set_output_embeddings(head)
        self.author = find_author(tokenizer, model.config, {"bos_token_id": 0, "eos_token_id": 0})
        self.writer, self.found = ModelWriter(model, tokenizer), list[Continuation]()

    def write(self, *arguments: Any) -> list[Continuation]:
        made = self.writer.write(*arguments)
        self.found += made
        return made


@pytest.mark.slow
def test_what_only_runs_in_circles_is_left_out() -> None:
    two = Recorded(2)
    made = write_batch(two.author, two, index=0, documents=4, length=160, seed=0)
    assert (made.rows, made.missing) == ([], 4)
    assert made.loops == 4 * (AGAIN + 1) == len(two.found)


@pytest.mark.slow
@pytest.mark.nightly
def test_loops_are_written_anew() -> None:
    """Of a model's texts that repeat themselves half of the time."""
    three = Recorded(3)
    made = write_batch(three.author, three, index=0, documents=24, length=192, seed=0)
    loops = [c for c in three.found if is_loop(c.ids)]
    assert 0 < len(loops) < len(three.found)
    assert made.loops == len(loops)
    kept = {c.text for c in three.found if not is_loop(c.ids)}
    assert [r.fields["text"] for r in made.rows if r.fields["text"] not in kept] == []
    assert len(made.rows) + made.missing == 24 < len(three.found)


@pytest.mark.slow
def test_a_device_that_is_full_is_given_half(
    author: Author, writer: ModelWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch says it; the texts are as many."""
    stock, sizes = writer.model.generate, []

    def generate(ids: Any, **more: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(ids, **more)

    monkeypatch.setattr(writer.model, "generate", generate)
    found = writer.write([[0]] * 5, 8, author.ends, 0, ())
    assert sizes == [5, 2, 3, 1, 2]
    assert len({c.ids for c in found}) == 5
