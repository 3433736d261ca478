"""A model traced by Torch-Pruning: for every layer with channels, what belongs to its channels.

An operation that Torch-Pruning cannot follow costs the groups that meet it, not the run: it guesses
channel counts along the graph, and on a channel shuffle or a product of two branches it divides by
zero, or follows every path, of which there are exponentially many. Both are held to their layer.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from moe_fair.vision.concatenation import Parts
from moe_fair.vision.layer_input import given
from moe_fair.vision.response_norm import response_norms

# calls of Torch-Pruning's recursions for one operation, and steps from one layer; DenseNet-121
# takes some hundreds of either
MOST_CALLS, MOST_STEPS = 20_000, 5_000
# places in all tensors that one layer's channels come to; where windows are cut out of a picture
# (Swin), every reshape multiplies them, and a gigabyte is soon full
MOST_PLACES = 2_000_000


UNREACHED = (
    "no gradient leads to it from the outputs (torch.no_grad or detach in the forward?), and "
    "channels are found along them"
)


class TooLongError(Exception):
    """An operation's channels are not found in reasonable time."""


def traced(
    model: nn.Module, images: Tensor, forward: Callable[[nn.Module, Tensor], list[Tensor]]
) -> tuple[Any, list[Any], dict[str, str]]:
    """The graph, the slices that belong together, and layer -> why nothing is known of it.

    Args:
        forward: the outputs of a model on images, of which the first sets what stays whole.

    Raises:
        ValueError: Torch-Pruning is not installed, or the model cannot be traced at all.
    """
    try:
        import torch_pruning
    except ImportError as e:
        raise ValueError(
            "pruning channels needs Torch-Pruning: pip install 'moe_fair[vision]'"
        ) from e
    trainable = {p: p.requires_grad for p in model.parameters()}
    broken: dict[Any, str] = {}
    try:
        with warnings.catch_warnings(), torch.enable_grad(), unchecked(), _guarded(broken) as parts:
            warnings.simplefilter("ignore")  # about bare parameters, which make a group stay whole
            model.requires_grad_(True)  # the trace follows gradients
            main: list[Any] = []

            def run(model: nn.Module, images: Tensor) -> list[Tensor]:
                with parts:
                    found = [t for t in forward(model, images) if t.grad_fn is not None]
                if not found:
                    raise ValueError(
                        "no gradient leads into the model (torch.no_grad or detach in its "
                        "forward?), and its channels are found along them"
                    )
                main.append(found[0].grad_fn)
                return found

            try:
                with _passed(model) as pruners:
                    graph = torch_pruning.DependencyGraph().build_dependency(
                        model, images, forward_fn=run, verbose=False, customized_pruners=pruners
                    )
            except ValueError:
                raise
            except Exception as e:  # of the model's code or of Torch-Pruning's
                raise ValueError(f"the model cannot be traced: {one_line(e)}") from e
            return graph, *_groups(graph, model, broken, main[0])
    finally:
        for p, flag in trainable.items():
            p.requires_grad_(flag)
        detach_computed(model)


def _groups(
    graph: Any, model: nn.Module, broken: dict[Any, str], main: Any
) -> tuple[list[Any], dict[str, str]]:
    """As Torch-Pruning's `get_all_groups`, which one layer would end.

    Args:
        main: what made the first output; the others may lose channels.
    """
    from torch_pruning import ops

    names = {module: name for name, module in model.named_modules()}
    found, whole, seen = [], {}, set()
    for layer, name in names.items():
        if isinstance(layer, (ops.TORCH_CONV, ops.TORCH_LINEAR)) and layer not in graph.module2node:
            whole[name] = UNREACHED
    for layer in list(graph.module2node):
        if not isinstance(layer, (ops.TORCH_CONV, ops.TORCH_LINEAR)) or layer in seen:
            continue
        pruner = graph.get_pruner_of_module(layer)
        if pruner is None or (width := pruner.get_out_channels(layer)) is None:
            continue
        try:
            items = graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(width)))
        except Exception as e:  # Torch-Pruning's, of any kind
            whole[names[layer]] = f"its channels cannot be followed: {one_line(e)}"
            continue
        for dependency, _ in items:
            if graph.is_out_channel_pruning_fn(dependency.handler):
                seen.add(dependency.target.module)
        why = next((broken[d.target] for d, _ in items if d.target in broken), None)
        if why is None:
            found.append([i for i in items if not _ends(i.dep.target, main)])
        else:
            whole[names[layer]] = f"its channels cannot be followed: {why}"
    return found, whole


def _ends(node: Any, main: Any) -> bool:
    """It is an output, and not the first."""
    return type(node.module).__name__ == "_OutputOp" and node.grad_fn is not main


