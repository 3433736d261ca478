"""A pruned checkpoint of the reference model, opened where moe_fair does not exist."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from masking import masked
from places import MODEL
from processes import python
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_fair
from moe_fair.core.plan import Plan
from moe_fair.core.units import Statistics
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import modeling_source, write_model
from moe_fair.moe.trusted_code import not_ours

STRANGER = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moe_fair":
            raise ImportError("moe_fair is not installed here")
sys.meta_path.insert(0, Absent())
sys.path[:] = [p for p in sys.path if p != sys.argv[2]]
try:
    import moe_fair
except ImportError:
    pass
else:
    raise SystemExit("moe_fair could be imported")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
out, uniform = sys.argv[1], sys.argv[3] == "uniform"
torch.set_num_threads(1)
load = lambda path: AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, trust_remote_code=None if uniform else True).eval()
model = load(out)
ids = torch.arange(3, 99).view(2, 48)
with torch.no_grad():
    logits = model(ids).logits
    model.set_experts_implementation("eager")
    eager = model(ids).logits
    model.set_experts_implementation("grouped_mm")
make = lambda cache: model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]),
    max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)[0].tolist()
cached, plain = make(True), make(False)
aux = float(model(ids, labels=ids, output_router_logits=True).aux_loss)
model.save_pretrained(sys.argv[4])
again = load(sys.argv[4])
a, b = model.state_dict(), again.state_dict()
with torch.no_grad():
    same = torch.equal(again(ids).logits, logits)
torch.save(logits, sys.argv[4] + "/logits.pt")
experts = [m.num_experts for m in model.modules() if hasattr(m, "_apply_gate")]
print(json.dumps({
    "class": type(model).__name__, "experts": experts, "cached": cached == plain, "aux": aux,
    "resaved": same and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a),
    "eager": float((eager - logits).abs().max()), "config": getattr(model.config, "num_experts", 0),
    "chat": bool(AutoTokenizer.from_pretrained(out).chat_template),
    "implementation": [model.config._experts_implementation, model.config._attn_implementation],
}))
"""


@pytest.fixture(scope="module", params=["tod", "uniform"])
def pruned(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    statistics_folder: Path,
) -> Any:
    out = tmp_path_factory.mktemp("pruned") / "out"
    return moe_fair.prune(
        str(MODEL), out, statistics=statistics_folder, experts=40, method="fair",
        allocate=request.param, repair="none",
    )  # fmt: skip


