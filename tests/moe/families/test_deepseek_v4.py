"""DeepSeek V4's hash layers, cut: everything that a family of the contract must pass.

`masking.masked` says independently what their tables shall name.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from collected import families
from flow import (
    DOMAINS,
    batches,
    check_counterfactual,
    check_cut,
    check_generation,
    check_naive,
    check_streaming,
    check_trial,
    kept_experts,
    original,
    summed,
)
from masking import masked, substitutes
from places import CALIBRATION, MODEL
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_fair.cli import main
from moe_fair.core.plan import Plan
from moe_fair.engines.resident import ResidentEngine
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.removal import RemovalLosses
from moe_fair.moe.surgery import cut
from moe_fair.moe.table_surgery import check_tables
from moe_fair.moe.token_table import remapped
from moe_fair.pipelines.verify import verify

pytestmark = pytest.mark.slow  # whole runs, by and large

HASH = [f"model.layers.{i}.mlp" for i in (0, 2)]
TABLE = "model.layers.0.ffn.gate.tid2eid"


def with_tables(model: Any) -> Any:
    """Every table names distinct experts at random."""
    g = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        gate = layer.mlp.gate
        if layer.mlp.is_hash:
            order = torch.rand(len(gate.tid2eid), gate.num_experts, generator=g).argsort(1)
            gate.tid2eid.copy_(order[:, : gate.top_k])
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("deepseek_v4") / "in"
    with_tables(tiny_model("deepseek_v4")).save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(str(folder), hash_layers="cut")


def test_the_blocks_are_those_that_are_asked_for(folder: Path, checkpoint: Checkpoint) -> None:
    plain = Checkpoint(str(folder))
    assert [b.layer for b in plain.blocks] == [1, 3]
    assert [b.layer for b in checkpoint.blocks] == [0, 1, 2, 3]
    assert plain.fingerprint.items() < checkpoint.fingerprint.items()
    # what a file says of it counts for nothing
    config = json.loads((folder / "config.json").read_text())
    assert not any("hash_layers" in k for k in config)


def test_a_config_file_does_not_say_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    config = {**json.loads(file.read_text()), "moe_fair_hash_layers": "cut"}
    file.write_text(json.dumps(config))
    assert [b.layer for b in Checkpoint(str(tmp_path / "in")).blocks] == [1, 3]


@pytest.mark.parametrize("count", [4, 5, 11])
def test_the_rule_equals_a_loop_over_tokens(count: int) -> None:
    g = torch.Generator().manual_seed(count)
    rows = torch.randn(12, 8, generator=g)
    rows[7] = 3 * rows[2]  # as near as can be, and alike
    rows[8] = rows[2]
    table = torch.rand(60, 12, generator=g).argsort(1)[:, :4].to(torch.int32)
    kept = sorted(torch.randperm(12, generator=g)[:count].tolist())
    got = remapped(table, kept, rows)
    want = substitutes(table.tolist(), kept, rows.tolist())
    assert got.dtype == table.dtype
    assert [[kept[i] for i in row] for row in got.tolist()] == want
    assert all(len(set(row)) == 4 for row in want)
    assert torch.equal(remapped(table, list(range(12)), rows), table)


def test_of_equally_near_experts_the_first_is_taken() -> None:
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [2, 2, 2]])
    # of 3: 4, then 0, 1 and 2 alike; 0 is named, 4 is gone too
    assert remapped(torch.tensor([[3, 0], [0, 3], [4, 3]]), [0, 1, 2], rows).tolist() == [
        [1, 0], [0, 1], [0, 1],
    ]  # fmt: skip


@pytest.mark.nightly
def test_a_vocabulary_as_published_takes_seconds() -> None:
    g = torch.Generator().manual_seed(0)
    table = torch.rand(129280, 256, generator=g).argsort(1)[:, :6].contiguous()
    new = remapped(table, list(range(0, 256, 2)), torch.randn(256, 64, generator=g))
    assert int(new.max()) == 127
    assert bool((new.sort(1).values.diff(dim=1) > 0).all())


def test_streaming_statistics_are_the_resident_ones(checkpoint: Checkpoint) -> None:
    check_streaming(checkpoint)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_statistics_equal_a_naive_loop(checkpoint: Checkpoint, implementation: str) -> None:
    check_naive(checkpoint, implementation)


@contextmanager
def cut_for_real(model: Any, kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside, the blocks are cut."""
    names = {n: n.rpartition(".") for n in kept}
    whole = {n: model.get_submodule(n) for n in kept}
    for name, (parent, _, last) in names.items():
        setattr(model.get_submodule(parent), last, copy.deepcopy(whole[name]))
    try:
        cut(model, kept)
        yield
    finally:
        for name, (parent, _, last) in names.items():
            setattr(model.get_submodule(parent), last, whole[name])


