"""Which channels must leave together: unit groups of an image model.

Torch-Pruning traces the model and says, for the output channels of a layer, which slices of which
other layers belong to them: the other producers of a residual stream, batch normalisations,
depthwise convolutions, and the consumers whose inputs they are. Each channel with all its slices is
one unit. What cannot be cut exactly is left whole, with the reason: channels that set the model's
outputs, and streams that are normalised over all their channels (LayerNorm), because the remaining
channels would change when one leaves. Where GroupNorm normalises some of them together, these are
one unit; where a response normalisation divides by a mean over all of them, it is cut so that the
others' share in it stays (`response_norm`).

Every group is then proven on the model itself (`proof`): cut and masked model must agree.

Shape legend: N units, m slices of one layer that belong to one unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from moe_fair.core.units import UnitGroup
from moe_fair.vision.fused import fused_attentions, gated_mlps, head_columns, head_rows
from moe_fair.vision.response_norm import response_norm
from moe_fair.vision.trace import traced

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SPATIAL = (*CONVOLUTIONS, *TRANSPOSED)
HEADS = "attention heads (offered with --heads)"
OUTPUTS = "sets the model's outputs"
# attribute of a model that says where in what it gives the logits are
CHOSEN = "moe_fair_logits"
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# what normalises every channel by itself, and what does so with several of them together
CHANNEL_NORMS = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (*CHANNEL_NORMS, nn.GroupNorm)
# what has numbers for every channel and never lets two of them meet
BY_CHANNEL = (*NORMS, nn.PReLU)


@dataclass(frozen=True)
class Member:
    """The slices of one layer that belong to a group's units.

    Attributes:
        module: name of the layer.
        side: "out" (rows of a weight, or all of a batch normalisation or depthwise convolution) or
            "in" (columns of a weight); "heads": the number of heads that an attention counts;
            "norm": channels of a response normalisation.
        index: [N][m] positions along that side.
    """

    module: str
    side: str
    index: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChannelGroup:
    """A unit group and where its units lie."""

    units: UnitGroup
    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        return self.units.name

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Layers that read the units; with their inputs zeroed a unit has no effect."""
        return tuple(m for m in self.members if m.side == "in")

    @property
    def norms(self) -> tuple[Member, ...]:
        """Response normalisations, in which a unit without effect is zero as well."""
        return tuple(m for m in self.members if m.side == "norm")


@dataclass(frozen=True)
class Graph:
    """The unit groups of a model, in its order, and what is left whole: layer name -> reason."""

    groups: tuple[ChannelGroup, ...]
    whole: dict[str, str] = field(default_factory=dict)

    @property
    def units(self) -> tuple[UnitGroup, ...]:
        return tuple(g.units for g in self.groups)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """[S, classes]: what a module gives, its `logits`, or the one tensor in its tuple or list.

    Of a model that was built with a name or a number for its logits, what lies there.

    Raises:
        ValueError: something else.
    """
    found = outputs(model, images)[0]
    # of one image a model that squeezes has dropped the first axis
    return found[None] if found.dim() == 1 == len(images) else found


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What is `logits`' without its look at one image, then the other tensors that a module gives.

    Raises:
        ValueError: none of several is said to be the logits.
    """
    return outputs_of(model, model(images))


def outputs_of(model: nn.Module, out: object) -> list[Tensor]:
    """`outputs`, of what the model has given."""
    if isinstance(out, Tensor) and not hasattr(model, CHOSEN):
        return [out]
    names, within = _within(out)
    main = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if (chosen := getattr(model, CHOSEN, None)) is not None:
        main = dict(zip(names, within, strict=True)).get(chosen)
        if not isinstance(main, Tensor):
            what = ", ".join(names) or f"a {type(out).__name__} without parts"
            raise ValueError(f"--logits {chosen}: the model gives {what}; name what is a tensor")
    elif not isinstance(main, Tensor):
        main = within[0] if len(within) == 1 else None
    if not isinstance(main, Tensor):
        which = f" ({', '.join(names)})" if names else ""
        raise ValueError(
            f"the model gives a {type(out).__name__} of {len(within)} things{which}, of which none "
            "is named `logits`: say which they are, by name or number, with --logits"
        )
    return [main, *(t for v in within if v is not main for t in tensors(v))]


def tensors(value: object) -> Iterator[Tensor]:
    """The tensors of numbers in an output, however deep."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from tensors(v)
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from tensors(v)


