"""Heads for multi-token prediction (MTP): finding them in a checkpoint, and what they are made of.

A head predicts the token after the next one (DeepSeek-V3, arXiv 2412.19437, section 2.2):

    u_t = W [norm(Emb(x_{t+1})); norm(h_t)]    h: the trunk's last hidden states
    h'_t = norm(layer(u)_t)                    the model's output matrix makes logits of x_{t+2}

where the layer is a decoder layer like the body's, with experts of its own; a second head takes h'
and the token after that. transformers loads no head with the model, so its tensors have no place
there. They are known by their names: layers beyond the last one (`model.layers.46.`, DeepSeek and
GLM), or whatever lies under `mtp.` (Qwen, Nemotron). What a head's layer is follows from the body:
it is the body's layer whose tensors have the same names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from moe_fair.core.plan import ModelSize
from moe_fair.engines.decoder import final_norm, find_decoder
from moe_fair.engines.names import Destination
from moe_fair.engines.shards import StoredTensor
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.surgery import cut_block

# what the config calls the number of heads
SETTINGS = (
    "num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules",
)  # fmt: skip
PROJECTION, EMBEDDING, HIDDEN, OUTPUT = "projection", "embedding norm", "hidden norm", "output norm"
ROLES = {
    "eh_proj": PROJECTION, "fc": PROJECTION,
    "enorm": EMBEDDING, "pre_fc_norm_embedding": EMBEDDING,
    "hnorm": HIDDEN, "pre_fc_norm_hidden": HIDDEN,
    "shared_head.norm": OUTPUT, "final_layernorm": OUTPUT, "norm": OUTPUT,
}  # fmt: skip
# of what the model has itself; the paper shares both
COPIES = ("embed_tokens", "shared_head.head")
PLAIN = {"F64", "F32", "F16", "BF16"}  # data types of weights that can be run as they are
UNDER_MTP = re.compile(r"(?:^|\.)mtp[._]")
MTP_LAYER = re.compile(r"^((?:.*\.)?mtp\.(?:layers\.)?(\d+)\.)(.+)$")
ANY_LAYER = re.compile(r"\blayers\.(\d+)\.")
EXPERT = re.compile(r"(?:^|\.)experts\.(?:(\d+)\.)?")


@dataclass(frozen=True)
class HeadLayer:
    """One decoder layer of a head.

    Attributes:
        prefix: of its tensors' names (`model.layers.46.`).
        template: index of the body's layer that has its structure.
        tensors: name that the template's tensor would have -> the stored tensor.
        block: its routed experts, if it has any; named by where they are stored.
        experts: how many there are.
    """

    prefix: str
    template: int
    tensors: Mapping[str, StoredTensor]
    block: MoeBlock | None
    experts: int


@dataclass(frozen=True)
class Head:
    """What predicts one token further: its layers, and role -> stored tensor of what is around."""

    layers: tuple[HeadLayer, ...]
    around: Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Heads:
    """All heads of a checkpoint; empty where there is none.

    Attributes:
        name: where they lie, for the screen.
        tensors: all that are stored.
        chain: the heads in the order in which they predict; empty where their structure is unknown.
        places: stored name -> name as in the model, with the head's own prefix.
        why: why they cannot be cut, where they have experts and cannot.
        promised: what the config says their number is.
    """

    name: str = ""
    tensors: tuple[StoredTensor, ...] = ()
    chain: tuple[Head, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    why: str | None = None
    promised: int = 0

    @property
    def blocks(self) -> list[MoeBlock]:
        """The MoE blocks of heads that can be cut."""
        if self.why is not None:
            return []
        return [b for h in self.chain for layer in h.layers if (b := layer.block) is not None]

    @property
    def with_experts(self) -> bool:
        """They have routed experts."""
        return any(EXPERT.search(t.name) for t in self.tensors)

    def size(self, weights: Callable[[StoredTensor], int] | None = None) -> ModelSize:
        """What leaves with them.

        Args:
            weights: how many a stored tensor stands for, where they are packed.
        """
        count = weights or (lambda t: t.numel)
        return ModelSize(sum(map(count, self.tensors)), sum(t.bytes for t in self.tensors))


def settings_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Setting -> number of heads, of the settings that a plain config has and that promise any."""
    found = {name: config.get(name) for name in SETTINGS}
    return {n: v for n, v in found.items() if isinstance(v, int) and v > 0}


