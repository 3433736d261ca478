"""`moe-fair eval` through lm-eval: its numbers are those of the `lm_eval` command."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import HELDOUT, MODEL, ROOT
from processes import python
from tiny import tiny_model
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import moe_fair
from moe_fair.cli import main
from moe_fair.moe.trusted_code import MODELING_FILE

TASKS = ROOT / "eval" / "tasks"
EVERY = "local"  # the group of all that lie there


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, statistics_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "out"
    statistics = moe_fair.Statistics.load(statistics_folder)
    done = moe_fair.prune(
        str(MODEL), folder, plan=moe_fair.plan(statistics, experts=24), repair="none"
    )
    assert not done.plan.uniform  # it brings its modeling file
    return folder


@pytest.fixture
def out(pruned: Path, tmp_path: Path) -> Path:
    """A copy of the pruned model that a test may write into."""
    return Path(shutil.copytree(pruned, tmp_path / "out"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; return what it prints."""

    def do(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        shown = capsys.readouterr()
        assert not stop.value.code, shown.err
        return shown.out

    return do


def by_hand(model: Path, output: Path, tasks: str, *more: str) -> dict[str, Any]:
    """The results of the `lm_eval` command."""
    done = python(
        "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu",
        "--model_args", f"pretrained={model},trust_remote_code=True", "--tasks", tasks,
        "--include_path", TASKS, "--batch_size", "8", "--output_path", output, *more,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = output.rglob("results*.json")
    return json.loads(file.read_text())["results"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "tasks", "count", "limit"),
    [
        pytest.param("original", EVERY, 9, 2, marks=pytest.mark.nightly),
        pytest.param("pruned", EVERY, 9, 2, marks=pytest.mark.nightly),
        ("pruned", "local_choice_python,local_passages_rust-docs", 2, 1),
    ],
)
def test_the_numbers_of_the_lm_eval_command(
    out: Path, tmp_path: Path, run: Callable[..., str], side: str, tasks: str, count: int,
    limit: int,
) -> None:  # fmt: skip
    """Choice and rolling, to the last digit."""
    few = "--limit", str(limit)
    given = "--tasks", tasks, "--include-path", TASKS
    shown = json.loads(run("eval", out, "--baseline", MODEL, *given, *few, "--json"))
    folder = out / "moe_fair"
    (file,) = (folder / "lm-eval").glob(f"*-{side}.json")
    ours = json.loads(file.read_text())["results"]
    theirs = by_hand({"original": MODEL, "pruned": out}[side], tmp_path / side, tasks, *few)
    assert ours == theirs
    for row in shown["benchmarks"]:
        assert row[side] == theirs[row["task"]][f"{row['metric']},none"]
    assert len(shown["benchmarks"]) == count
    assert json.loads((folder / "benchmarks.json").read_text())["rows"] == shown["benchmarks"]
    assert "local_passages_rust-docs" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_table_of_two_models(out: Path, run: Callable[..., str]) -> None:
    """On a screen of any width no number is cut short; the report is written again."""
    task = "local_choice_python"
    shown = run(
        "eval", out, "--baseline", MODEL, "--tasks", task, "--include-path", TASKS, "--limit", 6,
        "--log-samples", "--agreement", "--heldout", HELDOUT, "--heldout-samples", 4,
        "--length", 32,
    )  # fmt: skip
    header, row, *_ = shown.splitlines()
    assert header.split() == [
        "task", "metric", "items", "original", "pruned", "difference", "±", "stderr", "p", "test",
    ]  # fmt: skip
    assert row.split()[:4] == [task, "acc", "↑", "6"]
    assert row.split()[-1] == "McNemar"
    assert "…" not in shown
    assert "acceptance" in shown
    folder = out / "moe_fair"
    assert task in (folder / "report.html").read_text()
    (samples,) = (folder / "lm-eval").glob(f"*-pruned.samples_{task}.jsonl")
    items = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(items) == 6
    original, after = (float(x) for x in row.split()[4:6])
    assert after == pytest.approx(sum(i["acc"] for i in items) / 6, abs=1e-4)
    assert float(row.split()[6]) == pytest.approx(after - original, abs=2e-4)


@pytest.mark.slow
def test_of_a_multimodal_model_the_language_model_is_asked(
    tmp_path: Path, run: Callable[..., str]
) -> None:
    """lm-eval's `hf` knows causal models alone; what is scored is the loss of the text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["qwen3_vl_moe"]
    model = tiny_model("qwen3_vl_moe", vocab_size=len(tokenizer), architectures=[name]).eval()
    model.config.text_config.max_position_embeddings = 4096  # every text is one window
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task = "local_passages_rust-docs"
    given = "--tasks", task, "--include-path", TASKS, "--limit", 2, "--log-samples"
    run("eval", tmp_path / "model", *given, "-o", tmp_path / "found")
    (samples,) = (tmp_path / "found").rglob("*.samples_*.jsonl")
    items = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(items) == 2
    for item in items:
        ids = tokenizer(item["target"], return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], 1)
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1]).logits
        want = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()
        assert float(item["filtered_resps"][0]) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.slow
def test_nothing_is_written_into_other_models(tmp_path: Path, run: Callable[..., str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in MODEL.rglob("*")}
    common = "--tasks", "local_choice_python", "--include-path", TASKS, "--limit", 2
    assert "± stderr" in run("eval", MODEL, *common)
    assert {p: p.stat().st_mtime_ns for p in MODEL.rglob("*")} == before
    run("eval", MODEL, *common, "-o", tmp_path / "results")
    assert {p.name for p in (tmp_path / "results").iterdir()} == {"benchmarks.json", "lm-eval"}


@pytest.mark.slow
def test_only_our_own_code_runs_unasked(out: Path, fails: Callable[..., str]) -> None:
    """One changed letter in the modeling file, and nothing of it is run."""
    file = out / MODELING_FILE
    trace = out / "ran"
    file.write_text(file.read_text() + f"\nopen({str(trace)!r}, 'w').close()\n")
    common = "--tasks", "local_choice_python", "--include-path", TASKS, "--limit", 1
    said = fails("eval", out, *common)
    assert "--trust-remote-code" in said
    assert not trace.exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "give a MODEL and --tasks, or --agreement"),
        (["--agreement"], "name it with --baseline"),
        (["--agreement", "--baseline", str(MODEL)], "give --heldout"),
        (["--tasks", "a", "--batch-size", "many"], "write a whole number, or auto"),
        (["--tasks", "a", "--batch-size", "0"], "--batch-size 0"),
        (["--tasks", "a", "--limit", "0"], "--limit 0"),
        (["--tasks", "a", "--limit", "-3"], "--limit -3"),
        (["--tasks", "a", "--num-fewshot", "-1"], "--num-fewshot -1 is below 0"),
        (["--tasks", "a", "--include-path", "nowhere"], "--include-path nowhere: no such"),
        (["--tasks", ",", "--include-path", str(TASKS)], "no --tasks given; a suite is one of"),
    ],
)  # fmt: skip
def test_bad_input(fails: Callable[..., str], given: list[str], said: str) -> None:
    assert said in fails("eval", MODEL, *given)


@pytest.mark.slow
@pytest.mark.nightly
def test_lm_evals_own_index(fails: Callable[..., str]) -> None:
    """It takes seconds to read, so one test has all that needs it."""
    for task, near, more in (
        ("helaswag", "hellaswag", ["--include-path", TASKS]),
        ("hc-smo", "hc-smoe", []),
    ):
        said = fails("eval", MODEL, "--tasks", task, *more)
        assert f"no task {task!r} (did you mean {near!r}?)" in said
    from moe_fair.evaluate.benchmark import EIGHT, SUITES, Benchmark, find_tasks

    found, _ = find_tasks(Benchmark(tasks=tuple(SUITES)))
    assert set(found) == {t for tasks in SUITES.values() for t in tasks}
    assert len(EIGHT) == 8
    # what a task reads is on the Hub, which is not there
    said = fails("eval", MODEL, "--tasks", "arc_easy", "--limit", 1)
    assert "lm-eval could not run arc_easy" in said
    assert "data sets come from the Hub" in said
