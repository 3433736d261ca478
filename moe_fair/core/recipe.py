"""A recipe: every setting of a run in one YAML file; unknown keys fail with the nearest name."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from moe_fair.core.quote import clip, quote
from moe_fair.core.registry import check_settings, nearest
from moe_fair.core.yaml_file import read_yaml

DEFAULT_CALIBRATION = "NeelNanda/pile-10k"
LARGEST = 10**18  # of any number in a recipe
# what lets a model's files do more than be read: said by whoever runs it, never by a file
TRUST = ("trust_remote_code", "allow_pickle")
TARGETS = ("experts", "total", "ratio", "size", "tolerance")
# what decides the calibration text
TEXT = ("calibration", "samples", "length", "seed")
MADE = ("stats", "plan")  # files of an earlier stage
REDUCTIONS = ("prune", "merge")
HEADS = ("cut", "drop", "keep")
HASH_LAYERS = ("keep", "cut")
# what decides a plan once the statistics are there
PLANNING = (
    "method", "removal", "protection", "allocate", *TARGETS, "min_experts", "multiple_of",
    "weights", "reduce", "mtp",
)  # fmt: skip
# what the others do not look at; the command line has no options for it either
UNUSED = {
    "calibrate": (
        *TARGETS, "min_experts", "multiple_of", "repair", "heldout", "heldout_samples",
    ),
    "prune": ("curves", "for_"),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All settings of a pruning run.

    Attributes:
        model: local directory or Hub id; `revision` of the latter.
        trust_remote_code: let transformers run code that lies beside the model's weights;
            allow_pickle: read pickled weights where there are no safetensors. A recipe file cannot
            say either: it may come with the model.
        calibration: sources, `[domain=]path-or-dataset[:weight]`.
        samples, length: calibration sequences, and tokens in each.
        seed: decides which documents are drawn.
        batch_size: sequences per batch.
        dtype: auto, checkpoint, float32, bfloat16 or float16; device: auto, cpu, cuda, ...
        engine: auto, resident (the model in memory) or streaming (one layer at a time).
        device_map: auto, balanced or a file (module: device): spread one process's model over
            several devices, main memory and disk. For the resident engine.
        checkpointing: the resident engine runs each layer again in the backward, to keep one
            layer's activations at a time.
        max_memory: the most that the weights may take in memory, as "16GB"; decides `auto`.
        save_every: batches after which partial statistics are saved; a killed run goes on there.
        fresh: discard what a killed run left instead.
        for_: methods, `criterion` or `criterion/allocator`, whose statistics `calibrate` collects;
            unset: the usual ones. In a file the key is `for`.
        taylor, counterfactual, u_score, gram, alone: of earlier versions, for one release: families
            of statistics that are also collected, or are not (see `pipelines.collection`).
        curves: removal score in whose order `calibrate` also measures cost curves.
        curve_samples: calibration sequences on which these two are measured.
        method: `second-order` (ours), `fair` (the paper's), `fair-u`, or the name of a criterion,
            with that method's usual allocation; unset: `fair` for a tolerance, else `second-order`.
        removal, protection, allocate: replace the method's own scores or allocator.
        rivals: methods, `criterion` or `criterion/allocator`, whose plans are tried against the
            method's own on held-back calibration text; the best is taken. Unset: some where no
            method is named, else none; `none`: none.
        trial_samples: calibration sequences held back for it, 8 at least, and at most an eighth of
            all.
        experts: mean number kept per layer; total: kept over all layers; ratio: share removed;
            size: most parameters or bytes of the whole model ("8B", "20GB"); tolerance: ToD's α.
            Exactly one of the five.
        min_experts: fewest kept in any layer; multiple_of: kept counts are multiples of this.
        weights: calibration domain -> weight of its statistics in the scores.
        mtp: what becomes of heads for multi-token prediction: `cut`, `drop` or `keep` (see
            `heads`); unset: `cut` where their layer is like the body's.
        reduce: `prune` takes experts out; `merge` averages clusters of them into one each (see
            `moe.merge`), the budget by frequency and uniform unless a method is given.
        hash_layers: `keep` leaves layers that look experts up by token id as they are; `cut` cuts
            them like others, and their table then names the nearest of the remaining experts
            (see `moe.token_table`). Unset: keep.
        repair: how the remaining experts make up for those that left (see `moe.repairs`), or none;
            unset: the default where the model's experts allow it.
        heldout: sources of held-out text on which both models are measured.
        heldout_samples: most held-out windows.
        stats, plan: statistics or a plan made before, which this run starts from; not both. In a
            file their paths are relative to it.
        calibration_digest, heldout_digest: of the tokens that a recorded run has read; a run on
            others is refused. They go where the settings of their text are replaced.
        given: names of the settings that somebody gave, whatever their values; no setting itself.
    """

    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    calibration: tuple[str, ...] = (DEFAULT_CALIBRATION,)
    samples: int = 512
    length: int = 512
    seed: int = 0
    batch_size: int = 8
    dtype: str = "auto"
    device: str = "auto"
    engine: str = "auto"
    device_map: str | None = None
    checkpointing: bool = False
    max_memory: str | None = None
    save_every: int = 32
    fresh: bool = False
    for_: tuple[str, ...] | None = None
    taylor: bool | None = None
    counterfactual: bool | None = None
    u_score: bool | None = None
    gram: bool | None = None
    alone: bool | None = None
    curves: str | None = None
    curve_samples: int = 16
    method: str | None = None
    removal: str | None = None
    protection: str | None = None
    allocate: str | None = None
    rivals: tuple[str, ...] | None = None
    trial_samples: int = 64
    experts: float | None = None
    total: int | None = None
    ratio: float | None = None
    size: str | None = None
    tolerance: float | None = None
    min_experts: int = 0
    multiple_of: int = 1
    weights: Mapping[str, float] | None = None
    mtp: str | None = None
    reduce: str = "prune"
    hash_layers: str | None = None
    repair: str | None = None
    heldout: tuple[str, ...] = ()
    heldout_samples: int = 1024
    stats: str | None = None
    plan: str | None = None
    calibration_digest: str | None = None
    heldout_digest: str | None = None
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Recipe)
        for name in SETTINGS:
            object.__setattr__(self, name, coerce(name, getattr(self, name), hints[name]))
        changed = {n for n, default in SETTINGS.items() if getattr(self, n) != default}
        object.__setattr__(self, "given", self.given & SETTINGS.keys() | changed)
        for name, least in (
            ("samples", 1), ("length", 2), ("batch_size", 1), ("multiple_of", 1),
            ("min_experts", 0), ("heldout_samples", 1), ("seed", 0), ("save_every", 1),
            ("curve_samples", 1), ("trial_samples", 8),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{flag(name)} {getattr(self, name)} is below {least}")
        for name, known in (
            ("reduce", REDUCTIONS), ("mtp", HEADS), ("hash_layers", HASH_LAYERS),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(
                    f"{flag(name)} {quote(value)}{nearest(value, known)} is none of "
                    f"{', '.join(known)}"
                )
        if self.size is not None:
            parse_size(self.size)
        if self.max_memory is not None:
            parse_bytes("--max-memory", self.max_memory)
        given = [t for t in TARGETS if getattr(self, t) is not None]
        if len(given) > 1:
            raise ValueError(f"give one target, not {' and '.join(map(flag, given))}")
        if self.plan is not None and self.stats is not None:
            raise ValueError("give --plan or --stats, not both: a plan already holds its decision")

    def planning(self) -> dict[str, Any]:
        """The settings that decide a plan once the statistics are there."""
        return {k: v for k, v in self.to_dict().items() if k in PLANNING}

    def to_dict(self) -> dict[str, Any]:
        """Plain values without the unset ones."""
        plain = {k: v for k, v in asdict(self).items() if v is not None and k in SETTINGS}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    def to_yaml(self, without: Collection[str] = ()) -> str:
        """The recipe as YAML text, without these settings and what a file cannot say."""
        left_out = {*without, *TRUST}
        plain = {KEYS.get(k, k): v for k, v in self.to_dict().items() if k not in left_out}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with these settings replaced, and what they contradict taken out.

        A target replaces whichever target was there, a plan the statistics, another text the digest
        of the one before.

        Raises:
            ValueError: an unknown or impossible setting.
        """
        settings = renamed(settings)
        check_keys(settings, "settings")
        clear: dict[str, Any] = {}
        for names, cleared in REPLACED:
            if any(settings.get(n) is not None for n in names):
                clear |= dict.fromkeys(cleared)
        merged = {**clear, **settings}
        none = {n for n, v in merged.items() if v is None}
        return replace(self, **merged, given=(self.given | merged.keys()) - none)


# every setting, with its default
SETTINGS: dict[str, Any] = {
    f.name: f.default for f in fields(Recipe) if f.name != "given" and f.default is not MISSING
}
# settings that cannot be called in Python what they are called elsewhere
KEYS = {"for_": "for"}
# settings -> those that are taken out where one of the former is given
REPLACED = (
    (TARGETS, TARGETS),
    (MADE, MADE),
    (TEXT, ("calibration_digest",)),
    (("heldout", "heldout_samples", "length"), ("heldout_digest",)),
)


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe; paths of statistics and plan in it are relative to it.

    Raises:
        ValueError: no such file, not YAML, an unknown key (names the nearest), a bad value, or
            one of TRUST.
    """
    raw = renamed(read_settings(path))
    try:
        check_keys(raw, str(path))
        check_trust(raw)
        for name in MADE:
            if isinstance(raw.get(name), str):
                raw[name] = str(path.parent / raw[name])
        return Recipe(**raw, given=frozenset(raw))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def renamed(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """The same under the names that the settings have here."""
    own = {key: name for name, key in KEYS.items()}
    return {own.get(k, k): v for k, v in settings.items()}


def check_trust(raw: Mapping[Any, Any]) -> None:
    """A file does not allow what only whoever runs it may allow; it may come with the model.

    Raises:
        ValueError: it tries to.
    """
    for name in TRUST:
        if raw.get(name):
            raise ValueError(
                f"{name} is not taken from a file; read the model's files, then allow it with "
                f"{flag(name)} on the command line"
            )


def read_settings(path: Path) -> dict[Any, Any]:
    """The keys and values of a YAML file.

    Raises:
        ValueError: no such file, or no YAML of that kind.
    """
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no settings; a recipe is `key: value` lines")
    return raw


def check_taken(settings: Mapping[str, Any], command: str) -> None:
    """Every setting that is given, other than as it is by default, is one that the command uses.

    Raises:
        ValueError: one is not; says which.
    """
    given, usual = Recipe().with_settings(settings), Recipe()
    for name in renamed(settings):
        used = name in PLANNING if command == "plan" else name not in UNUSED[command]
        if not used and getattr(given, name) != getattr(usual, name):
            value = quote(getattr(given, name))
            raise ValueError(f"{command} does not use {name}={value}; leave it out")


def check_keys(settings: Mapping[Any, Any], where: str) -> None:
    """Every key is a setting.

    Raises:
        ValueError: one is not; names the nearest.
    """
    check_settings(settings, SETTINGS, f" in {where}")


def parse_size(text: str) -> tuple[str, int]:
    """`8B` or `1.5M` -> ("parameters", n); `20GB`, `16GiB` -> ("bytes", n).

    Raises:
        ValueError: neither form.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGTB]?)(i?)(B?)\s*", text)
    if found:
        number, prefix, binary, byte = found.groups()
        if not byte and not binary and prefix in ("K", "k", "M", "B", "T"):
            scale = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[prefix]
            return "parameters", round(float(number) * scale)
        if byte and prefix != "B":
            power = " kMGT".index(prefix.replace("K", "k") or " ")
            return "bytes", round(float(number) * (1024 if binary else 1000) ** power)
    raise ValueError(
        f"--size {quote(text)}: write parameters as 8B or 900M, bytes as 20GB or 16GiB"
    )


def parse_bytes(flag: str, text: str) -> int:
    """`20GB` or `16GiB` -> bytes.

    Raises:
        ValueError: another form.
    """
    try:
        unit, number = parse_size(text)
    except ValueError:
        unit, number = "", 0
    if unit != "bytes":
        raise ValueError(f"{flag} {quote(text)}: write bytes as 20GB or 16GiB")
    return number


def flag(name: str) -> str:
    """The option of a setting's name."""
    return "--" + KEYS.get(name, name).replace("_", "-")


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or an error that says what is wanted."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise ValueError(f"{flag(name)} has no value")
    kind = options[0]
    if kind == tuple[str, ...]:
        items = (value,) if isinstance(value, (str, PathLike)) else value
        if isinstance(items, (list, tuple)) and all(isinstance(i, (str, PathLike)) for i in items):
            return tuple(map(str, items))
        raise ValueError(f"{flag(name)} must be text or a list of texts, not {quote(value)}")
    if kind == tuple[float, ...]:
        items = value if isinstance(value, (list, tuple)) else (value,)
        if all(_is_number(i) for i in items):
            return tuple(float(i) for i in items)
        raise ValueError(f"{flag(name)} must be a number or a list of numbers, not {quote(value)}")
    if typing.get_origin(kind) is not None:  # weights
        return _weights(name, value)
    if kind is str and isinstance(value, PathLike):
        return str(value)
    if kind is str and name == "size" and _is_number(value):
        return str(value)
    if isinstance(value, Integral) and abs(int(value)) > LARGEST:
        raise ValueError(f"{flag(name)} is out of every range")
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)  # also numpy's
    if kind is float and _is_number(value):
        return float(value)
    if not isinstance(value, kind) or kind in (int, float):
        wanted = {
            "int": "a whole number",
            "float": "a finite number" if isinstance(value, float) else "a number",
            "str": "text",
            "bool": "true or false",
        }
        raise ValueError(f"{flag(name)} must be {wanted[kind.__name__]}, not {quote(value)}")
    return value


def _is_number(value: Any) -> bool:
    """It is one, and of a size that a setting may have."""
    return (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and (math.isfinite(value) if not isinstance(value, int) else abs(value) <= LARGEST)
    )


def _weights(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{flag(name)} must map domains to weights, not {quote(value)}")
    for domain, weight in value.items():
        if not isinstance(domain, str) and (not isinstance(domain, int) or domain in (True, False)):
            raise ValueError(
                f"{flag(name)}: the domain {quote(domain)} is no text; put it in quotes"
            )
        if not _is_number(weight) or not 0 <= weight <= LARGEST:
            raise ValueError(
                f"{flag(name)}: {clip(str(domain))}: {quote(weight)} is not a weight of 0 or more"
            )
    return {str(k): float(v) for k, v in value.items()}