@pytest.fixture(scope="module")
def stranger(pruned: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    resaved = tmp_path_factory.mktemp("resaved")
    here = str(Path(moe_fair.__file__).parent.parent)
    kind = "uniform" if pruned.plan.uniform else "unequal"
    done = python("-c", STRANGER, pruned.output, here, kind, resaved)
    assert done.returncode == 0, done.stderr[-2000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "logits": torch.load(resaved / "logits.pt")}


@pytest.mark.slow
def test_it_opens_where_moe_fair_is_not(pruned: Any, stranger: dict[str, Any]) -> None:
    assert sum(stranger["experts"]) == 40 * 6
    assert stranger["experts"] == [len(g.kept) for g in pruned.plan.groups]
    assert stranger["cached"]
    assert stranger["resaved"]
    assert stranger["chat"]
    assert 0 < stranger["aux"] < 100
    assert stranger["eager"] < 1e-4
    assert stranger["implementation"] == ["grouped_mm", "sdpa"]
    uniform = pruned.plan.uniform
    assert stranger["class"] == ("Qwen2MoeForCausalLM" if uniform else "MoeFairForCausalLM")
    assert stranger["config"] == (40 if uniform else 60)


@pytest.mark.slow
def test_its_logits_are_the_masked_original(pruned: Any, stranger: dict[str, Any]) -> None:
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = torch.arange(3, 99).view(2, 48)
    with torch.no_grad(), masked(original, pruned.plan.kept):
        expected = original(ids).logits
    with torch.no_grad():
        whole = original(ids).logits
    assert (stranger["logits"] - expected).abs().max() <= 3e-6 * expected.abs().max()
    assert (stranger["logits"] - whole).abs().max() > 1e-2  # the mask did something


@pytest.mark.slow
def test_sizes_in_the_plan_are_those_on_disk(pruned: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        pruned.output, trust_remote_code=not pruned.plan.uniform
    )
    assert pruned.plan.after.parameters == sum(p.numel() for p in model.parameters())
    data = sum(p.numel() * p.element_size() for p in model.parameters())
    assert pruned.plan.after.bytes == data


def test_what_lies_beside_the_weights(pruned: Any) -> None:
    inside = {p.name for p in (pruned.output / "moe_fair").iterdir()}
    assert inside == {
        "plan.json", "statistics.tensors", "recipe.yaml", "report.html", "manifest.json",
    }  # fmt: skip
    assert Plan.load(pruned.output / "moe_fair" / "plan.json") == pruned.plan
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (pruned.output / name).read_bytes() == (MODEL / name).read_bytes()
    config = json.loads((pruned.output / "config.json").read_text())
    assert ("auto_map" in config) != pruned.plan.uniform
    if not pruned.plan.uniform:
        kept = {str(g.layer): {"num_experts": len(g.kept)} for g in pruned.plan.groups}
        assert config["per_layer_config"] == kept
    AutoTokenizer.from_pretrained(pruned.output)


def test_what_other_loaders_read(pruned: Any) -> None:
    """Engines look the stock class up, and download `*.safetensors` from every folder."""
    config = json.loads((pruned.output / "config.json").read_text())
    published = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == published["architectures"]
    changed = {"num_experts", "per_layer_config", "moe_fair", "auto_map"}
    changed |= {"allow_global_per_layer_attribute_access", "model_file"}
    assert config.get("model_file") == (None if pruned.plan.uniform else "mlx_moe_fair.py")
    assert (pruned.output / "mlx_moe_fair.py").exists() != pruned.plan.uniform
    for key in published.keys() - changed:  # as published, not as transformers would save it
        assert json.dumps(config[key]) == json.dumps(published[key]), key
    assert config.keys() - changed == published.keys() - changed
    weights = {p.name for p in pruned.output.glob("*.safetensors")}
    assert {p.name for p in pruned.output.rglob("*.safetensors")} == weights


@pytest.mark.parametrize("fewest", [20, 40], ids=["unequal", "equal"])
def test_published_keys_survive_as_they_were_written(tmp_path: Path, fewest: int) -> None:
    """Also those that transformers reads in its own way and would save under other names."""
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    del config["rope_parameters"]
    old = {"rope_theta": 1000000.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    config |= {**old, "rms_norm_eps": 1e-06, "transformers_version": "4.39.0", "some_key": [1.0, 2]}
    (model / "config.json").write_text(json.dumps(config))
    source = Checkpoint(str(model))
    kept = {b.name: list(range(40)) for b in source.blocks}
    kept[source.blocks[0].name] = list(range(fewest))
    write_model(source, kept, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in config.keys() - {"num_experts"}:
        assert json.dumps(written[key]) == json.dumps(config[key]), key
    assert "rope_parameters" not in written


def test_every_layer_says_its_own_number(pruned: Any) -> None:
    """In the config of its experts, which quantisers read; all else is the model's config."""
    unequal = not pruned.plan.uniform
    model = AutoModelForCausalLM.from_pretrained(pruned.output, trust_remote_code=unequal)
    for module in (model, copy.deepcopy(model)):
        for g in pruned.plan.groups:
            experts = module.get_submodule(g.name).experts
            assert experts.config.num_experts == len(experts.gate_up_proj) == len(g.kept)
            assert isinstance(experts.config, type(module.config))
            fresh = type(experts)(experts.config)  # as who packs experts anew makes it
            assert fresh.down_proj.shape == experts.down_proj.shape
        module.set_experts_implementation("eager")  # reaches every layer
        layers = [module.get_submodule(g.name).experts.config for g in pruned.plan.groups]
        assert {c._experts_implementation for c in layers} == {"eager"}
        assert module.config.num_experts == (60 if unequal else 40)


def test_results_of_before_are_read(pruned: Any, tmp_path: Path) -> None:
    """Their statistics had the name that loaders take for weights."""
    notes = Path(shutil.copytree(pruned.output / "moe_fair", tmp_path / "moe_fair"))
    now = Statistics.load(notes)
    (notes / "statistics.tensors").rename(notes / "statistics.safetensors")
    assert Statistics.load(notes).digest == now.digest


def test_only_our_own_code_runs_unasked(pruned: Any, tmp_path: Path) -> None:
    assert bool(not_ours(pruned.output)) == pruned.plan.uniform
    if pruned.plan.uniform:
        return
    text = modeling_source(AutoModelForCausalLM._model_mapping[type(_config())])
    (tmp_path / "config.json").write_text((pruned.output / "config.json").read_text())
    (tmp_path / "modeling_moe_fair.py").write_text(text)
    assert not not_ours(tmp_path)
    (tmp_path / "modeling_moe_fair.py").write_text(text + "print('hello')\n")
    assert not_ours(tmp_path)


def _config() -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(MODEL)


@pytest.mark.slow
def test_a_pruned_model_can_be_pruned_again(pruned: Any, tmp_path: Path) -> None:
    settings = {
        "calibration": str(MODEL.parent / "text" / "calibration"),
        "samples": 4,
        "length": 32,
    }
    twice = moe_fair.prune(
        str(pruned.output), tmp_path / "out", experts=20, repair="none", **settings
    )
    assert sum(len(g.kept) for g in twice.plan.groups) == 120
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=not twice.plan.uniform, dtype=torch.float32
    ).eval()
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    first = pruned.plan.kept
    both = {n: [first[n][i] for i in ids] for n, ids in twice.plan.kept.items()}
    ids = torch.arange(3, 35).view(1, 32)
    with torch.no_grad(), masked(original, both):
        expected = original(ids).logits
    with torch.no_grad():
        error = (model(ids).logits - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()
