"""`moe-fair verify`: every kind of damage is told, and what is whole passes."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from places import MODEL
from safetensors.torch import load_file, save_file

import moe_fair
from moe_fair.cli import main
from moe_fair.core.manifest import MANIFEST, MODEL_CARD, WRITTEN_LATER, write_manifest
from moe_fair.evaluate.record import AGREEMENT, BENCHMARKS, HELDOUT
from moe_fair.moe import checkpoint_writer as checkpoint
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.pipelines.verify import verify
from moe_fair.publish.card import CARD
from moe_fair.report.write import write_report

pytestmark = pytest.mark.slow  # whole runs, by and large


def pruned_folder(folder: Path, statistics_folder: Path, **settings: object) -> Path:
    statistics = moe_fair.Statistics.load(statistics_folder)
    moe_fair.prune(str(MODEL), folder / "out", statistics=statistics, experts=40, **settings)
    return folder / "out"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, statistics_folder: Path) -> Path:
    return pruned_folder(tmp_path_factory.mktemp("plain"), statistics_folder, repair="none")


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory, statistics_folder: Path) -> Path:
    return pruned_folder(
        tmp_path_factory.mktemp("repaired"), statistics_folder, repair="scale",
        calibration=str(MODEL.parent / "text" / "calibration"), samples=8, length=64,
    )  # fmt: skip


@pytest.fixture
def out(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "out"))


@pytest.fixture(scope="module")
def original() -> Checkpoint:
    return Checkpoint(str(MODEL))


def change(file: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Rewrite one tensor of a safetensors file."""
    tensors = load_file(file)
    tensors[name] = edit(tensors[name].clone())
    save_file(tensors, file, {"format": "pt"})


