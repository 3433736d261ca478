"""One view of any MoE block, found by structure: which module holds the experts, which routes.

transformers keeps the experts of a layer in one module of fused 3-D parameters, under the contract
of `use_experts_implementation`: `num_experts`, `_apply_gate`, and
`forward(hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K])`. The router is the sibling
that carries the same `num_experts`. A block that is built otherwise has a file in `families/` that
says what differs; what fits neither raises before anything is measured.

Shape legend: T tokens, E experts, K top-k, S = T·K (token, slot) rows, D model, F hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_fair.core.layout import COUNTS
from moe_fair.core.units import UnitGroup
from moe_fair.moe.families import families

# experts in the place of a block's own: (hidden [T, D], ids [T, K], weights [T, K]) -> [T, D]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
# names under which modules keep E as a number, as configs do
COUNTERS = COUNTS
# of a model's config: "cut" where layers that look experts up by token id are cut like others;
# `Checkpoint` puts it there, so that every model that is built from the config is seen alike
HASH_LAYERS = "moe_fair_hash_layers"


class Axis(NamedTuple):
    """A tensor with an expert axis: `length // E` rows an expert, then `length % E` of none."""

    module: nn.Module
    tensor: str
    dim: int


class TokenTable(NamedTuple):
    """A tensor [V, K] with the ids of each token's experts, and the router's [E, D] beside it."""

    module: nn.Module
    tensor: str
    rows: str


@dataclass(frozen=True)
class MoeBlock:
    """A decoder layer's routed experts and what must be cut with them.

    Attributes:
        name: module path of the block, as in `model.named_modules()`.
        layer: index of the decoder layer.
        block, experts, router: the modules.
        routed: every router-side tensor with an expert axis.
        top_k: experts per token.
        n_group, topk_group: group-limited routing; 1, 1 without.
        table: what says who serves which token, where no score does.
    """

    name: str
    layer: int
    block: nn.Module
    experts: nn.Module
    router: nn.Module
    routed: tuple[Axis, ...]
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    table: TokenTable | None = None

    @property
    def num_experts(self) -> int:
        """E, as the experts module has it now."""
        return int(self.experts.num_experts)  # type: ignore[arg-type]

    def tensors(self) -> Iterator[Axis]:
        """Every tensor that is cut: those of the experts, then those of the router's side."""
        for module in self.experts.modules():
            yield from (Axis(module, tensor, 0) for tensor, _ in own_tensors(module))
        yield from self.routed

    def numbers(self) -> Iterator[tuple[nn.Module, str]]:
        """(module, attribute) of every number that is E."""
        linear = {m for m, _, _ in self.routed if isinstance(m, nn.Linear)}
        inside = dict.fromkeys([self.block, *self.experts.modules(), *self.router.modules()])
        for m in inside:
            for name in (*COUNTERS, *(["out_features"] if m in linear else [])):
                if getattr(m, name, None) == self.num_experts:
                    yield m, name

    def path(self, module: nn.Module, attribute: str) -> str:
        """`experts.down_proj`: where an attribute lies, from the block."""
        [name] = [n for n, m in self.block.named_modules() if m is module]
        return f"{name}.{attribute}" if name else attribute

    def attach(self, forward: Forward) -> tuple[Forward, Callable[[], None]]:
        """Put `forward` in the place of the block's experts.

        Returns:
            the stock forward, and what undoes it.
        """
        experts, stock = self.experts, self.experts.forward
        experts.forward = forward

        def detach() -> None:
            del experts.forward  # the class's own shows again
            if experts.forward != stock:  # accelerate had put a hook on the instance
                experts.forward = stock

        return stock, detach

    def outputs(self, stock: Forward, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """f_e(x) before its weight, one (token, slot) a row [S, D], by the stock kernel.

        Args:
            rows, ids, weights: [S, D], [S], [S]: what the experts would be given of each.
        """
        return stock(rows, ids.unsqueeze(1), torch.ones_like(weights).unsqueeze(1))

    def routed_output(self, stock: Forward, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Σ_K weight f_e(x) [T, D], by the stock kernel.

        Args:
            x, ids, weights: [T, D], [T, K], [T, K]: what `attach` gives to a forward.
        """
        return stock(x, ids, weights)

    def chosen(self, output: Any) -> tuple[Tensor, Tensor] | None:
        """Ids and weights [T, K] from what the router gives, where it does not give just these."""
        return None

    def matrices(self) -> list[Tensor]:
        """The experts' weights, [E, ...] each."""
        return [p for p in self.experts.parameters() if p.dim() == 3]

    @property
    def transposed(self) -> bool:
        """The experts' matrices are kept [in, out]."""
        return bool(getattr(self.experts, "is_transposed", False))

    def floor(self) -> int:
        """Fewest experts that routing can work with."""
        if self.n_group == 1:
            return self.top_k
        per_group = max(-(-self.top_k // self.topk_group), 2)  # a group's score is its best two
        return per_group * self.n_group

    def unit_parameters(self) -> int:
        """Parameters that leave with one expert: its matrices and its router entries."""
        size, count = self.num_experts, 0
        for module, tensor, dim in self.tensors():
            t = getattr(module, tensor)
            if tensor in module._parameters:
                count += t.numel() // t.shape[dim] * (t.shape[dim] // size)
        return count

    def unit_group(self, bytes_per_parameter: float) -> UnitGroup:
        """The block as the core sees it."""
        parameters = self.unit_parameters()
        return UnitGroup(
            name=self.name,
            layer=self.layer,
            size=self.num_experts,
            floor=self.floor(),
            unit_parameters=parameters,
            unit_bytes=round(parameters * bytes_per_parameter),
            blocks=self.n_group,
        )


def is_experts(module: nn.Module) -> bool:
    """The module follows the fused-experts contract of transformers."""
    return all(
        hasattr(module, a) for a in ("_apply_gate", "has_gate", "is_transposed", "num_experts")
    )


def find_blocks(model: nn.Module) -> list[MoeBlock]:
    """Every MoE block of a model whose experts can be removed, in layer order.

    Raises:
        ValueError: the model has no routed experts, or a block whose structure is unknown; says
            what was looked for.
    """
    decoder = language_model(model)
    modules = {n: m for n, m in model.named_modules() if (n + ".").startswith(decoder)}
    special = {n: f for n, m in modules.items() if (f := _family(m)) is not None}
    found: list[MoeBlock | None] = []
    for name, module in modules.items():
        parent = name.rpartition(".")[0]
        if name in special:
            found.append(special[name](name, module))
        elif is_experts(module) and parent not in special:
            found.append(standard_block(parent, modules[parent]))
    blocks = [b for b in found if b is not None]
    for b in blocks:
        _check_stacked(b)
    if not blocks:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"{kind}: no routed experts found. Looked for modules with fused experts "
            "(num_experts, gate_up_proj [E, 2F, D], down_proj [E, D, F]) that transformers marks "
            f"with use_experts_implementation, and for blocks of {', '.join(families())}; a dense "
            "model has nothing to prune here"
        )
    for b in blocks:
        if not 1 <= b.top_k <= b.num_experts:
            raise ValueError(f"{b.name}: the router picks top {b.top_k} of {b.num_experts} experts")
    return blocks


def language_model(model: nn.Module) -> str:
    """Prefix of the modules of a model's text decoder: other towers may have experts of their own.

    Returns:
        `model.language_model.`, or the empty string where the model does not say.
    """
    find = getattr(model, "get_decoder", None)
    decoder = find() if find else None
    names = [n for n, m in model.named_modules() if m is decoder]
    return f"{names[0]}." if names and names[0] else ""


def _family(module: nn.Module) -> Callable[[str, nn.Module], MoeBlock | None] | None:
    """The view of the family whose block this is, if it is one of the exceptions."""
    for family in families().values():
        if type(module).__name__ in family.blocks:
            return family.view
    return None


def standard_block(name: str, block: nn.Module) -> MoeBlock:
    """The view of a block that follows the contract.

    Raises:
        ValueError: something of its structure is unknown; says what was looked for.
    """
    experts = next(m for m in block.children() if is_experts(m))
    size = int(experts.num_experts)  # type: ignore[arg-type]
    _check_experts(name, experts, size)
    router = _router(name, block, experts, size)
    top_k = getattr(router, "top_k", None)
    if not isinstance(top_k, int):
        raise ValueError(f"{name}: the router {type(router).__name__} has no integer top_k")
    return MoeBlock(
        name=name,
        layer=layer_index(name),
        block=block,
        experts=experts,
        router=router,
        routed=tuple(_expert_axes(name, block, router, size)),
        top_k=top_k,
        n_group=int(getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1),
        topk_group=int(getattr(router, "topk_group", None) or 1),
    )


def rows_of(ids: Sequence[int], length: int, size: int) -> list[int]:
    """The indices that stay on an axis of this length when these of `size` experts do."""
    width = length // size
    rows = [e * width + i for e in ids for i in range(width)]
    return rows + list(range(width * size, length))


def _check_experts(name: str, experts: nn.Module, size: int) -> None:
    for tensor, p in experts.named_parameters():
        if p.shape[0] != size:
            raise ValueError(
                f"{name}: expert tensor {tensor} {tuple(p.shape)} does not have the {size} experts "
                "on its first axis"
            )


def _check_stacked(block: MoeBlock) -> None:
    """A layer's experts lie in one tensor: of a module for each, rows inside of it would go."""
    for name, module in block.experts.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) == block.num_experts:
            raise ValueError(
                f"{block.name}: its experts{f'.{name}' if name else ''} are {len(module)} modules; "
                "only experts that are stacked in one tensor can be cut"
            )


def _router(name: str, block: nn.Module, experts: nn.Module, size: int) -> nn.Module:
    siblings = dict(block.named_children())
    found = [
        c for c in siblings.values() if c is not experts and getattr(c, "num_experts", None) == size
    ]
    if len(found) != 1:
        raise ValueError(
            f"{name}: looked for one router with num_experts = {size} beside the experts and found "
            f"{len(found)} among {', '.join(siblings)}"
        )
    return found[0]


def _expert_axes(name: str, block: nn.Module, router: nn.Module, size: int) -> Iterator[Axis]:
    for module in router.modules():
        for tensor, t in own_tensors(module):
            if t.shape[0] == size:
                yield Axis(module, tensor, 0)
            elif t.dim() == 2 and t.shape == (1, size):
                yield Axis(module, tensor, 1)
            else:
                raise ValueError(
                    f"{name}: router tensor {tensor} {tuple(t.shape)} has no axis of {size} experts"
                )
    for tensor, t in own_tensors(block):  # a correction bias that some families keep on the block
        if t.dim() == 1 and t.shape[0] == size:
            yield Axis(block, tensor, 0)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own parameters and buffers, not those of its children."""
    for name, t in (*module._parameters.items(), *module._buffers.items()):
        if t is not None:
            yield name, t


def layer_index(name: str) -> int:
    """The decoder layer that a module path lies in.

    Raises:
        ValueError: the path has no number.
    """
    numbers = [int(p) for p in name.split(".") if p.isdigit()]
    if not numbers:
        raise ValueError(f"{name}: no layer index in the module path")
    return numbers[0]
