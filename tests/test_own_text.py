"""`moe-fair sample` and `-c self`: the same bytes however they come about, and kept."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from places import CALIBRATION, MODEL
from processes import Python, port

import moe_fair
from moe_fair.cli import main
from moe_fair.core.recipe import DEFAULT_CALIBRATION, Recipe
from moe_fair.engines.processes import ALONE
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.pipelines.own_source import with_own_text

Fails = Callable[..., str]
SAMPLE = ["sample", str(MODEL), "--length", "32", "--tokens", "6000", "--device", "cpu"]
SMALL: dict[str, Any] = {"samples": 8, "length": 32, "batch_size": 4}
RUN = ["--samples", "8", "--length", "32", "--batch-size", "4"]
PRUNE: dict[str, Any] = {**SMALL, "experts": 40, "repair": "none"}


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in arguments])


def test_sample_writes_text_and_where_it_is_from(tmp_path: Path) -> None:
    file = tmp_path / "self.jsonl"
    run("sample", MODEL, "--length", "32", "--tokens", "300", "-o", file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [list(r) for r in rows] == [["text"]] * len(rows)
    facts = yaml.safe_load((tmp_path / "self.yaml").read_text())
    assert facts["rows"] == len(rows)
    assert facts["tokens"] >= 300
    assert facts["settings"]["seed"] == 0
    assert facts["settings"]["model"] == Checkpoint(str(MODEL)).fingerprint["model"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["self.jsonl", "self.yaml"]
    again = tmp_path / "again.jsonl"
    run("sample", MODEL, "--length", "32", "--tokens", "300", "-o", again)
    assert again.read_bytes() == file.read_bytes()


def started(tmp_path: Path, file: Path, rank: int = 0, world: int = 1, where: str = "") -> Python:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if world > 1:
        environment |= {
            "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": where,
        }  # fmt: skip
    command = ["-m", "moe_fair", *SAMPLE, "-o", str(file)]
    return Python(command, tmp_path / f"log{rank}", env=environment)


@pytest.mark.slow
def test_two_processes_and_a_kill_give_the_same_bytes(tmp_path: Path) -> None:
    one, two, killed = (tmp_path / n / "self.jsonl" for n in ("one", "two", "killed"))
    for file in (one, two, killed):
        file.parent.mkdir()
    assert started(tmp_path, one).wait(timeout=400) == 0, (tmp_path / "log0").read_text()
    where = port()
    both = [started(tmp_path, two, rank, 2, where) for rank in range(2)]
    assert [p.wait(timeout=400) for p in both] == [0, 0], (tmp_path / "log0").read_text()
    first = started(tmp_path, killed)
    give_up = time.monotonic() + 240
    while not (killed.parent / "self.jsonl.partial" / "000000.json").exists():
        assert time.monotonic() < give_up
        assert first.poll() is None, (tmp_path / "log0").read_text()
        time.sleep(0.002)
    first.kill()
    first.wait()
    assert not killed.exists()
    assert started(tmp_path, killed).wait(timeout=400) == 0
    assert "batches of own text were done before" in (tmp_path / "log0").read_text()
    for name in ("self.jsonl", "self.yaml"):
        bytes_ = {f.with_name(name).read_bytes() for f in (one, two, killed)}
        assert len(bytes_) == 1, name
    for file in (one, two, killed):
        assert sorted(p.name for p in file.parent.iterdir()) == ["self.jsonl", "self.yaml"]


def test_self_alone_to_a_pruned_model_and_its_recipe_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No text is given: none is read from anywhere; what is kept serves a second run."""
    out, again = tmp_path / "out", tmp_path / "again"
    done = moe_fair.prune(str(MODEL), out, **PRUNE)
    assert sum(len(g.kept) for g in done.plan.groups) == 240
    recipe = yaml.safe_load((out / "moe_fair" / "recipe.yaml").read_text())
    assert recipe["calibration"] == ["self"]
    assert (out / "moe_fair" / "self.jsonl").is_file()
    run("verify", out, "--against", MODEL)
    capsys.readouterr()
    run("prune", "--recipe", out / "moe_fair" / "recipe.yaml", "-o", again)
    for name in ("plan.json", "self.jsonl", "self.yaml", "statistics.safetensors"):
        kept, made = (folder / "moe_fair" / name for folder in (out, again))
        assert kept.read_bytes() == made.read_bytes(), name