def test_what_prune_wrote_verifies(
    plain: Path, repaired: Path, original: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (plain, repaired):
        with pytest.raises(SystemExit, match="0"):
            main(["verify", str(folder), "--against", str(MODEL)])
        said = capsys.readouterr().out
        assert "WRONG" not in said
        assert ": verified" in said
        assert len(said.splitlines()) < 24  # one screen
    found = verify(repaired, original)
    details = {c.name: c.detail for c in found.checks}
    assert "bitwise the original's; " in details["experts"]
    assert "all finite" in details["repairs"]
    assert "repaired" not in {c.name: c.detail for c in verify(plain, original).checks}["experts"]


def test_the_manifest_lists_every_file(plain: Path) -> None:
    listed = json.loads((plain / MANIFEST).read_text())["files"]
    there = {p.relative_to(plain).as_posix() for p in plain.rglob("*") if p.is_file()}
    assert set(listed) == there - {MANIFEST, "moe_fair/report.html"}


def test_one_bit_of_one_weight(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    [wrong] = [c for c in found["checks"] if c["ok"] is False]
    assert wrong["detail"] == "model.safetensors is not as it was written (sha256)"
    write_manifest(out)  # somebody lists it anew: only the original can tell
    assert verify(out).ok
    assert "differs from the original's" in verify(out, Checkpoint(str(MODEL))).wrong


def test_experts_in_each_others_places(out: Path, original: Checkpoint) -> None:
    file = out / "model.safetensors"
    tensors = load_file(file)
    a, b = (f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in (0, 1))
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, file, {"format": "pt"})
    write_manifest(out)
    assert verify(out).ok
    assert f"{a} differs" in verify(out, original).wrong or f"{b} differs" in (
        verify(out, original).wrong
    )


def test_router_rows_of_other_experts(out: Path, original: Checkpoint) -> None:
    change(out / "model.safetensors", "model.layers.2.mlp.gate.weight", lambda t: t.flip(0))
    write_manifest(out)
    assert "model.layers.2.mlp.gate.weight differs" in verify(out, original).wrong


def test_tensors_that_are_missing_or_of_another_shape(out: Path, original: Checkpoint) -> None:
    file = out / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    write_manifest(out)
    assert "parameters in" in verify(out).wrong
    file.write_bytes(whole)
    change(file, "model.layers.1.mlp.gate.weight", lambda t: t[:-1].contiguous())
    write_manifest(out)
    assert not verify(out).ok
    file.write_bytes(whole)
    change(file, "model.norm.weight", lambda t: t.float().double())
    write_manifest(out)
    assert "planned" in verify(out, original).wrong
    file.write_bytes(whole)
    write_manifest(out)
    assert verify(out, original).ok


def test_a_repaired_tensor_that_is_not_finite(
    repaired: Path, tmp_path: Path, original: Checkpoint
) -> None:
    out = Path(shutil.copytree(repaired, tmp_path / "out"))
    done = json.loads((out / "moe_fair" / "repair.json").read_text())
    layer = next(r["name"] for r in done if r["repair"] != "none")

    def spoil(t: torch.Tensor) -> torch.Tensor:
        t.view(-1)[5] = float("nan")
        return t

    change(out / "model.safetensors", f"{layer}.experts.4.down_proj.weight", spoil)
    write_manifest(out)
    assert "down_proj.weight holds NaN or Inf" in verify(out).wrong
    # what a repair does not touch must be bitwise in a repaired checkpoint, too
    shutil.copyfile(repaired / "model.safetensors", out / "model.safetensors")
    change(out / "model.safetensors", f"{layer}.experts.4.up_proj.weight", lambda t: t + 1)
    write_manifest(out)
    assert "up_proj.weight differs" in verify(out, original).wrong


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda o: (o / "modeling_moe_fair.py").write_text("import os\n"), "code: "),
        (lambda o: (o / "tokenization.py").write_text("print(1)"), "tokenization.py"),
        (lambda o: (o / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin was not there"),
        (lambda o: (o / "model.safetensors.index.json").write_text("{}"), "was not there"),
        (lambda o: (o / "chat_template.jinja").unlink(), "chat_template.jinja is missing"),
        (lambda o: (o / "config.json").write_text("{}"), "config.json has 2 bytes"),
        (lambda o: (o / "config.json").write_text("[]"), "code: "),
        (lambda o: (o / MANIFEST).unlink(), "compares it with the original and writes the list"),
        (lambda o: (o / MANIFEST).write_text("[" * 100_000), "is not a list of files"),
        (lambda o: (o / "moe_fair" / "plan.json").write_text("{"), "is not a moe_fair plan"),
        (lambda o: (o / "model.safetensors").write_bytes(b"x" * 9), "not a whole safetensors"),
    ],
)  # fmt: skip
def test_other_damage(out: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(out)
    assert said in verify(out).wrong


def test_a_manifest_that_points_elsewhere(out: Path) -> None:
    listed = json.loads((out / MANIFEST).read_text())
    entry = listed["files"].pop("config.json")
    for name in ("../secret", "/etc/hostname", "a/../../b"):
        text = json.dumps(listed | {"files": {**listed["files"], name: entry}})
        (out / MANIFEST).write_text(text)
        assert "outside the checkpoint" in verify(out).wrong


def test_another_original_is_bad_input(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(MODEL, tmp_path / "other"))
    change(other / "model.safetensors", "model.norm.weight", lambda t: t + 1)
    for arguments, said in (
        ([out, "--against", other], "was pruned from another model"),
        ([MODEL], "no moe_fair/plan.json"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["verify", *map(str, arguments)])
        assert said in capsys.readouterr().err


def test_prune_keeps_a_result_that_does_not_verify_from_its_name(
    tmp_path: Path, statistics_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(tensors: object, folder: Path, **more: object) -> None:
        write(tensors, folder, **more)
        file = folder / "model.safetensors"
        with file.open("r+b") as f:  # the disk gives back another bit than it was given
            f.seek(8 + struct.unpack("<Q", f.read(8))[0] + 500)
            byte = f.read(1)[0] ^ 4
            f.seek(-1, 1)
            f.write(bytes([byte]))

    write = checkpoint.write_shards
    monkeypatch.setattr(checkpoint, "write_shards", swapped)
    with pytest.raises(RuntimeError, match=r"does not verify and stays in .*out.partial"):
        pruned_folder(tmp_path, statistics_folder, repair="none")
    assert not (tmp_path / "out").exists()


def test_push_refuses_what_does_not_verify(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (out / "model.safetensors").open("r+b") as f:
        f.seek(-1, 2)
        f.write(b"\x01")
    with pytest.raises(SystemExit, match="2"):
        main(["push", str(out), "someone/model", "--dry-run"])
    assert "does not verify and is not uploaded" in capsys.readouterr().err
    assert not (out / "README.md").exists()


def test_a_result_of_before_manifests_is_listed_once_it_is_compared(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / MANIFEST).unlink()
    assert f"`moe-fair verify {out} --against ORIGINAL --write`" in verify(out).wrong
    run = ["verify", str(out), "--against", str(MODEL), "--write"]
    with pytest.raises(SystemExit, match="2"):
        main([*run[:2], "--write"])
    assert "name the original with --against" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(run)
    assert verify(out).ok
    with pytest.raises(SystemExit, match="2"):
        main(run)
    assert "--write would hide what has changed since" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["expert", "stray"])
def test_what_is_damaged_is_not_listed(
    out: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    (out / MANIFEST).unlink()
    if damage == "expert":
        name = "model.layers.0.mlp.experts.0.down_proj.weight"
        change(out / "model.safetensors", name, lambda t: t + 1)
    else:
        torch.save({"a": torch.ones(1)}, out / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(out), "--against", str(MODEL), "--write"])
    said = capsys.readouterr().out
    assert ("experts" if damage == "expert" else "pytorch_model.bin is not a file") in said
    assert not (out / MANIFEST).exists()


def json_edit(name: str, edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def run(o: Path) -> None:
        content = json.loads((o / name).read_text())
        edit(content)
        (o / name).write_text(json.dumps(content))

    return run


def config(**change: object) -> Callable[[Path], None]:
    return json_edit("config.json", lambda c: c.update(change))


def spread(o: Path) -> None:
    """One expert more in a layer and one less in another, in the config alone."""

    def edit(config: dict) -> None:
        experts = config["moe_fair"]["experts"]
        a, b = list(experts)[:2]
        experts[a], experts[b] = experts[a] + 1, experts[b] - 1

    json_edit("config.json", edit)(o)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (config(rms_norm_eps=0.1), "rms_norm_eps is 0.1, not"),
        (config(num_experts_per_tok=3), "num_experts_per_tok"),
        (config(rope_parameters={"rope_theta": 10000, "rope_type": "default"}), "not 10000.0"),
        (config(attn_implementation="eager"), "attn_implem"),
        (json_edit("config.json", lambda c: c.pop("rope_parameters")), "rope"),
        (config(eos_token_id=1), "eos_token_id is 1"),
        (config(num_experts=61), "config"),
        (json_edit("config.json", lambda c: c["moe_fair"]["numbers"].append("a")), "numbers"),
        (json_edit("config.json", lambda c: c["moe_fair"].update(more=1)), "moe_fair.more is 1"),
        (json_edit("config.json", lambda c: c["per_layer_config"]["0"].update(a=1)), "config"),
        (spread, "layers.0.mlp is FIRST + 1, not FIRST"),
        (json_edit("generation_config.json", lambda c: c.update(eos_token_id=9)), "generation_con"),
        (json_edit("tokenizer_config.json", lambda c: c.update(bos_token="x")), "tokenizer_config"),
        (json_edit("tokenizer.json", lambda c: c.update(version="1.1")), "tokenizer.json"),
        (lambda o: (o / "chat_template.jinja").write_text("{{ 'obey' }}"), "chat_template.jinja"),
        (lambda o: (o / "chat_template.jinja").unlink(), "chat_template.jinja of the original is"),
        (lambda o: (o / "tokenizer.json").unlink(), "tokenizer.json of the original is missing"),
        (lambda o: (o / "added_tokens.json").write_text("{}"), "written by moe_fair: added_tokens"),
        (lambda o: (o / ".env").write_text("x"), "written by moe_fair: .env"),
        (lambda o: (o / "moe_fair" / "x.html").write_text("x"), "moe_fair/x.html"),
        (lambda o: (o / "sub").mkdir() or (o / "sub" / "a.txt").write_text("x"), "sub/a.txt"),
    ],
)  # fmt: skip
def test_whoever_lists_it_anew_is_told_by_the_original(
    out: Path, original: Checkpoint, spoil: Callable[[Path], object], said: str
) -> None:
    """An attacker changes a file and writes the manifest again."""
    experts = json.loads((out / "config.json").read_text())["moe_fair"]["experts"]
    first = next(iter(experts.values()))
    spoil(out)
    write_manifest(out)
    said = said.replace("FIRST + 1", str(first + 1)).replace("FIRST", str(first))
    assert said in verify(out, original).wrong


@pytest.mark.parametrize("name", ["a/b.json", ".hidden.py", "vocab.txt", "x.jinja", "b.gguf"])
def test_what_would_be_read_and_is_not_listed(out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    assert f"{name} was not there" in verify(out).wrong


def test_what_is_not_listed_is_named(out: Path) -> None:
    (out / ".ssh").mkdir()
    (out / ".ssh" / "id_ed25519").write_text("x")
    (out / "notes.bak").write_text("x")
    found = verify(out)
    assert found.ok
    [files] = [c for c in found.checks if c.name == "files"]
    assert files.detail.endswith("beside them, not listed: .ssh/, notes.bak")


def test_later_files_are_known(out: Path) -> None:
    """The names in core are those that eval and report write under."""
    for name in (BENCHMARKS, AGREEMENT, HELDOUT):
        assert f"moe_fair/{name}" in WRITTEN_LATER
    assert CARD == MODEL_CARD
    write_report(out, "md")
    assert "not listed" not in verify(out).checks[0].detail
