"""Text that a model writes itself: its own distribution, the same bytes again, by a server too."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from places import MODEL
from processes import Python, port
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from moe_fair.cli import main
from moe_fair.moe.text_loops import is_loop
from moe_fair.moe.text_writers import ModelWriter

Fails = Callable[..., str]
SMALL = ["--length", "32", "--set", "tokens=3000"]


@pytest.mark.slow
def test_it_is_the_models_own_distribution() -> None:
    """-log p of what was drawn is the entropy of what it was drawn from, but for chance; and what
    the maker would have cut off (top_k, a penalty) is not."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(3)
    model = tiny_model("qwen2_moe", vocab_size=len(tokenizer)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(5)  # far from uniform
    prompts = [[i] for i in range(32)]
    drawn = ModelWriter(model, tokenizer).write(prompts, 24, [], 1, [])
    surprise, expected, variance = 0.0, 0.0, 0.0
    for prompt, found in zip(prompts, drawn, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *found.ids]])).logits[0, :-1].double()
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        assert found.entropy == pytest.approx(float(entropy.mean()), rel=1e-4)
        surprise -= float(logp.gather(1, torch.tensor(found.ids).unsqueeze(1)).sum())
        expected += float(entropy.sum())
        variance += float((logp.exp() * (logp + entropy.unsqueeze(1)).square()).sum())
    assert abs(surprise - expected) < 4 * math.sqrt(variance)
    assert expected < 0.9 * math.log(len(tokenizer)) * 32 * 24
    model.generation_config = GenerationConfig(top_k=1, repetition_penalty=5.0, temperature=0.1)
    torch.manual_seed(99)
    assert ModelWriter(model, tokenizer).write(prompts, 24, [], 1, []) == drawn
    assert ModelWriter(model, tokenizer).write(prompts, 24, [], 2, []) != drawn


def test_circles() -> None:
    assert is_loop([1, 2, 3] * 30, None, None)
    assert not is_loop(list(range(100)), None, None)
    assert not is_loop([*range(60), *range(40)], None, None)


def done(*arguments: object) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in arguments])


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.slow
def test_the_same_bytes_killed_and_by_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is typed; killed in between; by two processes; and what it wrote calibrates."""
    out = tmp_path / "self.jsonl"
    done("sample", MODEL, *SMALL, "-o", out)
    about = yaml.safe_load((tmp_path / "self.yaml").read_text())
    assert about["rows"] == len(rows(out))
    assert about["tokens"] >= 3000
    assert about["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert len({json.dumps(r) for r in rows(out)}) > 0.9 * about["rows"]
    killed = tmp_path / "killed.jsonl"
    child = Python(["-m", "moe_fair", "sample", MODEL, *SMALL, "-o", killed], tmp_path / "log")
    kept = killed.with_name("killed.jsonl.partial")
    while child.poll() is None and not list(kept.glob("000000.json")):
        pass
    child.kill()
    child.wait()
    assert not killed.exists()
    capsys.readouterr()
    done("sample", MODEL, *SMALL, "-o", killed)
    assert "going on: " in capsys.readouterr().err
    assert killed.read_bytes() == out.read_bytes()
    assert not kept.exists()
    both = tmp_path / "both.jsonl"
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), "WORLD_SIZE": "2"}
    started = [
        Python(
            ["-m", "moe_fair", "sample", MODEL, *SMALL, "-o", both], tmp_path / f"log{rank}",
            env={**os.environ, **where, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [p.wait(timeout=400) for p in started] == [0, 0], (tmp_path / "log0").read_text()
    assert both.read_bytes() == out.read_bytes()
    text = ["-c", f"self={out}", "--samples", 8, "--length", 32]
    done("calibrate", MODEL, *text, "-o", tmp_path / "stats")
    assert "tokens of self" in capsys.readouterr().err


@contextmanager
def served() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible server around the reference model, and what it was asked.

    As vLLM has it, a request's seed is that of each of its prompts, and what a request does not say
    is as the model's maker would have it: here the likeliest token alone.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    asked: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.say({"data": [{"id": "reference"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            choices = []
            given = body["prompt"]
            for i, prompt in enumerate(given if isinstance(given[0], list) else [given]):
                with lock:
                    torch.manual_seed(body["seed"] % 2**31)
                    made = model.generate(
                        torch.tensor([prompt]),
                        do_sample=True,
                        max_new_tokens=8,
                        top_k=max(0, body.get("top_k", 1)),
                        repetition_penalty=body.get("repetition_penalty", 5.0),
                    )[0, len(prompt) :]
                text = tokenizer.decode(made, skip_special_tokens=True)
                choices.append({"index": i, "text": text, "finish_reason": "length"})
            self.say({"choices": choices[::-1]})

        def say(self, what: Any) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(what).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_from_a_server(tmp_path: Path, fails: Fails) -> None:
    """The weights are not read: they may be larger than memory."""
    out = tmp_path / "self.jsonl"
    few = ["--length", "16", "--set", "tokens=100", "--set", "max_memory=1MB"]
    with served() as (url, asked):
        done("sample", MODEL, *few, "--set", f"server={url}", "-o", out)
        own = ["-c", "self", "--samples", 2, *few[:2], *few[4:], "--set", f"server={url}"]
        done("calibrate", MODEL, *own, "-o", tmp_path / "stats")
    assert (tmp_path / "stats" / "self.jsonl").is_file()
    assert all(a["temperature"] == 1 and a["top_p"] == 1 for a in asked)
    assert {a["model"] for a in asked} == {"reference"}
    assert all("text" in r for r in rows(out))
    assert len(rows(out)) > 8
    assert len({r["text"] for r in rows(out)}) > 0.9 * len(rows(out))
    gone = fails("sample", MODEL, *few, "--set", f"server={url}", "-o", tmp_path / "b.jsonl")
    assert "is it running?" in gone
    path = fails("sample", MODEL, *few, "--set", "server=file:///etc", "-o", tmp_path / "c.jsonl")
    assert "write it as http://HOST:PORT" in path


def test_refusals(tmp_path: Path, fails: Fails) -> None:
    """Before any weight is read."""
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    assert "there.jsonl" in fails("sample", MODEL, "-o", there)
    assert there.read_text() == "mine"
    assert ".jsonl" in fails("sample", MODEL, "-o", tmp_path / "text.txt")
    new = tmp_path / "new.jsonl"
    assert "positions" in fails("sample", MODEL, "-o", new, "--length", 10**6)
    said = fails("sample", MODEL, "-o", new, "--set", "max_memory=1MB")
    assert "it is streamed here" in said
    (tmp_path / "new.jsonl.partial").symlink_to(tmp_path)
    assert "in the way" in fails("sample", MODEL, "-o", new)
    (tmp_path / "new.jsonl.partial").unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["there.jsonl"]
