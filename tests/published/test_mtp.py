"""Heads for multi-token prediction: found as published, run, cut, dropped, kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from collected import families
from flow import DOMAINS, batches, fused_expert
from places import CALIBRATION, HELDOUT, MODEL
from published.layouts import FP8, fp8
from published.mtp_replicas import (
    DEEPSEEK,
    GLM,
    INDEX,
    NEMOTRON,
    QWEN3_5,
    QWEN3_NEXT,
    REPLICAS,
    Replica,
    write_replica,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import moe_fair
from moe_fair.cli.tables import plan_table
from moe_fair.core.plan import Plan
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Statistics
from moe_fair.engines.auto import auto_class
from moe_fair.engines.decoder import find_decoder
from moe_fair.engines.layer_calls import call_layers
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.resident import ResidentEngine
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.evaluate.record import load_drafts
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.mtp_head import Drafting, HeadRunner
from moe_fair.pipelines import moe as pipeline
from moe_fair.pipelines.verify import verify

pytestmark = pytest.mark.slow  # whole runs, by and large

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "calibration": str(CALIBRATION), "samples": 8, "length": 24, "batch_size": 4,
    "repair": "none",
}  # fmt: skip
UNIFORM = {"experts": 6, "allocate": "uniform"}
STOCK_HEADS = [GLM.kind, DEEPSEEK.kind]  # that generate(use_mtp=True) knows


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a family's replica."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            home = tmp_path_factory.mktemp("published") / kind
            home.mkdir()
            made[kind] = write_replica(REPLICAS[kind], home)
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def uniform(
    published: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Result of a uniform budget."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("cut") / kind
            moe_fair.prune(str(published(kind)), made[kind], **SMALL, **UNIFORM)
        return made[kind]

    return folder


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    """As stock transformers loads it, and what it says of the keys."""
    config = Checkpoint(str(folder)).config
    model, info = auto_class(config).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    return model.eval(), info


def head_names(folder: Path) -> set[str]:
    return {t.name for t in Checkpoint(str(folder)).heads.tensors}


def notes(folder: Path) -> str:
    return "\n".join(Plan.load(folder / "moe_fair" / "plan.json").notes)


@pytest.mark.parametrize("replica", REPLICAS.values(), ids=list(REPLICAS))
def test_a_head_is_found_as_it_is_published(
    replica: Replica, published: Callable[[str], Path]
) -> None:
    source = Checkpoint(str(published(replica.kind)))
    heads = source.heads
    assert heads.why is None
    assert heads.promised == 1
    lies = [replica.before[1][:-1]] if replica.before else []
    assert heads.name.split() == [*lies, replica.head[:-1]]
    shard = load_file(source.path / "model-00002-of-00002.safetensors")
    stored = {n for n in shard if n.startswith((replica.head, "mtp."))}
    assert {t.name for t in heads.tensors} == stored
    [block] = heads.blocks
    assert block.name == replica.block
    assert block.num_experts == 8
    assert [g.name for g in source.groups if g.follows] == [block.name]
    body = [g for g in source.groups if not g.follows]
    assert source.groups[-1].unit_parameters == body[-1].unit_parameters


def collected(source: Checkpoint, model: Any, engine: Any) -> Statistics:
    """Statistics of `flow.batches()`, the head's included."""
    runner = HeadRunner(source, model, torch.float32, CPU)
    blocks = [*find_blocks(model), *runner.blocks]
    wanted = families("counterfactual")
    collector = ExpertCollector(blocks, source.groups, DOMAINS, wanted, after=runner)
    with collector:
        engine.run(batches(), collector, after=runner)
    return collector.statistics()


