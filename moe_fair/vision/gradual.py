"""Units leave a few at a time while the model trains (Molchanov et al., arXiv 1906.10771).

Every unit has a gate z, 1 while it is there and 0 once it left. Each training minibatch gives the
change of its mean loss L that the unit's removal should cause, from the backward that trains the
weights anyway, and the score is the mean of the square over a step's minibatches:

    taylor-fo    (z·g)²                        g = ∂L/∂z
    taylor-so    (-z·g + ½ z²·H)²              H = ∂²L/∂z², mean over the step's minibatches
    taylor-bn    Σ_norms (γ·∂L/∂γ + β·∂L/∂β)²  over the unit's batch normalisations

Scores of a step are mixed with those before it (momentum); the units that score lowest in the whole
model leave, and training goes on. Channels that shortcuts tie are one unit with one gate.

The paper's gates stand behind batch normalisation. Ours stand where the unit is read, as in
`gates`: ReLU, pooling and addition let a factor z ≥ 0 pass unchanged, so both have the same
derivatives, and at 0 ours is the removal itself. For a unit with one batch normalisation and ReLU
taylor-bn is the same number as taylor-fo.

Shape legend: N units of all groups, C channels of a normalisation.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_fair.core.output import fresh
from moe_fair.core.plan import Plan
from moe_fair.core.units import Scores
from moe_fair.vision.data import ImageSet
from moe_fair.vision.finetune import Training, loss_of, make_optimizer
from moe_fair.vision.gates import Gates
from moe_fair.vision.graph import BATCH_NORMS, ChannelGroup, Graph, logits
from moe_fair.vision.plan import Goal, Rules, make
from moe_fair.vision.size import Sizes

METHODS = ("taylor-fo", "taylor-so", "taylor-bn")
# the paper's: 100 units after every 30 minibatches
UNITS, MINIBATCHES, MOMENTUM, PROBES = 100, 30, 0.9, 1
SMALLEST = torch.finfo(torch.float64).tiny  # what a unit that is there scores at least


@dataclass(frozen=True)
class Schedule:
    """How units leave.

    Attributes:
        method: one of METHODS.
        units: that leave after a step.
        minibatches: of a step.
        momentum: share of the earlier scores in a step's.
        probes: random directions per minibatch for `taylor-so`'s Hessian; as many as there are
            units or more: every unit's second derivative exactly.
    """

    method: str
    units: int
    minibatches: int = MINIBATCHES
    momentum: float = MOMENTUM
    probes: int = PROBES


@dataclass
class Removal:
    """How far a run is.

    Attributes:
        scores: [N] float64, the criterion; 0 for units that left.
        there: [N] bool.
        steps: what every step did, for `result.json`.
    """

    scores: Tensor
    there: Tensor
    steps: list[dict[str, Any]] = field(default_factory=list)


def default_units(total: int) -> int:
    """The paper's 100 units, but no more than a hundredth of a smaller model's."""
    return min(UNITS, -(-total // 100))


def check_method(model: nn.Module, groups: Sequence[ChannelGroup], method: str) -> None:
    """The model has what the method looks at.

    Raises:
        ValueError: `taylor-bn` and a group without trained scale and shift.
    """
    for g in groups if method == "taylor-bn" else ():
        norms = [model.get_submodule(m.module) for m in _norms(model, g)]
        if not norms or any(n.weight is None or not n.weight.requires_grad for n in norms):
            raise ValueError(
                f"--method taylor-bn needs batch normalisation with scale and shift in training, "
                f"and {g.name} has none; take taylor-fo"
            )


def remove_gradually(
    model: nn.Module,
    graph: Graph,
    sizes: Sizes,
    images: ImageSet,
    *,
    schedule: Schedule,
    training: Training,
    goal: Goal,
    rules: Rules,
    teacher: nn.Module | None = None,
    work: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Plan, list[dict[str, Any]]]:
    """Train the model in place while units leave, until the goal is met; then only the cut is left.

    Args:
        rules: its allocator compares the units of all groups.
        teacher: the dense model; needed where `training.distill` is above 0.
        work: folder for the state after each step, from which a killed run goes on.

    Returns:
        the plan to cut by, with the last scores (0 for units that left before), and what every step
        did.

    Raises:
        ValueError: the goal cannot be met, or training diverged.
    """
    total = sum(g.size for g in graph.units)
    optimizer = make_optimizer(model, training)
    state = _resume(model, optimizer, work, total)
    if state.steps:
        say(f"going on after step {len(state.steps)}")
    while True:
        model.train()
        found, loss = _train(model, optimizer, graph, state, images, schedule, training, teacher)
        model.eval()
        if state.steps:
            found = schedule.momentum * state.scores + (1 - schedule.momentum) * found
        state.scores = torch.where(state.there, found.clamp(min=SMALLEST), 0.0)
        plan, met = _next(graph, state, sizes, schedule, goal, rules)
        state.there = _there(graph, plan)
        left, operations = int(state.there.sum()), plan.explanation["operations_after"]
        state.steps.append(
            {
                "units": left,
                "operations": operations,
                "parameters": plan.after.parameters,
                "loss": loss,
            }
        )
        say(
            f"step {len(state.steps)}: loss {loss:.4f}; {left:,} of {total:,} units stay, "
            f"{operations / sizes.whole.operations:.1%} of the multiply-adds"
        )
        if met:
            return plan, state.steps
        if work is not None:
            _save(model, optimizer, state, work)


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    graph: Graph,
    state: Removal,
    images: ImageSet,
    schedule: Schedule,
    training: Training,
    teacher: nn.Module | None,
) -> tuple[Tensor, float]:
    """One step's minibatches: [N] the criterion, and the mean loss."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    first = len(state.steps) * schedule.minibatches
    batches = minibatches(images, training.batch_size, training.seed, first)
    with Gates(model, graph.groups) as gates:
        sums = Sums(model, graph.groups, gates, schedule)
        for number, (x, y) in itertools.islice(batches, schedule.minibatches):
            # what dropout and probes draw must not depend on what ran before a kill
            torch.manual_seed(1_000_003 * training.seed + number)
            x, y = x.to(device), y.to(device)
            gates.values = gate_values(state.there, device)
            with attention(twice=schedule.method == "taylor-so"):
                now = loss_of(logits(model, x), x, y, training.distill, teacher)
            sums.add(now)
            optimizer.step()
            optimizer.zero_grad()
            total += now.detach()
    loss = float(total)
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} in step {len(state.steps) + 1}: training diverged; lower --lr"
        )
    return sums.scores(), loss / schedule.minibatches


