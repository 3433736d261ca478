"""The hidden neurons of experts, and which of two experts' neurons answer to one another.

An expert's hidden neurons can be put into any order, as long as its rows of gate and up, its
columns of down and its biases are put into the same one. Before experts are averaged, those of one
are put into the order in which they lie nearest those of the other (arXiv 2604.04356):

    min over permutations p   Σ_i ‖u_i - v_p(i)‖₂

with u_i and v_i the i-th neuron's weights, gate, up and down and the biases of the former two one
after another, scaled to length 1. It is solved exactly (the Hungarian method).

Shape legend: F hidden, D model, N entries of a neuron.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_fair.moe.blocks import MoeBlock


@dataclass(frozen=True)
class NeuronAxis:
    """Where the neurons lie in one expert's part of a tensor.

    Attributes:
        dim: the axis that they lie on.
        each: entries of a neuron on it: 2 where gate and up are one tensor.
        apart: these lie F from one another, not side by side.
    """

    dim: int
    each: int = 1
    apart: bool = True

    def rows(self, t: Tensor) -> Tensor:
        """[F, N] the entries of each neuron."""
        t = t.movedim(self.dim, 0)
        if self.apart:
            t = t.unflatten(0, (self.each, -1)).transpose(0, 1)
        else:
            t = t.unflatten(0, (-1, self.each))
        return t.flatten(1)

    def permuted(self, t: Tensor, order: Tensor) -> Tensor:
        """The same expert with its neurons in this order."""
        count = t.shape[self.dim] // self.each
        places = torch.arange(count * self.each).view(
            (self.each, count) if self.apart else (count, self.each)
        )
        places = places[:, order] if self.apart else places[order]
        return t.index_select(self.dim, places.flatten().to(t.device))


def neuron_axes(block: MoeBlock) -> dict[str, NeuronAxis | None]:
    """Each tensor of the experts with its axis of neurons; None: it has none, as the down bias.

    Raises:
        ValueError: a tensor in which they are not known.
    """
    known, size = dict(_known(block)), block.num_experts
    found: dict[str, NeuronAxis | None] = {}
    counts = set()
    for name, p in block.experts.named_parameters():
        axis = known.get(name)
        if name not in known or (axis is not None and axis.dim >= p.dim() - (len(p) == size)):
            raise ValueError(
                f"{block.name}: where the hidden neurons of {type(block.experts).__name__} lie in "
                f"{name} {tuple(p.shape)} is not known, so they cannot be matched; use --reduce "
                "merge"
            )
        found[name] = axis
        if axis is not None:
            shape = p.shape[1:] if len(p) == size else (len(p) // size, *p.shape[1:])
            counts.add(shape[axis.dim] / axis.each)
    if len(counts) != 1:
        raise ValueError(
            f"{block.name}: the tensors of {type(block.experts).__name__} have {sorted(counts)} "
            "hidden neurons, so they cannot be matched; use --reduce merge"
        )
    return found


def _known(block: MoeBlock) -> Iterator[tuple[str, NeuronAxis | None]]:
    """Of the fused contract, and of DBRX's rows."""
    across = int(block.transposed)
    apart = bool(getattr(block.experts, "is_concatenated", True))
    yield "gate_up_proj", NeuronAxis(across, 2, apart)
    yield "gate_up_proj_bias", NeuronAxis(0, 2, apart)
    yield "up_proj", NeuronAxis(across)
    yield "up_proj_bias", NeuronAxis(0)
    yield "down_proj", NeuronAxis(1 - across)
    yield "down_proj_bias", None
    for matrix in ("w1", "v1", "w2"):
        yield f"mlp.{matrix}", NeuronAxis(0)


def matched(parts: Sequence[tuple[NeuronAxis, Tensor, Tensor]]) -> Tensor:
    """[F] for each neuron of one expert the one of another that answers to it.

    Args:
        parts: of each tensor that has neurons their axis, and its part of the one expert and of
            the other. Rounded to a millionth of a length before they are compared: what differs
            by less is decided by the order.
    """
    from scipy.optimize import linear_sum_assignment

    one = torch.cat([axis.rows(t).cpu().double() for axis, t, _ in parts], 1)
    other = torch.cat([axis.rows(t).cpu().double() for axis, _, t in parts], 1)
    one, other = (nn.functional.normalize(t) for t in (one, other))
    cosines = (one @ other.T).clamp(max=1.0)
    cost = (2 - 2 * cosines).sqrt().mul(1e6).round()
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])