@pytest.mark.parametrize(
    "kind",
    [
        QWEN3_NEXT.kind,
        QWEN3_5.kind,
        NEMOTRON.kind,
        GLM.kind,
        pytest.param(DEEPSEEK.kind, marks=pytest.mark.nightly),
    ],
)
def test_streamed_statistics_are_those_of_the_model_in_memory(
    kind: str, published: Callable[[str], Path]
) -> None:
    source = Checkpoint(str(published(kind)))
    model = loaded(source.path)[0]
    resident = collected(source, model, ResidentEngine(model))
    layered = LayeredModel(source.path, source.config, dtype=torch.float32, device=CPU)
    engine = StreamingEngine(layered, device_bytes=20_000)
    streamed = collected(source, layered.model, engine)
    for group in resident.groups:
        assert torch.equal(resident.rows[group.name], streamed.rows[group.name])
        for name, value in resident.sums[group.name].items():
            assert torch.equal(value, streamed.sums[group.name][name]), (group.name, name)
    plain = ExpertCollector(
        find_blocks(model), [g for g in source.groups if not g.follows], DOMAINS,
        families("counterfactual"),
    )  # fmt: skip
    with plain:
        ResidentEngine(model).run(batches(), plain)
    for group, sums in plain.statistics().sums.items():  # the head changes nothing of the layers
        for name, value in sums.items():
            assert torch.equal(value, resident.sums[group][name])


class NaiveHead:
    """The head's formula, from the stored tensors: stock decoder layer, norms by hand."""

    def __init__(self, replica: Replica, folder: Path, model: Any) -> None:
        self.model = model
        stored = load_file(folder / "model-00002-of-00002.safetensors")
        self.around = {role: stored[name] for role, name in replica.around.items()}
        self.shift = 1.0 if replica.head.startswith("mtp") else 0.0  # norms around 0 or around 1
        last = model.model.layers[-1]
        self.layer = type(last)(model.config, len(model.model.layers) - 1).float().eval()
        own = {n.removeprefix(replica.head): t for n, t in stored.items()
               if n.startswith(replica.head)}  # fmt: skip
        state = {n: own[n] for n in self.layer.state_dict() if ".experts." not in n}
        per = [{p: own[f"mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")}
               for e in range(8)]  # fmt: skip
        state["mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([m["gate"], m["up"]]) for m in per]
        )
        state["mlp.experts.down_proj"] = torch.stack([m["down"] for m in per])
        self.layer.load_state_dict(state)

    def norm(self, x: Tensor, role: str) -> Tensor:
        rms = (x.square().mean(-1, keepdim=True) + self.model.config.rms_norm_eps).sqrt()
        return x / rms * (self.around[role] + self.shift)

    def logits(self, ids: Tensor) -> Tensor:
        """[L - 1, V] from the real tokens [L] of one sequence."""
        with torch.no_grad():
            hidden = self.model(ids[None], output_hidden_states=True).hidden_states[-1]
            embedded = self.model.get_input_embeddings()(ids[None, 1:])
        pair = [self.norm(embedded, "embedding"), self.norm(hidden[:, :-1], "hidden")]
        x = torch.cat(pair, -1) @ self.around["projection"].T
        positions = torch.arange(x.shape[1])[None]
        rotary = self.model.model.rotary_emb(x, positions)
        y = self.layer(x, position_embeddings=rotary, position_ids=positions)
        return self.model.lm_head(self.norm(y, "output"))[0]


@pytest.mark.parametrize("replica", [GLM, DEEPSEEK, QWEN3_NEXT, QWEN3_5], ids=lambda r: r.kind)
def test_statistics_are_those_of_a_plain_loop(
    replica: Replica, published: Callable[[str], Path]
) -> None:
    folder = published(replica.kind)
    source, (model, _) = Checkpoint(str(folder)), loaded(folder)
    name = source.groups[-1].name
    got = collected(source, model, ResidentEngine(model)).sums[name]
    naive = NaiveHead(replica, folder, model)
    experts = naive.layer.mlp.experts
    down = experts.down_proj.requires_grad_(True)
    want = {n: torch.zeros(2, 8, dtype=torch.float64)
            for n in ("tokens", "gate", "norm", "gated_norm", "taylor")}  # fmt: skip
    calls: list[Any] = []
    experts.register_forward_hook(lambda m, args, out: calls.append(args))
    for batch in batches():
        for ids, mask in zip(batch.input_ids, batch.mask, strict=True):
            real = ids[: int(mask.sum())]
            calls.clear()
            logits, down.grad = naive.logits(real), None
            F.cross_entropy(logits[:-1], real[2:]).backward()
            taylor = (down * down.grad).detach().double().view(8, -1).sum(1)
            want["taylor"][batch.domain] += taylor
            [(x, chosen, weights)] = calls
            for e in range(8):
                token, slot = torch.where(chosen == e)
                g = weights[token, slot].detach()
                f = fused_expert(experts, e, x[token], g[:, None]).detach().double().norm(dim=-1)
                for n, v in (("tokens", torch.ones_like(f)), ("gate", g.double()), ("norm", f),
                             ("gated_norm", g.double() * f)):  # fmt: skip
                    want[n][batch.domain, e] += v.sum()
    for n, w in want.items():
        assert (got[n] - w).abs().max() <= 1e-4 * w.abs().max(), n
    assert want["taylor"].abs().max() > 0


