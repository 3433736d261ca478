"""Text that a model writes itself: its own distribution, its template, the same bytes again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import MODEL
from processes import Python
from tiny import tiny_model
from transformers import AutoTokenizer, GenerationConfig

from moe_fair.cli import main
from moe_fair.moe.self_text import ROWS, Voice, Writer, goes_in_circles, turns, voice

# five ways of writing a chat, by the rules of those who publish them
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}\n\n"
    "{% elif m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}{% else %}"
    "{{ m['content'] }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:"
    "{% endif %}"
)
# -> before the first user's words, behind them, behind the answer
RULES = {
    CHATML: (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n!<|im_end|>\n", "<|im_end|>\n",
    ),
    LLAMA3: (
        "<s><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n!<|eot_id|>", "<|eot_id|>",
    ),
    MISTRAL: ("<s>[INST] ", " [/INST]!</s>", "</s>"),
    GEMMA: (
        "<s><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n!<end_of_turn>\n",
        "<end_of_turn>\n",
    ),
    DEEPSEEK: ("<s>User: ", "\n\nAssistant: !</s>", "</s>"),
}  # fmt: skip
IDS = ["chatml", "llama3", "mistral", "gemma", "deepseek"]
WITH_SYSTEM = (CHATML, LLAMA3, DEEPSEEK)


def tokenizer_with(template: str | None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    special = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_special_tokens({
        "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": special,
    })  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def model_for(tokenizer: Any) -> Any:
    torch.manual_seed(3)
    return tiny_model("qwen2_moe", vocab_size=len(tokenizer)).eval()


@pytest.mark.parametrize("template", RULES, ids=IDS)
def test_what_a_template_writes_around_messages(template: str) -> None:
    found = turns(tokenizer_with(template))
    assert found is not None
    before, behind, last = RULES[template]
    assert found.before[""] == before
    assert found.after_user == behind
    assert found.after_answer == last
    assert (len(found.before) > 1) == (template in WITH_SYSTEM)


def test_a_base_model_with_a_template_writes_documents() -> None:
    """It never ends a turn: of its sibling's template it has only the file."""
    tokenizer = tokenizer_with(CHATML)
    config = model_for(tokenizer).config
    assert voice(tokenizer, config).turns is None
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert voice(tokenizer, config, {"eos_token_id": [end]}).turns is not None
    assert voice(tokenizer_with(MISTRAL), config).turns is not None  # ends as documents do
    assert voice(tokenizer_with(None), config).turns is None


@pytest.mark.parametrize("template", RULES, ids=IDS)
def test_chats_are_those_that_the_template_takes(template: str) -> None:
    """Rows hold what the model wrote and nothing of the template, in turns that it accepts."""
    tokenizer = tokenizer_with(template)
    model = model_for(tokenizer)
    ends = [
        tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
    ]
    how = voice(tokenizer, model.config, {"eos_token_id": ends})
    writer = Writer(model, tokenizer, how, 48, 0)
    for number in (0, 4, 5):  # one turn, a system prompt, two turns
        made = writer.batch(number)
        assert made.rows
        assert len(made.rows) + made.replaced == ROWS
        for row in made.rows:
            roles = [m["role"] for m in row["messages"]]
            body = roles[1:] if roles[0] == "system" else roles
            assert body in (["user", "assistant"], ["user", "assistant"] * 2)
            assert len(
                tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
            )
            for m in row["messages"]:
                assert m["content"] == m["content"].strip() != ""
                assert not any(t in m["content"] for t in tokenizer.all_special_tokens)
    assert all("text" in row for row in writer.batch(3).rows)  # a share of documents


def test_it_is_the_models_own_distribution() -> None:
    """-log p of what was drawn is the entropy of what it was drawn from, but for chance; and what
    the maker would have cut off (top_k, a penalty) is not."""
    tokenizer = tokenizer_with(None)
    model = model_for(tokenizer)
    how = voice(tokenizer, model.config)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # far from uniform
    drawn: list[list[int]] = []
    writer = Writer(model, tokenizer, how, 24, 1)
    take = writer._continue
    writer._continue = lambda *a: drawn.extend(found := take(*a)) or found  # type: ignore
    plain = writer.batch(0)
    surprise, expected, variance = 0.0, 0.0, 0.0
    for ids in drawn:
        with torch.no_grad():
            logits = model(torch.tensor([[how.start, *ids]])).logits[0, :-1].double()
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        surprise -= float(logp.gather(1, torch.tensor(ids).unsqueeze(1)).sum())
        expected += float(entropy.sum())
        variance += float((logp.exp() * (logp + entropy.unsqueeze(1)).square()).sum())
    assert sum(map(len, drawn)) > 300
    assert abs(surprise - expected) < 4 * math.sqrt(variance)
    assert expected < 0.9 * math.log(len(tokenizer)) * sum(map(len, drawn))
    model.generation_config = GenerationConfig(top_k=1, repetition_penalty=5.0, temperature=0.1)
    assert Writer(model, tokenizer, how, 24, 1).batch(0) == plain
    assert model.generation_config.top_k == 1  # as it was