def copied(model: nn.Module, *, parameters: bool = True) -> nn.Module:
    """A deep copy, whatever the model keeps of its last call.

    Args:
        parameters: also of these; otherwise the copy has the model's own, and only such a use is
            right as puts others in their place, as a cut does.
    """
    detach_computed(model)
    return copy.deepcopy(model, {} if parameters else {id(p): p for p in model.parameters()})


def detach_computed(model: nn.Module) -> None:
    """Make tensors that modules have computed and keep plain ones: others cannot be copied.

    Weights that a hook computes (`weight_norm`), and what is kept from one call to the next, as
    LeViT's attention biases in a dict.
    """
    seen: set[int] = set()
    for m in model.modules():
        for name, value in vars(m).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                vars(m)[name] = _plain(value, seen)


def _plain(value: Any, seen: set[int]) -> Any:
    """The value with its computed tensors detached: itself, or what its dicts and lists hold."""
    if isinstance(value, Tensor):
        return value if value.is_leaf else value.detach()
    if type(value) is tuple:
        return tuple(_plain(v, seen) for v in value)
    if type(value) in (dict, OrderedDict, list) and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, list):  # in place: others may hold the same one
            value[:] = [_plain(v, seen) for v in value]
        else:
            value.update({k: _plain(v, seen) for k, v in value.items()})
    return value


@contextmanager
def unchecked() -> Iterator[None]:
    """Reentrant activation checkpoints run as plain calls: through one no graph can be followed,
    and without parameters or inputs to train it gives no gradients."""

    def plain(run: Callable[..., Any], _: bool, *arguments: Any) -> Any:
        return run(*arguments)

    function: Any = torch.utils.checkpoint.CheckpointFunction
    function.apply = plain
    try:
        yield
    finally:
        del function.apply  # the class's own


@contextmanager
def _passed(model: nn.Module) -> Iterator[dict[type, Any]]:
    """Response normalisations hand on what they get: a channel of their input is one of theirs.

    Yields what Torch-Pruning must be told of their classes.
    """
    from torch_pruning.pruner.function import BasePruningFunc

    class Channels(BasePruningFunc):  # asked only how many there are
        def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
            raise AssertionError("the graph is not what cuts")

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.Module) -> int:
            return next(layer.parameters()).numel()

        get_in_channels = get_out_channels

    def hand_on(*inputs: Tensor, **named: Tensor) -> Tensor:
        return given(inputs, named).clone()

    layers = [layer for _, layer, _ in response_norms(model)]
    for layer in layers:
        layer.forward = hand_on
    try:
        yield {type(layer): Channels() for layer in layers}
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _guarded(broken: dict[Any, str]) -> Iterator[Parts]:
    """Torch-Pruning's steps with limits.

    Args:
        broken: filled with the nodes whose channels could not be mapped -> why.

    Yields what is to be open while the model runs.
    """
    from torch_pruning.dependency import graph, index_mapping, shape_infer

    calls = [0]
    done: list[Any] = []
    parts = Parts()

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] > MOST_CALLS:
                raise TooLongError("too many paths lead through it")
            return function(*arguments, **named)

        return call

    class Group(graph.Group):
        places = 0

        def add_dep(self, dep: Any, idxs: Any) -> None:
            self.places += len(idxs)
            if len(self.items) > MOST_STEPS or self.places > MOST_PLACES:
                raise TooLongError("too many paths lead away from it")
            super().add_dep(dep, idxs)

    flatten = index_mapping._FlattenIndexMapping.__call__

    def flattened(mapping: Any, idxs: Any) -> Any:
        if not mapping.reverse and len(idxs) * mapping._stride > MOST_PLACES:
            raise TooLongError("too many paths lead away from it")
        return flatten(mapping, idxs)

    stock = index_mapping.update_index_mapping

    def update(whole: Any) -> None:
        if any(whole is g for g in done):  # nothing is cut in between: once is enough
            return
        done.append(whole)
        for node in whole.module2node.values():
            calls[0] = 0
            try:
                stock(_One(whole, node))
                parts.place(node)
            except Exception as e:
                broken[node] = one_line(e)

    names = ("infer_in_channels_recursively", "infer_out_channels_recursively")
    limits = {n: counted(getattr(shape_infer, n)) for n in names}
    changes = [(shape_infer, n, f) for n, f in limits.items()]
    changes += [(index_mapping, "update_index_mapping", update), (graph, "Group", Group)]
    changes += [(index_mapping._FlattenIndexMapping, "__call__", flattened)]
    before = [(place, n, getattr(place, n)) for place, n, _ in changes]
    for place, n, ours in changes:
        setattr(place, n, ours)
    try:
        yield parts
    finally:
        for place, n, theirs in before:
            setattr(place, n, theirs)


class _One:
    """A graph of which one node only is looked at; everything else is the graph's."""

    def __init__(self, graph: Any, node: Any) -> None:
        self.module2node = {node.module: node}
        self._graph = graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)


def one_line(error: Exception) -> str:
    """What a model's own code has raised, for a reader."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
