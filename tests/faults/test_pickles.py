"""Pickled weights: refused unless allowed, and then read without running anything in them."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from places import CALIBRATION, HELDOUT, MODEL
from safetensors.torch import load_file
from test_faults import Payload
from transformers import AutoModelForCausalLM, ResNetConfig, ResNetForImageClassification

from moe_fair.cli import main
from moe_fair.core.recipe import Recipe
from moe_fair.engines import pickles
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.vision.source import open_source

TEXT = ["-c", str(CALIBRATION), "--samples", "4", "--length", "16"]
QUICK = ["--method", "reap", "--no-taylor", "--no-counterfactual", "--repair", "none"]
Fails = Callable[..., str]


def plain(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """The reference model with its weights in two pickles, as older checkpoints have them."""
    folder = tmp_path / "pickled"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = list(plain(MODEL).items())
    where = {}
    for i, part in enumerate((tensors[:50], tensors[50:]), 1):
        name = f"pytorch_model-{i:05d}-of-00002.bin"
        torch.save(dict(part), folder / name)
        where |= dict.fromkeys(dict(part), name)
    (folder / pickles.PICKLE_INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories go."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([str(a) for a in arguments])


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", ["resident", pytest.param("streaming", marks=pytest.mark.nightly)]
)
def test_the_result_is_that_of_the_same_weights_in_safetensors(
    pickled: Path, tmp_path: Path, temporary: Path, engine: str
) -> None:
    settings = ["--experts", 40, *TEXT, "--engine", engine, *QUICK]
    run("prune", pickled, *settings, "--allow-pickle", "-o", tmp_path / "a")
    run("prune", MODEL, *settings, "-o", tmp_path / "b")
    a, b = ({t: v for f in (tmp_path / x).glob("*.safetensors") for t, v in load_file(f).items()}
            for x in "ab")  # fmt: skip
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not list((tmp_path / "a").rglob("*.bin*"))
    assert "allow_pickle" not in (tmp_path / "a" / "moe_fair" / "recipe.yaml").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True)
    assert loaded.num_parameters() < sum(t.numel() for t in plain(MODEL).values())
    run("verify", tmp_path / "a", "--against", pickled, "--allow-pickle")
    assert list(temporary.iterdir()) == []  # nothing converted stays behind


@pytest.mark.slow
def test_every_command_that_opens_a_model_refuses_and_can_be_allowed(
    fails: Fails,
    pickled: Path,
    tmp_path: Path,
    statistics_folder: Path,
) -> None:
    said = "is a pickle, which can run code when read: --allow-pickle reads its tensors"
    run("prune", MODEL, "--stats", statistics_folder, "--experts", 40, "--repair", "none", "-o",
        tmp_path / "cut")  # fmt: skip
    text = ["--heldout", HELDOUT, "--heldout-samples", 2, "--length", 32]
    commands = [
        ["calibrate", pickled, *TEXT, *QUICK[2:4], "-o", tmp_path / "stats"],
        ["prune", pickled, "--experts", 40, *TEXT, "-o", tmp_path / "out"],
        ["eval", tmp_path / "cut", "--baseline", pickled, "--agreement", *text],
        ["verify", tmp_path / "cut", "--against", pickled],
    ]
    for command in [*commands, ["oracle", pickled, *TEXT, "-o", tmp_path / "oracle"]]:
        assert said in fails(*command), command
    for command in (commands[0], commands[2]):
        run(*command, "--allow-pickle")
    assert not (tmp_path / "out").exists()


def test_safetensors_are_preferred(pickled: Path, tmp_path: Path) -> None:
    """Where both are there the pickle is not even opened."""
    shutil.copy(MODEL / "model.safetensors", pickled)
    (pickled / "pytorch_model-00001-of-00002.bin").write_bytes(
        pickle.dumps(Payload(tmp_path / "x"))
    )
    source = Checkpoint(str(pickled), allow_pickle=True)
    assert source.path == source.home == pickled
    assert not (tmp_path / "x").exists()


class Calls:
    """Unpickled, it calls something harmful with arguments of its own."""

    def __init__(self, what: Callable[..., object], *arguments: object) -> None:
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.what, self.arguments


def harmful(folder: Path) -> list[tuple[str, object]]:
    """Pickles that do something when they are unpickled in the usual way."""
    ran = folder / "ran"
    return [
        ("mkdir", Payload(ran)),
        ("eval", Calls(eval, f"__import__('os').mkdir({str(ran)!r})")),
        ("exec", Calls(exec, f"import os; os.mkdir({str(ran)!r})")),
        ("getattr", Calls(getattr, "", "join")),
        ("import", Calls(__import__, "this")),
        ("inside", {"model.embed_tokens.weight": torch.ones(2), "x": Payload(ran)}),
        ("state", {"x": Calls(torch.load, str(folder / "other.bin"))}),
    ]


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "bare"])
@pytest.mark.parametrize("index", range(7))
def test_a_pickle_that_would_run_code_is_refused(
    fails: Fails,
    pickled: Path,
    tmp_path: Path,
    temporary: Path,
    index: int,
    archive: bool,
) -> None:
    name, content = harmful(tmp_path)[index]
    for f in pickled.glob("*.bin*"):
        f.unlink()
    if archive:
        torch.save(content, pickled / "pytorch_model.bin")
    else:
        (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    run = ["prune", pickled, "--experts", 40, *TEXT, "--allow-pickle", "-o", tmp_path / "out"]
    said = fails(*run)
    assert "pytorch_model.bin: it asks for" in said, said
    assert "was refused: a pickle can run any code; get this model as safetensors" in said
    assert "weights_only=False" not in said  # torch's own advice
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    assert list(temporary.iterdir()) == []
    if name == "mkdir":  # the payload works: unpickled, it would have run
        with io.BytesIO(pickle.dumps(content)) as f:
            pickle.load(f)
        assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(2)], "holds no table of tensors"),
        ({}, "holds no table of tensors"),
        ({"a": 5}, "'a' is no plain tensor but a int"),
        ({"model": {"a": torch.ones(2)}}, "'model' is no plain tensor but a dict"),
        ({3: torch.ones(2)}, "3 is no plain tensor"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is no plain tensor"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "data type torch.complex128"),
        ({"a": torch.ones(1).expand(10**6, 10**7)}, "GB are free in"),
    ],
)  # fmt: skip
def test_tables_that_are_no_weights(
    tmp_path: Path, temporary: Path, content: object, said: str
) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as found:
        pickles.convert(tmp_path)
    assert said in str(found.value)
    assert list(temporary.iterdir()) == []


def test_damaged_pickles(tmp_path: Path, temporary: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(10.0)}, file)
    whole = file.read_bytes()
    for cut in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cannot read it .*download or copy it again"):
            pickles.convert(tmp_path)
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("archive/data.pkl", b"\x80\x02K\x05.")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        pickles.convert(tmp_path)
    assert list(temporary.iterdir()) == []


def test_indices_of_pickles(pickled: Path, temporary: Path) -> None:
    index = pickled / pickles.PICKLE_INDEX
    weights = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weights | {"x": "../x.bin"}}))
    with pytest.raises(ValueError, match="outside the checkpoint"):
        Checkpoint(str(pickled), allow_pickle=True).path  # noqa: B018
    index.write_text(json.dumps({"weight_map": weights | {"x": "lost.bin"}}))
    with pytest.raises(ValueError, match=r"lost\.bin is missing"):
        Checkpoint(str(pickled), allow_pickle=True).path  # noqa: B018
    index.write_text(json.dumps({"weight_map": weights | {"x": "more.bin"}}))
    torch.save({next(iter(weights)): torch.ones(1)}, pickled / "more.bin")
    with pytest.raises(ValueError, match="lies in two of its pickles"):
        Checkpoint(str(pickled), allow_pickle=True).path  # noqa: B018
    assert list(temporary.iterdir()) == []


def test_every_bit_arrives(tmp_path: Path) -> None:
    """All data types, tensors that share memory, slices of others, of no dimension, and empty."""
    base = torch.randn(6, 4)
    tensors = {
        **{str(t): torch.randint(0, 2, (3, 5)).to(t) for t in pickles.NAMES},
        "tied.a": base, "tied.b": base, "turned": base.T, "part": base[2:4, 1:],
        "number": torch.tensor(3.5), "none": torch.zeros(0, 4), "nan": torch.tensor([float("nan")]),
    }  # fmt: skip
    for zipped in (True, False):
        if not zipped:  # a form in which torch itself cannot bring these back
            tensors = {n: t for n, t in tensors.items() if "float8" not in n}
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        home = pickles.convert(tmp_path)
        found = load_file(home / "model.safetensors")
        assert found.keys() == tensors.keys()
        for name, t in tensors.items():
            assert found[name].dtype == t.dtype
            assert found[name].shape == t.shape
            a, b = (x.contiguous().view(-1).view(torch.uint8) for x in (found[name], t))
            assert torch.equal(a, b), name
        shutil.rmtree(home)


@pytest.mark.parametrize("name", ["trust_remote_code", "allow_pickle"])
def test_a_recipe_file_cannot_allow_it(fails: Fails, tmp_path: Path, name: str) -> None:
    """It may come with the model."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {MODEL}\nexperts: 40\n{name}: true\n")
    said = fails("prune", "--recipe", recipe, *TEXT, "-o", tmp_path / "out")
    flag = "--" + name.replace("_", "-")
    assert f"{name} is not taken from a file" in said
    assert f"allow it with {flag} on the command line" in said
    assert name in fails("vision", "prune", "--recipe", recipe, "-o", tmp_path / "out")
    recipe.write_text(Recipe(model=str(MODEL), experts=40, **{name: True}).to_yaml())
    assert name not in recipe.read_text()  # what prune writes beside a result can be run again


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A small ResNet whose weights are a pickle."""
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4
    )
    folder = tmp_path / "resnet"
    ResNetForImageClassification(config).save_pretrained(folder)
    torch.save(plain(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(tmp_path / "plain.safetensors")
    return folder


def test_image_classifiers_likewise(fails: Fails, classifier: Path, tmp_path: Path) -> None:
    run = [
        "vision",
        "prune",
        classifier,
        "--data",
        "digits",
        "--ratio",
        0.5,
        "-o",
        tmp_path / "out",
    ]
    assert "pytorch_model.bin is a pickle, which can run code when read" in fails(*run)
    model = open_source(str(classifier), allow_pickle=True).model
    for name, t in load_file(tmp_path / "plain.safetensors").items():
        assert torch.equal(model.state_dict()[name], t)
    torch.save({"a": Payload(tmp_path / "ran")}, classifier / "pytorch_model.bin")
    assert "it asks for posix.mkdir" in fails(*run, "--allow-pickle")
    assert not (tmp_path / "ran").exists()


def test_a_classifier_without_its_head_is_refused(classifier: Path, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "plain.safetensors")
    torch.save({n: t for n, t in tensors.items() if "classifier" not in n},
               classifier / "pytorch_model.bin")  # fmt: skip
    with pytest.raises(ValueError, match=r"hold no classifier\.1\.bias .*random numbers"):
        open_source(str(classifier), allow_pickle=True)


def test_weights_of_a_function_likewise(tmp_path: Path) -> None:
    spec = "moe_fair.vision.zoo:vgg_small(4)"
    model = open_source(spec).model
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt is a pickle"):
        open_source(spec, weights=tmp_path / "w.pt")
    again = open_source(spec, weights=tmp_path / "w.pt", allow_pickle=True).model
    for name, t in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], t)