def test_a_batch_is_the_same_whoever_makes_it() -> None:
    tokenizer = tokenizer_with(None)
    model = model_for(tokenizer)
    how = Voice(tokenizer.bos_token_id, frozenset({tokenizer.eos_token_id}), None)
    first = Writer(model, tokenizer, how, 16, 0)
    made = [first.batch(n) for n in range(3)]
    torch.manual_seed(99)
    other = Writer(model, tokenizer, how, 16, 0)
    assert [other.batch(n) for n in (2, 0, 1)] == [made[2], made[0], made[1]]
    assert Writer(model, tokenizer, how, 16, 1).batch(0) != made[0]
    assert len({json.dumps(r) for b in made for r in b.rows}) > 2 * ROWS


def test_circles() -> None:
    assert goes_in_circles([1, 2, 3] * 30)
    assert not goes_in_circles([1, 2, 3] * 10)  # too short to tell
    assert not goes_in_circles(list(range(100)))
    assert not goes_in_circles([*range(60), *range(40)])
    assert goes_in_circles([*range(45), *[7] * 60])


def test_a_model_that_only_goes_in_circles_is_refused(tmp_path: Path) -> None:
    from moe_fair.moe.self_text import batches

    tokenizer = tokenizer_with(None)
    model = model_for(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1e4  # one token, or any where the state is negative
        for parameter in model.model.norm.parameters():
            parameter.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
    how = Voice(tokenizer.bos_token_id, frozenset({tokenizer.eos_token_id}), None)
    writer = Writer(model, tokenizer, how, 80, 0)
    with pytest.raises(ValueError, match="32 of 32 texts of the last batch are empty or go in"):
        list(batches(writer, 100))


SMALL = ["--tokens", "1500", "--length", "32"]


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is typed, and what it wrote calibrates; killed in between, the same bytes."""
    out = tmp_path / "self.jsonl"
    with pytest.raises(SystemExit, match="0"):
        main(["sample", str(MODEL), *SMALL, "-o", str(out), "--json"])
    said = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
    assert said["rows"] == len(rows)
    assert said["tokens"] >= 1500
    assert said["chats"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["self.jsonl"]
    killed = tmp_path / "killed.jsonl"
    child = Python(["-m", "moe_fair", "sample", MODEL, *SMALL, "-o", killed], tmp_path / "log")
    partial = killed.with_name("killed.jsonl.partial")
    while child.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") > 1):
        pass
    child.kill()
    child.wait()
    assert not killed.exists()
    with partial.open("a") as f:
        f.write('{"rows": [{"te')  # as where it is killed while it writes
    with pytest.raises(SystemExit, match="0"):
        main(["sample", str(MODEL), *SMALL, "-o", str(killed)])
    assert "going on: " in capsys.readouterr().err
    assert killed.read_bytes() == out.read_bytes()
    with pytest.raises(SystemExit, match="0"):
        main(["calibrate", str(MODEL), "-c", f"self={out}", "--samples", "8", "--length", "32",
              "-o", str(tmp_path / "stats")])  # fmt: skip
    assert "tokens of self" in capsys.readouterr().err


def test_refusals(tmp_path: Path, fails: Callable[..., str]) -> None:
    """Before any weight is read."""
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    assert "is there already" in fails("sample", MODEL, "-o", there)
    assert there.read_text() == "mine"
    assert "name it so" in fails("sample", MODEL, "-o", tmp_path / "text.txt")
    assert "make it first" in fails("sample", MODEL, "-o", tmp_path / "no" / "a.jsonl")
    new = tmp_path / "new.jsonl"
    assert "positions" in fails("sample", MODEL, "-o", new, "--length", 10**6)
    said = fails("sample", MODEL, "-o", new, "--set", "max_memory=1MB")
    assert "has to be in memory as a whole" in said
    assert [p.name for p in tmp_path.iterdir()] == ["there.jsonl"]
