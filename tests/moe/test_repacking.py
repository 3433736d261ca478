"""New values of packed weights: packed by the scheme, judged as stored, and written as judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flow import some
from packing import COMPRESSED, SCHEMES, compressed, fp8, gptq, modelopt_nvfp4, nvfp4
from safetensors import safe_open
from safetensors.torch import save_file
from test_repair import batches
from torch import Tensor

from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.packing import PackedWeight
from moe_fair.engines.packing.fp4 import pack_bytes, unpack_bytes
from moe_fair.engines.packing.words import pack_words, unpack_words
from moe_fair.engines.stored_values import read_tensor
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.engine_choice import start_layerwise
from moe_fair.moe.overlay import ORIGINAL, original_tensors
from moe_fair.moe.repacking import PACKED, Repacking, StoredLayer
from moe_fair.moe.repair import Repairer
from moe_fair.moe.surgery import cut
from moe_fair.pipelines.companions import check_files_beside

pytestmark = pytest.mark.slow  # whole runs, by and large

FULL = ("fp8", "W4A16")  # of the schemes those tried in quick runs


def _slow(names: Any) -> list[Any]:
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(n, marks=marks[n in FULL]) for n in names]


@pytest.fixture(scope="module", params=_slow(SCHEMES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("packed") / request.param / "model"
    folder.parent.mkdir()
    SCHEMES[request.param](folder)
    return Checkpoint(str(folder))


def _kept(source: Checkpoint) -> dict[str, list[int]]:
    return {b.name: some(b, i, True) for i, b in enumerate(source.blocks)}


def _first(source: Checkpoint) -> tuple[PackedWeight, dict[str, Tensor], Tensor]:
    assert source.packing is not None
    weight = next(iter(source.packing.weights.values()))
    like = {role: read_tensor(t) for role, t in weight.parts.items()}
    return weight, like, source.packing.scheme.unpack(weight, like)


def test_what_has_not_changed_keeps_its_bytes(source: Checkpoint) -> None:
    weight, like, values = _first(source)
    assert source.packing is not None
    again = source.packing.pack(weight, values, like)
    assert all(torch.equal(again[r].view(torch.uint8), t.view(torch.uint8)) for r, t in like.items()
               if t.dim())  # fmt: skip


def test_new_values_come_near_and_keep_types_and_shapes(source: Checkpoint) -> None:
    weight, like, values = _first(source)
    assert source.packing is not None
    g = torch.Generator().manual_seed(1)
    wanted = values.float() + 0.1 * values.float().std() * torch.randn(values.shape, generator=g)
    new = source.packing.pack(weight, wanted, like)
    assert {r: (t.dtype, t.shape) for r, t in new.items()} == {
        r: (t.dtype, t.shape) for r, t in like.items()
    }
    got = source.packing.scheme.unpack(weight, new).float()
    relative = float((got - wanted).norm() / wanted.norm())
    said = source.published.get("quantization_config", {})
    assert relative < {2: 0.6}.get(said.get("bits"), 0.15)


@pytest.mark.parametrize("name", ["W4A16", "NVFP4A16", "ModelOpt NVFP4"])
def test_weights_that_hardly_moved_keep_their_codes(name: str, tmp_path: Path) -> None:
    SCHEMES[name](tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    weight, like, values = _first(source)
    assert source.packing is not None
    moved = values + 1e-5 * values.abs().max()
    new = source.packing.pack(weight, moved, like)
    near = source.packing.scheme.unpack(weight, new)
    assert float((near == values).float().mean()) > 0.95


@pytest.mark.parametrize("preset", _slow(COMPRESSED))
def test_no_worse_than_the_library_by_the_largest_number(preset: str, tmp_path: Path) -> None:
    """Its own scales of new values, its own compressor; ours are unpacked by it as well."""
    compressed(tmp_path / "model", preset)
    source = Checkpoint(str(tmp_path / "model"))
    weight, like, values = _first(source)
    assert source.packing is not None
    scheme: Any = source.packing.scheme
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    group = scheme.groups[0]
    args = group.weights
    g = torch.Generator().manual_seed(1)
    wanted = values.float() + 0.1 * values.float().std() * torch.randn(values.shape, generator=g)
    rows, columns = wanted.shape
    parts = {
        "channel": lambda: wanted.unsqueeze(1), "tensor": lambda: wanted.view(1, -1),
        "block": lambda: wanted.view(rows // 16, 16, columns // 16, 16).transpose(1, 2).flatten(2),
    }.get(str(args.strategy), lambda: wanted.unflatten(-1, (-1, args.group_size)))()  # fmt: skip
    shared = like.get("global scale")
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args, global_scale=shared)
    if like["scale"].dtype == torch.bfloat16:
        scale = scale.bfloat16().float()
    state = {"weight": wanted, "weight_scale": scale, "weight_zero_point": zero}
    if shared is not None:
        state["weight_global_scale"] = shared
    compressor = BaseCompressor.get_value_from_registry(group.format)
    theirs = compressor.decompress(compressor.compress(state, group), group)["weight"].float()
    new = source.packing.pack(weight, wanted, like)
    stored = {weight.parts[r].name.rpartition(".")[2]: t for r, t in new.items()}
    ours = compressor.decompress(stored, group)["weight"].float()
    exact = scheme.unpack(weight, new).float()
    a, b = (float((x - wanted).square().sum()) for x in (exact, theirs))
    assert a <= b * 1.001
    assert torch.allclose(ours, exact, rtol=2**-6, atol=1e-6)  # theirs in bfloat16


def test_a_repair_is_written_as_it_was_judged(source: Checkpoint, tmp_path: Path) -> None:
    kept = _kept(source)
    engine = start_layerwise(source, "resident", "float32", "cpu", lambda w, i, b: iter(b))
    plain = source.load("float32", "cpu").eval()
    cut(plain, kept)
    (tmp_path / "repaired").mkdir()
    done = Repairer(
        engine, kept, "refit", folder=tmp_path / "repaired", key="k",
        repacking=Repacking(source, kept),
    ).run(batches())  # fmt: skip
    write_model(source, kept, tmp_path / "out", repaired=tmp_path / "repaired")
    found = Checkpoint(str(tmp_path / "out")).load("float32", "cpu").state_dict()
    untouched = plain.state_dict()
    changed = 0
    for name, p in engine.model.state_dict().items():
        if "_bias" not in name:  # stored in bfloat16, not packed
            assert torch.equal(found[name], p), name
        changed += not torch.equal(p, untouched[name])
    assert changed == sum(d.repair != "none" for d in done) + sum(
        d.repair != "none" for d in done if source.published["model_type"] == "gpt_oss"
    )
    if source.path.parent.name != "GPTQ, 2 bits":
        assert changed


def test_streamed_as_in_memory(tmp_path: Path) -> None:
    fp8(tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    kept, found = _kept(source), []
    for name in ("resident", "streaming"):
        engine = start_layerwise(source, name, "float32", "cpu", lambda w, i, b: iter(b))
        (tmp_path / name).mkdir()
        repairer = Repairer(
            engine, kept, "distill", folder=tmp_path / name, key="k",
            repacking=Repacking(source, kept),
        )  # fmt: skip
        done = repairer.run(batches())
        assert all(d.repair == "distill" or d.epoch for d in done)
        write_model(source, kept, tmp_path / f"{name}-out", repaired=tmp_path / name)
        found.append((done, (tmp_path / f"{name}-out" / "model.safetensors").read_bytes()))
    assert found[0] == found[1]


def test_a_layer_that_packing_undoes_stays_as_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose new numbers come out with the wrong sign, say."""
    gptq(tmp_path / "model", bits=2)
    source = Checkpoint(str(tmp_path / "model"))
    kept = {b.name: list(range(3, b.num_experts)) for b in source.blocks}
    scheme = source.packing.scheme  # type: ignore[union-attr]
    pack, second = type(scheme).pack, source.blocks[1].name

    def spoiled(self: Any, weight: Any, values: torch.Tensor, like: Any) -> Any:
        return pack(self, weight, -values if weight.name.startswith(second) else values, like)

    monkeypatch.setattr(type(scheme), "pack", spoiled)
    done = {}
    for repacking in (None, Repacking(source, kept)):
        engine = StreamingEngine(LoadedLayers(source.load("float32", "cpu")))
        folder = tmp_path / f"{repacking is None}"
        folder.mkdir()
        repairer = Repairer(engine, kept, "refit", folder=folder, key="k", repacking=repacking)
        # one domain: fits on random tokens help no other
        done[repacking is None] = repairer.run([replace(b, domain=0) for b in batches()])
    assert [d.repair for d in done[True]] == ["refit"] * len(source.blocks)  # it helps unpacked
    undone = {d.name for d in done[False] if d.repair == "none"}
    assert second in undone
    assert source.blocks[0].name not in undone
    reference = source.load("float32", "cpu")
    cut(reference, kept)
    state, changed = reference.state_dict(), set()
    for name, p in engine.model.state_dict().items():
        if not torch.equal(p, state[name]):
            changed.add(name.partition(".experts")[0])
    assert changed == {b.name for b in source.blocks} - undone