def test_statistics_bring_their_own_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repair reads the text that was calibrated on; it is not sampled again."""
    run("calibrate", MODEL, *RUN, "-c", CALIBRATION / "python.jsonl", "-c", "self:2",
        "-o", tmp_path / "stats")  # fmt: skip
    found = moe_fair.Statistics.load(tmp_path / "stats")
    assert found.domains == ("python", "self")
    assert found.tokens.sum() == 8 * 32
    capsys.readouterr()
    run("prune", MODEL, "--stats", tmp_path / "stats", "--experts", "40", "--repair", "scale",
        "-o", tmp_path / "out")  # fmt: skip
    said = capsys.readouterr().err
    assert f"own text: that of {tmp_path / 'stats' / 'self.jsonl'}" in said
    assert "sampling" not in said
    kept = tmp_path / "out" / "moe_fair" / "self.jsonl"
    assert kept.read_bytes() == (tmp_path / "stats" / "self.jsonl").read_bytes()


def test_an_edited_text_is_not_taken_for_the_models(tmp_path: Path) -> None:
    moe_fair.calibrate(str(MODEL), tmp_path / "stats", calibration="self", **SMALL)
    file = tmp_path / "stats" / "self.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + b'{"text": "one more"}\n')
    moe_fair.prune(
        str(MODEL), tmp_path / "out", stats=str(tmp_path / "stats"), experts=40, repair="scale"
    )
    assert (tmp_path / "out" / "moe_fair" / "self.jsonl").read_bytes() == before


def test_a_share_of_own_text_beside_what_is_given() -> None:
    source = Checkpoint(str(MODEL))
    recipe = Recipe().with_settings({"calibration": ["a.txt:2", "b.txt"], "self_share": 0.25})
    found = with_own_text(recipe, source, lambda _: None, ALONE)
    assert found.calibration == ("a.txt:2", "b.txt", "self:1")
    assert with_own_text(found, source, lambda _: None, ALONE) == found  # as it is recorded
    none = recipe.with_settings({"self_share": 0})
    assert with_own_text(none, source, lambda _: None, ALONE).calibration == none.calibration


def test_what_does_not_fit_reads_text_as_before() -> None:
    source, said = Checkpoint(str(MODEL)), list[str]()
    recipe = Recipe().with_settings({"model": str(MODEL), "max_memory": "1MB"})
    found = with_own_text(recipe, source, said.append, ALONE)
    assert found.calibration == (DEFAULT_CALIBRATION,)
    assert said[-1].startswith("note: no calibration text is given, and the model is streamed")
    fits = with_own_text(replace(recipe, max_memory=None), source, said.append, ALONE)
    assert fits.calibration == ("self",)


def test_a_dry_run_says_what_would_be_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("prune", MODEL, "--experts", "40", *RUN, "-c", CALIBRATION / "python.jsonl", "-c", "self",
        "--repair", "none", "--dry-run", "--json", "-o", tmp_path / "out")  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in found["stages"]][:2] == ["sample own text", "calibrate"]
    assert found["stages"][0]["tokens"] == 4 * 32
    assert found["stages"][0]["seconds"] > 0
    assert found["checks"]["calibration text"] == (
        "8 sequences, 256 tokens of python, self, sampled when it runs"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name_is_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    text = (CALIBRATION / "python.jsonl").read_text()
    (tmp_path / "self" / "python.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    found = moe_fair.calibrate(str(MODEL), calibration="self", **SMALL)
    assert found.domains == ("python",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--self-share", "0.5", "-c", "self"], "--self-share would change nothing: -c self has"),
        (["--self-share", "0.5"], "--self-share would change nothing: no other text is given"),
        (["--self-share", "1", "-c", "x.txt"], "must be 0 or more and below 1"),
        (["--server", "http://127.0.0.1:9", "-c", str(CALIBRATION)], "--server would change"),
        (["--server", "http://127.0.0.1:9", "-c", "self"], "is it running?"),
        (["-c", "self", "--max-memory", "1MB"], "do not fit in"),
        (["-c", "self", "-c", "missing.txt"], "missing.txt does not exist"),
    ],
)
def test_refusals_of_prune(given: list[str], said: str, fails: Fails, tmp_path: Path) -> None:
    line = fails("prune", MODEL, "--experts", "40", *RUN, *given, "-o", tmp_path / "out")
    assert said in line
    assert not (tmp_path / "out").exists()


def test_refusals_of_sample(fails: Fails, tmp_path: Path) -> None:
    assert "is written as .jsonl" in fails("sample", MODEL, "-o", tmp_path / "self.txt")
    assert "there is no directory" in fails("sample", MODEL, "-o", tmp_path / "a" / "self.jsonl")
    there = tmp_path / "there.jsonl"
    there.write_text("")
    assert "is there already" in fails("sample", MODEL, "-o", there)
    small = ["--set", "max_memory=1MB"]
    assert "do not fit in" in fails("sample", MODEL, *small, "-o", tmp_path / "self.jsonl")
    (tmp_path / "self.jsonl.partial").symlink_to(tmp_path)
    assert "in the way" in fails("sample", MODEL, "-o", tmp_path / "self.jsonl")
    assert there.read_text() == ""


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server of the reference model, as far as texts are asked for."""

    asked: list[dict[str, Any]]
    model: Any
    tokenizer: Any

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "tiny"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, **body})
        torch.manual_seed(body["seed"] % 2**63)
        ids = torch.tensor(body["prompt"])
        rows = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
            temperature=body["temperature"], max_new_tokens=body["max_tokens"],
        )  # fmt: skip
        texts = self.tokenizer.batch_decode(rows[:, ids.shape[1] :], skip_special_tokens=True)
        choices = [{"index": i, "text": t, "finish_reason": "length"} for i, t in enumerate(texts)]
        self.answer({"choices": choices[::-1]})  # by their index, whatever their order

    def answer(self, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    source = Checkpoint(str(MODEL))
    parts = {"asked": [], "model": source.load("float32", "cpu"), "tokenizer": source.tokenizer()}
    handler: Any = type("Tiny", (Server,), parts)
    found = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{found.server_address[1]}", handler.asked
    found.shutdown()
    thread.join()
    found.server_close()


def test_a_server_writes_it(
    server: tuple[str, list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what does not fit here; by token ids, at temperature 1, each batch by its own seed."""
    url, asked = server
    file = tmp_path / "self.jsonl"
    run("sample", MODEL, "--length", "16", "--tokens", "1100", "--server", url,
        "--set", "max_memory=1MB", "-o", file)  # fmt: skip
    rows = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert len(rows) >= 64
    assert len({*rows}) > 60
    assert {a["path"] for a in asked} == {"/v1/completions"}
    assert asked[0]["prompt"] == [[0]] * 64
    assert (asked[0]["model"], asked[0]["temperature"]) == ("tiny", 1.0)
    assert len({a["seed"] for a in asked}) == len(asked) >= 2
    found = moe_fair.calibrate(str(MODEL), calibration="self", server=url + "/v1", **SMALL)
    assert found.domains == ("self",)


def test_a_server_of_another_kind(fails: Fails, tmp_path: Path) -> None:
    class Other(Server):
        def do_GET(self) -> None:
            self.answer([])

    found = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{found.server_address[1]}"
    line = fails("sample", MODEL, "--server", url, "-o", tmp_path / "self.jsonl")
    found.shutdown()
    thread.join()
    found.server_close()
    assert "names no model at" in line
    assert list(tmp_path.iterdir()) == []
