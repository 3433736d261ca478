"""A transformers mixture-of-experts model whose layers keep different numbers of routed experts.

This file travels inside the checkpoint (`auto_map`), needs nothing but transformers, and changes
nothing but sizes: it subclasses the stock model, and before the weights are loaded it cuts every
block of `config.moe_fair["experts"]` = {block: experts kept}. What is cut in a block is named by
`config.moe_fair["tensors"]` = {tensor: axis of the experts} and `config.moe_fair["numbers"]`.
"""

import torch
from torch import nn
from transformers import Qwen2MoeForCausalLM as StockModel

# names under which configs say how many routed experts there are
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _cut(module, name, dim, old, new):
    t = getattr(module, name).detach()
    length = t.shape[dim] // old * new + t.shape[dim] % old  # rows of no expert stay
    t = t.narrow(dim, 0, length).clone()
    setattr(module, name, nn.Parameter(t) if name in module._parameters else t)


def _owner(block, path):
    name, _, attribute = path.rpartition(".")
    for part in name.split(".") if name else ():
        block = getattr(block, part, None)
    return (block, attribute) if getattr(block, attribute, None) is not None else (None, "")


def _pad(index, width):
    """Recorded router logits keep one width, so that the auxiliary loss can stack the layers."""

    def hook(module, arguments, output):
        logits = output[index] if isinstance(output, tuple) else output
        missing = width - logits.shape[-1]
        padded = nn.functional.pad(logits, (0, missing), value=float("-inf"))
        if not isinstance(output, tuple):
            return padded
        return (*output[:index], padded, *output[index + 1 :])

    return hook


def _own_config(config, own):
    """The model's config with a layer's own numbers; all else is shared, also what is set later."""
    kind = type(config.__class__.__name__, (type(config),), {})
    for name, value in own.items():
        setattr(kind, name, property(lambda self, value=value: value))
    kind.__reduce_ex__ = lambda self, protocol: (_own_config, (config, own))
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", vars(config))
    return made


class MoeFairForCausalLM(StockModel):
    """The stock model with blocks of different sizes."""

    # transformers finds these two by reading the source file of the class, and this is not the file
    _can_set_experts_implementation_cached_value = StockModel._can_set_experts_implementation()
    _can_set_attn_implementation_cached_value = StockModel._can_set_attn_implementation()

    @classmethod
    def is_custom_code(cls):
        """The weights have the stock class's names: transformers' own conversion applies."""
        return False

    @classmethod
    def _supports_default_dynamic_cache(cls):
        """Asked of the stock class, because transformers answers by the name of the class."""
        return StockModel._supports_default_dynamic_cache()

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        with torch.no_grad():
            for name, count in config.moe_fair["experts"].items():
                self._resize(self.get_submodule(name), config.moe_fair, count)

    def _resize(self, block, plan, new):
        numbers = [_owner(block, path) for path in plan["numbers"]]
        [old] = {getattr(m, name) for m, name in numbers if m is not None}
        if old == new:
            return
        for path, dim in plan["tensors"].items():
            module, name = _owner(block, path)
            if module is not None:
                _cut(module, name, dim, old, new)
        for module, name in numbers:
            if module is not None:
                setattr(module, name, new)
                self._tell(module, old, new)
        self._pad_recorded(block, old)

    def _tell(self, module, old, new):
        """The module's config has its own number: quantisers and others build from it."""
        config = getattr(module, "config", None)
        own = {n: new for n in COUNTS if getattr(config, n, None) == old}
        if own:
            module.config = _own_config(config, own)

    def _pad_recorded(self, block, old):
        recorders = (self._can_record_outputs or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, (list, tuple)) else (recorders,):
            kind = getattr(recorder, "target_class", None)
            for module in block.modules() if kind else ():
                if isinstance(module, kind):
                    module.register_forward_hook(_pad(recorder.index, old))