def _within(out: object) -> tuple[list[str], list[object]]:
    """The names and values that a model's output holds."""
    if isinstance(out, Mapping):
        return [str(k) for k in out], list(out.values())
    if isinstance(out, (tuple, list)):
        return [str(i) for i in range(len(out))], list(out)
    found = dict(vars(out)) if hasattr(out, "__dict__") else {}
    return list(found), list(found.values())


def is_depthwise(layer: nn.Module) -> bool:
    """A convolution whose channels never meet."""
    return (
        isinstance(layer, CONVOLUTIONS)
        and layer.groups > 1
        and layer.groups == layer.out_channels == layer.in_channels
    )


def candidates(model: nn.Module, images: Tensor, *, heads: bool = False) -> Graph:
    """Groups as the traced graph has them, not yet proven.

    Args:
        images: an example batch; two images are enough.
        heads: also offer attention heads as units.

    Raises:
        ValueError: Torch-Pruning is not installed, or the model cannot be traced.
    """
    graph, found, whole = traced(model, images, outputs)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    names = {module: name for name, module in model.named_modules()}
    owners = _owners(model)
    groups = []
    for items in found:
        producers = [
            names[d.target.module]
            for d, _ in items
            if d.target.module in names and graph.is_out_channel_pruning_fn(d.handler)
        ]
        name = min(producers, key=order.__getitem__)
        members = _members(graph, items, names, owners)
        if isinstance(members, str):
            whole[name] = members
            continue
        made = _group(model, name, order[name], members, heads)
        if isinstance(made, str):
            whole[name] = made
        else:
            groups.append(made)
    known = {m.module for g in groups for m in g.members}
    for made in _fused(model, order):
        layers = [model.get_submodule(m.module) for m in made.members]
        tied = any(len(owners[p]) > 1 for m in layers for p in m.parameters(recurse=False))
        if made.name in known or tied:
            continue
        if made.members[0].side == "heads" and not heads:
            whole[made.name] = HEADS
        else:
            whole.pop(made.name, None)
            groups.append(made)
    return Graph(tuple(sorted(groups, key=lambda g: g.units.layer)), whole)


def _fused(model: nn.Module, order: Mapping[str, int]) -> Iterator[ChannelGroup]:
    """Heads of fused attentions and hidden units of gated MLPs, as their parts look."""
    for attention, count, width in fused_attentions(model):
        before = f"{attention}." if attention else ""
        heads = Member(attention, "heads", tuple((h,) for h in range(count)))
        made = Member(f"{before}qkv", "out", head_rows(count, width))
        read = Member(f"{before}proj", "in", head_columns(count, width))
        units = UnitGroup(made.module, order[made.module], count, floor=1, blocks=1)
        yield ChannelGroup(units, (heads, made, read))
    for first, second, size in gated_mlps(model):
        made = Member(first, "out", tuple((i, size + i) for i in range(size)))
        read = Member(second, "in", tuple((i,) for i in range(size)))
        units = UnitGroup(first, order[first], size, floor=1, blocks=1)
        yield ChannelGroup(units, (made, read))


def _owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Parameter -> the layers that have it."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            found.setdefault(p, []).append(name)
    return found


def _members(
    graph: object,
    items: object,
    names: dict[nn.Module, str],
    owners: dict[nn.Parameter, list[str]],
) -> list[Member] | str:
    """The layers of a traced group, or why it must stay whole."""
    members = {}
    for i, (dependency, index) in enumerate(items):  # type: ignore[arg-type, var-annotated]
        layer = dependency.target.module
        if type(layer).__name__ == "_OutputOp":
            return OUTPUTS
        if layer not in names:
            if isinstance(layer, nn.Parameter):
                return "meets a bare parameter"
            continue  # an operation without weights
        if "weight" not in layer._parameters and hasattr(layer, "weight"):
            return f"the weight of {names[layer]} is computed from others"
        for p in layer.parameters(recurse=False):
            if len(owners[p]) > 1:
                return f"{' and '.join(owners[p])} share a parameter"
        out = graph.is_out_channel_pruning_fn(dependency.handler)  # type: ignore[attr-defined]
        if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
            continue  # one slope for all channels
        if isinstance(layer, BY_CHANNEL) or is_depthwise(layer):
            side = "out"
        elif isinstance(layer, (nn.Linear, *CONVOLUTIONS)) or (
            isinstance(layer, TRANSPOSED) and layer.groups == 1
        ):
            side = "out" if out else "in"
        elif response_norm(layer) is not None:
            side = "norm"
        elif any(True for _ in layer.parameters()):
            return f"runs through {type(layer).__name__}"
        else:
            continue
        roots = items[i].root_idxs  # type: ignore[index]
        table: dict[int, list[int]] = {}
        for root, position in zip(roots, index, strict=True):
            table.setdefault(root, []).append(position)
        widths = {len(v) for v in table.values()}
        if len(widths) != 1 or set(table) != set(range(len(table))):
            return f"its channels reach {names[layer]} unevenly"
        if max(index) >= _width(layer, side):
            return f"its channels are more than {names[layer]} has"
        rows = tuple(tuple(sorted(table[r])) for r in range(len(table)))
        members[names[layer], side] = Member(names[layer], side, rows)
    sizes = {len(m.index) for m in members.values()}
    if len(sizes) != 1:
        return "its channels reach some layers in part"
    if not any(m.side == "in" for m in members.values()):
        return OUTPUTS
    return list(members.values())


