"""One view of any MoE block, found by structure: which module holds the experts, which routes.

transformers keeps the experts of a layer in one module of fused 3-D parameters, under the contract
of `use_experts_implementation`: `num_experts`, `_apply_gate`, and
`forward(hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K])`. The router is the sibling
that carries the same `num_experts`. What does not fit raises before anything is measured.

Shape legend: T tokens, E experts, K top-k, D model, F hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from moe_fair.core.units import UnitGroup


@dataclass(frozen=True)
class MoeBlock:
    """A decoder layer's routed experts and what must be cut with them.

    Attributes:
        name: module path of the block, as in `model.named_modules()`.
        layer: index of the decoder layer.
        block, experts, router: the modules.
        routed: (module, tensor name, dimension) of every router-side tensor with an expert axis.
        top_k: experts per token.
        n_group, topk_group: group-limited routing; 1, 1 without.
    """

    name: str
    layer: int
    block: nn.Module
    experts: nn.Module
    router: nn.Module
    routed: tuple[tuple[nn.Module, str, int], ...]
    top_k: int
    n_group: int = 1
    topk_group: int = 1

    @property
    def num_experts(self) -> int:
        """E, as the experts module has it now."""
        return int(self.experts.num_experts)  # type: ignore[arg-type]

    def counters(self) -> Iterator[nn.Module]:
        """The modules that carry `num_experts` as a number."""
        for m in (self.block, self.experts, self.router):
            if getattr(m, "num_experts", None) == self.num_experts:
                yield m

    def floor(self) -> int:
        """Fewest experts that routing can work with."""
        if self.n_group == 1:
            return self.top_k
        per_group = max(-(-self.top_k // self.topk_group), 2)  # a group's score is its best two
        return per_group * self.n_group

    def unit_parameters(self) -> int:
        """Parameters that leave with one expert: its matrices and its router entries."""
        own = sum(p.numel() for p in self.experts.parameters())
        routing = sum(getattr(m, t).numel() for m, t, _ in self.routed if t in m._parameters)
        return (own + routing) // self.num_experts

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
    """Every MoE block of a model, in layer order.

    Raises:
        ValueError: the model has no routed experts, or a block whose structure is unknown; says
            what was looked for.
    """
    blocks = [_block(model, name, m) for name, m in model.named_modules() if is_experts(m)]
    if not blocks:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"{kind}: no routed experts found. Looked for modules with fused experts "
            "(num_experts, gate_up_proj [E, 2F, D], down_proj [E, D, F]) that transformers marks "
            "with use_experts_implementation; a dense model has nothing to prune here"
        )
    return blocks


def _block(model: nn.Module, experts_name: str, experts: nn.Module) -> MoeBlock:
    name = experts_name.rpartition(".")[0]
    block = model.get_submodule(name)
    size = int(experts.num_experts)  # type: ignore[arg-type]
    _check_experts(name, experts, size)
    router = _router(name, block, experts, size)
    top_k = getattr(router, "top_k", None)
    if not isinstance(top_k, int):
        raise ValueError(f"{name}: the router {type(router).__name__} has no integer top_k")
    return MoeBlock(
        name=name,
        layer=_layer_index(name),
        block=block,
        experts=experts,
        router=router,
        routed=tuple(_expert_axes(name, block, router, size)),
        top_k=top_k,
        n_group=int(getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1),
        topk_group=int(getattr(router, "topk_group", None) or 1),
    )


def _check_experts(name: str, experts: nn.Module, size: int) -> None:
    for tensor, p in experts.named_parameters():
        if p.shape[0] != size:
            raise ValueError(
                f"{name}: expert tensor {tensor} {tuple(p.shape)} does not have the {size} experts "
                "on its first axis"
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


def _expert_axes(
    name: str, block: nn.Module, router: nn.Module, size: int
) -> Iterator[tuple[nn.Module, str, int]]:
    for module in router.modules():
        for tensor, t in _tensors(module):
            if t.shape[0] == size:
                yield module, tensor, 0
            elif t.dim() == 2 and t.shape == (1, size):
                yield module, tensor, 1
            else:
                raise ValueError(
                    f"{name}: router tensor {tensor} {tuple(t.shape)} has no axis of {size} experts"
                )
    for tensor, t in _tensors(block):  # a correction bias that some families keep on the block
        if t.dim() == 1 and t.shape[0] == size:
            yield block, tensor, 0


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own parameters and buffers, not those of its children."""
    for name, t in (*module._parameters.items(), *module._buffers.items()):
        if t is not None:
            yield name, t


def _layer_index(name: str) -> int:
    numbers = [int(p) for p in name.split(".") if p.isdigit()]
    if not numbers:
        raise ValueError(f"{name}: no layer index in the module path")
    return numbers[0]
