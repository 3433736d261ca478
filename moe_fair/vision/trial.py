"""A copy of a model on which a wrong cut shows, and the inputs on which it is looked at.

Parameters that hide what happens before them are filled with random numbers: normalisations,
factors on a branch (LayerScale), and whatever is zero or nearly so in the whole tensor (a head or a
last normalisation that starts at zero, biases). Beside a model's outputs those of the layers that
set them are compared: behind a saturated softmax nothing changes any more.

Shape legend: S images, N units of all groups.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe_fair.engines.oom import out_of_memory
from moe_fair.vision.gates import Gates
from moe_fair.vision.graph import NORMS, SPATIAL, ChannelGroup, logits, outputs_of, tensors
from moe_fair.vision.response_norm import enlarge, response_norm
from moe_fair.vision.trace import copied, one_line, unchecked

TINY = 1e-3  # a tensor without a larger number is filled
LAYERS = (nn.Linear, *SPATIAL, *NORMS)


@dataclass(frozen=True)
class Tolerance:
    """What counts as equal, and what as a change, in one floating point type.

    Attributes:
        error: most that masked and cut model may differ, of the largest output.
        relative: the same of the change that masking makes, for what changes the outputs little.
        rounding: of the largest output, what rounding leaves.
        change: of the largest output; a smaller change is none.
    """

    error: float
    relative: float
    rounding: float
    change: float


TOLERANCES = {
    torch.float64: Tolerance(1e-9, 1e-5, 1e-13, 1e-8),
    # for models that turn their images into float32 themselves
    torch.float32: Tolerance(1e-4, 1e-2, 1e-5, 1e-3),
}


NUDGE = 16  # of rounding's own size, by which inputs are moved to see what becomes of it


@dataclass(frozen=True)
class Probe:
    """One input and how the model is run on it.

    Attributes:
        images: [S, C, H, W].
        said: the mode for a reader: nothing, "at 16 × 16", "in training".
        training: in training mode, without dropout.
        heads: names of the layers whose outputs are compared too.
    """

    images: Tensor
    said: str = ""
    training: bool = False
    heads: tuple[str, ...] = ()

    def run(self, model: nn.Module, seed: int = 0) -> list[Tensor]:
        """The model's outputs, then those of the heads; the model is left as it was."""
        found: dict[str, Tensor] = {}

        def keep(name: str):  # type: ignore[no-untyped-def]
            def hook(_: nn.Module, __: object, out: object) -> None:
                if isinstance(out, Tensor):
                    found[name] = out

            return hook

        handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in self.heads]
        try:
            with _mode(model, self.training), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(seed)
                out = _seen(model, self.images)
        finally:
            for h in handles:
                h.remove()
        return [*out, *(found[n] for n in self.heads if n in found)]