def is_head(name: str, depth: int) -> bool:
    """A tensor's name is one that heads have.

    Args:
        depth: decoder layers of the model.
    """
    layer = ANY_LAYER.search(name)
    return bool(UNDER_MTP.search(name) or (layer and int(layer[1]) >= depth))


def find_heads(
    skeleton: nn.Module,
    tensors: Sequence[StoredTensor],
    find: Callable[[str], Destination],
    config: Mapping[str, Any],
) -> Heads:
    """The heads of a checkpoint.

    Args:
        skeleton: the model, without weights.
        tensors: all that the checkpoint holds.
        find: see `engines.names.destinations`.
        config: the plain part of the config that describes the language model.
    """
    promised = max(settings_of(config).values(), default=0)
    state = skeleton.state_dict()
    unknown = [t for t in tensors if find(t.name).name not in state]
    if not unknown:
        return Heads(promised=promised)
    try:
        body: _Body | None = _Body(skeleton, tensors, find)
    except ValueError:  # no plain list of layers
        body = None
    mine = [t for t in unknown if UNDER_MTP.search(t.name) or (body and body.beyond(t.name))]
    if not mine:
        return Heads(promised=promised)
    layers, around = _sorted(mine, body)
    name = " ".join(sorted({p.rstrip(".") for p in layers})) or "mtp"
    heads = Heads(name, tuple(mine), promised=promised)
    if not heads.with_experts:
        return heads
    try:
        if body is None:
            raise ValueError("the model has no plain list of decoder layers")
        chain = _chain(layers, around, body)
    except ValueError as e:
        return replace(heads, why=str(e))
    places = {
        t.name: layer.prefix + place.removeprefix(body.layer(layer.template))
        for h in chain
        for layer in h.layers
        for alias, t in layer.tensors.items()
        if (place := find(alias).name).startswith(body.layer(layer.template))
    }
    return replace(heads, chain=chain, places=places)


def fresh_layer(model: Any, index: int, experts: int) -> nn.Module:
    """A decoder layer as the model's own of this index, with so many routed experts."""
    layer: nn.Module = type(find_decoder(model).layers[index])(model.get_decoder().config, index)
    block = block_of(layer)
    if block is not None and experts < block.num_experts:
        cut_block(block, range(experts))
    return layer


def block_of(layer: nn.Module) -> MoeBlock | None:
    """The routed experts of a decoder layer, if it has any; the name is that within the layer."""
    try:
        [block] = find_blocks(nn.ModuleDict({"0": layer}))
    except ValueError:
        return None
    return replace(block, name=block.name.removeprefix("0."))


class _Body:
    """The body's layers, and how the checkpoint names them."""

    def __init__(
        self,
        skeleton: Any,
        tensors: Sequence[StoredTensor],
        find: Callable[[str], Destination],
    ) -> None:
        self.skeleton, self.find = skeleton, find
        self.state = skeleton.state_dict()
        self.layers = find_decoder(skeleton).layers
        final_norm(skeleton)  # says what is missing
        self.within = next(n for n, m in skeleton.named_modules() if m is self.layers) + "."
        self.stored = {
            t.name.partition(f".{number}.")[0] + "."
            for t in tensors
            if (place := find(t.name).name).startswith(self.within)
            and f".{(number := place[len(self.within) :].partition('.')[0])}." in t.name
        }

    def layer(self, index: int) -> str:
        """Prefix of the names in the model of a layer's tensors."""
        return f"{self.within}{index}."

    def beyond(self, name: str) -> tuple[str, int] | None:
        """Prefix and number of the layer that a stored name lies in, beyond the last one."""
        for prefix in self.stored:
            number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
            if number.isdigit() and int(number) >= len(self.layers):
                return f"{prefix}{number}.", int(number)
        return None

    def templates(self) -> Iterator[tuple[int, set[str]]]:
        """The last layer of every structure, and its tensors' names in the model."""
        seen = set()
        for i in reversed(range(len(self.layers))):
            names = {n for n in self.state if n.startswith(self.layer(i))}
            structure = frozenset(n.removeprefix(self.layer(i)) for n in names)
            if structure not in seen:
                seen.add(structure)
                yield i, names


