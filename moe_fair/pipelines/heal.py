"""Healing a written checkpoint on calibration text, or leaving it as it was repaired.

First the original says what it predicts, then it leaves memory and the pruned model is trained.
Only what makes no held-back domain and no greedy text worse is written; whatever goes wrong on the
way, the checkpoint that was there stands.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from moe_fair.core.output import digest
from moe_fair.core.recipe import Recipe
from moe_fair.core.say import Say
from moe_fair.engines.oom import lacking, out_of_memory, release
from moe_fair.engines.processes import ALONE, Team
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.device_map import offloaded
from moe_fair.moe.greedy_text import (
    agreement,
    beginnings,
    continuations,
    repetition,
    worse_by_chance,
)
from moe_fair.moe.healed_weights import check_stored, healed_parameters, write_over
from moe_fair.moe.healing import Healer
from moe_fair.moe.healing_record import Healing
from moe_fair.moe.healing_text import HealingText, healing_text
from moe_fair.moe.overlay import TYPES, UnknownLayoutError
from moe_fair.pipelines.teacher import Teacher

FILE = "heal.json"
EACH = 256  # sequences whose predictions lie in one file
LOGITS = 2**26  # elements of the logits of one batch, of which there are several copies


def heal_model(
    recipe: Recipe,
    source: Checkpoint,
    folder: Path,
    calibration: CalibrationSet,
    work: Path,
    say: Say,
    team: Team,
) -> Healing | None:
    """Train the checkpoint in `folder` toward its original, and write over what became better.

    Args:
        work: where predictions and the state of the training lie; a killed run goes on from there.

    Returns:
        what was done, in the first process; None where nothing could be, which is said.
    """
    if not all(team.gather((folder / "config.json").is_file())):
        if not team.first:
            return None
        say("note: the other processes do not see the result: healing is the first one's alone")
        team = ALONE
    text = healing_text(calibration, recipe.heal, recipe.seed)
    pruned = Checkpoint(str(folder), trust_remote_code=recipe.trust_remote_code)
    vocabulary = source.config.get_text_config().vocab_size
    longest = max(text.length(i) for step in text.steps for i in step)
    most = max(1, min(recipe.batch_size, LOGITS // (longest * vocabulary)))
    key = {
        "model": source.fingerprint, "text": calibration.digest, "heal": recipe.heal,
        "seed": recipe.seed, "dtype": recipe.dtype, "device": recipe.device, "most": most,
    }  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    say(
        f"healing on {text.tokens:,} tokens in {len(text.steps)} steps, judged by "
        f"{len(text.judging)} sequences"
    )
    teacher = Teacher(work, digest(key), text, team, EACH)
    healer, lack = None, None
    try:
        teacher.write(recipe.with_settings({"batch_size": most}), source, say)
        release()
        its = digest({**key, "pruned": pruned.fingerprint["model"]})
        healer = _healer(recipe, pruned, text, teacher, work, its, most, say, team)
        healer.run()
        if not team.first:
            teacher.discard()
            return None
        return _settled(healer, pruned, text, teacher, say)
    except UnknownLayoutError as e:
        lack = str(e)
    except Exception as e:
        if not out_of_memory(e):
            raise
        lack = f"out of memory ({lacking(e)})"
    healer = None  # what it holds is free for what follows
    release()
    say(f"note: not healed: {lack}")
    return None


def _settled(
    healer: Healer, pruned: Checkpoint, text: HealingText, teacher: Teacher, say: Say
) -> Healing:
    """What the training came to, written over the checkpoint where it is kept."""
    before = healer.looks[0]
    if not healer.best:
        last = healer.looks[-1]
        worse = last.worsens(before)
        why = f"{', '.join(worse)} worse" if worse else "nothing gained"
        found = Healing(text.tokens, last.step, f"on held-back text {why}", before.domains,
                        last.domains)  # fmt: skip
    else:
        found = _judged_by_writing(healer, teacher, text)
        if not found.refused:
            write_over(pruned, healer.kept)
    say(summary(found))
    return found


def _healer(
    recipe: Recipe,
    pruned: Checkpoint,
    text: HealingText,
    teacher: Teacher,
    work: Path,
    key: str,
    most: int,
    say: Say,
    team: Team,
) -> Healer:
    """The pruned model in memory, in every process or in none.

    Raises:
        MemoryError: there is too little of it, here or in another process.
        UnknownLayoutError: what the checkpoint keeps is not what the model has.
    """
    healer, lack = None, None
    try:
        model = pruned.load(recipe.dtype, recipe.device, recipe.device_map)
        if offloaded(model):  # `auto` found too little memory on the devices
            raise MemoryError("--device-map leaves weights outside the devices; all are trained")
        weights = healed_parameters(model)
        check_stored(pruned, {n: p.detach().cpu() for n, p in weights.items()})
        stored = {pruned.find(t.name).name: TYPES[t.dtype] for t in pruned.tensors
                  if pruned.find(t.name).name in weights}  # fmt: skip
        healer = Healer(
            model, weights, stored, text, teacher.wanted, most=most, team=team, folder=work,
            key=key, say=say,
        )  # fmt: skip
    except Exception as e:
        if not out_of_memory(e):
            raise
        lack = lacking(e)
    if lost := [x for x in team.gather(lack) if x is not None]:
        raise MemoryError(lost[0])
    assert healer is not None
    return healer


def _judged_by_writing(healer: Healer, teacher: Teacher, text: HealingText) -> Healing:
    """Greedy text of the repaired and of the healed model, beside the original's."""
    prompts, wanted = beginnings(text), teacher.written()
    agreed, repeated = [], [repetition(wanted)]
    for put in (healer.put_first, healer.put_kept):
        put()
        agreed.append(agreement(healer.choices, prompts, wanted, healer.most))
        repeated.append(repetition(continuations(healer.choices, prompts, healer.most)))
    before, best = healer.looks[0], healer.looks[healer.best]
    return Healing(
        text.tokens, best.step, _worse_writing(agreed, repeated), before.domains, best.domains,
        (_mean(agreed[0]), _mean(agreed[1])),
        (_mean(repeated[0]), _mean(repeated[1]), _mean(repeated[2])),
    )  # fmt: skip


def _worse_writing(agreed: Sequence[Tensor], repeated: Sequence[Tensor]) -> str:
    """What is worse in greedy text than chance alone explains; empty where nothing is.

    Args:
        agreed: before and after, by prompt.
        repeated: of the original, before and after; where the original repeats more itself, to
            repeat as it does is not worse.
    """
    original, first, now = repeated
    lost, more = agreed[0] - agreed[1], now - first
    if _mean(lost) > worse_by_chance(lost):
        return f"greedy text agrees in {_mean(agreed[1]):.1%} instead of {_mean(agreed[0]):.1%}"
    if _mean(more) > worse_by_chance(more) and _mean(now) > _mean(original):
        return f"greedy text repeats {_mean(now):.1%} of its 4-grams instead of {_mean(first):.1%}"
    return ""


def _mean(x: Tensor) -> float:
    return float(x.mean())


def summary(found: Healing) -> str:
    """One line with the numbers."""
    parts = [
        f"{d}: loss {a.loss:.4f} -> {found.after[d].loss:.4f}, KL {a.kl:.5f} -> "
        f"{found.after[d].kl:.5f}"
        for d, a in found.before.items()
    ]
    done = f"not healed, {found.refused}" if found.refused else f"healed, {found.steps} steps"
    return f"{done} ({'; '.join(parts)})"


def save(found: Healing, folder: Path) -> None:
    """Beside the result."""
    (folder / FILE).write_text(json.dumps(asdict(found), indent=1) + "\n")
