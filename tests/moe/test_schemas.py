"""Every form of rows gives the ids that the chat template gives by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from places import MODEL
from transformers import AutoTokenizer

from moe_fair.moe.calibration_text import CalibrationSet, windows
from moe_fair.moe.rows import BadRow, Row, parse_row
from moe_fair.moe.schemas import SCHEMAS, Chat, mapped
from moe_fair.moe.text_sources import parse_sources

# in the manner of Qwen's and Hermes': tools in the system message, calls as JSON
TEMPLATE = (
    "{% if tools %}TOOLS{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}CALL{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


def say(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


TURN = [say("user", "why?"), say("assistant", "because")]
WITH = [say("system", "be brief"), *TURN]
BARE = {"name": "add", "description": "sums", "parameters": {"a": {"type": "int"}}}
TOOL = {
    "type": "function",
    "function": {**BARE, "parameters": {"type": "object", "properties": {"a": {"type": "int"}}}},
}
CALL = {"name": "add", "arguments": {"a": 1}}
CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": CALL}, {"type": "function", "function": CALL}],
}


def shared(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"from": role, "value": value, "weight": None} for role, value in turns]


# row, the messages by hand, the tools by hand
CHATS: list[tuple[dict[str, Any], list[dict[str, Any]], Any]] = [
    ({"messages": TURN}, TURN, None),
    ({"messages": json.dumps(TURN)}, TURN, None),
    ({"messages": [say("user", "a"), {**CALLS, "content": None}, say("tool", "2")],
      "tools": json.dumps([TOOL])},
     [say("user", "a"), {**CALLS, "content": None}, say("tool", "2")], [TOOL]),
    ({"messages": [say("user", "a"), {k: v for k, v in CALLS.items() if k != "content"}]},
     [say("user", "a"), {k: v for k, v in CALLS.items() if k != "content"}], None),
    ({"conversations": TURN}, TURN, None),
    ({"conversations": shared(("human", "why?"), ("gpt", "because"))}, TURN, None),
    ({"conversation": TURN, "language": "English"}, TURN, None),
    ({"conversations": shared(("system", "be brief"), ("user", "why?"), ("chatgpt", "because"))},
     WITH, None),
    ({"system": "be brief", "conversations": shared(("user", "why?"), ("assistant", "because"))},
     WITH, None),
    ({"conversations": json.dumps(shared(("human", "why?"), ("gpt", "because")))}, TURN, None),
    ({"conversations": shared(("human", "a"), ("function_call", json.dumps([CALL, CALL])),
                              ("observation", "2"), ("gpt", "two")), "tools": json.dumps([BARE])},
     [say("user", "a"), CALLS, say("tool", "2"), say("assistant", "two")], [TOOL]),
    ({"conversations": shared(("system", "<tools>[add]</tools>"), ("human", "a"), ("gpt", "b"),
                              ("tool", "c")), "tools": json.dumps([TOOL])},
     [say("system", "<tools>[add]</tools>"), say("user", "a"), say("assistant", "b"),
      say("tool", "c")], None),
    ({"query": "a", "answers": json.dumps([CALL, CALL]), "tools": json.dumps([BARE])},
     [say("user", "a"), CALLS], [TOOL]),
    ({"query": "a", "answers": [CALL, CALL], "tools": [TOOL]}, [say("user", "a"), CALLS], [TOOL]),
    ({"chosen": TURN, "rejected": [TURN[0], say("assistant", "no")]}, TURN, None),
    ({"prompt": "why?", "chosen": [TURN[1]], "rejected": [say("assistant", "no")]}, TURN, None),
    ({"prompt": [TURN[0]], "chosen": [TURN[1]], "rejected": [say("assistant", "no")]}, TURN, None),
    ({"system": "be brief", "question": "why?", "chosen": "because", "rejected": "no"}, WITH, None),
    ({"instruction": "why?", "input": "", "output": "because"}, TURN, None),
    ({"instruction": "why", "input": "is it?", "output": "because", "system": "be brief"},
     [WITH[0], say("user", "why\n\nis it?"), TURN[1]], None),
    ({"instruction": "why", "context": "is it?", "response": "because", "category": "qa"},
     [say("user", "why\n\nis it?"), TURN[1]], None),
    ({"prompt": [TURN[0]], "completion": [TURN[1]]}, TURN, None),
    ({"prompt": "why?", "response": "because"}, TURN, None),
    ({"question": "why?", "answer": "because"}, TURN, None),
    ({"system_prompt": "be brief", "question": "why?", "response": "because"}, WITH, None),
    ({"query": "why?", "response": "because"}, TURN, None),
    ({"problem": "why?", "solution": "because"}, TURN, None),
    ({"inputs": "why?", "targets": "because", "language": "English"}, TURN, None),
]  # fmt: skip
TEXTS: list[tuple[dict[str, Any], str]] = [
    ({"text": "a b c"}, "a b c"),
    ({"content": "a b c"}, "a b c"),
    ({"prompt": "[a] b", "completion": " c"}, "[a] b c"),
    ({"chosen": "\n\nHuman: a", "rejected": "b"}, "\n\nHuman: a"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(MODEL)
    found.chat_template = TEMPLATE
    return found


def read(file: Path, tokenizer: Any, row: Any, **fields: str) -> CalibrationSet:
    file.write_text(json.dumps(row) + "\n")
    return windows(parse_sources([str(file)], fields or None), tokenizer, samples=1, length=999)


@pytest.mark.parametrize(("row", "messages", "tools"), CHATS)
def test_rows_are_what_the_template_makes_of_them(
    tokenizer: Any, tmp_path: Path, row: dict[str, Any], messages: Any, tools: Any
) -> None:
    want = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    assert read(tmp_path / "x.jsonl", tokenizer, row).sequences == ((tuple(want), 0),)


@pytest.mark.parametrize(("row", "text"), TEXTS)
def test_rows_that_are_text(row: dict[str, Any], text: str) -> None:
    found = parse_row(row, "line 1")
    assert isinstance(found, Row)
    assert found.document == text


def test_every_schema_is_tried_above() -> None:
    rows = [r for r, *_ in CHATS] + [r for r, _ in TEXTS]
    seen = {next(s.name for s in SCHEMAS if all(n in r for n in s.needs)) for r in rows}
    assert seen == {s.name for s in SCHEMAS}


def test_the_same_through_parquet(tokenizer: Any, tmp_path: Path) -> None:
    """Where every row has every field of the table, most of them without a value."""
    rows = [
        {"conversations": shared(("human", "why?"), ("gpt", "because")), "tools": None},
        {"conversations": shared(("human", "a"), ("gpt", "b")), "tools": json.dumps([BARE])},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    found = windows(parse_sources([str(tmp_path / "x.parquet")]), tokenizer, samples=2, length=999)
    turns = [(TURN, None), ([say("user", "a"), say("assistant", "b")], [TOOL])]
    want = [
        tuple(tokenizer.apply_chat_template(m, tools=t, return_dict=True)["input_ids"])
        for m, t in turns
    ]
    assert [ids for ids, _ in found.sequences] == want


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruct": "a", "outputs": "b"}, "fields are instruct, outputs; nearest: instruction, "
         "output; say which is what: --map user=FIELD,assistant=FIELD"),
        ({"question": "a", "answer": {"x": 1}}, "\"answer\" is {'x': 1} and must be text"),
        ({"question": "a", "answer": None}, '"answer" has no value'),
        ({"zzzz": 1}, "its fields are zzzz; say which"),
        ({"conversations": [{"from": "humen", "value": "a"}]},
         "\"from\" is 'humen' (did you mean 'human'?)"),
        ({"conversations": [{"from": "human", "value": 5}]}, 'the "value" of a message is 5'),
        ({"query": "a", "answers": "yes", "tools": "[]"}, '"answers" is not JSON'),
        ({"query": "a", "answers": ["x"]}, "\"answers\" is ['x'] and must be calls"),
        ({"chosen": 5, "rejected": "b"}, '"chosen" is 5 and must be text or messages'),
        ({"messages": '[{"role": "user"}]'}, '"messages" must be a list of messages'),
        ({"messages": "[broken"}, '"messages" must be a list of messages'),
        ({"prompt": "a", "completion": "\udcff"}, "the text is not UTF-8"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why(row: dict[str, Any], said: str) -> None:
    found = parse_row(row, "line 1")
    assert isinstance(found, BadRow)
    assert said in found.why


def test_a_broken_field_does_not_hide_a_good_one() -> None:
    for row in (
        {"messages": "[broken", "text": "a"},
        {"conversations": "x", "text": "a"},
        {"query": "x", "answers": ["y"], "text": "a"},
    ):
        found = parse_row(row, "line 1")
        assert isinstance(found, Row)
        assert found.document == "a"


def test_how_rows_are_read_is_said(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    row = {"chosen": TURN, "rejected": TURN, "score": 1}
    assert read(file, tokenizer, row).notes == (
        f"{file}: of the answers of a row the chosen one is read",
        f"{file}: fields not used: score",
    )
    row = {"instruction": "a", "output": "b"}
    [note] = read(file, tokenizer, row).notes
    assert note.endswith("a chat of one turn: instruction and input asked, output answered")
    assert read(file, tokenizer, {"messages": TURN}).notes == ()


def test_without_a_template_questions_and_answers_are_text(tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(MODEL)
    own.chat_template = None
    row = {"instruction": "why " * 9, "input": "is it " * 9, "output": "because " * 9}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    found = windows(parse_sources([str(tmp_path / "x.jsonl")]), own, samples=1, length=8)
    text = f"{row['instruction']}\n\n{row['input']}\n\n{row['output']}"
    assert found.sequences[0][0] == tuple(own(text)["input_ids"][:8])
    assert any("written as plain text" in n for n in found.notes)
    with pytest.raises(ValueError, match="holds chats, but the tokenizer has no chat template"):
        read(tmp_path / "y.jsonl", own, {"messages": TURN})


def test_arguments_are_given_as_a_template_takes_them(tmp_path: Path) -> None:
    """DeepSeek's adds them to a text, GLM's goes through them."""
    own = AutoTokenizer.from_pretrained(MODEL)
    row = {"query": "a", "answers": [CALL]}
    texts = json.dumps(CALL["arguments"])
    calls = {
        **CALLS,
        "tool_calls": [{"type": "function", "function": {**CALL, "arguments": texts}}],
    }
    for template, messages, given in (
        ("{{ messages[-1].tool_calls[0].function.arguments + '!' }}", [calls], row),
        ("{% for k, v in messages[-1].tool_calls[0].function.arguments.items() %}{{ k }}={{ v }}"
         "{% endfor %}", [CALLS], {"messages": [say("user", "a"), calls]}),
    ):  # fmt: skip
        own.chat_template = template
        want = own.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert read(tmp_path / "x.jsonl", own, given).sequences == ((tuple(want), 0),)


def test_fields_that_are_mapped(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    row = {"q": "why?", "a": "because", "s": "be brief", "t": [BARE], "text": "no", "rest": 1}
    found = read(file, tokenizer, row, user="q", assistant="a", system="s", tools="t")
    want = tokenizer.apply_chat_template(WITH, tools=[TOOL], return_dict=True)["input_ids"]
    assert found.sequences == ((tuple(want), 0),)
    assert found.notes == (f"{file}: read by --map", f"{file}: fields not used: text, rest")
    found = read(file, tokenizer, {"log": json.dumps(WITH)}, messages="log")
    want = tokenizer.apply_chat_template(WITH, return_dict=True)["input_ids"]
    assert found.sequences == ((tuple(want), 0),)
    row = {"body": "a b c", "text": "no"}
    assert parse_row(row, "", schemas=(mapped({"text": "body"}), *SCHEMAS)) == Row(
        "", "a b c", None, ("text",), "read by --map"
    )
    # rows without the fields are read as ever, and that is said
    found = read(file, tokenizer, {"messages": TURN}, user="q", assistant="a")
    assert found.notes == ("no row has the fields of --map",)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"usr": "q", "assistant": "a"}, "'usr' (did you mean 'user'?)"),
        ({"user": "q"}, "give text, or messages, or user and assistant"),
        ({"text": "q", "system": "a"}, "give text, or messages"),
        ({"text": "q", "messages": "a"}, "give text, or messages"),
        ({}, "give text, or messages"),
    ],
)
def test_maps_that_say_no_document(fields: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match="--map") as e:
        mapped(fields)
    assert said in str(e.value)


def test_chats_that_are_cut_are_said(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"messages": [say("user", "why " * 50)]}))
    found = windows(parse_sources([str(file)]), tokenizer, samples=1, length=8)
    assert found.notes == (f"{file}: 1 chat cut to --length",)
    assert len(found.sequences[0][0]) == 8


def test_a_chat_as_plain_text() -> None:
    found = parse_row({"system": "s", "question": "q", "answer": "a"}, "")
    assert isinstance(found, Row)
    assert isinstance(found.document, Chat)
    assert found.document.text == "s\n\nq\n\na"
