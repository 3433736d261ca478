"""The vLLM plugin against stand-ins that are called as vLLM 0.32.0 calls its own.

`bash eval/serving/vllm.sh` runs it in vLLM itself.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from plugins import plugin_of
from torch import nn

COUNTS = {"0": {"num_experts": 3}, "2": {"num_experts": 5}}
UTILS, LOADER = "vllm.model_executor.models.utils", "vllm.model_executor.model_loader.utils"


@pytest.fixture
def plugin() -> Any:
    return plugin_of("vllm")


class Convertor:
    """vLLM's own, which knows of no layers that differ."""

    def __init__(self, hf_config: Any) -> None:
        self.hf_config = hf_config

    def get_per_layer_hf_configs(self) -> Any:
        return ["what vLLM makes of it"]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What vLLM runs with: `current`, and a model's module that imported both functions before."""
    found = SimpleNamespace(current=None)

    def make_layers(number: int, layer_fn: Callable[..., Any], prefix: str) -> Any:
        return 0, number, [layer_fn(prefix=f"{prefix}.{i}") for i in range(number)]

    def initialize_model(vllm_config: Any, *, prefix: str = "", **kwargs: Any) -> Any:
        found.current = vllm_config
        return kwargs["model_class"](vllm_config)

    parts = {
        "vllm.config": {"get_current_vllm_config": lambda: found.current},
        UTILS: {"make_layers": make_layers},
        LOADER: {"initialize_model": initialize_model},
        "vllm.a_model": {"make_layers": make_layers, "initialize_model": initialize_model},
        "vllm.transformers_utils.model_arch_config_convertor": {
            "ModelArchConfigConvertorBase": type("Own", (Convertor,), {})
        },
    }
    for name, own in parts.items():
        pieces = name.split(".")
        for i in range(1, len(pieces)):
            parent = ".".join(pieces[:i])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        vars(module).update(own)
        monkeypatch.setitem(sys.modules, name, module)
    found.model, found.utils, found.loader = (
        sys.modules[n] for n in ("vllm.a_model", UTILS, LOADER)
    )
    found.convertor = sys.modules[
        "vllm.transformers_utils.model_arch_config_convertor"
    ].ModelArchConfigConvertorBase
    return found


def config(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(num_experts=8, **more)


def run(hf: Any, draft: Any = None, **parallel: Any) -> SimpleNamespace:
    """What vLLM hands on, of a model and of its head's own copy of the config."""
    usual = {"enable_eplb": False, "enable_expert_parallel": False,
             "tensor_parallel_size": 1, "data_parallel_size": 1}  # fmt: skip
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf),
        draft=SimpleNamespace(hf_config=draft),
        parallel_config=SimpleNamespace(**usual | parallel),
    )


def layers(vllm: SimpleNamespace, given: SimpleNamespace, own: Any = None) -> list[int]:
    """The number that each of three layers is built under, by a model that reads `own`."""
    read = own or getattr(given.model_config.hf_config, "text_config", given.model_config.hf_config)

    def build(_: Any) -> Any:
        _, _, made = vllm.model.make_layers(3, lambda prefix: read.num_experts, "model.layers")
        return made

    return vllm.model.initialize_model(given, model_class=build)


def head(vllm: SimpleNamespace, given: SimpleNamespace) -> tuple[int, int]:
    """The numbers that a head is built under: in the model's config, and in its own."""

    def build(_: Any) -> tuple[int, int]:
        both = given.model_config.hf_config, given.draft.hf_config
        return tuple(getattr(c, "text_config", c).num_experts for c in both)

    return vllm.model.initialize_model(given, model_class=build, model_config=given.draft)


def test_each_layer_has_its_own_count(plugin: Any, vllm: SimpleNamespace) -> None:
    plugin.register()
    plugin.register()  # vLLM may do so twice
    assert vllm.model.make_layers is vllm.utils.make_layers
    ours = config(moe_fair={}, per_layer_config=COUNTS)
    assert layers(vllm, run(ours)) == [3, 8, 5]
    assert ours.num_experts == 8
    spec = SimpleNamespace(per_layer_overrides={0: {"num_experts": 2}})  # as transformers 5 reads
    assert layers(vllm, run(config(moe_fair={}, _heterogeneity_spec=spec))) == [2, 8, 8]


def test_a_multimodal_model_has_its_mark_outside_and_its_counts_inside(
    plugin: Any, vllm: SimpleNamespace
) -> None:
    plugin.register()
    text = config(per_layer_config=COUNTS)
    outer = SimpleNamespace(moe_fair={}, text_config=text)
    assert layers(vllm, run(outer)) == [3, 8, 5]
    assert layers(vllm, run(text)) == [3, 8, 5]  # its language model, built on its own
    assert vllm.convertor(outer).get_per_layer_hf_configs() is None


def test_a_config_without_counts_by_layer_names_the_blocks(
    plugin: Any, vllm: SimpleNamespace
) -> None:
    plugin.register()
    said = {"experts": {"model.layers.0.mlp": 3, "model.layers.2.mlp": 5}}
    ours = config(moe_fair=said, num_local_experts=8)
    assert layers(vllm, run(ours)) == [3, 8, 5]
    assert (ours.num_experts, ours.num_local_experts) == (8, 8)
    inner = config()
    assert layers(vllm, run(SimpleNamespace(moe_fair=said, text_config=inner))) == [3, 8, 5]


