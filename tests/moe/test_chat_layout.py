"""Chat templates of six forms, and chats that a model writes through them.

The templates follow the rules of real ones; what each should give is written out by hand here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_fair.moe.chat_layout import End, find_layout
from moe_fair.moe.self_text import Row, find_author, write_batch, writes_chats
from moe_fair.moe.text_writers import Continuation, ModelWriter

pytestmark = pytest.mark.slow  # whole runs, by and large

Messages = list[dict[str, str]]
CHARACTERS = sorted(set("abcdefghijklmnopqrstuvwxyzYAESIMQ012 \n.,:[]/<>"))


def chatml(messages: Messages) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def llama_2(messages: Messages) -> str:
    system, rest = _system(messages)
    system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    text = ""
    for m in rest:
        if m["role"] == "user":
            text += f"<s>[INST] {system}{m['content']} [/INST]"
            system = ""
        else:
            text += f" {m['content']} </s>"
    return text


def llama_3(messages: Messages) -> str:
    head = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    return "<s>" + "".join(head.format(m["role"], m["content"]) for m in messages)


def mistral(messages: Messages) -> str:
    system, rest = _system(messages)
    text, last = "<s>", [i for i, m in enumerate(rest) if m["role"] == "user"][-1]
    for i, m in enumerate(rest):
        before = f"{system}\n\n" if system and i == last else ""
        user = m["role"] == "user"
        text += f"[INST]{before}{m['content']}[/INST]" if user else f"{m['content']}</s>"
    return text


def gemma(messages: Messages) -> str:
    names = {"user": "user", "assistant": "model"}
    turn = "<start_of_turn>{}\n{}<end_of_turn>\n"
    return "<s>" + "".join(turn.format(names[m["role"]], m["content"].strip()) for m in messages)


def deepseek(messages: Messages) -> str:
    system, rest = _system(messages)
    text = f"<s>{system}"
    for m in rest:
        user = m["role"] == "user"
        text += f"<|User|>{m['content']}" if user else f"<|Assistant|>{m['content']}</s>"
    return text


def _system(messages: Messages) -> tuple[str, Messages]:
    given = messages[0]["role"] == "system"
    return (messages[0]["content"], messages[1:]) if given else ("", messages)


@dataclass(frozen=True)
class Form:
    """A template, what it should give, and its tokens.

    Attributes:
        opens: what stands before the first question, and before its answer.
    """

    template: str
    by_hand: Callable[[Messages], str]
    special: tuple[str, ...]
    user_end: str
    answer_end: str
    opens: tuple[str, str]
    takes_system: bool = True


SPLIT = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
    "{% endif %}"
)
FORMS = {
    "chatml": Form(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        chatml, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>",
        ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ),
    "llama-2": Form(
        SPLIT + "{% for m in rest %}{% if m['role'] == 'user' %}<s>[INST] "
        "{% if loop.index0 == 0 and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
        "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}",
        llama_2, (), "[/INST]", "</s>", ("<s>[INST] ", " [/INST]"),
    ),
    "llama-3": Form(
        "<s>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        llama_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>", "<|eot_id|>",
        ("<s><|start_header_id|>user<|end_header_id|>\n\n",
         "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    ),
    "mistral": Form(
        SPLIT + "<s>{% set users = rest | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}[INST]{% if system and m == users[-1] %}"
        "{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}</s>"
        "{% endif %}{% endfor %}",
        mistral, ("[INST]", "[/INST]"), "[/INST]", "</s>", ("<s>[INST]", "[/INST]"),
    ),
    "gemma": Form(
        "<s>{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n"
        "{% endif %}",
        gemma, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "<end_of_turn>",
        ("<s><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"), takes_system=False,
    ),
    "deepseek": Form(
        SPLIT + "<s>{{ system }}{% for m in rest %}{% if m['role'] == 'user' %}<|User|>"
        "{{ m['content'] }}{% else %}<|Assistant|>{{ m['content'] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}",
        deepseek, ("<|User|>", "<|Assistant|>"), "<|Assistant|>", "</s>",
        ("<s><|User|>", "<|Assistant|>"),
    ),
}  # fmt: skip


def character_tokenizer(form: Form) -> Any:
    """A token a character, beside the template's own."""
    vocabulary = {c: i for i, c in enumerate(["<unk>", *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(form.special), chat_template=form.template,
    )  # fmt: skip


class Recorded:
    """A writer whose continuations are kept."""

    def __init__(self, writer: ModelWriter) -> None:
        self.writer, self.found = writer, list[Continuation]()

    def write(self, *arguments: Any) -> list[Continuation]:
        made = self.writer.write(*arguments)
        self.found += made
        return made


def chat_model(form: Form, ends: float = 1.0) -> tuple[Any, Any]:
    """A random model that writes characters, and its tokenizer.

    Args:
        ends: added to the logits of what ends a turn; other special tokens are not written.
    """
    tokenizer = character_tokenizer(form)
    model = tiny_model(
        "qwen2_moe", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
        max_position_embeddings=1024,
    )  # fmt: skip
    head = torch.nn.Linear(16, len(tokenizer))
    head.weight.data = model.get_output_embeddings().weight.data
    head.bias.data[:] = 0
    head.bias.data[list(tokenizer.added_tokens_decoder)] = -30.0
    wanted = {form.answer_end} | {form.user_end} & {*form.special, "</s>"}
    head.bias.data[tokenizer.convert_tokens_to_ids(sorted(wanted))] = ends
    model.set_output_embeddings(head)
    return model, tokenizer


def rows_of(
    name: str, documents: int, length: int
) -> tuple[Any, list[Row], Sequence[Continuation]]:
    form = FORMS[name]
    model, tokenizer = chat_model(form)
    end = tokenizer.convert_tokens_to_ids(form.answer_end)
    author = find_author(tokenizer, model.config, {"eos_token_id": [end]})
    assert author.layout is not None, author.why
    writer = Recorded(ModelWriter(model, tokenizer))
    made = write_batch(author, writer, index=0, documents=documents, length=length, seed=3)
    return tokenizer, made.rows, writer.found


@pytest.mark.parametrize("name", FORMS)
def test_what_a_template_puts_around_turns(name: str) -> None:
    form = FORMS[name]
    tokenizer = character_tokenizer(form)
    layout = find_layout(tokenizer)
    assert layout is not None
    ids = {t.content: i for i, t in tokenizer.added_tokens_decoder.items()}
    assert layout.user_end == End(form.user_end, ids.get(form.user_end))
    assert layout.answer_end == End(form.answer_end, ids[form.answer_end])
    assert layout.takes_system is form.takes_system
    assert layout.before_user([]) == form.opens[0]
    asked = [{"role": "user", "content": "why"}]
    assert layout.before_answer(asked) == f"{form.opens[0]}why{form.opens[1]}"
    talk = [*asked, {"role": "assistant", "content": "so"}, {"role": "user", "content": "oh"}]
    assert layout.before_user(talk[:2]) == form.by_hand(talk).rpartition("oh")[0]


@pytest.mark.parametrize("name", FORMS)
def test_chats_written_through_it(name: str) -> None:
    """What is saved is rendered as by hand, its turns alternate, and its ids are those drawn."""
    form = FORMS[name]
    tokenizer, rows, found = rows_of(name, 24, 400)
    chats = [r.fields["messages"] for r in rows if "messages" in r.fields]
    assert len(chats) >= 4
    assert any(len([m for m in c if m["role"] == "user"]) == 2 for c in chats)
    assert any(c[0]["role"] == "system" for c in chats) is form.takes_system
    drawn = {tuple(tokenizer.encode(c.text.strip(), add_special_tokens=False)) for c in found}
    for chat in chats:
        turns = [m for m in chat if m["role"] != "system"]
        roles = ["user", "assistant"] * (len(turns) // 2)
        assert [m["role"] for m in turns] == roles
        text = form.by_hand(chat)
        encoded = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)
        assert encoded["input_ids"] == tokenizer.encode(text, add_special_tokens=False)
        for m in turns:
            assert tuple(tokenizer.encode(m["content"], add_special_tokens=False)) in drawn
            assert not any(s in m["content"] for s in form.special)


def test_texts_are_read_as_the_ids_that_were_drawn() -> None:
    tokenizer, _, found = rows_of("chatml", 8, 300)
    assert len(found) > 8
    for c in found:
        assert tokenizer.encode(c.text, add_special_tokens=False) == list(c.ids)


def test_a_quarter_of_the_batches_are_plain_documents() -> None:
    model, tokenizer = chat_model(FORMS["chatml"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    author = find_author(tokenizer, model.config, {"eos_token_id": end})
    writer = ModelWriter(model, tokenizer)
    kinds = []
    for index in range(8):
        made = write_batch(author, writer, index=index, documents=2, length=200, seed=0)
        kinds.append({"text" in r.fields for r in made.rows})
        for row in made.rows:
            assert "<|im_start|>" not in row.fields.get("text", "")
    assert [i for i, kind in enumerate(kinds) if kind == {True}] == [3, 7]


def test_a_base_model_with_a_template() -> None:
    """It is told by its files, or by what it writes."""
    model, tokenizer = chat_model(FORMS["chatml"])
    base = find_author(tokenizer, model.config, {"eos_token_id": tokenizer.eos_token_id})
    assert base.layout is None
    assert base.why == "it does not end its answers with <|im_end|>, as its template does"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    author = find_author(tokenizer, model.config, {"eos_token_id": end})
    writer = ModelWriter(model, tokenizer)
    assert writes_chats(author, writer, 1000, 0)
    endless, _ = chat_model(FORMS["chatml"], ends=-30.0)
    assert not writes_chats(author, ModelWriter(endless, tokenizer), 400, 0)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("{{ messages[0]['content'] }}", "does not render"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "nothing between"),
    ],
)
def test_a_template_that_is_none(template: str, said: str) -> None:
    tokenizer = character_tokenizer(FORMS["chatml"])
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=said):
        find_layout(tokenizer)
    model, _ = chat_model(FORMS["chatml"])
    author = find_author(tokenizer, model.config, {})
    assert author.layout is None
    assert said in author.why