@pytest.mark.parametrize("without", [masked, pytest.param(cut_for_real, marks=pytest.mark.nightly)])
def test_without_each_expert(tmp_path: Path, without: Any) -> None:
    kinds = {"mlp_layer_types": ["moe", "hash_moe"], "num_hidden_layers": 2}
    with_tables(tiny_model("deepseek_v4", **kinds)).save_pretrained(tmp_path)
    check_counterfactual(Checkpoint(str(tmp_path), hash_layers="cut"), without=without)


def test_with_layers_on_disk_the_tables_are_the_same(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    where = tmp_path / "map.yaml"
    where.write_text('"": cpu\n"model.layers.0": disk\n"model.layers.1": disk\n')
    found = []
    for place in (None, str(where)):
        model = checkpoint.load("float32", "cpu", place)
        blocks = find_blocks(model)
        wanted = families("counterfactual")
        with ExpertCollector(blocks, checkpoint.groups, DOMAINS, wanted) as collector:
            ResidentEngine(model, checkpointing=True).run(batches(), collector)
        found.append(collector.statistics())
    for name in HASH:
        a, b = (s.sums[name]["removed_error"] for s in found)
        assert torch.equal(a, b)
        assert a.max() > 0


def test_trial_losses_are_those_of_tables_replaced_by_hand(checkpoint: Checkpoint) -> None:
    check_trial(checkpoint)


def test_removal_losses_are_those_of_tables_replaced_by_hand(checkpoint: Checkpoint) -> None:
    model = original(checkpoint)
    text = batches()
    sets = {HASH[0]: [[3], [0, 5]], HASH[1]: [[1, 2, 7]]}
    whole = summed(model)
    for name, changes in RemovalLosses(model, text, lambda *a: a[-1]).measure(sets):
        for r, gone in enumerate(sets[name]):
            with masked(model, {name: [e for e in range(12) if e not in gone]}):
                want = float((summed(model) - whole).sum())
            assert abs(float(changes[:, r].sum()) - want) <= 1e-4
            assert want != 0


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "unequal"])
def test_cut_saved_and_loaded(checkpoint: Checkpoint, tmp_path: Path, uniform: bool) -> None:
    loaded = check_cut(checkpoint, tmp_path / "out", uniform)
    assert (type(loaded).__name__ == "DeepseekV4ForCausalLM") == uniform
    assert (tmp_path / "out" / "modeling_moe_fair.py").exists() != uniform
    check_generation(loaded)


