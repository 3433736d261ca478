"""The tasks in eval/tasks: made from held-out text, reproducible, and sound."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from places import HELDOUT, ROOT

TASKS = ROOT / "eval" / "tasks"
DOMAINS = sorted(f.stem for f in HELDOUT.glob("*.jsonl"))
MAKE = ROOT / "eval" / "make_tasks.py"


def make(text: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(MAKE), "--text", str(text), "-o", str(output)],
        capture_output=True,
        text=True,
    )


def test_the_script_made_them(tmp_path: Path) -> None:
    done = make(HELDOUT, tmp_path / "tasks")
    assert done.returncode == 0, done.stderr
    made, kept = (
        {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
        for folder in (tmp_path / "tasks", TASKS)
    )
    assert made == kept
    assert len(made) == 4 * len(DOMAINS) + 3


@pytest.mark.parametrize("domain", DOMAINS)
def test_choices(domain: str) -> None:
    """The labelled continuation follows the context in its document, the others do not."""
    lines = (HELDOUT / f"{domain}.jsonl").read_text().splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    lines = (TASKS / f"local_choice_{domain}.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    assert len(items) >= 200
    for item in items:
        choices, label = item["choices"], item["label"]
        assert len(choices) == len(set(choices)) == 4
        assert {len(c) for c in choices} == {100}
        home = [d for d in documents if item["context"] + choices[label] in d]
        assert home
        for i, wrong in enumerate(choices):
            assert any(wrong in d for d in documents)
            assert i == label or item["context"] + wrong not in "".join(home)
    # always answering with the same letter gives chance
    assert max(Counter(i["label"] for i in items).values()) < 0.35 * len(items)
    assert len({(i["context"], i["choices"][i["label"]]) for i in items}) == len(items)


@pytest.mark.parametrize("domain", DOMAINS)
def test_passages(domain: str) -> None:
    """Together they are the held-out text, once."""
    lines = (HELDOUT / f"{domain}.jsonl").read_text().splitlines()
    text = "".join(json.loads(line)["text"] for line in lines)
    lines = (TASKS / f"local_passages_{domain}.jsonl").read_text().splitlines()
    passages = [json.loads(line)["text"] for line in lines]
    assert max(map(len, passages)) <= 1500
    assert "".join("".join(passages).split()) == "".join(text.split())


def test_groups_name_every_task() -> None:
    group = yaml.safe_load((TASKS / "local.yaml").read_text())
    choice = yaml.safe_load((TASKS / "local_choice.yaml").read_text())
    assert choice["task"] == [f"local_choice_{d}" for d in DOMAINS]
    assert group["task"] == ["local_choice", *(f"local_passages_{d}" for d in DOMAINS)]


@pytest.mark.parametrize("documents", [[], ["word " * 400] * 2])
def test_too_little_text(tmp_path: Path, documents: list[str]) -> None:
    (tmp_path / "text").mkdir()
    if documents:
        lines = "".join(json.dumps({"text": d}) + "\n" for d in documents)
        (tmp_path / "text" / "a.jsonl").write_text(lines)
    done = make(tmp_path / "text", tmp_path / "tasks")
    assert done.returncode == 1
    assert ("too few documents" if documents else "no .jsonl file") in done.stderr
    assert "Traceback" not in done.stderr
