"""An mlx-lm model whose layers keep different numbers of routed experts.

This file travels inside the checkpoint (`model_file`) and needs nothing but mlx-lm. It builds the
stock model at the largest of the layers' numbers (`moe_fair` of the config) and slices every tensor
with a row per expert, before the weights are loaded.
"""

import importlib
import re

import mlx.core as mx
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import MODEL_REMAPPING

# names under which configs say how many routed experts there are
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ROUTERS = ("gate", "router")  # modules whose rows, or those of their parts, are the experts'


class ModelArgs:
    """What the stock class takes, and the layers' own numbers."""

    @classmethod
    def from_dict(cls, config):
        self, kind = cls(), config["model_type"]
        self.stock = importlib.import_module("mlx_lm.models." + MODEL_REMAPPING.get(kind, kind))
        blocks = config["moe_fair"]["experts"].items()
        self.counts = {int(re.findall(r"\.(\d+)\.", name)[-1]): n for name, n in blocks}
        self.most = max(self.counts.values())
        names = {k for k in COUNTS if k in config}
        self.args = self.stock.ModelArgs.from_dict({**config, **dict.fromkeys(names, self.most)})
        return self


class Model:
    """The stock model with blocks of different sizes; an object of a subclass of its class."""

    def __new__(cls, args):
        model = args.stock.Model(args.args)
        cut = {i: _slice(model, i, n, args.most) for i, n in args.counts.items()}

        class Sized(args.stock.Model):
            def sanitize(self, weights):
                """Stock names; layers with a tensor per expert are filled up to be stacked."""
                for i, n in args.counts.items():
                    for name in [k for k in weights if f".layers.{i}." in k and ".experts.0." in k]:
                        for e in range(n, args.most):
                            weights[name.replace(".experts.0.", f".experts.{e}.")] = weights[name]
                weights = super().sanitize(weights)
                for i, n in args.counts.items():
                    for name in cut[i] & weights.keys():
                        weights[name] = weights[name][:n]
                return weights

        model.__class__ = Sized
        return model


def _slice(model, index, count, most):
    """Cut one layer; the names of what has a row per expert."""
    layer = model.layers[index]
    prefix = next(path for path, m in model.named_modules() if m is layer)
    found = set()
    for path, module in layer.named_modules():
        routes = not {*path.split(".")}.isdisjoint(ROUTERS)
        for name, tensor in list(module.items()):
            rows = isinstance(tensor, mx.array) and tensor.ndim and tensor.shape[0] == most
            if rows and (routes or isinstance(module, SwitchLinear) or "correction" in name):
                module[name] = tensor[:count]
                found.add(f"{prefix}.{path}.{name}")
        for name in [k for k, v in vars(module).items() if "experts" in k and v == most]:
            setattr(module, name, count)
    return found