@pytest.mark.parametrize(
    "dtype", [torch.int32, pytest.param(torch.int64, marks=pytest.mark.nightly)]
)
def test_a_uniform_result_is_stock(checkpoint: Checkpoint, tmp_path: Path, dtype: Any) -> None:
    """In the published data type of the table too; the count in the config is the new one."""
    source = checkpoint
    if dtype != torch.int64:
        shutil.copytree(checkpoint.path, tmp_path / "in")
        file = tmp_path / "in" / "model.safetensors"
        tensors = load_file(file)
        tensors = {n: t.to(dtype) if "tid2eid" in n else t for n, t in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
        source = Checkpoint(str(tmp_path / "in"), hash_layers="cut")
    kept = kept_experts(source, uniform=True)
    out = tmp_path / "out"
    write_model(source, kept, out)
    assert load_file(out / "model.safetensors")[TABLE].dtype == dtype
    loaded, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert loaded.config.n_routed_experts == 6
    whole = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    ids = batches()[0].input_ids
    with torch.no_grad(), masked(whole, kept):
        want = whole(input_ids=ids).logits
    with torch.no_grad():
        got = loaded(input_ids=ids).logits
        untouched = whole(input_ids=ids).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (got - untouched).abs().max() > 1e-3


def test_a_result_is_cut_again_with_either_choice(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Layers that an earlier run has cut stay as it left them, or are cut further."""
    write_model(checkpoint, kept_experts(checkpoint, uniform=False), tmp_path / "once")
    once = Checkpoint(str(tmp_path / "once"), hash_layers="cut")
    assert [b.num_experts for b in once.blocks] == [6, 7, 6, 7]
    check_tables(once)
    for choice, want in (("keep", [6, 5, 6, 5]), ("cut", [5] * 4)):
        source = once.with_hash_layers(choice)
        kept = {b.name: list(range(5)) for b in source.blocks}
        out = tmp_path / choice
        write_model(source, kept, out)
        twice = Checkpoint(str(out), hash_layers="cut")
        assert [b.num_experts for b in twice.blocks] == want
        assert (out / "modeling_moe_fair.py").exists() == (choice == "keep")
        assert find_blocks(twice.load("float32", "cpu"))


def test_tables_that_cannot_be_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    source = Checkpoint(str(tmp_path / "in"), hash_layers="cut")

    def written(table: Any) -> Checkpoint:
        new = {**tensors, TABLE: table} if table is not None else dict(tensors)
        if table is None:
            del new[TABLE]
        save_file(new, file, metadata={"format": "pt"})
        return Checkpoint(source.model, hash_layers="cut")

    far = tensors[TABLE].clone()
    far[3, 1] = 12
    for table, words in (
        (far, r"tid2eid names experts beyond 0\.\.11"),
        (tensors[TABLE].float(), r"tid2eid is F32 \[128, 4\], expected \[128, 4\] in one of I64"),
        (tensors[TABLE][:100].contiguous(), r"tid2eid is I64 \[100, 4\], expected \[128, 4\]"),
        (None, r"hold no model\.layers\.0\.mlp\.gate\.tid2eid"),
    ):
        with pytest.raises(ValueError, match=words):
            check_tables(written(table))


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer."""
    folder = tmp_path_factory.mktemp("readable") / "in"
    words = len(AutoTokenizer.from_pretrained(MODEL))
    with_tables(tiny_model("deepseek_v4", vocab_size=words)).save_pretrained(folder)
    for file in MODEL.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


TEXT = ("-c", CALIBRATION, "--samples", 8, "--length", 32)


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 0


@pytest.mark.nightly
def test_statistics_and_plans_are_of_one_choice(readable: Path, tmp_path: Path, fails: Any) -> None:
    stats, plan, out = tmp_path / "stats", tmp_path / "plan.json", tmp_path / "out"
    run("calibrate", readable, "-o", stats, "--hash-layers", "cut", "--no-taylor",
        "--no-counterfactual", *TEXT)  # fmt: skip
    run("plan", stats, "--experts", 6, "--method", "reap", "-o", plan)
    assert Plan.load(plan).recipe["hash_layers"] == "cut"
    assert len(Plan.load(plan).groups) == 4
    for given in (("--stats", stats, "--experts", 6, "--method", "reap"), ("--plan", plan)):
        for other in ((), ("--hash-layers", "keep")):
            line = fails(
                "prune", readable, "-o", out, *given, *other, "--repair", "none", "--length", 32
            )
            assert "made with --hash-layers cut" in line
            assert "--hash-layers keep is asked" in line
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("hash_layers: keep\nexperts: 6\nmethod: reap\n")
    assert "made with --hash-layers cut" in fails("plan", stats, "--recipe", recipe)
    line = fails("prune", readable, "-o", out, "--hash-layers", "cut", "--reduce", "merge",
                 "--experts", 6, *TEXT)  # fmt: skip
    assert "does not lead to merged experts" in line
    assert not out.exists()
    run("prune", readable, "-o", out, "--plan", plan, "--hash-layers", "cut", "--repair", "none",
        "--length", 32)  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(out).config.n_routed_experts == 6


def test_of_a_model_without_such_layers_nothing_is_asked(tmp_path: Path, fails: Any) -> None:
    given = ("-o", tmp_path / "out", "--hash-layers", "cut", *TEXT)
    line = fails("prune", MODEL, "--experts", 40, *given)
    assert "--hash-layers cut: none of its layers looks experts up by token id" in line
    assert "--hash-layers cut: none" in fails("calibrate", MODEL, *given)
    assert "--hash-layers cut: none" in fails("oracle", MODEL, *given)
    line = fails("prune", MODEL, "--experts", 40, "-o", tmp_path / "out", "--hash-layers", "cuts")
    assert "--hash-layers 'cuts' (did you mean 'cut'?) is none of keep, cut" in line
    assert not list(tmp_path.iterdir())


def test_a_changed_table_does_not_verify(readable: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("prune", readable, "-o", out, "--experts", 6, "--method", "reap", "--repair", "none",
        "--hash-layers", "cut", *TEXT)  # fmt: skip
    found = verify(out, Checkpoint(str(readable)))
    assert found.ok, found.wrong
    assert "2 tables of token ids name the remaining experts" in found.checks[-1].detail
    file = out / "model.safetensors"
    tensors = load_file(file)
    row = tensors[TABLE][9]
    for wrong, words in ((row.roll(1), "does not name the remaining"), (row + 6, "beyond 0..5")):
        tensors[TABLE][9] = wrong
        save_file(tensors, file, metadata={"format": "pt"})
        found = verify(out, Checkpoint(str(readable)), hashes=False)
        assert words in found.wrong


def test_by_the_command(readable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the defaults, counts differ between layers; the loss is measured and all is verified."""
    out = tmp_path / "out"
    run("prune", readable, "-o", out, "--ratio", 0.25, "--hash-layers", "cut",
        "--heldout", CALIBRATION, "--heldout-samples", 4, *TEXT)  # fmt: skip
    said = "".join(capsys.readouterr())
    assert "2 tables of token ids name the remaining experts" in said
    plan = Plan.load(out / "moe_fair" / "plan.json")
    assert [g.layer for g in plan.groups] == [0, 1, 2, 3]
    assert sum(len(g.kept) for g in plan.groups) == 36
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert [layer.mlp.gate.weight.shape[0] for layer in model.model.layers] == [
        len(g.kept) for g in plan.groups
    ]
    run("verify", out, "--against", readable)
