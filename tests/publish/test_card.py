"""The model card: front matter, licence, hostile names, and the user's own card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from places import MODEL

import moe_fair
from moe_fair.cli import main
from moe_fair.publish.card import OURS, Base, make_card, read_metadata
from moe_fair.report.sources import gather

pytestmark = pytest.mark.slow  # whole runs, by and large

# what the Hub allows
RELATIONS = {"adapter", "merge", "quantized", "finetune"}


@pytest.fixture(scope="module", params=["tod", "uniform"])
def pruned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
    statistics_folder: Path,
) -> Path:  # fmt: skip
    folder = tmp_path_factory.mktemp("pruned") / "out"
    statistics = moe_fair.Statistics.load(statistics_folder)
    plan = moe_fair.plan(statistics, experts=40, allocate=request.param)
    moe_fair.prune(str(MODEL), folder, plan=plan, repair="none")
    return folder


@pytest.fixture
def out(pruned: Path, tmp_path: Path) -> Path:
    """A copy that a test may write into."""
    return Path(shutil.copytree(pruned, tmp_path / "out"))


def push(out: Path, *more: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["push", str(out), "tester/pruned", "--dry-run", *more])
    assert not stop.value.code


def test_front_matter(pruned: Path) -> None:
    """As huggingface_hub reads it."""
    from huggingface_hub import ModelCard

    base = Base("Qwen/Qwen1.5-MoE-A2.7B", {"license": "apache-2.0", "language": ["en"]})
    sources = gather(pruned)
    card = ModelCard(make_card(sources, "tester/pruned", base))
    data = card.data.to_dict()
    assert data["base_model"] == base.id
    assert data["base_model_relation"] in RELATIONS
    assert (data["license"], data["language"]) == ("apache-2.0", ["en"])
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert ("custom_code" in data["tags"]) != sources.plan.uniform
    assert "Nothing was fine-tuned" in card.text
    assert ("trust_remote_code=True" in card.text) != sources.plan.uniform
    assert ("moe-fair-vllm" not in card.text) == sources.plan.uniform
    assert "lm_eval --model hf --model_args pretrained=tester/pruned" in card.text


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "with code"])
def test_a_multimodal_model_is_loaded_by_its_own_class(out: Path, stock: bool) -> None:
    file, auto = out / "config.json", "AutoModelForImageTextToText"
    config = json.loads(file.read_text()) | {"model_type": "qwen3_vl_moe"}
    config |= {"architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    for name in ("auto_map", "moe_fair"):
        config.pop(name, None)
    if not stock:
        config |= {"moe_fair": {}, "auto_map": {auto: "modeling_moe_fair.MoeFair"}}
    file.write_text(json.dumps(config))
    text = make_card(gather(out), "tester/pruned", Base())
    assert f"from transformers import {auto}, AutoTokenizer\n" in text
    trust = "" if stock else ", trust_remote_code=True"
    assert f'model = {auto}.from_pretrained("tester/pruned", dtype="auto"{trust})' in text
    assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "image-text-to-text"
    assert "AutoModelForCausalLM" not in text
    assert "lm_eval" not in text
    (out / "preprocessor_config.json").write_text("{}")
    text = make_card(gather(out), "tester/pruned", Base())
    assert 'processor = AutoProcessor.from_pretrained("tester/pruned")' in text


def test_the_card_holds_plan_and_recipe(pruned: Path) -> None:
    sources = gather(pruned)
    text = make_card(sources, "tester/pruned", Base())
    for g in sources.plan.groups:
        assert f"| {g.layer} | {g.size} | {len(g.kept)} |" in text
    fenced = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(fenced) == yaml.safe_load(sources.recipe)


def test_the_card_says_what_was_trained(out: Path) -> None:
    table = [{"name": "model.layers.0.mlp", "repair": "refit", "ridge": 0.1, "before": 1.0,
              "after": 0.5, "from_another_version": 1}]  # fmt: skip
    (out / "moe_fair" / "repair.json").write_text(json.dumps(table))
    text = make_card(gather(out), "tester/pruned", Base())
    assert "repaired (refit) on calibration text" in text
    assert "Nothing was fine-tuned" not in text


def test_a_licence_given_wins_over_the_base_models(pruned: Path) -> None:
    base = Base("a/b", {"license": "other", "license_name": "x", "license_link": "http://x"})
    text = make_card(gather(pruned), "tester/pruned", base, license="mit")
    found = yaml.safe_load(text.split("---\n")[1])
    assert found["license"] == "mit"
    assert not {"license_name", "license_link"} & found.keys()


def test_missing_licence_and_base_model_are_notes(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(out)
    shown = capsys.readouterr()
    assert "note: the card names no base model" in shown.err
    assert "note: the card has no licence line" in shown.err
    assert "note: the recipe names paths of this machine" in shown.err
    push(out, "--license", "apache-2.0", "--base-model", "someone/base")
    shown = capsys.readouterr()
    assert "no licence line" not in shown.err
    assert "names no base model" not in shown.err
    found = read_metadata(out / "README.md")
    assert (found["license"], found["base_model"]) == ("apache-2.0", "someone/base")


def test_the_users_own_card_stays(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(out)
    card = out / "README.md"
    edited = card.read_text().replace(OURS, "").replace("## Load it", "## Load it well")
    card.write_text(edited)
    push(out, "--license", "mit")
    assert card.read_text() == edited
    card.write_text(edited + OURS)
    push(out)
    assert "## Load it well" not in card.read_text()


def test_what_stays_at_home(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "moe_fair" / "lm-eval").mkdir()
    (out / "moe_fair" / "lm-eval" / "secret.json").write_text("{}")
    (out / "moe_fair" / "report.html.partial").write_text("half")
    push(out)
    shown = capsys.readouterr().out
    assert "moe_fair/plan.json" in shown
    assert "model.safetensors" in shown
    assert "secret.json" not in shown
    assert "partial" not in shown


def test_a_hostile_name_stays_text(pruned: Path) -> None:
    """A directory may be called anything; the Hub shows Markdown with HTML in it."""
    sources = gather(pruned)
    name = "x](javascript:alert(1)) <img src=x onerror=alert(1)>\n---\nlicense: mit"
    sources.plan.recipe["model"] = f"/home/user/{name}"
    text = make_card(sources, "tester/pruned", Base())
    found = yaml.safe_load(text.split("---\n")[1])
    assert "license" not in found
    body = text.split("## The recipe")[0]
    assert "<img" not in body.replace("\\<img", "")
    assert "](javascript" not in body.replace("\\](javascript", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], "'nobody' is not a Hub name: there is no user in it; write USER/NAME"),
        (["a/b/c"], "is not a Hub name"),
        (["a/b c"], "is not a Hub name"),
        (["a/b", "--base-model", "Qwen"], "'Qwen' is not a Hub name"),
    ],
)
def test_bad_names(
    out: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["push", str(out), *arguments, "--dry-run"])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_only_what_prune_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, MODEL):
        with pytest.raises(SystemExit) as stop:
            main(["push", str(folder), "a/b", "--dry-run"])
        assert stop.value.code == 2
        assert "give a directory that `moe-fair prune` wrote" in capsys.readouterr().err
