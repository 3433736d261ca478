"""The SGLang plugin against stand-ins that are called as SGLang 0.5.23 calls its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from places import ROOT
from plugins import plugin_of

COUNTS = {"0": {"num_experts": 3}, "2": {"num_experts": 5}}


@pytest.fixture
def plugin() -> Any:
    return plugin_of("sglang")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What SGLang was started with, and the hooks that it was given."""
    moe = SimpleNamespace(
        enable_eplb=False, ep_num_redundant_experts=0, disable_shared_experts_fusion=False
    )
    found = SimpleNamespace(moe=moe, moe_ep_size=1, hooks={})
    registry, context = ModuleType("hook_registry"), ModuleType("runtime_context")
    registry.HookType = SimpleNamespace(AROUND="around")  # type: ignore[attr-defined]
    registry.HookRegistry = SimpleNamespace(  # type: ignore[attr-defined]
        register=lambda target, hook, kind: found.hooks.update({target: (hook, kind)})
    )
    context.get_exec = lambda: found  # type: ignore[attr-defined]
    context.get_parallel = lambda: found  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", registry)
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    return found


def config(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(num_experts=8, **more)


def built(plugin: Any, found: SimpleNamespace) -> list[int]:
    """The number that each of three layers is built under."""

    def make_layers(number: int, layer_fn: Callable[..., Any], prefix: str = "") -> list[Any]:
        return [layer_fn(idx=i, prefix=f"{prefix}.{i}") for i in range(number)]

    def model(given: Any, _: Any, quant: Any = None) -> list[int]:
        inner = getattr(given.hf_config, "text_config", given.hf_config)
        return plugin.build_layers(
            make_layers, 3, lambda idx, prefix: inner.num_experts, prefix="model"
        )

    return plugin.build_model(model, SimpleNamespace(hf_config=found), "load", quant=None)


def test_it_registers_two_hooks(plugin: Any, server: SimpleNamespace) -> None:
    plugin.register()
    assert server.hooks == {
        "sglang.srt.model_loader.loader._initialize_model": (plugin.build_model, "around"),
        "sglang.srt.utils.common.make_layers": (plugin.build_layers, "around"),
    }
    text = (ROOT / "serving" / "sglang" / "pyproject.toml").read_text()
    assert (
        '[project.entry-points."sglang.srt.plugins"]\nmoe_fair = "moe_fair_sglang:register"' in text
    )


def test_each_layer_has_its_own_count(plugin: Any, server: SimpleNamespace) -> None:
    ours = config(moe_fair={}, per_layer_config=COUNTS)
    assert built(plugin, ours) == [3, 8, 5]
    assert ours.num_experts == 8
    inside = SimpleNamespace(moe_fair={}, text_config=config(per_layer_config=COUNTS))
    assert built(plugin, inside) == [3, 8, 5]
    spec = SimpleNamespace(per_layer_overrides={0: {"num_experts": 2}})  # as transformers 5 reads
    assert built(plugin, config(moe_fair={}, _heterogeneity_spec=spec)) == [2, 8, 8]
    assert plugin.building.get() is None


def test_others_are_built_as_ever(plugin: Any, server: SimpleNamespace) -> None:
    server.moe.enable_eplb = True
    for other in (config(), config(per_layer_config=COUNTS), config(moe_fair={})):
        assert built(plugin, other) == [8, 8, 8]


def test_what_is_refused(plugin: Any, server: SimpleNamespace) -> None:
    ours = config(moe_fair={}, per_layer_config=COUNTS, n_shared_experts=1)
    with pytest.raises(ValueError, match="give --disable-shared-experts-fusion"):
        built(plugin, ours)
    server.moe.disable_shared_experts_fusion = True
    assert built(plugin, ours) == [3, 8, 5]
    server.moe_ep_size = 3
    with pytest.raises(
        ValueError, match=r"layer 2 keeps 5 experts .* which 3 devices do not divide"
    ):
        built(plugin, ours)
    server.moe_ep_size, server.moe.ep_num_redundant_experts = 1, 2
    with pytest.raises(ValueError, match="leave out --enable-eplb"):
        built(plugin, ours)
    server.moe.ep_num_redundant_experts = 0
    with pytest.raises(ValueError, match="in a form that is not known"):
        built(plugin, config(moe_fair={}, per_layer_config=[1, 2]))
