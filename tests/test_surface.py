"""The surface that users have: options that --help shows, settings and the commands that take them.

A change here is a change of what people have typed into scripts; the changelog says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from places import MODEL

from moe_fair.cli import app, main
from moe_fair.core.recipe import TRUST, Recipe
from moe_fair.core.recipe_file import load_recipe
from moe_fair.core.settings import flag, key_of, settings_of
from moe_fair.core.units import Statistics
from moe_fair.pipelines.choices import choices

Fails = Callable[..., str]
# command -> its arguments and the options that --help shows
VISIBLE = {
    "calibrate":
        "MODEL --calibration --samples --length --seed --batch-size --dtype --device --engine "
        "--for --output --recipe --debug --set",
    "sample":
        "MODEL --length --seed --tokens --server --dtype --device --output --debug --set",
    "plan":
        "--method --experts --total --ratio --size --tolerance --serve STATISTICS --output "
        "--recipe --json --debug --set",
    "prune":
        "MODEL --calibration --samples --length --seed --batch-size --dtype --device --engine "
        "--method --experts --total --ratio --size --tolerance --serve --repair --heldout --stats "
        "--plan --output --recipe --dry-run --json --debug --set",
    "oracle":
        "MODEL --calibration --samples --length --seed --batch-size --dtype --device --stats "
        "--output --recipe --json --debug --set",
    "eval":
        "MODEL --length --device --engine --heldout --heldout-samples --baseline --output "
        "--tasks --num-fewshot --limit --apply-chat-template --include-path --log-samples "
        "--agreement --batch-size --dtype --json --debug --set",
    "report":
        "OUT --output --format --debug",
    "verify":
        "OUT --against --write --revision --trust-remote-code --allow-pickle --json --debug",
    "check":
        "OUT --json --debug",
    "export":
        "OUT --to --output --converter --outtype --pad --json --debug",
    "push":
        "OUT REPO --private --revision --base-model --license --dry-run --debug",
    "recipes":
        "--json --debug",
    "settings":
        "NAME --json --debug",
    "vision prune":
        "MODEL --data --batch-size --seed --weights --image-size --mean --std --transforms "
        "--logits --revision "
        "--trust-remote-code --allow-pickle --device --ratio --flops --params --tolerance "
        "--removal --protection --allocate --method --units-per-step --minibatches --momentum "
        "--probes --min-channels --align --heads --samples --directions --max-memory --steps "
        "--finetune-epochs --optimizer --lr --distill --output --recipe --fresh --json "
        "--debug --set",
    "vision sparsify":
        "MODEL --data --batch-size --seed --weights --image-size --mean --std --transforms "
        "--logits --revision "
        "--trust-remote-code --allow-pickle --device --sparsity --allocate --repair "
        "--shrinkage --samples --output --recipe --json --debug --set",
    "vision export":
        "OUT --to --output --trust-remote-code --json --debug",
}  # fmt: skip
# setting -> commands
SETTINGS = {
    "model": "calibrate prune oracle eval sample",
    "revision": "calibrate prune oracle eval sample",
    "trust_remote_code": "calibrate prune oracle eval sample",
    "allow_pickle": "calibrate prune oracle eval sample",
    "calibration": "calibrate prune oracle",
    "map": "calibrate prune oracle eval",
    "samples": "calibrate prune oracle",
    "length": "calibrate prune oracle eval sample",
    "seed": "calibrate prune oracle sample",
    "tokens": "sample",
    "server": "calibrate prune sample",
    "self_share": "calibrate prune",
    "batch_size": "calibrate prune oracle eval",
    "dtype": "calibrate prune oracle eval sample",
    "device": "calibrate prune oracle eval sample",
    "engine": "calibrate prune eval",
    "device_map": "calibrate prune sample",
    "checkpointing": "calibrate prune",
    "max_memory": "calibrate prune oracle eval sample",
    "save_every": "calibrate prune",
    "fresh": "calibrate prune oracle",
    "for_": "calibrate",
    "taylor": "calibrate prune",
    "counterfactual": "calibrate prune",
    "u_score": "calibrate prune",
    "gram": "calibrate prune",
    "alone": "calibrate prune",
    "curves": "calibrate",
    "curve_samples": "calibrate prune",
    "method": "calibrate plan prune",
    "removal": "calibrate plan prune",
    "protection": "calibrate plan prune",
    "allocate": "calibrate plan prune",
    "rivals": "calibrate prune",
    "trial_samples": "calibrate prune",
    "experts": "plan prune",
    "total": "plan prune",
    "ratio": "plan prune",
    "size": "plan prune",
    "tolerance": "plan prune",
    "min_experts": "plan prune",
    "multiple_of": "plan prune",
    "serve": "plan prune",
    "weights": "calibrate plan prune",
    "mtp": "calibrate plan prune",
    "reduce": "calibrate plan prune",
    "hash_layers": "calibrate prune oracle",
    "repair": "prune",
    "heal": "prune",
    "save_as": "prune",
    "heldout": "prune eval",
    "heldout_samples": "prune eval",
    "stats": "prune oracle",
    "plan": "prune",
    "calibration_digest": "calibrate prune",
    "heldout_digest": "prune",
}


@pytest.mark.slow
def test_what_fields_hold_is_said_by_role(
    fails: Fails, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "x.jsonl"
    text.write_text(json.dumps({"q": "why?", "a": "because"}))
    given = ("calibrate", MODEL, "-c", text, "-o", tmp_path / "out")
    assert "its fields are q, a; say which is what: --map user=FIELD" in fails(*given)
    assert "'usr' (did you mean 'user'?) is none of text" in fails(*given, "--map", "usr=q")
    assert "each role once" in fails(*given, "--map", "user=q,user=a")
    assert "each role once" in fails(*given, "--map", "user")
    assert "give text, or messages, or user and assistant" in fails(*given, "--map", "user=q")
    assert "--map must map names to names" in fails(*given, "--set", "map={user: 5}")
    with pytest.raises(SystemExit) as stop:
        main([*map(str, given), "--map", "user=q,assistant=a", "--for", "frequency"])
    assert not stop.value.code
    found = Statistics.load(tmp_path / "out").metadata["calibration"]
    assert found["map"] == {"user": "q", "assistant": "a"}
    assert f"note: {text}: read by --map" in capsys.readouterr().err


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, word + " ")
        else:
            yield name + word, command


def test_options_that_help_shows() -> None:
    found = {}
    for name, command in commands(typer.main.get_command(app)):
        shown = [p for p in command.params if not getattr(p, "hidden", False)]
        words = [max(p.opts, key=len) if p.opts[0][0] == "-" else p.opts[0].upper() for p in shown]
        found[name] = " ".join(words)
    assert found == VISIBLE


def test_settings_and_their_commands() -> None:
    known = settings_of(Recipe)
    assert {n: " ".join(s.about.commands) for n, s in known.items()} == SETTINGS


def test_every_setting_has_its_option_and_its_key(tmp_path: Path) -> None:
    """Shown or not, by its flag and in a file; the text says what the default is."""
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, its in settings_of(Recipe).items():
        assert its.about.help.strip(), name
        for command in its.about.commands:
            options = {o: p for p in known[command].params for o in p.opts}
            word = name if name == "model" else flag(name)
            assert (word in options) == its.about.option, (name, command)
    plain = {k: v for k, v in Recipe(experts=4).to_dict().items() if k not in TRUST}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(plain))
    assert load_recipe(file) == Recipe(experts=4)


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_is_short_and_says_where_the_rest_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "prune", "--help")
    assert "moe-fair settings" in text
    assert "--experts" in text
    assert "--trial-samples" not in text
    assert len(text.splitlines()) < 80


def test_settings_in_a_list_and_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "settings").splitlines()
    keys = [key_of(name) for name in SETTINGS]
    assert [line.split()[0] for line in lines][: len(keys)] == keys
    assert any("vision sparsify" in line for line in lines)
    assert "Calibration sequences" in next(x for x in lines if x.startswith("samples"))
    facts = json.loads(printed(capsys, "settings", "--json"))
    assert [f["name"] for f in facts][: len(keys)] == keys
    one, of_images = json.loads(printed(capsys, "settings", "repair", "--json"))
    assert of_images["commands"] == ["vision sparsify"]
    assert {"none", "refit", "distill"} <= one["choices"].keys()
    assert "least: 1" in printed(capsys, "settings", "batch-size")
    full = printed(capsys, "settings", "method")
    assert "reap " in full
    assert "arXiv 2510.13999" in full
    assert "never in a recipe" in printed(capsys, "settings", "allow_pickle")


def test_registries_say_what_each_choice_is() -> None:
    for name in ("method", "removal", "allocate", "repair"):
        found = choices(settings_of(Recipe)[name].about)
        assert found
        assert all(line for value, line in found.items() if value != "none"), name


def test_an_unknown_setting(fails: Fails) -> None:
    assert "no setting 'repiar' (did you mean 'repair'?)" in fails("settings", "repiar")


def test_set_is_the_option(capsys: pytest.CaptureFixture[str], statistics_folder: Path) -> None:
    ask = ["plan", statistics_folder, "--json"]
    own = printed(
        capsys, *ask, "--experts", 40, "--method", "fair", "--weights", "python=2,rust-docs=0.5"
    )
    assert own == printed(
        capsys, *ask, "--set", "experts=40", "--set", "method=fair", "--set",
        "weights={python: 2, rust-docs: 0.5}",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sampels=3"], "no setting 'sampels' (did you mean 'samples'?)"),
        (["samples"], "--set 'samples': write key=value"),
        (["samples=0"], "--samples 0 is below 1"),
        (["samples=many"], "--samples must be a whole number, not 'many'"),
        (["samples=010"], "can be read in two ways"),
        (["samples=[1"], "--set 'samples=[1' is not YAML that can be used"),
        (["samples=3", "--set", "samples=4"], "--set samples is given twice"),
        (["samples=3", "--samples", "3"], "--samples is given twice, once by --set"),
        (["dtype=float31"], "--dtype 'float31' (did you mean 'float32'?) is none of"),
        (["curves=reap"], "prune does not use curves; leave it out"),
    ],
)
def test_what_set_refuses(fails: Fails, tmp_path: Path, given: list[str], said: str) -> None:
    line = fails("prune", MODEL, "--experts", 40, "-o", tmp_path / "out", "--set", *given)
    assert said in line


def test_options_of_the_command_itself_are_not_set(fails: Fails) -> None:
    line = fails("eval", MODEL, "--tasks", "quick", "--set", "batch_size=4")
    assert "--set batch_size: give it as --batch-size here" in line
