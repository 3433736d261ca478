"""SGLang plugin: layers with different numbers of routed experts, as `moe-fair prune` leaves them.

Such a checkpoint says in `config.json`, under `per_layer_config`, how many experts each layer has;
SGLang's models read one number for all. They build their layers by way of
`sglang.srt.utils.common.make_layers`, so that function is wrapped: while a layer is built, the
config has that layer's own count. Models that are not moe_fair's are built as ever.

Written against SGLang 0.5.23 and its registry of hooks, and not run in it: nobody here has a device
that it takes. Loaded by SGLang itself (entry point `sglang.srt.plugins`) in its processes.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MARK = "moe_fair"  # key of a pruned checkpoint's config
BUILD = "sglang.srt.model_loader.loader._initialize_model"
LAYERS = "sglang.srt.utils.common.make_layers"
# settings of a config by which a model has shared experts
SHARED = ("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size")

Counts = dict[int, dict[str, int]]
# config and counts of the model that is being built
building: contextvars.ContextVar[tuple[Any, Counts] | None] = contextvars.ContextVar(
    "moe_fair", default=None
)


def register() -> None:
    """Hook the two functions; SGLang says by name where one has moved."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(BUILD, build_model, HookType.AROUND)
    HookRegistry.register(LAYERS, build_layers, HookType.AROUND)


def build_model(stock: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """`_initialize_model`, with the checkpoint's counts at hand.

    Raises:
        ValueError: what the server was started with cannot serve layers of different sizes.
    """
    config, counts = per_layer(model_config.hf_config)
    if config is not None:
        check(config, counts)
    token = building.set(None if config is None else (config, counts))
    try:
        return stock(model_config, *args, **kwargs)
    finally:
        building.reset(token)


def build_layers(
    stock: Callable[..., Any], number: int, layer_fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """`make_layers` under each layer's own counts."""
    now = building.get()
    if now is None:
        return stock(number, layer_fn, *args, **kwargs)
    config, counts = now

    @functools.wraps(layer_fn)
    def one(*a: Any, idx: int, **k: Any) -> Any:
        with own_counts(config, counts.get(idx, {})):
            return layer_fn(*a, idx=idx, **k)

    return stock(number, one, *args, **kwargs)


def per_layer(config: Any) -> tuple[Any, Counts]:
    """The (text) config of a moe_fair checkpoint and its layers' counts; None and {} of others.

    The mark is in the outer config of a multimodal model, the counts are in its text config.

    Raises:
        ValueError: the counts are there, and not where this transformers keeps them.
    """
    for c in (config, getattr(config, "text_config", None)):
        if c is None or MARK not in vars(config):
            continue
        spec = vars(c).get("_heterogeneity_spec")  # transformers' own reading of per_layer_config
        given = getattr(spec, "per_layer_overrides", None) or vars(c).get("per_layer_config")
        if not given:
            continue  # equal counts: a stock checkpoint
        if not isinstance(given, Mapping) or not all(
            isinstance(v, Mapping) for v in given.values()
        ):
            import transformers

            raise ValueError(
                f"moe-fair-sglang: transformers {transformers.__version__} keeps per_layer_config "
                "of config.json in a form that is not known; look for a newer moe-fair-sglang"
            )
        return c, {int(i): dict(v) for i, v in given.items()}
    return None, {}


def check(config: Any, counts: Counts) -> None:
    """The server was started with what layers of different sizes can be served by.

    Raises:
        ValueError: EPLB, experts that devices do not divide, or shared experts among the routed.
    """
    from sglang.srt.runtime_context import get_exec, get_parallel

    moe, devices = get_exec().moe, get_parallel().moe_ep_size
    if moe.enable_eplb or moe.ep_num_redundant_experts:
        raise ValueError(
            "moe-fair-sglang: EPLB and redundant experts count slots of one number, and the layers "
            "of this checkpoint keep different numbers; leave out --enable-eplb and "
            "--ep-num-redundant-experts"
        )
    for layer, own in sorted(counts.items()):
        for name, count in own.items():
            if count % devices:
                raise ValueError(
                    f"moe-fair-sglang: layer {layer} keeps {count} experts ({name}), which "
                    f"{devices} devices do not divide; leave out --ep-size, or prune with "
                    f"--multiple-of {devices}"
                )
    shared = any(getattr(config, n, None) for n in SHARED)
    if shared and not moe.disable_shared_experts_fusion:
        raise ValueError(
            "moe-fair-sglang: a fused shared expert is numbered after the experts of the whole "
            "model, and each layer has its own number; give --disable-shared-experts-fusion"
        )


@contextlib.contextmanager
def own_counts(config: Any, values: Mapping[str, int]) -> Iterator[None]:
    """Inside, the config has these numbers."""
    before = {k: config.__dict__[k] for k in values if k in config.__dict__}
    config.__dict__.update(values)
    try:
        yield
    finally:
        for k in values:
            if k in before:
                config.__dict__[k] = before[k]
            else:
                del config.__dict__[k]