class Trial:
    """The copy, its probes and what the whole model answers to each.

    Attributes:
        model: float64, or float32 where it does not run in float64; in eval mode.
        probes: input -> outputs; none where every output has NaN or Inf.
        random: probes whose outputs are drawn: only that the model runs can be checked there.
        never_ran: layer -> why nothing is known of it.
    """

    def __init__(self, model: nn.Module, noise: Tensor, real: Tensor, heads: Sequence[str]) -> None:
        """Find the precision and the inputs that the model takes.

        Raises:
            ValueError: it takes none, or not one image by itself.
        """
        self.heads = tuple(heads)
        for self.dtype in TOLERANCES:
            self.model = _filled(model, self.dtype)
            try:
                self._look(noise.to(self.dtype), real.to(self.dtype))
                break
            except Exception as e:  # whatever the model's own code raises
                if out_of_memory(e):
                    raise
                if self.dtype == torch.float32:
                    raise ValueError(f"the model does not run on one image: {one_line(e)}") from e
        self.tolerance = TOLERANCES[self.dtype]

    def _look(self, noise: Tensor, real: Tensor) -> None:
        self.probes: list[tuple[Probe, list[Tensor]]] = []
        self.random: list[Probe] = []
        self.never_ran: dict[str, str] = {}
        with _called(self.model) as ran:
            if not self._add(real[:1]) and not self._add(noise[:1]):
                return
            shape = real.shape[-2:]
            for part in (0.5, 0.75, 1.5):
                small = nn.functional.interpolate(real, scale_factor=part)
                if self._takes(small[:1], f"at {small.shape[-2]} × {small.shape[-1]}"):
                    shape = min(shape, small.shape[-2:])
                    break
            self._try(noise[:1, :, : shape[0], : shape[1]], "on noise")
        with _called(self.model) as trained:
            for size in dict.fromkeys((shape, real.shape[-2:])):  # the smaller one is cheaper
                if self._try(nn.functional.interpolate(real, size), "in training", training=True):
                    break
        self.never_ran = {
            n: "runs in training only" if n in trained else "is not called on the example images"
            for n, m in self.model.named_modules()
            if isinstance(m, LAYERS) and n not in ran
        }

    def _add(self, images: Tensor, said: str = "", training: bool = False) -> bool:
        probe = Probe(images, said, training, self.heads)
        with torch.no_grad():
            out = probe.run(self.model)
            if not all(bool(t.isfinite().all()) for t in out):
                return False
            # a functional dropout draws for every channel: with fewer of them, other numbers. One
            # run shows both where there is neither
            drawn = training and not self._firm(probe, out, seed=1)
            if drawn and not self._firm(probe, out):
                return False
        if drawn:
            self.random.append(probe)
        else:
            self.probes.append((probe, out))
        return True

    def _firm(self, probe: Probe, out: Sequence[Tensor], seed: int = 0) -> bool:
        """Rounding of the input stays small: not where a batch of few values is normalised, as of
        two images of 1 × 1, which makes ±1 of any difference between them.

        Args:
            seed: another than that of `out`, to see whether anything is drawn as well.
        """
        moved = replace(probe, images=probe.images * (1 + NUDGE * torch.finfo(self.dtype).eps))
        most = TOLERANCES[self.dtype].error
        return all(
            float((a - b).abs().max()) <= most * float(b.abs().max())
            for a, b in zip(moved.run(self.model, seed), out, strict=True)
        )

    def _try(self, images: Tensor, said: str, training: bool = False) -> bool:
        """Whether the model takes them."""
        try:
            return self._add(images, said, training)
        except Exception:  # whatever a model's own code raises on what it does not take
            return False

    def _takes(self, images: Tensor, said: str) -> bool:
        """Whether the model takes images of another size and is the same afterwards.

        transformers' Swin makes its windows smaller for good when it meets a small image.
        """
        before, count = _numbers(self.model), (len(self.probes), len(self.random))
        took = self._try(images, said)
        changed = [(m, k, v) for (m, k), v in before.items() if vars(m).get(k) != v]
        for m, name, value in changed:
            setattr(m, name, value)
        if changed:
            del self.probes[count[0] :], self.random[count[1] :]
        return took and not changed

    def smallest(self) -> Trial:
        """The trial with its smallest images alone."""
        small = copy.copy(self)
        small.probes, small.random = self.cheap_first()[:1], []
        return small

    def cheap_first(self) -> list[tuple[Probe, list[Tensor]]]:
        """The probes, small images first: what is wrong mostly shows there."""
        return sorted(self.probes, key=lambda p: p[0].images.numel())

    def masked(self, probe: Probe, groups: Sequence[ChannelGroup], kept: dict) -> list[Tensor]:
        """The outputs without the units that are not kept."""
        gates = Gates(self.model, groups)
        gates.close(kept, groups)
        with gates, torch.no_grad():
            return probe.run(self.model)

    def slopes(self, groups: Sequence[ChannelGroup]) -> dict[str, float]:
        """Group -> the outputs' slope along its gates; 0 everywhere, where there is no gradient."""
        slopes = dict.fromkeys((g.name for g in groups), 0.0)
        generator = torch.Generator().manual_seed(0)
        probe = min((p for p, _ in self.probes if not p.training), key=lambda p: p.images.numel())
        with Gates(self.model, groups) as gates:
            gates.open(1, self.dtype, probe.images.device)
            try:
                with torch.enable_grad(), unchecked():
                    total = sum(
                        (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()
                        / t.detach().abs().max().clamp(min=1e-30)
                        for t in probe.run(self.model)
                    )
                    [found] = torch.autograd.grad(total, gates.values)  # type: ignore[arg-type]
            except Exception:  # the model's own code, which need not be differentiable
                return slopes
            for g in groups:
                at = gates.offsets[g.name]
                slopes[g.name] = float(found[0, at : at + g.units.size].abs().sum())
        return slopes


def _seen(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The logits; everything that the model gives where it does not say which they are, as one that
    gives more in training than otherwise."""
    if not model.training:
        return [logits(model, images)]
    out = model(images)
    try:
        return outputs_of(model, out)[:1]
    except ValueError:
        return list(tensors(out))


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """In training mode without dropout, if asked for; buffers are put back."""
    if not training:
        yield
        return
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.eval()
    try:
        yield
    finally:
        model.eval()
        with torch.no_grad():
            for n, b in model.named_buffers():
                if n in buffers and b.shape == buffers[n].shape:
                    b.copy_(buffers[n])


def _numbers(model: nn.Module) -> dict[tuple[nn.Module, str], object]:
    """What modules keep in plain attributes."""
    return {
        (m, name): value
        for m in model.modules()
        for name, value in vars(m).items()
        if isinstance(value, (int, float, str))
        or (isinstance(value, tuple) and all(isinstance(v, (int, float, str)) for v in value))
    }


@contextmanager
def _called(model: nn.Module) -> Iterator[set[str]]:
    """Names of the layers that are called within."""
    names: set[str] = set()

    def hook(name: str):  # type: ignore[no-untyped-def]
        return lambda *_: names.add(name)

    handles = [
        m.register_forward_pre_hook(hook(n))
        for n, m in model.named_modules()
        if isinstance(m, LAYERS)
    ]
    try:
        yield names
    finally:
        for h in handles:
            h.remove()


def _filled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in eval mode whose parameters hide nothing."""
    trial = copied(model).to(dtype).requires_grad_(False)
    trial.train().eval()  # modules that keep what they have computed in evaluation forget it
    generator = torch.Generator().manual_seed(0)

    def fill(t: Tensor | None, low: float, high: float) -> None:
        if t is not None:
            drawn = torch.rand(t.shape, generator=generator, dtype=torch.float64)
            t.copy_(low + (high - low) * drawn)

    with torch.no_grad():
        for layer in trial.modules():
            if isinstance(layer, NORMS):
                fill(layer.weight, 0.5, 1.5)
                fill(layer.bias, -0.5, 0.5)
                fill(getattr(layer, "running_mean", None), -0.5, 0.5)
                fill(getattr(layer, "running_var", None), 0.5, 1.5)
                continue
            if (norm := response_norm(layer)) is not None:
                times = 1.0 if norm.epsilon else enlarge(layer)
                fill(getattr(layer, norm.scale), 0.5, 1.5)
                if norm.shift is not None:
                    fill(getattr(layer, norm.shift), -0.5 * times, 0.5 * times)
                continue
            bare = next(layer.children(), None) is not None
            for name, p in layer.named_parameters(recurse=False):
                factor = bare or "scale" in type(layer).__name__.lower()
                if factor and p.numel() == max(p.shape, default=1):
                    fill(p, 0.5, 1.5)
                elif not p.numel() or not p.is_floating_point() or float(p.abs().max()) > TINY:
                    continue
                elif p.numel() > max(p.shape, default=1):
                    spread = (p.numel() / p.shape[0]) ** -0.5
                    p.copy_(spread * torch.randn(p.shape, generator=generator, dtype=torch.float64))
                else:
                    fill(p, *((-0.5, 0.5) if "bias" in name else (0.5, 1.5)))
    return trial
