"""llama.cpp's converter for checkpoints whose layers keep different numbers of routed experts.

    LLAMA_CPP=SOURCE python convert_per_layer.py OUT --outfile OUT.gguf [--outtype TYPE]

What follows goes to the `convert_hf_to_gguf.py` of SOURCE, a copy of llama.cpp, unchanged: while a
tensor of a layer is converted, the settings have that layer's own count (`per_layer_config` of
config.json). What comes out is for a llama.cpp with the patch that lies beside this file.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator
from typing import Any

if "LLAMA_CPP" not in os.environ:
    raise SystemExit("set LLAMA_CPP to a copy of llama.cpp's source")
root = os.environ["LLAMA_CPP"]
sys.path[:0] = [root, f"{root}/gguf-py"]
import conversion  # noqa: E402

stock_class = conversion.get_model_class
# names of the number in configs; the converter copies some to others for families that it joins
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def own_counts(hparams: dict[str, Any], layer: int | None) -> dict[str, int]:
    """A layer's own number by the name that the config has; {} where it has none of its own.

    Where a family reads per_layer_config in its own way, moe_fair's own list of blocks says it.
    """
    if hparams.get("per_layer_config"):
        return dict(hparams["per_layer_config"].get(str(layer), {}))
    names = [k for k in COUNTS if k in hparams]
    for block, n in (hparams.get("moe_fair") or {}).get("experts", {}).items():
        if f".layers.{layer}." in f".{block}.":
            return dict.fromkeys(names, n)
    return {}


def get_model_class(name: str, mmproj: bool = False) -> Any:
    """The converter's class for an architecture, which converts each layer under its own count."""
    stock = stock_class(name, mmproj=mmproj)

    class PerLayer(stock):  # type: ignore[misc, valid-type]
        model_arch = stock.model_arch

        def modify_tensors(self, data: Any, name: str, bid: int | None) -> Iterator[Any]:
            own = own_counts(self.hparams, bid)
            for k, count in [*own.items()]:
                old = self.hparams.get(k)
                own |= {n: count for n in COUNTS if old is not None and self.hparams.get(n) == old}
            before = {k: self.hparams[k] for k in own if k in self.hparams}
            self.hparams.update(own)
            try:
                made = list(super().modify_tensors(data, name, bid))
            finally:
                for k in own:
                    self.hparams.pop(k)
                self.hparams.update(before)
            yield from made

    return PerLayer


conversion.get_model_class = get_model_class

if __name__ == "__main__":
    sys.argv[0] = f"{root}/convert_hf_to_gguf.py"
    runpy.run_path(sys.argv[0], run_name="__main__")
