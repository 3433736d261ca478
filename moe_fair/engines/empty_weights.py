"""Models without weights: parameters on the meta device, buffers as they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

LARGE = 2**26  # elements: more than a buffer has, less than a layer's experts


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, a model that is made has none.

    accelerate lets each parameter be allocated before it drops it: what may be larger than the
    machine's memory (experts of one layer of DeepSeek-V3 in float32) is not allocated at all.
    """
    with init_empty_weights(include_buffers=False), _LargeOnMeta(), uninitialised():
        yield


@contextmanager
def uninitialised() -> Iterator[None]:
    """Inside, parameters of models that are made get no values; which are tied is as ever.

    Random numbers for weights that are never there are most of the time that making a model takes.
    """
    with no_init_weights():  # which puts back what is replaced here too
        PreTrainedModel.init_weights = _tied
        yield


def _tied(model: PreTrainedModel) -> None:
    model.tie_weights(recompute_mapping=False)


class _LargeOnMeta(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            sizes = args[0] if args and not isinstance(args[0], int) else args
            if torch.Size(sizes).numel() >= LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)
