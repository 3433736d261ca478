"""vLLM plugin: layers with different numbers of routed experts, as `moe-fair prune` leaves them.

Such a checkpoint says in `config.json`, under `per_layer_config`, how many experts each layer has;
vLLM's models read one number for all. Every one of them builds its layers by way of
`vllm.model_executor.models.utils.make_layers`, so that function is wrapped: while a layer is built,
the config has that layer's own count. Models that are not moe_fair's are built as ever.

Loaded by vLLM itself (entry point `vllm.general_plugins`) in every process that it starts.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MARK = "moe_fair"  # key of a pruned checkpoint's config
SEAM = "vllm.model_executor.models.utils.make_layers"
TESTED = "0.32.0"
log = logging.getLogger("vllm.moe_fair")


def register() -> None:
    """Wrap `make_layers`, wherever it has been imported by now, and lift one refusal.

    Where this vLLM has no such function, a warning says so: unequal checkpoints will not load.
    """
    try:
        from vllm.model_executor.models import utils

        stock = utils.make_layers
    except (ImportError, AttributeError) as e:
        log.warning(
            "moe-fair-vllm was tested with vLLM %s; this one has no %s (%s): checkpoints with "
            "different numbers of experts per layer will not load",
            TESTED, SEAM, e,
        )  # fmt: skip
        return
    if hasattr(stock, MARK):
        return
    wrapped = _wrap(stock)
    for module in list(sys.modules.values()):
        ours = getattr(module, "__name__", "").startswith("vllm.")
        if ours and getattr(module, "make_layers", None) is stock:
            module.make_layers = wrapped  # type: ignore[attr-defined]
    utils.make_layers = wrapped
    _lift_refusal()


def _wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`make_layers` under each layer's own counts."""

    @functools.wraps(stock)
    def make_layers(
        num_hidden_layers: int, layer_fn: Callable[..., Any], prefix: str, *args: Any, **kwargs: Any
    ) -> Any:
        from vllm.config import get_current_vllm_config

        current = get_current_vllm_config()
        config, counts = per_layer(current.model_config.hf_config)
        if config is None:
            return stock(num_hidden_layers, layer_fn, prefix, *args, **kwargs)
        check_parallel(current.parallel_config, counts)

        def one(*a: Any, prefix: str, **k: Any) -> Any:
            with own_counts(config, counts.get(int(prefix.rsplit(".", 1)[1]), {})):
                return layer_fn(*a, prefix=prefix, **k)

        return stock(num_hidden_layers, one, prefix, *args, **kwargs)

    setattr(make_layers, MARK, True)
    return make_layers


def per_layer(config: Any) -> tuple[Any, dict[int, dict[str, int]]]:
    """The (text) config of a moe_fair checkpoint and its layers' counts; None and {} of others.

    Raises:
        ValueError: the counts are there, and not where this transformers keeps them.
    """
    for c in (config, getattr(config, "text_config", None)):
        if c is None or MARK not in vars(c):
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
                f"moe-fair-vllm: transformers {transformers.__version__} keeps per_layer_config of "
                "config.json in a form that is not known; look for a newer moe-fair-vllm"
            )
        return c, {int(i): dict(v) for i, v in given.items()}
    return None, {}


def check_parallel(parallel: Any, counts: Mapping[int, Mapping[str, int]]) -> None:
    """Each layer's experts divide by the devices that share them.

    Raises:
        ValueError: expert parallelism that cannot be; names the layer and its number.
    """
    if getattr(parallel, "enable_eplb", False):
        raise ValueError(
            "moe-fair-vllm: EPLB moves experts between layers' slots of one number, and the layers "
            "of this checkpoint keep different numbers; leave out --enable-eplb"
        )
    if not getattr(parallel, "enable_expert_parallel", False):
        return
    devices = parallel.tensor_parallel_size * parallel.data_parallel_size
    for layer, own in sorted(counts.items()):
        for name, count in own.items():
            if count % devices:
                raise ValueError(
                    f"moe-fair-vllm: layer {layer} keeps {count} experts ({name}), which {devices} "
                    "devices do not divide; leave out --enable-expert-parallel, or prune with "
                    f"--multiple-of {devices}"
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


def _lift_refusal() -> None:
    """vLLM refuses latent attention where the config varies by layer; here only counts do."""
    try:
        from vllm.transformers_utils.model_arch_config_convertor import (
            ModelArchConfigConvertorBase as Convertor,
        )

        stock = Convertor.get_per_layer_hf_configs
    except (ImportError, AttributeError):
        return  # a version that does not refuse them

    def get_per_layer_hf_configs(self: Any) -> Any:
        return None if hasattr(self.hf_text_config, MARK) else stock(self)

    Convertor.get_per_layer_hf_configs = get_per_layer_hf_configs
