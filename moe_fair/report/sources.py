"""What a pruned checkpoint says about itself: the files of its `moe_fair` folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_fair.core.engine_facts import Layout
from moe_fair.core.layout import layout_of
from moe_fair.core.manifest import check_result
from moe_fair.core.plan import Plan
from moe_fair.core.recipe_file import read_settings
from moe_fair.core.units import STATISTICS_FORMAT, UnitGroup, statistics_file
from moe_fair.engines.auto import auto_name
from moe_fair.engines.shards import shard_files, stored_tensors
from moe_fair.evaluate.agreement import Agreements
from moe_fair.evaluate.compare import Row
from moe_fair.evaluate.drafts import Drafts
from moe_fair.evaluate.heldout import HeldoutLoss
from moe_fair.evaluate.record import (
    load_agreement,
    load_benchmarks,
    load_drafts,
    load_heldout,
)
from moe_fair.moe.healing_record import Healing, Judged
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.vision.checkpoint import PRUNED_FILE

FOLDER = "moe_fair"  # inside a pruned checkpoint
USE = "tokens"  # the statistic that routing maps show
PROCESSORS = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Routing:
    """From the statistics: the unit groups, the calibration domains, and how often units were used.

    `use`: group name -> [D, N].
    """

    groups: tuple[UnitGroup, ...]
    domains: tuple[str, ...]
    tokens: int
    use: dict[str, Tensor]


@dataclass(frozen=True)
class Sources:
    """Everything that a report or a model card is made of; None for what there is not.

    Attributes:
        auto: name of the class of transformers whose `from_pretrained` loads the checkpoint.
        brings_code: it does so with `trust_remote_code` alone.
        layout: what decides who serves it; None where its config does not say.
        sees: there is a processor beside the tokenizer.
    """

    plan: Plan
    auto: str
    brings_code: bool
    sees: bool
    recipe: str
    routing: Routing | None
    repairs: list[LayerRepair] | None
    heldout: tuple[HeldoutLoss, HeldoutLoss] | None
    agreement: Agreements | None
    benchmarks: list[Row] | None
    drafts: tuple[Drafts, Drafts] | None = None
    healing: Healing | None = None
    layout: Layout | None = None

    @property
    def model(self) -> str:
        """The original's name; of a local directory only the last part."""
        name = str(self.plan.recipe.get("model") or "model")
        return Path(name).name if name.startswith((".", "/", "~")) or name.count("/") > 1 else name


def gather(output: Path) -> Sources:
    """Read what `prune` and `eval` left in a pruned checkpoint.

    Raises:
        ValueError: it is none, or a file in it cannot be used.
    """
    folder = output / FOLDER
    if (output / PRUNED_FILE).is_file():
        raise ValueError(
            f"{output} is an image classifier: `vision prune` drew its report, and cards and "
            "uploads are for language models"
        )
    check_result(output)
    recipe = folder / "recipe.yaml"
    config = _config(output / "config.json")
    return Sources(
        plan=_as_stored(Plan.load(folder / "plan.json"), output),
        auto=auto_name(config),
        brings_code=config.get("moe_fair") is not None,
        sees=any((output / name).is_file() for name in PROCESSORS),
        recipe=recipe.read_text() if recipe.is_file() else "",
        routing=_routing(statistics_file(folder)),
        repairs=load_repairs(folder / "repair.json"),
        heldout=load_heldout(folder),
        agreement=load_agreement(folder),
        benchmarks=load_benchmarks(folder),
        drafts=load_drafts(folder),
        healing=load_healing(folder / "heal.json"),
        layout=_layout(config),
    )


def saved_as(output: Path) -> str | None:
    """What the recipe beside a result says that its weights have become; None: what they were."""
    try:
        said = read_settings(output / FOLDER / "recipe.yaml").get("save_as")
    except ValueError:
        return None
    return said if isinstance(said, str) else None


def _as_stored(plan: Plan, output: Path) -> Plan:
    """The plan with the bytes of a result that is stored otherwise, which it does not know."""
    if saved_as(output) is None:
        return plan
    size = sum(t.bytes for file in shard_files(output) for t in stored_tensors(file))
    return replace(plan, after=replace(plan.after, bytes=size))


def _config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{file} cannot be read: {e}; is the checkpoint whole?") from e
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no config of a model; is the checkpoint whole?")
    return found


def _layout(config: dict[str, Any]) -> Layout | None:
    try:
        return layout_of(config)
    except ValueError:
        return None


def load_repairs(file: Path) -> list[LayerRepair] | None:
    """The table of repairs, or None where there is none.

    Raises:
        ValueError: the file is no such table.
    """
    if not file.is_file():
        return None
    known = {f.name for f in fields(LayerRepair)}  # another version may know more
    try:
        layers = json.loads(file.read_text())
        return [LayerRepair(**{k: v for k, v in layer.items() if k in known}) for layer in layers]
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{file} is not a table of repairs: {e}; remove it") from e


def load_healing(file: Path) -> Healing | None:
    """What healing did, or None where it was not asked for.

    Raises:
        ValueError: the file does not say.
    """
    if not file.is_file():
        return None
    known = {f.name for f in fields(Healing)}
    try:
        found = {k: v for k, v in json.loads(file.read_text()).items() if k in known}
        for side in ("before", "after"):
            found[side] = {d: Judged(**j) for d, j in found[side].items()}
        return Healing(**found)
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise ValueError(f"{file} does not say what healing did: {e}; remove it") from e


def _routing(file: Path) -> Routing | None:
    """Only what is shown: the vector statistics of a large model are gigabytes."""
    if not file.is_file():
        return None
    try:
        with safe_open(str(file), framework="pt") as f:
            header = json.loads((f.metadata() or {}).get("moe_fair", "{}"))
            if header.get("format") != STATISTICS_FORMAT:
                raise ValueError(f"format {header.get('format')!r}")
            groups = tuple(UnitGroup(**g) for g in header["groups"])
            use = {g.name: f.get_tensor(f"sums/{g.name}/{USE}") for g in groups}
            tokens = int(f.get_tensor("tokens").sum())
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file} cannot be read as a statistics file: {e}") from e
    return Routing(groups, tuple(header["domains"]), tokens, use)