def test_what_a_repair_has_to_better_is_the_layer_only_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its experts that stay and all: by the stock model, cut, up to the end of its first layer."""
    fp8(tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    kept = _kept(source)
    reference = source.load("float32", "cpu").eval()
    cut(reference, kept)
    seen: list[torch.Tensor] = []

    def noting(self: Any, j: int, given: Any, out: torch.Tensor, target: Any) -> None:
        seen.append(out)
        only_cut(self, j, given, out, target)

    only_cut = StoredLayer.only_cut
    monkeypatch.setattr(StoredLayer, "only_cut", noting)
    engine = StreamingEngine(LoadedLayers(source.load("float32", "cpu")))
    Repairer(engine, kept, "refit", repacking=Repacking(source, kept)).run(batches())
    for batch, out in zip(batches(), seen, strict=False):  # the first layer's come first
        with torch.no_grad():
            said = reference(
                batch.input_ids, attention_mask=batch.mask, output_hidden_states=True
            ).hidden_states[1]
        real = batch.mask.bool()
        torch.testing.assert_close(out[real], said[real], rtol=1e-4, atol=1e-5)


def test_a_killed_repair_goes_on_with_what_was_stored(tmp_path: Path) -> None:
    fp8(tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    kept, first = _kept(source), None
    (tmp_path / "repaired").mkdir()
    for _ in range(2):
        engine = StreamingEngine(LoadedLayers(source.load("float32", "cpu")))
        done = Repairer(
            engine, kept, "refit", folder=tmp_path / "repaired", key="k",
            repacking=Repacking(source, kept),
        ).run(batches())  # fmt: skip
        state = {n: t.clone() for n, t in engine.model.state_dict().items()}
        first = first or (done, state)
        (tmp_path / "repaired" / "layer-00001.safetensors").unlink(missing_ok=True)
    assert first is not None
    assert first[0] == done
    assert all(torch.equal(first[1][n], t) for n, t in state.items())
    with safe_open(tmp_path / "repaired" / "layer-00000.safetensors", "pt") as f:
        assert any(n.startswith(PACKED) for n in f.keys())  # noqa: SIM118


def test_merged_values_are_packed_and_the_others_keep_their_bytes(tmp_path: Path) -> None:
    modelopt_nvfp4(tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    model, kept = source.load("float32", "cpu"), _kept(source)
    block = source.blocks[1]
    ids = kept[block.name]
    from moe_fair.moe.blocks import find_blocks
    from moe_fair.moe.merge import merged_tensors

    loaded = next(b for b in find_blocks(model) if b.name == block.name)
    gone = next(e for e in range(block.num_experts) if e not in ids)
    shares = {e: {e: 1.0} for e in ids} | {ids[2]: {ids[2]: 0.75, gone: 0.25}}
    new = merged_tensors(loaded, shares)
    old = original_tensors(loaded, ids[0])
    (tmp_path / "merged").mkdir()
    both = {**new, **{ORIGINAL + n: old[n] for n in new}}
    save_file(both, tmp_path / "merged" / "layer-00001.safetensors")
    write_model(source, kept, tmp_path / "out", repaired=tmp_path / "merged")
    result = Checkpoint(str(tmp_path / "out"))
    found = result.load("float32", "cpu").state_dict()
    for name, values in new.items():
        near = found[name]
        assert float((near[2] - values[2]).norm() / values[2].norm()) < 0.15
        others = [i for i in range(len(ids)) if i != 2]
        assert torch.equal(near[others], values[others])


def test_lists_of_modelopts_file_follow_the_cut(tmp_path: Path) -> None:
    modelopt_nvfp4(tmp_path / "model")
    file = tmp_path / "model" / "hf_quant_config.json"
    said = json.loads(file.read_text())
    home = "model.layers.1.mlp.experts."
    said["quantization"]["exclude_modules"] = ["lm_head", *(f"{home}{e}.act" for e in range(12))]
    file.write_text(json.dumps(said))
    source = Checkpoint(str(tmp_path / "model"))
    kept = _kept(source)
    write_model(source, kept, tmp_path / "out")
    new = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    count = len(kept[source.blocks[1].name])
    names = [f"{home}{e}.act" for e in range(count)]
    assert new["quantization"]["exclude_modules"] == ["lm_head", *names]
    assert check_files_beside(tmp_path / "out", source, Checkpoint(str(tmp_path / "out")))
    new["quantization"]["quant_algo"] = "FP8"
    (tmp_path / "out" / "hf_quant_config.json").write_text(json.dumps(new))
    with pytest.raises(ValueError, match="differs"):
        check_files_beside(tmp_path / "out", source, Checkpoint(str(tmp_path / "out")))


def test_fp4_rounds_to_the_nearest_ties_to_even() -> None:
    table = unpack_bytes(torch.arange(256).to(torch.uint8))
    assert torch.equal(pack_bytes(table), torch.arange(256).to(torch.uint8))
    numbers = table.view(-1)[:16].tolist()
    positive = sorted({abs(n) for n in numbers} | {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0})
    x = torch.linspace(-7, 7, 28001)
    x = x[: len(x) // 2 * 2]
    near = unpack_bytes(pack_bytes(x))
    for value, got in zip(x.tolist(), near.tolist(), strict=True):
        distances = [abs(abs(value) - n) for n in positive]
        best = min(distances)
        ties = [i for i, d in enumerate(distances) if abs(d - best) < 1e-9]
        wanted = positive[ties[0] if len(ties) == 1 or ties[0] % 2 == 0 else ties[1]]
        assert abs(got) == wanted, value
    codes = torch.randint(256, (4, 8)).byte()
    assert torch.equal(nvfp4(codes, torch.ones(4, 1)), unpack_bytes(codes))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_hold_what_was_put_into_them(bits: int) -> None:
    numbers = torch.randint(2**bits, (3, 64)).to(torch.uint8)
    words = pack_words(numbers, bits)
    assert words.dtype == torch.int32
    assert torch.equal(unpack_words(words, bits), numbers)