class Sums:
    """What a step's minibatches say of every unit. `first`, `second`, `curve`: [N] float64, sums of
    g, g² (of its counterpart for taylor-bn) and the Hessian's diagonal."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        gates: Gates,
        schedule: Schedule,
    ) -> None:
        self._model, self._groups, self._gates, self._schedule = model, groups, gates, schedule
        self.first, self.second, self.curve = torch.zeros(3, gates.total, dtype=torch.float64)
        self.count = 0

    def add(self, loss: Tensor) -> None:
        """One minibatch's mean loss, made with the gates open; leaves the weights' gradients."""
        self.count += 1
        method, values = self._schedule.method, self._gates.values
        if method == "taylor-so":
            g, diagonal = second_order(loss, values, self._schedule.probes)
            loss.backward()
            self.curve += diagonal
        else:
            loss.backward()
            assert values.grad is not None
            g = values.grad[0, :-1].double().cpu()
        if method == "taylor-bn":
            self.second += self._norm_terms()
        else:
            self.first += g
            self.second += g.square()

    def scores(self) -> Tensor:
        """[N] the criterion for units that are there."""
        second = self.second / self.count
        if self._schedule.method != "taylor-so":
            return second
        # mean of (-g + H/2)², with one H for all minibatches
        g, h = self.first / self.count, self.curve / self.count
        return second - g * h + h.square() / 4

    def _norm_terms(self) -> Tensor:
        """[N] Σ over a unit's batch normalisations of (γ·∂L/∂γ + β·∂L/∂β)²."""
        found = torch.zeros_like(self.second)
        for g in self._groups:
            at = self._gates.offsets[g.name]
            for m in _norms(self._model, g):
                layer: Any = self._model.get_submodule(m.module)
                term = layer.weight.detach() * layer.weight.grad
                term = (term + layer.bias.detach() * layer.bias.grad).double().cpu()  # [C]
                per_unit = term[torch.tensor(m.index)].sum(1)
                found[at : at + g.units.size] += per_unit.square()
        return found