def _sorted(
    mine: Sequence[StoredTensor], body: _Body | None
) -> tuple[dict[str, tuple[int, dict[str, StoredTensor]]], dict[str, StoredTensor]]:
    """Layer's prefix -> its number and rest of the name -> tensor; and the tensors of no layer."""
    layers: dict[str, tuple[int, dict[str, StoredTensor]]] = {}
    around: dict[str, StoredTensor] = {}
    for t in mine:
        match = MTP_LAYER.match(t.name)
        beyond = body.beyond(t.name) if body and not match else None
        if match:
            layers.setdefault(match[1], (int(match[2]), {}))[1][match[3]] = t
        elif beyond:
            rest = t.name.removeprefix(beyond[0])
            layers.setdefault(beyond[0], (beyond[1], {}))[1][rest] = t
        else:
            around[t.name.rpartition("mtp.")[2]] = t
    return dict(sorted(layers.items(), key=lambda item: item[1][0])), around


def _chain(
    layers: Mapping[str, tuple[int, Mapping[str, StoredTensor]]],
    around: Mapping[str, StoredTensor],
    body: _Body,
) -> tuple[Head, ...]:
    """The heads, in the order of their layers.

    Raises:
        ValueError: the structure is not the body's; says what is other.
    """
    shared = _roles(around)
    found: list[tuple[list[HeadLayer], dict[str, StoredTensor]]] = []
    for place, (prefix, (number, tensors)) in enumerate(layers.items()):
        index = number if number >= len(body.layers) else len(body.layers) + place
        layer, own = _layer(prefix, index, tensors, body)
        if PROJECTION in own or PROJECTION in shared or not found:
            found.append(([], dict(shared)))
        found[-1][0].append(layer)
        found[-1][1].update(own)
    chain = tuple(Head(tuple(ls), roles) for ls, roles in found)
    for head in chain:
        missing = {PROJECTION, EMBEDDING, HIDDEN, OUTPUT} - head.around.keys()
        if missing:
            raise ValueError(f"{head.layers[0].prefix[:-1]} has no {min(missing)} that is known")
    return chain


def _roles(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Role -> tensor, of what is around the layers.

    Raises:
        ValueError: one has no known role.
    """
    roles = {}
    for rest, t in tensors.items():
        name = rest.removesuffix(".weight")
        if name in COPIES:
            continue
        if name not in ROLES or name == rest:
            raise ValueError(f"{t.name} is no part of a head that is known")
        roles[ROLES[name]] = t
    return roles


def _layer(
    prefix: str, index: int, tensors: Mapping[str, StoredTensor], body: _Body
) -> tuple[HeadLayer, dict[str, StoredTensor]]:
    """A head's layer by the body's layer of the same structure, and the roles of what is beside it.

    Raises:
        ValueError: no layer of the body has this structure.
    """
    why = ""
    for i, wanted in body.templates():
        for stored in body.stored:
            aliases = {f"{stored}{i}.{rest}": t for rest, t in tensors.items()}
            inside = {a: t for a, t in aliases.items() if body.find(a).name in wanted}
            if {body.find(a).name for a in inside} != wanted:
                continue
            packed = {t.dtype for t in inside.values()} - PLAIN
            if packed:
                raise ValueError(f"{prefix[:-1]} is packed ({min(packed)}), and is not unpacked")
            modules = {a.rpartition(".")[0] for a in inside}  # scales of packed weights lie there
            inside |= {a: t for a, t in aliases.items() if a.rpartition(".")[0] in modules}
            beside = {
                a.removeprefix(f"{stored}{i}."): t for a, t in aliases.items() if a not in inside
            }
            try:
                roles = _roles(beside)
            except ValueError as e:
                why = f": {e}"
                continue
            return _with_block(HeadLayer(prefix, i, inside, None, 0), index, body), roles
    raise ValueError(f"no layer of the body has the tensors of {prefix[:-1]}{why}")


def _with_block(layer: HeadLayer, index: int, body: _Body) -> HeadLayer:
    """The layer with its experts, as many as are stored."""
    numbers = {int(m[1]) for a in layer.tensors if (m := EXPERT.search(a)) and m[1]}
    fused = [t.shape[0] for a, t in layer.tensors.items() if EXPERT.search(a) and t.shape]
    count = len(numbers) or max(fused, default=0)
    with torch.device("meta"):
        whole = block_of(fresh_layer(body.skeleton, layer.template, count))
    if whole is None:
        return layer
    if whole.num_experts != count:
        raise ValueError(
            f"{layer.prefix[:-1]} has {count} experts, the body's layers {whole.num_experts}"
        )
    block = replace(whole, name=layer.prefix + whole.name, layer=index)
    return replace(layer, block=block, experts=count)
