"""Fine-tuning a pruned classifier, epoch by epoch, so that a killed run goes on at the last one.

Presets: `sgd`, as FAIR-Pruner publishes it (learning rate .001, momentum .9, constant), and `adamw`
with a cosine to zero. With `distill` λ the loss is

    (1 - λ)·CE(y, label) + λ·T²·KL(softmax(dense/T) ‖ softmax(y/T)),   T = 4

after Hinton et al., arXiv 1503.02531, the dense model being the teacher.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_fair.core.registry import pick
from moe_fair.vision.data import ImageSet
from moe_fair.vision.graph import logits

TEMPERATURE = 4.0
LEARNING_RATES = {"sgd": 1e-3, "adamw": 5e-4}


@dataclass(frozen=True)
class Training:
    """How to fine-tune.

    Attributes:
        epochs: passes over the images.
        optimizer: `sgd` or `adamw`.
        learning_rate: None takes the preset's.
        distill: λ, 0 for labels alone.
        batch_size, seed: of the shuffled batches.
    """

    epochs: int
    optimizer: str = "sgd"
    learning_rate: float | None = None
    distill: float = 0.0
    batch_size: int = 64
    seed: int = 0

    @property
    def rate(self) -> float:
        """The learning rate at the start."""
        preset = pick(LEARNING_RATES, self.optimizer, "optimizer")
        return preset if self.learning_rate is None else self.learning_rate


def finetune(
    model: nn.Module,
    images: ImageSet,
    training: Training,
    *,
    teacher: nn.Module | None = None,
    work: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> nn.Module:
    """Train the model in place and return it, in eval mode.

    Args:
        teacher: the dense model; needed where `distill` is above 0.
        work: folder for the state after each epoch, from which a killed run goes on.
    """
    from accelerate import Accelerator

    device = next(model.parameters()).device
    accelerator = Accelerator(cpu=device.type == "cpu")
    optimizer = make_optimizer(model, training)
    steps = math.ceil(len(images) / training.batch_size)
    schedule = _schedule(optimizer, training, steps)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    first = _resume(accelerator, work)
    if first:
        say(f"going on after epoch {first}")
    for epoch in range(first, training.epochs):
        total = _epoch(model, images, training, epoch, teacher, optimizer, schedule, accelerator)
        say(f"epoch {epoch + 1} of {training.epochs}: loss {total:.4f}")
        check_trained(model, total)
        if work is not None:
            _save(accelerator, work, epoch + 1)
    return accelerator.unwrap_model(model).eval()


def check_trained(model: nn.Module, loss: float = 0.0) -> None:
    """Training has not diverged.

    Raises:
        ValueError: the loss or a weight is not finite.
    """
    finite = torch.stack([p.isfinite().all() for p in model.parameters()]).all()
    if not (math.isfinite(loss) and bool(finite)):
        raise ValueError("training diverged: weights are not finite any more; lower --lr")


def _epoch(
    model: nn.Module,
    images: ImageSet,
    training: Training,
    epoch: int,
    teacher: nn.Module | None,
    optimizer: Any,
    schedule: Any,
    accelerator: Any,
) -> float:
    """One pass; returns the mean loss. The order of the images depends on seed and epoch only."""
    model.train()
    generator = torch.Generator().manual_seed(1000 * training.seed + epoch)
    # what dropout draws must not depend on what ran before a kill
    torch.manual_seed(1000 * training.seed + epoch)
    order = torch.randperm(len(images), generator=generator).tolist()
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for x, y in images.batches(training.batch_size, order):
        if len(x) == 1 and len(images) > 1:
            continue  # batch normalisation cannot train on one image
        x, y = x.to(accelerator.device), y.to(accelerator.device)
        loss = loss_of(logits(model, x), x, y, training.distill, teacher)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.detach().double() * len(x)
    return float(total) / len(images)


def loss_of(
    out: Tensor, images: Tensor, labels: Tensor, distill: float, teacher: nn.Module | None
) -> Tensor:
    """Cross-entropy, mixed with the distillation loss where `distill` is above 0."""
    hard = nn.functional.cross_entropy(out, labels)
    if not distill:
        return hard
    assert teacher is not None
    with torch.no_grad():
        wanted = torch.log_softmax(logits(teacher.eval(), images) / TEMPERATURE, dim=-1)
    given = torch.log_softmax(out / TEMPERATURE, dim=-1)
    soft = nn.functional.kl_div(given, wanted, reduction="batchmean", log_target=True)
    return (1 - distill) * hard + distill * TEMPERATURE**2 * soft


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The preset's optimizer of everything that is trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("all parameters are frozen (requires_grad is False): none can be trained")
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=training.rate, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.05)


def _schedule(
    optimizer: torch.optim.Optimizer, training: Training, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    total = max(1, steps * training.epochs)

    def factor(step: int) -> float:
        if training.optimizer == "sgd":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _resume(accelerator: Any, work: Path | None) -> int:
    """Load the state after the last finished epoch; returns its number, 0 if there is none."""
    if work is None:
        return 0
    done = sorted(int(p.name.removeprefix("epoch-")) for p in work.glob("epoch-*[0-9]"))
    if not done:
        return 0
    accelerator.load_state(str(work / f"epoch-{done[-1]}"))
    return done[-1]


def _save(accelerator: Any, work: Path, epoch: int) -> None:
    """The state after an epoch, in place of the one before it."""
    work.mkdir(parents=True, exist_ok=True)
    partial = work / "saving"
    if partial.exists():
        shutil.rmtree(partial)
    accelerator.save_state(str(partial))
    partial.rename(work / f"epoch-{epoch}")
    if (work / f"epoch-{epoch - 1}").exists():
        shutil.rmtree(work / f"epoch-{epoch - 1}")
