"""Calibration text by name: what the package has, and what of it is read from a (loopback) Hub."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from places import MODEL, ROOT
from processes import python
from publish.hub import Hub, serving
from transformers import AutoTokenizer

from moe_fair.moe.calibration_text import sample
from moe_fair.moe.left_out import LeftOut
from moe_fair.moe.presets import is_preset, preset, presets
from moe_fair.moe.text_sources import Source, expand, parse_source

NAMES = ["chat", "code", "general", "math", "multilingual", "tools"]
ROWS = 1100  # of a shard: more than are read before the first is drawn


def test_the_presets() -> None:
    assert sorted(presets()) == NAMES
    for name in NAMES:
        for found in preset(name):
            assert len(found.revision) == 40
            assert "/" in found.id
    assert not is_preset("chats")
    assert not is_preset("../chat")


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("chat", Source("chat")),
        ("chat:2", Source("chat", None, 2.0)),
        ("talk=chat:.5", Source("chat", "talk", 0.5)),
        ("chats:2", Source("chats", config="2")),
    ],
)
def test_how_a_preset_is_written(
    spec: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_source(spec) == source
    with pytest.raises(ValueError, match="the weight 'two' is not a number"):
        parse_source("chat:two")


def test_the_sets_of_a_preset_share_its_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    left: dict[str, LeftOut] = {}
    found = expand([parse_source("math:2"), parse_source("x=code")], left)
    assert [(s.where, s.config, s.domain, s.weight) for s in found] == [
        ("AI-MO/NuminaMath-CoT", None, "math", 1.5), ("openai/gsm8k", "main", "math", 0.5),
        ("theblackcat102/evol-codealpaca-v1", None, "x", 0.5),
        ("ise-uiuc/Magicoder-OSS-Instruct-75K", None, "x", 0.5),
    ]  # fmt: skip
    assert left["math"].notes("math") == [
        "math: AI-MO/NuminaMath-CoT@train of 8d207465bffa (apache-2.0)",
        "math: openai/gsm8k:main@train of e53f048856ff (mit)",
    ]


def test_what_lies_here_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("code").mkdir()
    Path("code/mine.jsonl").write_text(json.dumps({"text": "one two " * 50}))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found = sample([parse_source("code:2")], tokenizer, samples=2, length=8, seed=0)
    assert found.domains == ("mine",)
    assert found.notes == ("code: what lies here under this name is read, not the preset",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "instruction/outputs"}, "did you mean 'instruction/output'"),
        ({"share": 0}, "must be above 0"),
        ({"share": True}, "share is True"),
        ({"revision": 12}, "revision is 12"),
        ({"more": 1}, "must have id"),
    ],
)
def test_a_preset_that_is_none(
    change: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = yaml.safe_load(presets()["chat"].read_text())
    raw["sets"][0] |= change
    (tmp_path / "chat.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setattr("moe_fair.moe.presets.presets", lambda: {"chat": tmp_path / "chat.yaml"})
    with pytest.raises(ValueError, match=str(tmp_path)) as e:
        preset("chat")
    assert said in str(e.value)


# stand-ins with the columns, files and configs that the real sets have at these commits


def ask(n: int) -> str:
    return f"question {n}"


def answer(n: int) -> str:
    return f"answer {n} " * 5


def turns(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": ask(n)}, {"role": "assistant", "content": answer(n)}]


def called(n: int) -> list[dict[str, Any]]:
    return [{"name": "add", "arguments": {"a": n}}]


TOOL = {"name": "add", "description": "sums", "parameters": {"a": {"type": "int"}}}
HERMES = {"type": "function", "function": TOOL}


def row(name: str, n: int) -> dict[str, Any]:
    """A row as it lies in the set."""
    q, a = ask(n), answer(n)
    rows: dict[str, dict[str, Any]] = {
        "HuggingFaceH4/ultrachat_200k": {"prompt": q, "prompt_id": f"{n}", "messages": turns(n)},
        "theblackcat102/evol-codealpaca-v1": {"instruction": q, "output": a},
        "ise-uiuc/Magicoder-OSS-Instruct-75K": {
            "lang": "python", "raw_index": n, "index": n, "seed": "x", "openai_fingerprint": "fp",
            "problem": q, "solution": a,
        },
        "AI-MO/NuminaMath-CoT": {
            "source": "olympiads", "problem": q, "solution": a, "messages": turns(n)
        },
        "openai/gsm8k": {"question": q, "answer": a},
        "argilla/Synth-APIGen-v0.1": {
            "func_name": "add", "func_desc": "sums", "tools": json.dumps([TOOL]), "query": q,
            "answers": json.dumps(called(n)), "model_name": "m", "hash_id": f"{n}",
        },
        "NousResearch/hermes-function-calling-v1": {
            "id": f"{n}", "category": "c", "subcategory": "s", "task": "t",
            "tools": json.dumps([HERMES]),
            "conversations": [
                {"from": "system", "value": "tools: <tools> [add] </tools>"},
                {"from": "human", "value": q}, {"from": "gpt", "value": "<tool_call> add"},
                {"from": "tool", "value": f"{n}"}, {"from": "gpt", "value": a},
            ],
        },
        "CohereLabs/aya_dataset": {
            "inputs": q, "targets": a, "language": "German", "language_code": "deu",
            "annotation_type": "original-annotations", "user_id": "u",
        },
        "wikimedia/wikipedia": {"id": f"{n}", "url": "u", "title": "t", "text": f"article {a}"},
        "HuggingFaceFW/fineweb-edu": {
            "text": f"page {a}", "id": f"{n}", "dump": "d", "url": "u", "file_path": "f",
            "language": "en", "language_score": 0.9, "token_count": 9, "score": 3.0, "int_score": 3,
        },
    }  # fmt: skip
    return rows[name]


def by_hand(name: str, n: int) -> tuple[list[dict[str, Any]], Any]:
    """The messages and tools that the row is."""
    tool = {**TOOL, "parameters": {"type": "object", "properties": TOOL["parameters"]}}
    if name.startswith("argilla"):
        call = [{"type": "function", "function": c} for c in called(n)]
        made = {"role": "assistant", "content": "", "tool_calls": call}
        return [turns(n)[0], made], [{"type": "function", "function": tool}]
    if name.startswith("Nous"):
        names = {"human": "user", "gpt": "assistant"}
        found = row(name, n)["conversations"]
        return [
            {"role": names.get(t["from"], t["from"]), "content": t["value"]} for t in found
        ], None
    return turns(n), None


# id -> (suffix, config -> split -> where its files lie)
LAYOUTS: dict[str, tuple[str, dict[str, dict[str, str]]]] = {
    "HuggingFaceH4/ultrachat_200k": (
        "parquet", {"default": {s: f"data/{s}-" for s in ("train_sft", "test_sft", "train_gen")}}
    ),
    "theblackcat102/evol-codealpaca-v1": ("jsonl", {}),
    "ise-uiuc/Magicoder-OSS-Instruct-75K": ("jsonl", {}),
    "AI-MO/NuminaMath-CoT": (
        "parquet", {"default": {s: f"data/{s}-" for s in ("train", "test")}}
    ),
    "openai/gsm8k": (
        "parquet", {c: {s: f"{c}/{s}-" for s in ("train", "test")} for c in ("main", "socratic")}
    ),
    "argilla/Synth-APIGen-v0.1": ("parquet", {"default": {"train": "data/train-"}}),
    "NousResearch/hermes-function-calling-v1": (
        "json",
        {c: {"train": f"{c.replace('_', '-')}"} for c in ("func_calling_singleturn",
                                                          "func_calling")},
    ),
    "CohereLabs/aya_dataset": (
        "parquet", {"default": {s: f"data/{s}-" for s in ("train", "test")}}
    ),
    "wikimedia/wikipedia": (
        "parquet",
        {f"20231101.{x}": {"train": f"20231101.{x}/train-"} for x in
         ("ar", "de", "en", "es", "fr", "hi", "ja", "ru", "zh")},
    ),
    "HuggingFaceFW/fineweb-edu": (
        "parquet", {"default": {"train": "data/x/"}, "sample-10BT": {"train": "sample/10BT/"}}
    ),
}  # fmt: skip


def stand_in(name: str) -> dict[str, bytes]:
    """The files of a set: three shards a split, which are of one content."""
    suffix, configs = LAYOUTS[name]
    rows = [row(name, n) for n in range(ROWS)]
    if suffix == "parquet":
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        content = file.getvalue()
    elif suffix == "jsonl":
        content = "\n".join(map(json.dumps, rows)).encode()
    else:
        content = json.dumps(rows, indent=1).encode()
    if not configs:
        return {"train.jsonl": content, "README.md": b"# a set\n"}
    listed: list[dict[str, Any]] = []
    files = {}
    for config, splits in configs.items():
        shards = 3 if suffix == "parquet" else 1
        names = {
            s: [f"{p}{i:05d}.{suffix}" if shards > 1 else f"{p}.{suffix}" for i in range(shards)]
            for s, p in splits.items()
        }
        files |= {f: content for found in names.values() for f in found}
        data = [{"split": s, "path": found} for s, found in names.items()]
        listed.append({"config_name": config, "data_files": data})
    card = f"---\n{yaml.safe_dump({'configs': listed})}---\n# a set\n"
    return {**files, "README.md": card.encode()}


SCRIPT = """
import json, sys
from transformers import AutoTokenizer
from moe_fair.moe.calibration_text import sample
from moe_fair.moe.text_sources import parse_sources
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
found = {}
for name in sys.argv[2:]:
    text = sample(parse_sources([name]), tokenizer, samples=18, length=64, seed=0)
    found[name] = [text.domains, [ids for ids, _ in text.sequences], text.notes]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_every_preset_from_a_hub(tmp_path: Path) -> None:
    hub = Hub()
    sets = {s.id: s for name in NAMES for s in preset(name)}
    for name in sets:
        hub.add(f"datasets/{name}", stand_in(name))
    with serving(hub):
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        mine |= {
            "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        done = python("-c", SCRIPT, MODEL, *NAMES, env=mine, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    chats: dict[str, set[tuple[int, ...]]] = {
        name: {
            tuple(
                tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
            )[:64]
            for messages, tools in (by_hand(name, n) for n in range(ROWS))
        }
        for name in sets
        if sets[name].schema.name != "text"
    }
    for name in NAMES:
        domains, sequences, notes = found[name]
        assert domains == [name]
        assert len(sequences) == 18
        left = [tuple(ids) for ids in sequences]
        for s in preset(name):
            told = f"{name}: {s.id}{':' + s.config if s.config else ''}@{s.split} of "
            assert any(n.startswith(told) and f"({s.licence})" in n for n in notes)
            if s.id in chats:
                used = [ids for ids in left if ids in chats[s.id]]
                assert used, s.id
        for ids in left:
            text = tokenizer.decode(ids)
            plain = "page" in text or "article" in text
            assert plain or any(ids in c for s, c in chats.items()), text
    asked = [path for method, path in hub.requests]
    for name, s in sets.items():
        assert any(s.revision in path for path in asked if name in path), name
        # of a split's three shards the first, for its columns, and one; of other splits none
        opened = {p for p in asked if f"/{name}/resolve/" in p and not p.endswith(".md")}
        opened = {p for p in opened if not p.endswith((".py", ".yaml", "infos.json"))}
        configs = {x.config for n in NAMES for x in preset(n) if x.id == name}
        assert len(opened) <= 2 * len(configs), opened
        assert all(s.split in p or "10BT" in p or "calling" in p for p in opened)
