"""Which weights of a result become what on the way out (--save-as), known from headers alone.

Routed experts are packed, and whatever linear maps of the decoder layers come in modules whose
every matrix divides into blocks: engines join the maps of one module (queries, keys and values),
which then have to be packed alike. Everything else is bfloat16, as readers want beside packed
weights; buffers, and what a class keeps in float32, stay as they are.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from moe_fair.core.plan import ModelSize
from moe_fair.engines.decoder import find_decoder
from moe_fair.engines.packing import QUANTISED, PackedWeight
from moe_fair.engines.packing.checkpoint import BESIDE
from moe_fair.engines.packing.scheme import CODES, FLOATS
from moe_fair.engines.packing.targets import SIDE, Target, target
from moe_fair.engines.shards import StoredTensor, bytes_of
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.tensor_slicing import ExpertTensor

DTYPES = ("dtype", "torch_dtype")
EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


class Conversion:
    """See the module.

    Args:
        source: the checkpoint that is cut.
        name: `bf16`, `fp8` or `w4a16`.

    Attributes:
        weights: by name, of those that are packed before or after.

    Raises:
        ValueError: its experts cannot become that, or are that already.
    """

    def __init__(self, source: Checkpoint, name: str) -> None:
        self.source, self.target, self._plain = source, target(name), target("bf16")
        packing = source.packing
        if packing is not None and packing.scheme.name == name:
            self._refuse(f"its weights are packed as {name} already")
        self.weights: dict[str, PackedWeight] = dict(packing.weights) if packing else {}
        self.packs = frozenset(self._packs() if self.target.scheme is not None else ())
        self.weights |= {n: w for n, w in self._matrices.items() if n in self.packs}
        if not self.weights and not any(map(self.narrows, source.tensors)):
            self._refuse("all of it is bfloat16 already")

    def pack(self, weight: PackedWeight, values: Tensor) -> dict[str, Tensor]:
        """Role -> tensor, of all parts of a weight of the result."""
        return self._target(weight).pack(weight, values)

    def unpack(self, weight: PackedWeight, parts: Mapping[str, Tensor]) -> Tensor:
        """The numbers that it then has."""
        return self._target(weight).unpack(weight, parts)

    def becomes(self, weight: PackedWeight, name: str, shape: tuple[int, ...]) -> PackedWeight:
        """What a weight is in the result, under its name and in its shape after the cut."""
        its = self.target if weight.name in self.packs else self._plain
        return its.weight(name, shape)

    def narrows(self, t: StoredTensor) -> bool:
        """A tensor that is not packed, before or after, becomes bfloat16.

        Args:
            t: of the checkpoint, or of what is left of it after the cut.
        """
        place = self.source.find(t.name).name
        return t.dtype in FLOATS and t.dtype != "BF16" and place in self._parameters

    def drops(self, t: StoredTensor) -> bool:
        """It says how activations were quantised, which they no longer are."""
        return self.source.packing is not None and t.name.endswith(BESIDE)

    def config(self, config: dict[str, Any], stays: Iterable[StoredTensor]) -> dict[str, Any]:
        """The config of the result: how its weights are packed, and of which type the others are.

        Args:
            stays: tensors of the result that are not packed.
        """
        config = copy.deepcopy(config)
        inner = config.get("text_config")
        for part in (config, inner if isinstance(inner, dict) else {}):
            for name in QUANTISED:
                part.pop(name, None)
            part |= {n: "bfloat16" for n in DTYPES if n in part}
        if not any(n in config for n in DTYPES):
            config[DTYPES[0]] = "bfloat16"
        if self.target.scheme is not None:
            plain = sorted(set(_modules(stays)))
            settings = {**copy.deepcopy(dict(self.target.settings)), self.target.plain: plain}
            config[QUANTISED[0]] = settings
        return config

    def size(self, cut: ModelSize) -> ModelSize:
        """What the result takes on disk, to some percent.

        Args:
            cut: parameters and bytes of the result, were it stored as the checkpoint is.
        """
        whole = expert = weights = 0
        owned = {p.name for w in self.weights.values() for p in w.parts.values()}
        for w in self.weights.values():
            new = sum(bytes_of(t) for t in self.becomes(w, w.name, w.shape).parts.values())
            whole += new
            if w.parts[CODES].name in self.source.parts:
                expert, weights = expert + new, weights + w.numel
        for t in self.source.tensors:
            if t.name not in owned and not self.drops(t):
                new = t.numel * 2 if self.narrows(t) else t.bytes
                whole += new
                if t.name in self.source.parts:
                    expert, weights = expert + new, weights + t.numel
        gone = self.source.size.parameters - cut.parameters
        return ModelSize(cut.parameters, whole - gone * expert // weights)

    @cached_property
    def _parameters(self) -> frozenset[str]:
        """Names in the model of what may become bfloat16."""
        model: Any = self.source.skeleton
        wide = [
            n for of in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
            for n in getattr(model, of, None) or ()
        ]  # fmt: skip
        names = (n for n, _ in model.named_parameters(remove_duplicate=False))
        return frozenset(n for n in names if not any(_within(w, n) for w in wide))

    @cached_property
    def _matrices(self) -> dict[str, PackedWeight]:
        """Every weight by its name, packed before or not."""
        packing = self.source.packing
        owned = packing.owners if packing else {}
        plain = [t for t in self.source.tensors if t.name not in owned and t.dtype in FLOATS]
        found = {t.name: PackedWeight(t.name, t.shape, {CODES: t}) for t in plain}
        return found | (dict(packing.weights) if packing else {})

    def _target(self, weight: PackedWeight) -> Target:
        """By what is stored of a weight of the result."""
        return self.target if len(weight.parts) > 1 else self._plain

    def _packs(self) -> Iterator[str]:
        """Names of the weights that will be packed."""
        experts = {
            f"{b.name}.{b.path(b.experts, n)}"
            for b in self.source.blocks
            for n, p in b.experts.named_parameters()
            if p.dim() == 3
        }
        linear = self._linear()
        modules: dict[str, list[PackedWeight]] = {}
        for w in self._matrices.values():
            where, part = self.source.find(w.name), self.source.parts.get(w.parts[CODES].name)
            if where.name in experts:
                self._check_expert(w, part)
                yield w.name
            elif where.name in linear:
                modules.setdefault(w.name.rsplit(".", 2)[0], []).append(w)
        for members in modules.values():
            if all(map(self._divides, members)):
                yield from (w.name for w in members)

    def _linear(self) -> set[str]:
        """Names of the weights of linear maps in decoder layers that are no routers."""
        model = self.source.skeleton
        routers = {id(a.module) for b in self.source.blocks for a in b.routed}
        layers = {id(m) for layer in find_decoder(model).layers for m in layer.modules()}
        return {
            f"{n}.weight"
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and id(m) in layers and id(m) not in routers
        }

    def _divides(self, w: PackedWeight) -> bool:
        where = self.source.find(w.name)
        whole = where.one and not where.operations and where.name in self._parameters
        return whole and len(w.shape) == 2 and not any(n % SIDE for n in w.shape)

    def _check_expert(self, w: PackedWeight, part: ExpertTensor | None) -> None:
        if part is None or part.expert is None or self.source.find(w.name).part is None:
            self._refuse(
                f"{w.name} {list(w.shape)} is no matrix of one expert, which readers of "
                f"{self.target.name} want"
            )
        if len(w.shape) != 2 or any(n % SIDE for n in w.shape):
            self._refuse(f"{w.name} is {list(w.shape)}, which {SIDE} does not divide")

    def _refuse(self, why: str) -> None:
        raise ValueError(
            f"{self.source.model}: --save-as {self.target.name}: {why}; leave it out, or give "
            "another"
        )


def _within(name: str, parameter: str) -> bool:
    """As transformers reads what a class keeps in float32: whole words of a parameter's name."""
    return re.search(rf"(^|\.){re.escape(name)}($|\.)", parameter) is not None


def _modules(stays: Iterable[StoredTensor]) -> Iterator[str]:
    """Modules that a reader must not take for packed ones."""
    for t in stays:
        if t.name.endswith(".weight") and len(t.shape) == 2:
            yield t.name.removesuffix(".weight")
            if (match := EXPERT.match(t.name)) is not None:
                yield match[1]


def plain_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config without what `Conversion.config` may change."""
    left = {k: v for k, v in config.items() if k not in (*QUANTISED, *DTYPES)}
    if isinstance(left.get("text_config"), dict):
        left["text_config"] = plain_settings(left["text_config"])
    return left