def _width(layer: nn.Module, side: str) -> int:
    """Channels of a layer on a side."""
    if (norm := response_norm(layer)) is not None:
        return norm.channels
    for name in (
        "num_features",
        "num_channels",
        "num_parameters",
        f"{side}_channels",
        f"{side}_features",
    ):
        if isinstance(width := getattr(layer, name, None), int):
            return width
    raise AssertionError(type(layer))


def _group(
    model: nn.Module, name: str, place: int, members: list[Member], heads: bool
) -> ChannelGroup | str:
    size, blocks = len(members[0].index), 1
    for m in members:
        layer = model.get_submodule(m.module)
        parts = getattr(layer, "groups", 1)
        if parts > 1 and not is_depthwise(layer):
            if m.index != tuple((i,) for i in range(size)):
                return f"its channels reach the grouped convolution {m.module} in another order"
            blocks = math.lcm(blocks, parts)
    if size == 1:
        return "has one channel"
    if size % blocks or size == blocks:
        return f"grouped convolutions split its {size} channels into {blocks}"
    width = _head_width(model, members)
    if width and not heads:
        return HEADS
    what = f"heads of {width}"
    if not width:
        width = _together(model, members)
        what = f"groups of {width} that GroupNorm normalises together"
    if width > 1:
        if size % width or size == width:
            return f"its {size} channels are not several {what}"
        members = [
            Member(
                m.module, m.side, tuple(_joined(m.index, i, width) for i in range(size // width))
            )
            for m in members
        ]
        size //= width
        for m in members:
            if not _whole_groups(model.get_submodule(m.module), m):
                return f"its channels reach {m.module} across the groups that it normalises"
    order = {n: i for i, (n, _) in enumerate(model.named_modules())}
    return ChannelGroup(
        UnitGroup(name=name, layer=place, size=size, floor=blocks, blocks=blocks),
        tuple(sorted(members, key=lambda m: (order[m.module], m.side))),
    )


def _head_width(model: nn.Module, members: list[Member]) -> int:
    """Channels per attention head where the producers are projections of an attention, else 0."""
    parents = {m.module.rpartition(".")[0] for m in members if m.side == "out"}
    for parent in parents:
        module = model.get_submodule(parent)
        for attribute in ("head_dim", "attention_head_size"):
            if isinstance(getattr(module, attribute, None), int):
                return int(getattr(module, attribute))
    return 0


def _together(model: nn.Module, members: list[Member]) -> int:
    """So many neighbouring channels are normalised together; 1 where each is by itself."""
    norms = [model.get_submodule(m.module) for m in members]
    return math.lcm(*(_group_width(n) for n in norms if isinstance(n, nn.GroupNorm)))


def _group_width(norm: nn.GroupNorm) -> int:
    return norm.num_channels // norm.num_groups


def _whole_groups(layer: nn.Module, member: Member) -> bool:
    """Every unit has all or nothing of what a GroupNorm normalises together."""
    if not isinstance(layer, nn.GroupNorm):
        return True
    width = _group_width(layer)
    return all(
        set(row) == {i // width * width + k for i in row for k in range(width)}
        for row in member.index
    )


def _joined(index: tuple[tuple[int, ...], ...], unit: int, width: int) -> tuple[int, ...]:
    return tuple(i for row in index[unit * width : (unit + 1) * width] for i in row)
