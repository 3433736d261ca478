"""A recipe: every setting of a run in one YAML file; unknown keys fail with the nearest name."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from moe_fair.core.registry import check_settings, nearest

DEFAULT_CALIBRATION = "NeelNanda/pile-10k"
LARGEST = 10**18  # of any number in a recipe
# what lets a model's files do more than be read: said by whoever runs it, never by a file
TRUST = ("trust_remote_code", "allow_pickle")
TARGETS = ("experts", "total", "ratio", "size", "tolerance")
REDUCTIONS = ("prune", "merge")
HASH_LAYERS = ("keep", "cut")
# what decides a plan once the statistics are there
PLANNING = (
    "method", "removal", "protection", "allocate", *TARGETS, "min_experts", "multiple_of",
    "weights", "reduce",
)  # fmt: skip


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
        taylor: also run the backward and collect gate Taylor scores.
        counterfactual: also collect what each expert's removal would change in its layer.
        u_score: also keep the distributions of each expert's outputs per calibration domain.
        gram: also collect the products of what any two experts of a layer add to its output.
        alone: also measure the loss with each expert removed alone.
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
        reduce: `prune` takes experts out; `merge` averages clusters of them into one each (see
            `moe.merge`), the budget by frequency and uniform unless a method is given.
        hash_layers: `keep` leaves layers that look experts up by token id as they are; `cut` cuts
            them like others, and their table then names the nearest of the remaining experts
            (see `moe.token_table`). Unset: keep.
        repair: how the remaining experts make up for those that left (see `moe.repairs`), or none;
            unset: the default where the model's experts allow it.
        heldout: sources of held-out text on which both models are measured.
        heldout_samples: most held-out windows.
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
    taylor: bool = True
    counterfactual: bool = True
    u_score: bool = False
    gram: bool = False
    alone: bool = False
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
    reduce: str = "prune"
    hash_layers: str | None = None
    repair: str | None = None
    heldout: tuple[str, ...] = ()
    heldout_samples: int = 1024

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Recipe)
        for f in fields(self):
            object.__setattr__(self, f.name, coerce(f.name, getattr(self, f.name), hints[f.name]))
        for name, least in (
            ("samples", 1), ("length", 2), ("batch_size", 1), ("multiple_of", 1),
            ("min_experts", 0), ("heldout_samples", 1), ("seed", 0), ("save_every", 1),
            ("curve_samples", 1), ("trial_samples", 8),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} is below {least}")
        for name, known in (("reduce", REDUCTIONS), ("hash_layers", HASH_LAYERS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(
                    f"{_flag(name)} {value!r}{nearest(value, known)} is none of {', '.join(known)}"
                )
        if self.max_memory is not None:
            parse_bytes("--max-memory", self.max_memory)
        given = [t for t in TARGETS if getattr(self, t) is not None]
        if len(given) > 1:
            raise ValueError(f"give one target, not {' and '.join(map(_flag, given))}")

    def planning(self) -> dict[str, Any]:
        """The settings that decide a plan once the statistics are there."""
        return {k: v for k, v in self.to_dict().items() if k in PLANNING}

    def to_dict(self) -> dict[str, Any]:
        """Plain values without the unset ones."""
        plain = {k: v for k, v in asdict(self).items() if v is not None}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    def to_yaml(self) -> str:
        """The recipe as YAML text, without what a file cannot say."""
        plain = {k: v for k, v in self.to_dict().items() if k not in TRUST}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with these settings replaced; a target replaces whichever target was there.

        Raises:
            ValueError: an unknown or impossible setting.
        """
        check_keys(settings, "settings")
        clear = dict.fromkeys(TARGETS) if any(settings.get(t) is not None for t in TARGETS) else {}
        return replace(self, **{**clear, **settings})


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe.

    Raises:
        ValueError: no such file, not YAML, an unknown key (names the nearest), a bad value, or
            one of TRUST.
    """
    raw = read_settings(path)
    try:
        check_keys(raw, str(path))
        check_trust(raw)
        return Recipe(**raw)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def check_trust(raw: Mapping[Any, Any]) -> None:
    """A file does not allow what only whoever runs it may allow; it may come with the model.

    Raises:
        ValueError: it tries to.
    """
    for name in TRUST:
        if raw.get(name):
            raise ValueError(
                f"{name} is not taken from a file; read the model's files, then allow it with "
                f"{_flag(name)} on the command line"
            )


def read_settings(path: Path) -> dict[Any, Any]:
    """The keys and values of a YAML file.

    Raises:
        ValueError: no such file, or no YAML of that kind.
    """
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    try:
        raw = yaml.safe_load(path.read_text())
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as e:
        # of a value that does not fit its tag PyYAML raises whatever its own code runs into
        raise ValueError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no settings; a recipe is `key: value` lines")
    return raw


def check_keys(settings: Mapping[Any, Any], where: str) -> None:
    """Every key is a setting.

    Raises:
        ValueError: one is not; names the nearest.
    """
    check_settings(settings, [f.name for f in fields(Recipe)], f" in {where}")


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
    raise ValueError(f"--size {text!r}: write parameters as 8B or 900M, bytes as 20GB or 16GiB")


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
        raise ValueError(f"{flag} {text!r}: write bytes as 20GB or 16GiB")
    return number


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or an error that says what is wanted."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise ValueError(f"{_flag(name)} has no value")
    kind = options[0]
    if kind == tuple[str, ...]:
        items = (value,) if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(i, str) for i in items):
            return tuple(items)
        raise ValueError(f"{_flag(name)} must be text or a list of texts, not {value!r}")
    if kind == tuple[float, ...]:
        items = value if isinstance(value, (list, tuple)) else (value,)
        if all(isinstance(i, (int, float)) and not isinstance(i, bool) for i in items):
            return tuple(float(i) for i in items)
        raise ValueError(f"{_flag(name)} must be a number or a list of numbers, not {value!r}")
    if typing.get_origin(kind) is not None:  # weights
        return _weights(name, value)
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{_flag(name)} is out of every range")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, (int, float)) and name == "size":
        value = str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        wanted = {
            "int": "a whole number",
            "float": "a number",
            "str": "text",
            "bool": "true or false",
        }
        raise ValueError(f"{_flag(name)} must be {wanted[kind.__name__]}, not {value!r}")
    return value


def _weights(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{_flag(name)} must map domains to weights, not {value!r}")
    for domain, weight in value.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 <= weight <= LARGEST:
            raise ValueError(f"{_flag(name)}: {domain}: {weight!r} is not a weight of 0 or more")
    if not any(value.values()):
        raise ValueError(f"{_flag(name)}: every weight is 0")
    return {str(k): float(v) for k, v in value.items()}
