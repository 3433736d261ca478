"""The recipes in recipes/moe: each on its model's real structure at tiny width."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from places import CALIBRATION, MODEL, ROOT
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from moe_fair.cli import app
from moe_fair.core.bundled_recipes import EXPERTS, recipe_path
from moe_fair.core.recipe_file import load_recipe
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.text_sources import parse_source
from moe_fair.pipelines import moe as pipeline
from moe_fair.pipelines.checks import check_plan_settings
from moe_fair.pipelines.moe import open_model

pytestmark = pytest.mark.slow  # whole runs, by and large

RECIPES = sorted((ROOT / "recipes" / "moe").glob("*.yaml"))
BY_NIGHT = (
    "qwen1.5-moe-a2.7b-chat-40", "deepseek-v2-lite", "qwen3-30b-a3b", "olmoe-1b-7b",
    "mixtral-8x7b", "gpt-oss-20b",
)  # fmt: skip
# what decides the structure, from each model's own config.json
REAL: dict[str, dict[str, Any]] = {
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": {
        "model_type": "qwen2_moe", "num_hidden_layers": 24, "num_experts": 60,
        "num_experts_per_tok": 4, "norm_topk_prob": False, "decoder_sparse_step": 1,
        "max_position_embeddings": 8192,
    },
    "Qwen/Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "num_hidden_layers": 48, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "max_position_embeddings": 40960,
    },
    "allenai/OLMoE-1B-7B-0125-Instruct": {
        "model_type": "olmoe", "num_hidden_layers": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "max_position_embeddings": 4096,
    },
    "mistralai/Mixtral-8x7B-Instruct-v0.1": {
        "model_type": "mixtral", "num_hidden_layers": 32, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768,
    },
    "deepseek-ai/DeepSeek-V2-Lite-Chat": {
        "model_type": "deepseek_v2", "num_hidden_layers": 27, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False, "q_lora_rank": None,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 163840,
    },
    "openai/gpt-oss-20b": {
        "model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32,
        "num_experts_per_tok": 4, "head_dim": 16, "layer_types": ["sliding_attention",
        "full_attention"] * 12, "max_position_embeddings": 131072,
    },
}  # fmt: skip
NARROW = {
    "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def tiny(name: str, tokenizer: Any) -> Any:
    """The real config with narrow layers and the reference model's vocabulary."""
    real = dict(REAL[name])
    kind = real.pop("model_type")
    known = CONFIG_MAPPING[kind]().to_dict()
    narrow = {k: v for k, v in NARROW.items() if k in known}
    return CONFIG_MAPPING[kind](**narrow | real, vocab_size=len(tokenizer), pad_token_id=0)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_fit_their_models(path: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Every check that a run makes before it loads weights, at full depth and expert count."""
    recipe = load_recipe(path)
    assert recipe.model is not None
    model = AutoModelForCausalLM.from_config(tiny(recipe.model, tokenizer), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = open_model(recipe.with_settings({"model": str(tmp_path)}))
    plan = check_plan_settings(recipe, source)
    assert recipe.experts is not None
    counts = [len(g.kept) for g in plan.groups]
    assert sum(counts) == recipe.experts * len(plan.groups)
    assert all(g.floor <= n < g.size for g, n in zip(source.groups, counts, strict=True))
    for text in recipe.calibration:
        found = parse_source(text)
        assert re.fullmatch(r"[\w-]+/[\w.-]+", found.where)
        assert found.split


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_headers_say_what_to_type(path: Path) -> None:
    """The commands in the header parse, name this file and this model, and sizes agree."""
    head = [line[1:] for line in path.read_text().splitlines() if line.startswith("#")]
    commands = [line.split() for line in head if line.startswith("     moe-fair")]
    assert [c[1] for c in commands] == ["prune", "eval"]
    group = typer.main.get_command(app)
    for _, name, *arguments in commands:
        group.commands[name].make_context(name, list(arguments))  # type: ignore[attr-defined]
    prune, evaluate = commands
    assert recipe_path(Path(prune[prune.index("--recipe") + 1]), EXPERTS) == path
    assert evaluate[2] == prune[prune.index("-o") + 1]
    recipe = load_recipe(path)
    assert evaluate[evaluate.index("--baseline") + 1] == recipe.model
    kept, size, layers = map(
        int, re.search(r"(\d+) of (\d+) (?:routed )?experts .* (\d+) (?:MoE )?layers", head[0])
        .groups()  # type: ignore[union-attr]
    )  # fmt: skip
    real = REAL[recipe.model or ""]
    assert kept == recipe.experts
    assert size in (real.get(k) for k in ("num_experts", "num_local_experts", "n_routed_experts"))
    assert layers == real["num_hidden_layers"] - real.get("first_k_dense_replace", 0)


# of recipes that differ in their count alone one is run, and the larger models' by night
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=pytest.mark.nightly if p.stem in BY_NIGHT else ())
        for p in RECIPES
        if not p.stem.endswith(("-30", "-45"))
    ],
)
def test_recipes_run(path: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The whole recipe, with its text and sizes replaced by what is here."""
    recipe = load_recipe(path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny(recipe.model or "", tokenizer), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    here = recipe.with_settings({
        "model": str(tmp_path / "model"), "calibration": [str(CALIBRATION)], "samples": 8,
        "length": 32,
        # all layers of the real depth are repaired once; elsewhere that is a minute for nothing new
        "repair": "refit" if path.stem.startswith("olmoe") else "none",
    })  # fmt: skip
    done = pipeline.prune(here, tmp_path / "out")
    assert sum(len(g.kept) for g in done.plan.groups) == recipe.experts * len(done.plan.groups)
    with torch.no_grad():
        logits = Checkpoint(str(tmp_path / "out")).load("float32")(torch.arange(3, 19)[None]).logits
    assert math.isfinite(float(logits.sum()))
    assert (tmp_path / "out" / "moe_fair" / "report.html").is_file()


def test_every_model_has_its_recipe() -> None:
    models = {load_recipe(p).model for p in RECIPES}
    assert models == set(REAL)
    chat = [load_recipe(p).experts for p in RECIPES if p.stem.startswith("qwen1.5")]
    assert sorted(x for x in chat if x) == [30, 40, 45]