@pytest.mark.parametrize(
    "replica", [QWEN3_NEXT, pytest.param(GLM, marks=pytest.mark.nightly)], ids=lambda r: r.kind
)
def test_drafted_tokens_are_accepted_as_a_plain_loop_counts_them(
    replica: Replica, tmp_path: Path
) -> None:
    write_replica(replica, tmp_path)
    for file in tmp_path.glob("*.safetensors"):  # a few tokens stand out, so that some agree
        tensors = load_file(file)
        for name in tensors.keys() & {"lm_head.weight"}:
            tensors[name][:4] *= 20
        save_file(tensors, file, {"format": "pt"})
    source, (model, _) = Checkpoint(str(tmp_path)), loaded(tmp_path)
    naive, wanted = NaiveHead(replica, tmp_path, model), [0, 0]
    for batch in batches():
        for ids, mask in zip(batch.input_ids, batch.mask, strict=True):
            real = ids[: int(mask.sum())]
            with torch.no_grad():
                says = model(real[None]).logits[0].argmax(-1)
                drafts = naive.logits(real).argmax(-1)
            wanted[0] += len(real) - 2  # of the tokens after the first two
            wanted[1] += int((drafts[:-1] == says[1:-1]).sum())
    layered = LayeredModel(source.path, source.config, dtype=torch.float32, device=CPU)
    for engine, run in (
        (ResidentEngine(model), model), (StreamingEngine(layered), layered.model),
    ):  # fmt: skip
        watch = Drafting(HeadRunner(source, run, torch.float32, CPU))
        engine.run(batches(), watch, backward=False, after=watch.after)
        assert [watch.after.drafted, watch.after.accepted] == wanted
    assert 0 < wanted[1] < wanted[0]


def test_the_report_has_the_acceptance_rate_of_both(
    published: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, heldout = tmp_path / "out", {"heldout": str(HELDOUT), "heldout_samples": 4}
    made = moe_fair.prune(str(published(QWEN3_NEXT.kind)), out, **SMALL, **UNIFORM, **heldout)
    found = load_drafts(out / "moe_fair")
    assert found is not None
    assert [d.drafted for d in found] == [4 * 22] * 2
    report = (out / "moe_fair" / "report.html").read_text()
    assert "Multi-token prediction" in report
    assert f"{found[1].rate:.2%}" in report
    assert "MTP head mtp.layers.0: cut" in report
    plan_table(made.plan)
    assert "4 MTP" in capsys.readouterr().out


@pytest.mark.parametrize("kind", STOCK_HEADS)
def test_a_head_gives_what_stock_transformers_gives(
    kind: str, published: Callable[[str], Path]
) -> None:
    source = Checkpoint(str(published(kind)))
    model = loaded(source.path)[0]
    stock, ids = MtpModel.from_pretrained(model), batches()[0].input_ids[:1]
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][:, :-1]
        positions = torch.arange(1, ids.shape[1])[None]
        cache = MtpCache(config=model.config.get_mtp_config())
        want = stock.forward_layer(0, hidden, positions, cache, input_ids=ids[:, 1:])
        with HeadRunner(source, model, torch.float32, CPU) as runner:
            embedded, calls = call_layers(find_decoder(model), ids[:, 1:], None)
            got = runner.heads[0].forward(embedded, hidden, calls)
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.nightly if k == DEEPSEEK.kind else ()) for k in REPLICAS],
)
def test_a_uniform_result_has_as_many_experts_in_its_head(
    kind: str, published: Callable[[str], Path], uniform: Callable[[str], Path]
) -> None:
    folder = uniform(kind)
    assert not (folder / "modeling_moe_fair.py").exists()
    source, result = Checkpoint(str(published(kind))), Checkpoint(str(folder))
    assert result.heads.blocks[0].num_experts == 6
    assert result.heads.promised == 1
    _, before = loaded(source.path)
    _, after = loaded(folder)
    assert {k: set(v) for k, v in before.items()} == {k: set(v) for k, v in after.items()}
    plan = Plan.load(folder / "moe_fair" / "plan.json")
    assert plan.mtp == "cut"
    assert plan.groups[-1].follows
    assert len(plan.groups[-1].kept) == 6
    assert plan.after == result.size
    assert "cut, 6 of 8 experts kept" in notes(folder)
    old, new = ({t.name: t for t in c.heads.tensors} for c in (source, result))
    first = plan.groups[-1].kept[0]
    name = f"{REPLICAS[kind].block}.experts.{{}}.up_proj.weight"
    a, b = (_bytes(t) for t in (old[name.format(first)], new[name.format(0)]))
    assert a == b
    assert verify(folder, source).ok