def test_a_part_of_the_config_may_keep_the_number(plugin: Any, vllm: SimpleNamespace) -> None:
    plugin.register()
    part = config()
    ours = SimpleNamespace(moe_fair={}, per_layer_config=COUNTS, ffn_config=part)
    assert layers(vllm, run(ours), part) == [3, 8, 5]
    assert part.num_experts == 8
    assert not hasattr(ours, "num_experts")


def test_others_are_built_as_ever(plugin: Any, vllm: SimpleNamespace) -> None:
    plugin.register()
    by_width = {"0": {"num_experts": 3, "hidden_size": 16}}
    for other in (config(), config(moe_fair={}), config(per_layer_config=by_width)):
        assert layers(vllm, run(other, enable_eplb=True)) == [8, 8, 8]
        assert vllm.convertor(other).get_per_layer_hf_configs() == ["what vLLM makes of it"]


def test_a_head_has_its_own_count(plugin: Any, vllm: SimpleNamespace) -> None:
    plugin.register()
    ours = {"moe_fair": {"mtp": {"model.layers.3.mlp": 4}}, "per_layer_config": COUNTS}
    given = run(config(**ours), config(**ours, n_predict=1))
    assert head(vllm, given) == (4, 4)
    assert (given.model_config.hf_config.num_experts, given.draft.hf_config.num_experts) == (8, 8)
    assert layers(vllm, given) == [3, 8, 5]
    inner = config(per_layer_config=COUNTS)
    outer = {"moe_fair": ours["moe_fair"], "text_config": inner}
    assert head(
        vllm, run(SimpleNamespace(**outer), SimpleNamespace(**outer, n_predict=1))
    ) == (4, 4)  # fmt: skip
    stock = config(moe_fair={}), config(n_predict=1)
    assert head(vllm, run(*stock, enable_eplb=True)) == (8, 8)


class Router(nn.Module):
    """As transformers builds one: its number, its rows, a bias that is a buffer."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.weight = nn.Parameter(torch.randn(number, 4))
        self.register_buffer("bias", torch.randn(number))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Router(8), nn.Linear(4, 16)  # two rows an expert


def test_what_transformers_builds_is_cut(
    plugin: Any, vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MoEMixin:
        """Takes the experts out, as vLLM's transformers backend does."""

        def __init__(self, hf: Any) -> None:
            self.config, self.parallel_config = hf, run(hf).parallel_config
            self.model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})

        def recursive_replace(self) -> list[Any]:
            return [
                backend.FusedMoEFactory(num_experts=8, prefix=f"model.layers.{i}.experts")
                for i in range(3)
            ]

    backend: Any = ModuleType(plugin.BACKEND)
    backend.MoEMixin, backend.FusedMoEFactory = MoEMixin, lambda num_experts, prefix: num_experts
    factory = backend.FusedMoEFactory
    monkeypatch.setitem(sys.modules, plugin.BACKEND, backend)
    plugin.register()
    said = {
        "experts": {"model.layers.0": 3, "model.layers.1": 8, "model.layers.2": 5},
        "tensors": {"gate.weight": 0, "gate.bias": 0, "experts.weight": 0, "experts.bias": 0},
        "numbers": ["gate.number"],
    }
    ours = config(moe_fair=said, per_layer_config=COUNTS)
    layers(vllm, run(ours))
    made = MoEMixin(ours)
    before = made.model["layers"][2].gate.weight[:5].clone()
    assert made.recursive_replace() == [3, 8, 5]
    last = made.model["layers"][2]
    assert (last.gate.number, len(last.gate.bias), len(last.experts.bias)) == (5, 5, 10)
    assert torch.equal(last.gate.weight, before)
    assert isinstance(last.gate.weight, nn.Parameter)
    assert backend.FusedMoEFactory is factory
    assert MoEMixin(config()).recursive_replace() == [8, 8, 8]


def test_what_is_refused(plugin: Any, vllm: SimpleNamespace) -> None:
    plugin.register()
    ours = {"moe_fair": {"mtp": {"mtp.layers.0.mlp": 4}}, "per_layer_config": COUNTS}
    model, own = config(**ours), config(**ours, n_predict=1)
    with pytest.raises(ValueError, match="leave out --enable-eplb"):
        layers(vllm, run(model, enable_eplb=True))
    by_three = {"enable_expert_parallel": True, "tensor_parallel_size": 3}
    with pytest.raises(ValueError, match=r"layer 2 keeps 5 experts .* which 3 devices"):
        layers(vllm, run(model, **by_three))
    with pytest.raises(ValueError, match=r"layer mtp\.layers\.0\.mlp keeps 4 experts .* 3 devices"):
        head(vllm, run(model, own, **by_three))
    own.moe_fair = {"mtp": {"mtp.layers.0.mlp": 4, "mtp.layers.1.mlp": 5}}
    with pytest.raises(ValueError, match=r"mtp\.layers\.1\.mlp: 5.* are built under one"):
        head(vllm, run(model, own))
    with pytest.raises(ValueError, match="in a form that is not known"):
        layers(vllm, run(config(moe_fair={}, per_layer_config=[1, 2])))


def test_a_version_whose_seam_has_moved_says_so(
    plugin: Any, vllm: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    del vllm.loader.initialize_model
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert f"this one has no {LOADER}.initialize_model" in caplog.text
    assert "their MTP heads will not load" in caplog.text
    caplog.clear()
    del vllm.utils.make_layers
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert f"this one has no {UTILS}.make_layers" in caplog.text