def second_order(loss: Tensor, values: Tensor, probes: int) -> tuple[Tensor, Tensor]:
    """[N] ∂L/∂z and [N] ∂²L/∂z² of the gates, float64; the loss can be differentiated again after.

    With fewer probes than units the second is Hutchinson's estimate, the mean over random sign
    vectors v of v ⊙ Hv; its error is what the gates' mixed derivatives leave, 0 on average.

    Args:
        loss: of a forward within `attention(twice=True)`.
        values: [1, N + 1], as in `Gates`.
    """
    total = values.shape[1] - 1
    exact = probes >= total
    diagonal = torch.zeros(total, dtype=torch.float64)
    [gradient] = torch.autograd.grad(loss, values, create_graph=True)
    for i in range(total if exact else probes):
        v = torch.zeros(total + 1)
        if exact:
            v[i] = 1
        else:
            v[:-1] = torch.randint(0, 2, (total,)) * 2.0 - 1
        v = v.to(values)
        [hv] = torch.autograd.grad(gradient, values, v[None], retain_graph=True)
        diagonal += (v * hv[0])[:-1].double().cpu()
    return gradient.detach()[0, :-1].double().cpu(), diagonal / (1 if exact else probes)


def attention(*, twice: bool) -> AbstractContextManager[None]:
    """For forwards whose loss is differentiated twice: the fused attention kernels are not."""
    return sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()


def gate_values(there: Tensor, device: torch.device) -> Tensor:
    """[1, N + 1] gates that can be differentiated: 1 for units that are there, 0 for the others."""
    return torch.cat([there.float(), torch.ones(1)])[None].to(device).requires_grad_()


def minibatches(
    images: ImageSet, size: int, seed: int, start: int = 0
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Numbered minibatches without end, from number `start` on; epochs are shuffled by the seed.

    An epoch's last images, too few for a minibatch, wait for another epoch.
    """
    per_epoch = max(1, len(images) // size)
    for epoch in itertools.count(start // per_epoch):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(images), generator=generator).tolist()
        number = max(start, epoch * per_epoch)
        rest = order[(number - epoch * per_epoch) * size : per_epoch * size]
        yield from enumerate(images.batches(size, rest), number)


def _next(
    graph: Graph, state: Removal, sizes: Sizes, schedule: Schedule, goal: Goal, rules: Rules
) -> tuple[Plan, bool]:
    """Who stays after this step, and whether the goal is met then."""
    parts = torch.split(state.scores, [g.size for g in graph.units])
    scores = Scores(schedule.method, {g.name: s for g, s in zip(graph.units, parts, strict=True)})
    least = int(state.there.sum()) - schedule.units
    plan = make(graph.groups, scores, None, sizes, rules=rules, goal=goal)
    met = sum(len(g.kept) for g in plan.groups) >= least
    if not met:
        plan = make(graph.groups, scores, None, sizes, rules=rules, goal=Goal(units=least))
    # whoever left scores 0 and everybody else more: nobody comes back
    assert not bool((_there(graph, plan) & ~state.there).any())
    return plan, met


def _there(graph: Graph, plan: Plan) -> Tensor:
    """[N] bool, in the order of the gates."""
    kept = plan.kept
    return torch.cat([
        torch.zeros(g.size, dtype=torch.bool).index_fill(0, torch.tensor(kept[g.name]), True)
        for g in graph.units
    ])  # fmt: skip


def _norms(model: nn.Module, group: ChannelGroup) -> list:
    return [
        m
        for m in group.members
        if isinstance(norm := model.get_submodule(m.module), BATCH_NORMS) and norm.affine
    ]


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, state: Removal, work: Path) -> None:
    """The state after a step, in place of the one before it."""
    work.mkdir(parents=True, exist_ok=True)
    partial = fresh(work / "saving")
    tensors = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
    save_file(tensors, partial / "model.safetensors")
    save_file({"scores": state.scores, "there": state.there}, partial / "units.safetensors")
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    (partial / "steps.json").write_text(json.dumps(state.steps))
    last = len(state.steps)
    partial.rename(work / f"removed-{last}")
    if (work / f"removed-{last - 1}").exists():
        shutil.rmtree(work / f"removed-{last - 1}")


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, work: Path | None, total: int
) -> Removal:
    """Load the state after the last finished step; a new one if there is none."""
    blank = Removal(torch.zeros(total, dtype=torch.float64), torch.ones(total, dtype=torch.bool))
    found = list(work.glob("removed-*[0-9]")) if work is not None else []
    if not found:
        return blank
    folder = max(found, key=lambda p: int(p.name.removeprefix("removed-")))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state)  # which puts it beside the weights
    units = load_file(folder / "units.safetensors")
    return replace(blank, **units, steps=json.loads((folder / "steps.json").read_text()))
