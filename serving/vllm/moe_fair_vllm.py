"""vLLM plugin: layers with different numbers of routed experts, as `moe-fair prune` leaves them.

Such a checkpoint says in `config.json`, under `per_layer_config`, how many experts each layer has;
vLLM's models read one number for all. Every one of them builds its layers by way of
`vllm.model_executor.models.utils.make_layers`, so that function is wrapped: while a layer is built,
the config has that layer's own count. A head for multi-token prediction (MTP), which speculative
decoding runs as a model of its own, is built without that function: while it is, by way of
`vllm.model_executor.model_loader.utils.initialize_model`, the config has the head's count. Where
vLLM has no model of its own it builds one from transformers' class, whole: that is cut before vLLM
takes its experts out. Models whose configs do not say so are built as ever.

Loaded by vLLM itself (entry point `vllm.general_plugins`) in every process that it starts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MARK = "moe_fair"  # key of a pruned checkpoint's config
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SEAM = "vllm.model_executor.models.utils.make_layers"
HEAD_SEAM = "vllm.model_executor.model_loader.utils.initialize_model"
BACKEND = "vllm.model_executor.models.transformers.moe"  # builds from transformers' classes
TESTED = "0.32.0"
log = logging.getLogger("vllm.moe_fair")


def register() -> None:
    """Wrap both functions, wherever they have been imported by now, and lift one refusal.

    Where this vLLM lacks one, a warning says so, and what will not load.
    """
    if _put(SEAM, _wrap, "checkpoints with different numbers of experts per layer"):
        _put(HEAD_SEAM, _wrap_heads, "their MTP heads")
        _lift_refusal()


def _put(seam: str, wrap: Callable[[Any], Any], lost: str) -> bool:
    """The wrapped function in place of vLLM's own; False where there is none.

    Args:
        lost: what does not load without.
    """
    home, name = seam.rsplit(".", 1)
    try:
        stock = getattr(importlib.import_module(home), name)
    except (ImportError, AttributeError) as e:
        log.warning(
            "moe-fair-vllm was tested with vLLM %s; this one has no %s (%s): %s will not load",
            TESTED, seam, e, lost,
        )  # fmt: skip
        return False
    if not hasattr(stock, MARK):
        wrapped = wrap(stock)
        setattr(wrapped, MARK, True)
        for module in list(sys.modules.values()):
            ours = getattr(module, "__name__", "").startswith("vllm.")
            if ours and getattr(module, name, None) is stock:
                setattr(module, name, wrapped)
    return True


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

    return make_layers


def _wrap_heads(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`initialize_model`: a head under the head's count, and transformers' classes cut."""

    @functools.wraps(stock)
    def initialize_model(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        model_config = kwargs.get("model_config") or vllm_config.model_config
        counts = heads(model_config.hf_config)
        check_parallel(vllm_config.parallel_config, counts)
        if per_layer(model_config.hf_config)[1]:
            _cut_in_backend()
        with contextlib.ExitStack() as stack:
            if counts:
                # some classes of heads read the model's config, some their own copy of it
                for c in (vllm_config.model_config.hf_config, model_config.hf_config):
                    stack.enter_context(own_counts(per_layer(c)[0], next(iter(counts.values()))))
            return stock(vllm_config, *args, **kwargs)

    return initialize_model


def per_layer(config: Any) -> tuple[Any, dict[int, dict[str, int]]]:
    """The (text) config whose layers differ, and their counts; None and {} of others.

    A multimodal model builds its language model under the text config alone, which does not bear
    our mark: what counts is that nothing but numbers of experts differs.

    Raises:
        ValueError: the counts are there, and not where this transformers keeps them.
    """
    for c in (config, getattr(config, "text_config", None)):
        if c is None:
            continue
        spec = vars(c).get("_heterogeneity_spec")  # transformers' own reading of per_layer_config
        given = getattr(spec, "per_layer_overrides", None) or vars(c).get("per_layer_config")
        if not given:
            continue  # equal counts: a stock checkpoint
        known = isinstance(given, Mapping) and all(isinstance(v, Mapping) for v in given.values())
        if known and all(k in COUNTS for v in given.values() for k in v):
            return c, {int(i): dict(v) for i, v in given.items()}
        if not known and hasattr(config, MARK):
            import transformers

            raise ValueError(
                f"moe-fair-vllm: transformers {transformers.__version__} keeps per_layer_config of "
                "config.json in a form that is not known; look for a newer moe-fair-vllm"
            )
    return _by_block(config)


def _by_block(config: Any) -> tuple[Any, dict[int, dict[str, int]]]:
    """The same from moe_fair's own list, where a config has no per_layer_config of ours."""
    home = getattr(config, "text_config", None) or config
    keys = [k for k in COUNTS if isinstance(getattr(home, k, None), int)]
    counts = {
        int(re.findall(r"\.(\d+)\.", name)[-1]): dict.fromkeys(keys, n)
        for name, n in (vars(config).get(MARK) or {}).get("experts", {}).items()
    }
    return (home, counts) if keys and counts else (None, {})


def heads(config: Any) -> dict[str, dict[str, int]]:
    """Counts of an MTP head's blocks, by name, where a config is what vLLM builds a head from.

    Raises:
        ValueError: the blocks have different numbers, which vLLM builds under one.
    """
    _, layers = per_layer(config)
    if not layers or not hasattr(config, "n_predict"):  # which vLLM adds in its copy for heads
        return {}
    found: Mapping[str, int] = getattr(config, MARK, {}).get("mtp", {})
    if len({*found.values()}) > 1:
        said = ", ".join(f"{name}: {n}" for name, n in found.items())
        raise ValueError(
            f"moe-fair-vllm: MTP heads with different numbers of experts ({said}) are built under "
            "one; leave out --speculative-config, or prune with --mtp drop"
        )
    keys = next(iter(layers.values()))
    return {name: dict.fromkeys(keys, n) for name, n in found.items()}


def check_parallel(parallel: Any, counts: Mapping[Any, Mapping[str, int]]) -> None:
    """Each layer's experts divide by the devices that share them.

    Args:
        counts: of the layers, by number or by name.

    Raises:
        ValueError: expert parallelism that cannot be; names the layer and its number.
    """
    if counts and getattr(parallel, "enable_eplb", False):
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
    """Inside, the config has these numbers, and so has a part of it that keeps one (DBRX)."""
    parts = [v.__dict__ for v in vars(config).values() if hasattr(v, "__dict__")]
    with contextlib.ExitStack() as stack:
        for k, value in values.items():
            for home in (config.__dict__, *(p for p in parts if k in p)):
                if k in home:
                    stack.callback(home.__setitem__, k, home[k])
                else:
                    stack.callback(home.pop, k)
                home[k] = value
        yield


def _cut_in_backend() -> None:
    """vLLM's transformers backend takes experts out of models that were cut before.

    Done when the first unequal model is built: to import the backend is slow.
    """
    try:
        backend = importlib.import_module(BACKEND)
        stock, factory = backend.MoEMixin.recursive_replace, backend.FusedMoEFactory
    except (ImportError, AttributeError) as e:
        log.warning(
            "moe-fair-vllm was tested with vLLM %s; this one has no %s as it was (%s): checkpoints "
            "that it builds from transformers' classes will not load", TESTED, BACKEND, e,
        )  # fmt: skip
        return
    if hasattr(stock, MARK):
        return

    @functools.wraps(stock)
    def recursive_replace(self: Any) -> Any:
        _, counts = per_layer(self.config)
        if not counts:
            return stock(self)
        check_parallel(self.parallel_config, counts)
        blocks = cut(self.model, getattr(self.config, MARK))

        def own(**kwargs: Any) -> Any:  # `prefix` names the experts within a block
            within = f".{kwargs['prefix']}."
            found = next((n for name, n in blocks.items() if f".{name}." in within), None)
            return factory(**kwargs | ({"num_experts": found} if found else {}))

        backend.FusedMoEFactory = own
        try:
            return stock(self)
        finally:
            backend.FusedMoEFactory = factory

    setattr(recursive_replace, MARK, True)
    backend.MoEMixin.recursive_replace = recursive_replace


def cut(model: Any, plan: Mapping[str, Any]) -> dict[str, int]:
    """Blocks of a model without weights to the sizes of the checkpoint's; name -> experts.

    As the file modeling_moe_fair.py in the checkpoint does it, which needs --trust-remote-code.

    Args:
        model: transformers' own, perhaps without what stands around it in the checkpoint's names.
        plan: what the checkpoint's config says under `moe_fair`.
    """
    modules, done = dict(model.named_modules()), {}
    for full, new in plan["experts"].items():
        ends = [full.split(".", i)[-1] for i in range(full.count(".") + 1)]
        name = next((e for e in ends if e in modules), None)
        if name is None:
            continue  # a layer that another device holds
        block, done[name] = modules[name], new
        numbers = [o for o in (_owner(block, path) for path in plan["numbers"]) if o]
        [old] = {getattr(m, n) for m, n in numbers}
        for path, dim in plan["tensors"].items():
            if owner := _owner(block, path):
                _narrow(*owner, dim, old, new)
        for m, n in numbers:
            setattr(m, n, new)
    return done


def _owner(block: Any, path: str) -> tuple[Any, str] | None:
    """The module in a block that has this tensor or number, and its name there."""
    *folders, name = path.split(".")
    for part in folders:
        block = getattr(block, part, None)
    return None if getattr(block, name, None) is None else (block, name)


def _narrow(module: Any, name: str, dim: int, old: int, new: int) -> None:
    import torch

    t = getattr(module, name).detach()
    length = t.shape[dim] // old * new + t.shape[dim] % old  # rows of no expert stay
    t = t.narrow(dim, 0, length).clone()
    setattr(module, name, torch.nn.Parameter(t) if name in module._parameters else t)


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
        return None if per_layer(self.hf_config)[1] else stock(self)

    Convertor.get_per_layer_hf_configs = get_per_layer_hf_configs
