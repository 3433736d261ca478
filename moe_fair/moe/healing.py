"""Healing: a pruned model trained end to end toward the original's predictions.

    min over the layers' weights   mean over tokens of   KL(p ‖ q) - μ log q(x)

with p the original's prediction, kept as its most probable tokens and the rest (`predictions`), q
the pruned model's, x the true next token, μ small: distillation with next-token loss as in
SlimQwen (arXiv 2605.08738). What changes in a weight is small (`low_rank`), the embeddings stay.
AdamW (arXiv 1711.05101) in float32 whatever the weights' data type, the step relative to each
tensor's size. What runs are the weights as they would be written.

Held-back sequences of every domain judge, a few times on the way. Kept is the best, by what is
trained for, that raises no domain's loss, nor its divergence by more than chance may. Where nothing
is gained any more, training ends, and where nothing ever was, it begins again with a quarter of the
step, and of that one.

Shape legend: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_fair.engines.batch import Batch, token_losses
from moe_fair.engines.decoder import find_decoder
from moe_fair.engines.oom import out_of_memory, release
from moe_fair.engines.processes import ALONE, Team
from moe_fair.engines.resident import ResidentEngine, checkpointed
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.healing_record import Judged
from moe_fair.moe.healing_text import HealingText, batches_of
from moe_fair.moe.low_rank import SmallChange
from moe_fair.moe.predictions import Predictions, divergence, stacked

LANGUAGE = 0.1  # μ; at 1 the text teaches more than the original (eval/LAB.md)
STEP = 0.005  # of a tensor's root mean square, at the schedule's peak
RISE = 0.1  # of all steps, in which the rate rises; then it falls to zero along a cosine
BETAS = (0.9, 0.95)
CLIP = 1.0  # the gradient's largest norm
LOOKS = 8  # times that the held-back sequences are asked
DRIFT = 1.05  # times which a domain's divergence may be: few sequences judge it
PATIENCE = 2  # looks without a gain after which training ends
TRIED = (1.0, 0.25, 0.0625)  # shares of the step, each where the one before gains nothing
SAVED = 64  # steps after which everything is saved, for a killed run to go on from
STATE = "state.safetensors"
FORMAT = "moe_fair.healing/1"
T = TypeVar("T")


@dataclass(frozen=True)
class Look:
    """What the held-back sequences said after so many steps, by domain."""

    step: int
    domains: dict[str, Judged]

    @property
    def mean(self) -> float:
        """What is trained for: every domain counts the same."""
        return sum(j.kl + LANGUAGE * j.loss for j in self.domains.values()) / len(self.domains)

    def worsens(self, before: Look) -> list[str]:
        """The domains whose loss is above what it was, or whose divergence clearly is; NaN is."""
        return [
            d
            for d, now in self.domains.items()
            if not (now.loss <= before.domains[d].loss and now.kl <= DRIFT * before.domains[d].kl)
        ]


class Healer:
    """Trains the weights of a pruned model, in place.

    Args:
        model: in memory.
        weights: those of its weights that are trained.
        stored: the data type in which each will be written.
        text: what is read.
        wanted: number of a sequence -> the original's predictions behind each of its tokens.
        most: sequences that are run together, while memory allows it.
        team: the processes that do this together, each with a model of its own.
        folder: where the state is saved; a run that was killed takes up what it finds there with
            the same `key`: everything the result depends on.

    Attributes:
        looks: what the held-back sequences said, before the first step and on the way.
        best: number of the look that is kept; 0: none.
        kept: its weights, as they are written.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        stored: Mapping[str, torch.dtype],
        text: HealingText,
        wanted: Callable[[int], Predictions],
        *,
        most: int,
        team: Team = ALONE,
        folder: Path | None = None,
        key: str = "",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.engine = ResidentEngine(model)
        self.text, self.wanted, self.most, self.team = text, wanted, most, team
        self.folder, self.key, self.say = folder, key, say
        self.layers: Sequence[nn.Module] = ()  # those that are run again in the backward
        routed = {id(getattr(m, t)) for b in find_blocks(model) for m, t, _ in b.routed}
        order = torch.Generator().manual_seed(0)
        self.changes = {
            n: SmallChange(p, stored[n], order, whole=id(p) in routed) for n, p in weights.items()
        }
        self.tried, self.best = 0, 0
        self.looks: list[Look] = []
        self.kept: dict[str, Tensor] = {}
        self._begin()

    def run(self) -> None:
        """Train to the end of the text, or until nothing is gained, with one step or another."""
        if not self._resume():
            self.looks.append(self._look())
        self._train()
        while not self.best and self.tried + 1 < len(TRIED):
            self.tried += 1
            self._begin()
            self._train()

    def _begin(self) -> None:
        """The weights as they were given, before the first step."""
        self.step, self.looks = 0, self.looks[:1]
        for c in self.changes.values():
            c.begin_again()
        peak, steps = STEP * TRIED[self.tried], len(self.text.steps)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [t], "lr": peak * size}
                for c in self.changes.values()
                for t, size in zip(c.trained, c.sizes, strict=True)
            ],
            betas=BETAS,
            weight_decay=0.0,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _rate(step, steps)
        )
        self._put()

    def _train(self) -> None:
        """To the end of the text, or until nothing is gained."""
        steps = len(self.text.steps)
        every = -(-steps // LOOKS)
        while self.step < steps and len(self.looks) - 1 - self.best < PATIENCE:
            self._learn()
            looks = self.step % every == 0 or self.step == steps
            if looks:
                self._judge()
            if looks or self.step % SAVED == 0:
                self._save()

    def _learn(self) -> None:
        """One step along the gradient of one step's sequences."""
        numbers = self.text.steps[self.step]
        tokens = sum(self.text.length(i) - 1 for i in numbers)
        self._until_it_fits(lambda: self._gradient(numbers, tokens))
        trained = [t for c in self.changes.values() for t in c.trained]
        gradients = [t.grad for t in trained if t.grad is not None]
        self.team.add_up(gradients)
        nn.utils.clip_grads_with_norm_(trained, CLIP, nn.utils.get_total_norm(gradients))
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self._put()

    def _gradient(self, numbers: Sequence[int], tokens: int) -> None:
        """This process's share of a step's gradient."""
        for c in self.changes.values():
            c.clear()
        mine = numbers[self.team.rank :: self.team.size]
        for batch in batches_of(self.text.text, mine, self.most) if mine else ():
            with torch.enable_grad(), checkpointed(self.engine.model, self.layers):
                losses, kl, counts = self._terms(batch)
                (((kl + LANGUAGE * losses) * counts).sum() / tokens).backward()

    def _terms(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L - 1] next-token losses, KL from the original, and whether a position counts."""
        wanted = stacked([self.wanted(i) for i in batch.sequence_ids.tolist()])
        b = batch.to(self.engine.device)
        logits = self.engine.model(
            input_ids=b.input_ids, attention_mask=b.attention_mask(), use_cache=False
        ).logits
        losses, counts = token_losses(logits, b)
        return losses, divergence(logits[:, :-1], wanted.to(logits.device)), counts

    @torch.no_grad()
    def _measured(self) -> dict[int, tuple[float, float, int]]:
        """Summed losses, summed KL and tokens of this process's judging sequences."""
        found: dict[int, tuple[float, float, int]] = {}
        mine = self.text.judged_by(self.team)
        for batch in batches_of(self.text.text, mine, self.most) if mine else ():
            losses, kl, counts = self._terms(batch)
            sums = [(t * counts).sum(1, dtype=torch.float64).tolist() for t in (losses, kl)]
            rows = zip(*sums, counts.sum(1).tolist(), strict=True)
            found |= dict(zip(batch.sequence_ids.tolist(), rows, strict=True))
        return found

    def _look(self) -> Look:
        """Ask all judging sequences."""
        sums: dict[int, tuple[float, float, int]] = {}
        for part in self.team.gather(self._until_it_fits(self._measured)):
            sums |= part
        domains = self.text.text.domains
        total = torch.zeros(len(domains), 3, dtype=torch.float64)
        for i in self.text.judging:  # in one order, whoever measured
            total[self.text.text.sequences[i][1]] += torch.tensor(sums[i], dtype=torch.float64)
        means = {d: (t[:2] / t[2]).tolist() for d, t in zip(domains, total, strict=True)}
        return Look(self.step, {d: Judged(*m) for d, m in means.items()})

    def _judge(self) -> None:
        """Look, and keep what is the best so far."""
        look = self._look()
        self.looks.append(look)
        best = self.looks[self.best]
        if not look.worsens(self.looks[0]) and look.mean < best.mean:
            self.best = len(self.looks) - 1
            self.kept = {n: c.value().to("cpu", copy=True) for n, c in self.changes.items()}

    def _put(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """The model runs with these, by default with what has been trained."""
        for n, c in self.changes.items():
            c.put(None if weights is None else weights[n])

    def put_first(self) -> None:
        """The model runs with what it was given."""
        self._put({n: c.first for n, c in self.changes.items()})

    def put_kept(self) -> None:
        """The model runs with the best."""
        self._put(self.kept)

    def choices(self, batch: Batch, count: int) -> Tensor:
        """[B, count] the tokens that the model ranks first behind the last positions."""
        [logits] = self.engine.logits([batch])
        return logits[:, -count:].argmax(-1).cpu()

    def _until_it_fits(self, attempt: Callable[[], T]) -> T:
        """What an attempt gives; with ever less memory where it runs out.

        Raises:
            MemoryError: nothing smaller can be tried, here or in another process.
        """
        while True:
            found, lack = None, None
            try:
                found = attempt()
            except Exception as e:
                if not out_of_memory(e):
                    raise
                lack = (str(e).strip().splitlines() or [type(e).__name__])[0]
            if lack is None or not self._less(lack):
                break
        if lost := [x for x in self.team.gather(lack) if x is not None]:
            raise MemoryError(lost[0])
        return found  # type: ignore[return-value]

    def _less(self, lack: str) -> bool:
        """Take less memory from here on; False where nothing is left to try."""
        for c in self.changes.values():
            c.clear()
        release()
        if self.most > 1:
            self.most //= 2
            how = f"with {self.most} sequences at a time"
        elif not self.layers:
            self.layers = tuple(find_decoder(self.engine.model).layers)
            how = "every layer run again in the backward"
        else:
            return False
        self.say(f"out of memory ({lack}): healing goes on {how}")
        return True

    def _save(self) -> None:
        """Everything, whole or not at all; by the first process."""
        if self.folder is None or not self.team.first:
            return
        about = {
            "format": FORMAT, "key": self.key, "step": str(self.step), "best": str(self.best),
            "tried": str(self.tried),
            "looks": json.dumps([asdict(look) for look in self.looks]),
        }  # fmt: skip
        tensors = {f"{kind} {n}": t.cpu() for kind, n, t in self._state()}
        tensors |= {f"kept {n}": t for n, t in self.kept.items()}
        temporary = self.folder / "state.partial"
        save_file(tensors, temporary, about)
        temporary.rename(self.folder / STATE)

    def _state(self) -> Iterator[tuple[str, str, Tensor]]:
        """What the next step depends on, beside its number."""
        for n, c in self.changes.items():
            for i, t in enumerate(c.trained):
                yield f"trained {i}", n, t
                for kind in ("exp_avg", "exp_avg_sq"):
                    yield f"{kind} {i}", n, self.optimizer.state[t][kind]

    def _resume(self) -> bool:
        """Go on where a killed run with the same key has saved its state."""
        header, tensors = self._saved() if self.team.first else (None, {})
        header = self.team.broadcast(lambda: header)
        if header is None:
            return False
        self.tried = int(header["tried"])
        self._begin()
        self.step, self.best = int(header["step"]), int(header["best"])
        self.looks = [
            Look(look["step"], {d: Judged(**j) for d, j in look["domains"].items()})
            for look in json.loads(header["looks"])
        ]
        for t in (t for c in self.changes.values() for t in c.trained):
            self.optimizer.state[t] = {
                "step": torch.tensor(float(self.step), device=t.device),
                "exp_avg": torch.zeros_like(t),
                "exp_avg_sq": torch.zeros_like(t),
            }
        for kind, n, t in self._state():
            if self.team.first:
                t.copy_(tensors[f"{kind} {n}"])
        self.team.spread([t for _, _, t in self._state()])
        if self.best and self.team.first:
            self.kept = {n: tensors[f"kept {n}"] for n in self.changes}
        for group, base in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = base * _rate(self.step, len(self.text.steps))
        self.schedule.last_epoch = self.step
        self._put()
        return True

    def _saved(self) -> tuple[dict[str, str] | None, dict[str, Tensor]]:
        """A killed run's header and tensors; None where there are none of this key."""
        file = self.folder / STATE if self.folder is not None else None
        if file is None or not file.is_file():
            return None, {}
        try:
            with safe_open(file, framework="pt") as f:
                header = f.metadata() or {}
                if header.get("format") != FORMAT or header.get("key") != self.key:
                    return None, {}
                return header, {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError):
            return None, {}  # damaged: begun again


def _rate(step: int, steps: int) -> float:
    """Share of the peak rate."""
    rise = max(1, round(RISE * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