def _bytes(t: Any) -> bytes:
    [piece] = t.pieces
    return piece.file.read_bytes()[piece.start : piece.start + piece.length]


@pytest.mark.parametrize("kind", [GLM.kind, pytest.param(DEEPSEEK.kind, marks=pytest.mark.nightly)])
def test_stock_generation_with_the_head_is_that_without(
    kind: str, uniform: Callable[[str], Path]
) -> None:
    model, info = loaded(uniform(kind))
    assert not any(info.values()), info
    prompt = batches()[0].input_ids[:1, :8]
    more = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(prompt, **more)
    assert plain.shape[1] == 20
    assert model.generate(prompt, use_mtp=True, **more).tolist() == plain.tolist()


def test_kept_experts_of_the_head_are_those_of_its_own_scores(
    uniform: Callable[[str], Path],
) -> None:
    plan = Plan.load(uniform(GLM.kind) / "moe_fair" / "plan.json")
    scores = torch.tensor(plan.groups[-1].removal)
    assert plan.groups[-1].kept == sorted(scores.argsort(descending=True)[:6].tolist())


def test_a_dropped_head_leaves_with_its_promise(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    for kind in (GLM.kind, QWEN3_5.kind):
        source, out = Checkpoint(str(published(kind))), tmp_path / kind
        made = moe_fair.prune(str(source.path), out, **SMALL, **UNIFORM, mtp="drop").plan
        assert head_names(out) == set()
        assert json.loads((out / "config.json").read_text())[REPLICAS[kind].promise] == 0
        assert made.mtp == "drop"
        assert "dropped" in notes(out)
        assert made.after == Checkpoint(str(out)).size
        assert verify(out, source).ok
        assert not any(loaded(out)[1].values())


def test_a_head_stays_whole_only_where_counts_differ(
    published: Callable[[str], Path], tmp_path: Path, fails: Callable[..., str]
) -> None:
    folder = published(GLM.kind)
    line = fails(
        "prune", folder, "--experts", 6, "--allocate", "uniform", "--mtp", "keep",
        "--length", 24, "-c", CALIBRATION, "-o", tmp_path / "no",
    )  # fmt: skip
    assert "--mtp keep" in line
    out = tmp_path / "out"
    moe_fair.prune(str(folder), out, **SMALL, experts=5, mtp="keep")
    result = Checkpoint(str(out))
    assert result.heads.blocks[0].num_experts == 8
    assert head_names(out) == head_names(folder)
    assert verify(out, Checkpoint(str(folder))).ok
    model, info = loaded(out)
    assert not any(info.values())
    prompt = batches()[0].input_ids[:1, :8]
    more = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    # the config still has the original's number
    assert (
        model.generate(prompt, use_mtp=True, **more).tolist()
        == model.generate(prompt, **more).tolist()
    )


@pytest.mark.nightly
def test_with_unequal_counts_a_head_keeps_the_mean(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, out = published(DEEPSEEK.kind), tmp_path / "out"
    made = moe_fair.prune(str(folder), out, **SMALL, total=14, allocate="global").plan
    counts = [len(g.kept) for g in made.groups]
    assert sum(counts[:-1]) == 14
    assert len(set(counts[:-1])) > 1
    assert counts[-1] == 4  # of 14 / 3, in steps of two for two routing groups
    assert "vLLM with moe-fair-vllm runs it" in notes(out)
    assert not any(loaded(out)[1].values())
    assert verify(out, Checkpoint(str(folder))).ok
    again = moe_fair.prune(str(out), tmp_path / "again", **SMALL, experts=4, allocate="uniform")
    assert [len(g.kept) for g in again.plan.groups] == [4] * 4
    model = loaded(tmp_path / "again")[0]
    prompt = batches()[0].input_ids[:1, :8]
    more = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    assert (
        model.generate(prompt, use_mtp=True, **more).tolist()
        == model.generate(prompt, **more).tolist()
    )


def test_a_file_that_the_index_does_not_name_is_seen(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    source.mkdir()
    write_replica(QWEN3_5, source, apart="mtp.safetensors")
    own = set(load_file(source / "mtp.safetensors"))
    assert own
    assert own == head_names(source)
    before = Checkpoint(str(source)).fingerprint
    made = moe_fair.prune(str(source), out, **SMALL, **UNIFORM).plan
    assert made.mtp == "cut"
    assert Checkpoint(str(out)).heads.blocks[0].num_experts == 6
    assert verify(out, Checkpoint(str(source))).ok
    tensors = load_file(source / "mtp.safetensors")
    tensors["mtp.norm.weight"][0] += 1
    save_file(tensors, source / "mtp.safetensors")
    assert Checkpoint(str(source)).fingerprint != before
    (source / "consolidated.safetensors").write_bytes(b"of another tool")
    assert head_names(source) == own


def test_a_promise_without_tensors_is_told_and_taken_back(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    source.mkdir()
    write_replica(GLM, source, head=False)
    made = moe_fair.prune(str(source), out, **SMALL, **UNIFORM).plan
    assert made.mtp is None
    assert "promises 1 MTP head(s), and no file holds" in notes(out)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_head_of_another_structure_is_dropped(tmp_path: Path, fails: Callable[..., str]) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    source.mkdir()
    write_replica(QWEN3_NEXT, source, apart="mtp.safetensors")
    tensors = load_file(source / "mtp.safetensors")
    tensors["mtp.layers.0.memory.weight"] = torch.zeros(3)
    save_file(tensors, source / "mtp.safetensors")
    line = fails(
        "prune",
        source,
        "--experts",
        6,
        "--mtp",
        "cut",
        "--length",
        24,
        "-c",
        CALIBRATION,
        "-o",
        out,
    )
    assert "mtp.layers.0.memory.weight is no part of a head" in line
    made = moe_fair.prune(str(source), out, **SMALL, **UNIFORM).plan
    assert made.mtp == "drop"
    assert "memory" in notes(out)
    assert head_names(out) == set()


def test_a_packed_head_is_dropped(tmp_path: Path, fails: Callable[..., str]) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    source.mkdir()
    write_replica(QWEN3_NEXT, source, apart="mtp.safetensors")
    tensors = load_file(source / "mtp.safetensors")
    for name in [n for n in tensors if ".experts." in n]:  # as FP8 is published
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, source / "mtp.safetensors")
    given = ["--experts", 6, "--length", 24, "-c", CALIBRATION, "-o", out]
    line = fails("prune", source, "--mtp", "cut", *given)
    assert "mtp.layers.0 is packed (F8_E4M3)" in line
    moe_fair.prune(str(source), out, **SMALL, **UNIFORM)
    assert "dropped (mtp.layers.0 is packed" in notes(out)


@pytest.fixture(scope="module")
def packed_with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As GLM-4.5-FP8 and DeepSeek-V3 are published: body and head in FP8."""
    home = tmp_path_factory.mktemp("packed") / "model"
    home.mkdir()
    write_replica(GLM, home)
    stored = {n: t for f in home.glob("*.safetensors") for n, t in load_file(f).items()}
    config = json.loads((home / "config.json").read_text())
    config["quantization_config"] = FP8 | {"modules_to_not_convert": ["lm_head", "eh_proj"]}
    for f in home.glob("*.safetensors*"):
        f.unlink()
    packed = fp8(16, ("lm_head", "eh_proj"))(stored, config)
    save_file(packed, home / "model.safetensors", {"format": "pt"})
    (home / "config.json").write_text(json.dumps(config))
    return home


@pytest.mark.nightly
def test_a_packed_head_of_a_packed_model(
    packed_with_head: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """By default it is dropped, cutting it is refused before anything is read, keeping keeps it."""
    source, out = packed_with_head, tmp_path / "out"
    given = ["--experts", 6, "--length", 24, "-c", CALIBRATION, "-o", out]
    assert "is packed (F8_E4M3)" in fails("prune", source, "--mtp", "cut", *given)
    made = moe_fair.prune(str(source), out, **SMALL, **UNIFORM).plan
    assert made.mtp == "drop"
    assert "is packed" in notes(out)
    assert head_names(out) == set()
    kept = moe_fair.prune(
        str(source), tmp_path / "kept", **SMALL, experts=6, allocate="global", mtp="keep"
    ).plan
    assert kept.mtp == "keep"
    before, after = (Checkpoint(str(f)).heads.tensors for f in (source, tmp_path / "kept"))
    assert {t.name for t in before} == {t.name for t in after}
    assert any(t.name.endswith("scale_inv") for t in after)
    plain = tmp_path / "plain"
    moe_fair.prune(
        str(source), plain, **SMALL, experts=6, allocate="global", mtp="keep", save_as="bf16"
    )
    heads = Checkpoint(str(plain)).heads.tensors
    packed = {t.name for t in before if t.dtype == "F8_E4M3"}
    assert packed == {t.name for t in heads if t.dtype == "BF16"}  # the others are float32 there
    assert len(heads) == len(before) - len(packed)  # no scales


def test_a_size_counts_the_head(published: Callable[[str], Path], tmp_path: Path) -> None:
    source = Checkpoint(str(published(GLM.kind)))
    statistics = moe_fair.calibrate(str(source.path), **{k: v for k, v in SMALL.items()
                                                         if k != "repair"})  # fmt: skip
    one = source.groups[-1].unit_parameters
    limit = source.size.parameters - 8 * one
    made = moe_fair.plan(statistics, size=f"{limit / 1000}k", allocate="uniform")
    assert [len(g.kept) for g in made.groups] == [6, 6, 6, 6]
    assert made.before == source.size
    assert made.after.parameters == limit
    limit = source.size.parameters - source.heads.size().parameters - 3 * one
    made = moe_fair.plan(statistics, size=f"{limit / 1000}k", allocate="uniform", mtp="drop")
    assert [len(g.kept) for g in made.groups] == [7, 7, 7]
    assert made.after.parameters == limit


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"method": "fair"}, marks=pytest.mark.nightly),
        pytest.param({"method": "counterfactual-measured"}, marks=pytest.mark.nightly),
        pytest.param({"method": "naee"}, marks=pytest.mark.nightly),
        pytest.param({"allocate": "curves", "curve_samples": 2}, marks=pytest.mark.nightly),
        pytest.param({"reduce": "merge"}, marks=pytest.mark.nightly),
        pytest.param(
            {"repair": "scale", "heldout": str(HELDOUT), "heldout_samples": 4},
            marks=pytest.mark.nightly,
        ),
        {"engine": "streaming", "repair": "distill"},
        # plans are tried
        pytest.param(
            {"samples": 80, "trial_samples": 16, "self_share": 0}, marks=pytest.mark.nightly
        ),
    ],
    ids=lambda s: "-".join(map(str, s.values()))[:20],
)
def test_every_way_of_planning_has_a_row_for_the_head(
    settings: dict[str, Any], published: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = moe_fair.prune(
        str(published(QWEN3_NEXT.kind)), out, **{**SMALL, "experts": 5, **settings}
    ).plan
    assert made.groups[-1].follows
    assert len(made.groups[-1].kept) == 5
    assert verify(out, Checkpoint(str(published(QWEN3_NEXT.kind)))).ok


def test_a_plan_that_does_not_mention_the_head_is_refused(
    published: Callable[[str], Path], uniform: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = Recipe().with_settings({**SMALL, "model": str(published(GLM.kind))})
    plan = Plan.load(uniform(GLM.kind) / "moe_fair" / "plan.json")
    with pytest.raises(ValueError, match="does not say what becomes of the MTP head"):
        pipeline.prune(recipe, tmp_path / "out", ready=replace(plan, mtp=None))
    with pytest.raises(ValueError, match="--mtp drop: the --plan says cut"):
        pipeline.prune(recipe.with_settings({"mtp": "drop"}), tmp_path / "out", ready=plan)
    again = pipeline.prune(recipe, tmp_path / "out", ready=plan).output
    assert (again / INDEX).exists() == (uniform(GLM.kind) / INDEX).exists()
    assert head_names(again) == head_names(uniform(GLM.kind))


def test_statistics_without_the_head_cannot_cut_it(published: Callable[[str], Path]) -> None:
    settings = {k: v for k, v in SMALL.items() if k != "repair"}
    statistics = moe_fair.calibrate(str(published(GLM.kind)), **settings, mtp="drop")
    assert not any(g.follows for g in statistics.groups)
    with pytest.raises(ValueError, match="these statistics hold none of it"):
        moe_fair.plan(statistics, experts=6, mtp="cut")
    assert moe_fair.plan(statistics, experts=6).mtp == "drop"


def test_a_word_on_heads_where_there_is_none_is_told(statistics_folder: Path) -> None:
    made = moe_fair.plan(statistics_folder, experts=40, mtp="drop")
    assert "--mtp drop: these statistics know of no MTP head" in made.notes


@pytest.mark.parametrize(
    "fused",
    [pytest.param(False, marks=pytest.mark.nightly), True],
    ids=["an expert a tensor", "fused"],
)
def test_a_multimodal_model_keeps_its_head_beside(tmp_path: Path, fused: bool) -> None:
    """As Qwen3.5 is published: the body under `model.language_model.`, the head in a file apart."""
    source, names = tmp_path / "model", ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    tiny_model(
        "qwen3_5_moe", vocab_size=4096, architectures=["Qwen3_5MoeForConditionalGeneration"]
    ).save_pretrained(source)
    body, last = load_file(source / "model.safetensors"), "model.language_model.layers.3."
    own = {
        "mtp.layers.0." + n.removeprefix(last): t.flip(0).contiguous()
        for n, t in body.items()
        if n.startswith(last)
    }
    own |= {f"mtp.{n}.weight": torch.full((64,), 0.1) for n in names}
    own["mtp.fc.weight"] = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) / 8
    if fused:
        prefix = "mtp.layers.0.mlp.experts."
        per = [{p: own.pop(f"{prefix}{e}.{p}_proj.weight") for p in ("gate", "up", "down")}
               for e in range(12)]  # fmt: skip
        own[prefix + "gate_up_proj"] = torch.stack([torch.cat([m["gate"], m["up"]]) for m in per])
        own[prefix + "down_proj"] = torch.stack([m["down"] for m in per])
    save_file(own, source / "mtp.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (source / "config.json").write_text(json.dumps(config))
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, source)
    for name, given in {"cut": UNIFORM, "dropped": {**UNIFORM, "mtp": "drop"}}.items():
        moe_fair.prune(str(source), tmp_path / name, **SMALL, **given)
        assert verify(tmp_path / name, Checkpoint(str(source))).ok
        assert not any(loaded(tmp_path / name)[1].values())
    assert Checkpoint(str(tmp_path / "cut")).heads.blocks[0].num_experts == 6
    text = json.loads((tmp_path / "dropped" / "config.json").read_text())["text_config"]
    assert text["mtp_num_hidden_layers"] == 0
    assert head_names(tmp_path / "dropped") == set()
