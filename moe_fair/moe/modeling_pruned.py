"""A transformers mixture-of-experts model whose layers keep different numbers of routed experts.

This file travels inside the checkpoint (`auto_map`), needs nothing but transformers, and changes
nothing but sizes: it subclasses the stock model, and before the weights are loaded it cuts every
block's experts and router to the count that `config.moe_fair["experts"]` gives for it.
"""

import torch
from torch import nn
from transformers import Qwen2MoeForCausalLM as StockModel


def _cut(store, name, dim, count):
    tensor = store[name].detach().narrow(dim, 0, count).clone()
    old = store[name]
    store[name] = (
        nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    )


def _cut_router(module, old, new):
    for sub in module.modules():
        for store in (sub._parameters, sub._buffers):
            for name, t in store.items():
                if t is not None:
                    _cut(store, name, 0 if t.shape[0] == old else 1, new)
        if isinstance(sub, nn.Linear):
            sub.out_features = new


def _pad_router_logits(width):
    """Recorded router logits keep one width, so that the auxiliary loss can stack the layers."""

    def hook(module, arguments, output):
        logits = output[0]
        missing = width - logits.shape[-1]
        return (nn.functional.pad(logits, (0, missing), value=float("-inf")), *output[1:])

    return hook


def _resize(block, experts, new):
    old = experts.num_experts
    router = next(
        c for c in block.children() if c is not experts and getattr(c, "num_experts", None) == old
    )
    for name, t in experts._parameters.items():
        if t is not None:
            _cut(experts._parameters, name, 0, new)
    _cut_router(router, old, new)
    for store in (block._parameters, block._buffers):
        for name, t in store.items():
            if t is not None and t.dim() == 1 and t.shape[0] == old:
                _cut(store, name, 0, new)
    for module in (block, experts, router):
        if getattr(module, "num_experts", None) == old:
            module.num_experts = new
    router.register_forward_hook(_pad_router_logits(old))


class MoeFairForCausalLM(StockModel):
    """The stock model with `config.moe_fair["experts"]` = {block: number of experts}."""

    # transformers finds these two by reading the source file of the class, and this is not the file
    _can_set_experts_implementation_cached_value = True
    _can_set_attn_implementation_cached_value = True

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        with torch.no_grad():
            for name, count in config.moe_fair["experts"].items():
                block = self.get_submodule(name)
                experts = next(c for c in block.children() if hasattr(c, "_apply_gate"))
                if experts.num_experts != count:
                    _resize(block, experts, count)
