"""A recipe: every setting of a run in one YAML file; unknown keys fail with the nearest name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moe_fair.core.method import SIGNS, join_method, parse_method
from moe_fair.core.quote import quote
from moe_fair.core.registry import check_settings
from moe_fair.core.settings import (
    coerce_all,
    flag,
    is_number,
    key_of,
    name_of,
    setting,
    settings_of,
)
from moe_fair.core.sizes import parse_bytes, parse_size

DEFAULT_CALIBRATION = "NeelNanda/pile-10k"
# what lets a model's files do more than be read: said by whoever runs it, never by a file
TRUST = ("trust_remote_code", "allow_pickle")
TARGETS = ("experts", "total", "ratio", "size", "tolerance")
# what decides the calibration text
TEXT = ("calibration", "map", "samples", "length", "seed", "self_share")
MADE = ("stats", "plan")  # files of an earlier stage

# headings of the help screens, in their order
PANELS = TARGET, SCORES, TEXTS, RUNNING = (
    "Target (exactly one)",
    "Scores and budget",
    "Text",
    "Running",
)
# groups of commands; `plan` takes what decides a plan once the statistics are there
PLANS = ("plan", "prune")
DECIDES = ("calibrate", "plan", "prune")
GATHERS = ("calibrate", "prune")
MEASURES = ("calibrate", "prune", "oracle")
RUNS = ("calibrate", "prune", "oracle", "eval")
OPENS = (*RUNS, "sample")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _weights(text: str) -> dict[str, float]:
    try:
        pairs = [item.rsplit("=", 1) for item in text.split(",")]
        return {domain.strip(): float(weight) for domain, weight in pairs}
    except ValueError:
        raise ValueError(f"--weights {text!r}: write domain=weight,domain=weight") from None


def _fields(text: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in text.split(",")]
    found = {role.strip(): field.strip() for role, _, field in pairs}
    if len(found) < len(pairs) or not all(found.values()):
        raise ValueError(f"--map {text!r}: write user=FIELD,assistant=FIELD, each role once")
    return found


@dataclass(frozen=True)
class Recipe:
    """All settings of a pruning run; each field says what it is, and `moe-fair settings` shows it.

    A recipe file says neither `trust_remote_code` nor `allow_pickle`: it may come with the model.

    Attributes:
        given: names of the settings that somebody gave, whatever their values; no setting itself.
    """

    model: str | None = setting(
        None, "Model directory or Hub id", commands=OPENS, shown=True, flags=("MODEL",)
    )
    revision: str | None = setting(
        None, "Branch, tag or commit on the Hub", panel=RUNNING, commands=OPENS
    )
    trust_remote_code: bool = setting(
        False,
        "Run a tokenizer's code that lies beside the weights; a model's own is never run, the "
        "stock class serves",
        panel=RUNNING, commands=OPENS,
    )  # fmt: skip
    allow_pickle: bool = setting(
        False,
        "Where a model has no safetensors, read its pickled weights (.bin): tensors only, nothing "
        "in them is run",
        panel=RUNNING, commands=OPENS,
    )  # fmt: skip
    calibration: tuple[str, ...] = setting(
        (DEFAULT_CALIBRATION,),
        "[domain=]WHERE[:weight]; WHERE is self (text sampled from the model), a .txt, .jsonl, "
        ".json, .csv or .parquet file, a directory of them, a preset (chat, code, math, tools, "
        "multilingual or general), or a dataset id[:config][@split], whose first : is its "
        "config's: a weight is id@split:2. Repeat for a mix",
        panel=TEXTS, commands=MEASURES, shown=True, flags=("-c", "--calibration"),
        usual="self where the model fits here, else NeelNanda/pile-10k",
    )  # fmt: skip
    map: Mapping[str, str] | None = setting(
        None,
        "What the fields of rows hold, where they are not known ones: user=FIELD,assistant=FIELD, "
        "perhaps with system= and tools=; or text=FIELD; or messages=FIELD",
        panel=TEXTS, commands=RUNS, parse=_fields, usual="known ones",
    )  # fmt: skip
    samples: int = setting(
        512, "Calibration sequences", panel=TEXTS, commands=MEASURES, shown=True, minimum=1
    )
    length: int = setting(512, "Tokens in each", panel=TEXTS, commands=OPENS, shown=True, minimum=2)
    seed: int = setting(
        0, "Decides which documents are drawn", panel=TEXTS, commands=(*MEASURES, "sample"),
        shown=True, minimum=0,
    )  # fmt: skip
    tokens: int | None = setting(
        None, "Tokens of text to sample", panel=TEXTS, commands=("sample",), shown=True,
        minimum=1, usual="512 x --length",
    )  # fmt: skip
    server: str | None = setting(
        None,
        "An OpenAI-compatible server that runs the original, and samples the model's own text",
        panel=TEXTS, commands=(*GATHERS, "sample"), shown=("sample",),
    )  # fmt: skip
    self_share: float | None = setting(
        None,
        "Samples of the model's own text on top of those of text that is given, a share of these",
        panel=TEXTS, commands=GATHERS,
        usual="0.25; 0 with a --method, streamed, or below 29 samples",
    )  # fmt: skip
    batch_size: int = setting(
        8, "Sequences per batch", panel=RUNNING, commands=RUNS, shown=True, minimum=1
    )
    dtype: str = setting(
        "auto", "auto, checkpoint, float32, bfloat16 or float16", panel=RUNNING, commands=OPENS,
        shown=True, usual="auto: float32 on a CPU, as on disk elsewhere",
        choices=("auto", "checkpoint", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    device: str = setting("auto", "auto, cpu, cuda, ...", panel=RUNNING, commands=OPENS, shown=True)
    engine: str = setting(
        "auto", "auto, resident (the model in memory) or streaming (one layer at a time)",
        panel=RUNNING, commands=("calibrate", "prune", "eval"), shown=True,
        usual="auto, by size and free memory", choices=("auto", "resident", "streaming"),
    )  # fmt: skip
    device_map: str | None = setting(
        None,
        "auto, balanced or a file of module: device lines: spread the model of one process over "
        "several devices, main memory (cpu) and disk; for the resident engine",
        panel=RUNNING, commands=(*GATHERS, "sample"),
    )  # fmt: skip
    checkpointing: bool = setting(
        False,
        "Run each layer again in the backward: keeps the activations of one layer at a time",
        panel=RUNNING, commands=GATHERS,
    )  # fmt: skip
    max_memory: str | None = setting(
        None, "The most that weights may take in memory, as 16GB; decides --engine auto, "
        "and whether packed experts stay packed",
        panel=RUNNING, commands=OPENS,
    )  # fmt: skip
    save_every: int = setting(
        32, "Batches after which partial statistics are saved, for a killed run to go on from",
        panel=RUNNING, commands=GATHERS, minimum=1,
    )  # fmt: skip
    fresh: bool = setting(False, "Discard what a killed run left", panel=RUNNING, commands=MEASURES)
    for_: tuple[str, ...] | None = setting(
        None,
        "Collect exactly what these methods need, as reap,fair-u: `criterion`, "
        "`criterion/allocator`, merge, ream, or default for what is collected without this",
        panel=TEXTS, commands=("calibrate",), shown=True, parse=_names,
        usual="what the default, its rivals and most criteria need",
    )  # fmt: skip
    # of earlier versions, for one release: families of statistics, see `pipelines.collection`
    taylor: bool | None = setting(
        None, "Older form of --for: with or without gate Taylor scores",
        panel=TEXTS, commands=GATHERS, flags=("--taylor/--no-taylor",),
    )  # fmt: skip
    counterfactual: bool | None = setting(
        None, "Older form of --for: with or without what each expert's removal would change",
        panel=TEXTS, commands=GATHERS, flags=("--counterfactual/--no-counterfactual",),
    )  # fmt: skip
    u_score: bool | None = setting(
        None, "Older form of --for default,fair-u",
        panel=TEXTS, commands=GATHERS, flags=("--u-score/--no-u-score",),
    )  # fmt: skip
    gram: bool | None = setting(
        None, "Older form of --for default,naee",
        panel=TEXTS, commands=GATHERS, flags=("--gram/--no-gram",),
    )  # fmt: skip
    alone: bool | None = setting(
        None, "Older form of --for default,counterfactual-measured",
        panel=TEXTS, commands=GATHERS, flags=("--alone/--no-alone",),
    )  # fmt: skip
    curves: str | None = setting(
        None,
        "Also measure what each layer's depth costs when experts leave in the order of this "
        "criterion, for plan --method METHOD/curves",
        panel=TEXTS, commands=("calibrate",), choices="criteria",
    )  # fmt: skip
    curve_samples: int = setting(
        16, "Calibration sequences on which removals alone and cost curves are measured",
        panel=TEXTS, commands=GATHERS, minimum=1,
    )  # fmt: skip
    method: str | None = setting(
        None,
        "REMOVAL[:PROTECTION][/ALLOCATOR][+REPAIR], as reap/global+refit. REMOVAL: second-order, "
        "fair (ToD), fair-u (ToD on U-Scores between calibration domains), or a criterion: reap, "
        "frequency, ean, ..., with its usual allocation unless an ALLOCATOR is named",
        panel=SCORES, commands=DECIDES, shown=PLANS, choices="methods",
        usual="second-order; fair with --tolerance",
    )  # fmt: skip
    removal: str | None = setting(
        None, "The REMOVAL of --method in its older form", panel=SCORES, commands=DECIDES,
        choices="criteria",
    )  # fmt: skip
    protection: str | None = setting(
        None, "The PROTECTION of --method in its older form", panel=SCORES, commands=DECIDES,
        choices="criteria",
    )  # fmt: skip
    allocate: str | None = setting(
        None,
        "The ALLOCATOR of --method in its older form: tod, uniform, global, or another that "
        "`moe-fair settings allocate` lists",
        panel=SCORES, commands=DECIDES, choices="allocators",
    )  # fmt: skip
    rivals: tuple[str, ...] | None = setting(
        None,
        "Methods, without a repair, whose plans are tried against the method's own on held-back "
        "calibration text, the best of which is taken, as reap,mone/global; none: none",
        panel=SCORES, commands=GATHERS, parse=_names, usual="some where no --method is given",
    )  # fmt: skip
    trial_samples: int = setting(
        64, "Calibration sequences held back for --rivals, at most a quarter of all",
        panel=TEXTS, commands=GATHERS, minimum=16,
    )  # fmt: skip
    experts: float | None = setting(
        None, "Experts kept per layer on average", panel=TARGET, commands=PLANS, shown=True
    )
    total: int | None = setting(
        None, "Experts kept over all layers", panel=TARGET, commands=PLANS, shown=True
    )
    ratio: float | None = setting(
        None, "Share of all experts removed, 0 to 1", panel=TARGET, commands=PLANS, shown=True
    )
    size: str | None = setting(
        None, "Most that the whole model may hold: 8B parameters, or 20GB", panel=TARGET,
        commands=PLANS, shown=True,
    )  # fmt: skip
    tolerance: float | None = setting(
        None, "ToD's α and no budget: each layer goes as deep as it allows", panel=TARGET,
        commands=PLANS, shown=True,
    )  # fmt: skip
    min_experts: int = setting(
        0, "Fewest kept in any layer (never below top-k)", panel=SCORES, commands=PLANS, minimum=0
    )
    multiple_of: int = setting(
        1, "Kept counts are multiples of this", panel=SCORES, commands=PLANS, minimum=1
    )
    serve: tuple[str, ...] | None = setting(
        None,
        "Engines that must serve the result, as vllm,llama.cpp (`moe-fair check` lists them), or "
        "vllm:ep=8 with each layer's experts shared by 8 devices: a budget that one "
        "of them cannot take is refused before anything is measured",
        panel=TARGET, commands=PLANS, shown=True, flags=("--for", "--serve"), parse=_names,
    )  # fmt: skip
    weights: Mapping[str, float] | None = setting(
        None, "Domain weights in the scores, 1 for those not named: python=2,rust-docs=0",
        panel=SCORES, commands=DECIDES, parse=_weights,
    )  # fmt: skip
    mtp: str | None = setting(
        None,
        "Heads for multi-token prediction: cut (as many experts as the layers have), drop, or keep "
        "(unequal counts only)",
        panel=SCORES, commands=DECIDES, choices=("cut", "drop", "keep"),
        usual="cut where the head's layer is like the body's",
    )  # fmt: skip
    reduce: str = setting(
        "prune",
        "prune; merge: average clusters of experts with like outputs into one each (HC-SMoE); or "
        "ream: average the others into those that stay, neuron by neuron (REAM). Both have uniform "
        "budgets, by frequency or by reap, unless a method is given, and --repair only where given",
        panel=SCORES, commands=DECIDES, choices=("prune", "merge", "ream"),
    )  # fmt: skip
    hash_layers: str | None = setting(
        None,
        "Layers that look experts up by token id (DeepSeek V4's first): keep them whole, or cut "
        "them like others, their table naming the nearest remaining experts",
        panel=SCORES, commands=MEASURES, choices=("keep", "cut"), usual="keep",
    )  # fmt: skip
    repair: str | None = setting(
        None,
        "Fit the remaining experts to the original model, layer by layer: none, refit, distill, or "
        "another that `moe-fair settings repair` lists",
        panel=SCORES, commands=("prune",), shown=True, choices="repairs",
        usual="distill where the model's experts allow it",
    )  # fmt: skip
    heal: int = setting(
        0,
        "Tokens of calibration text on which the repaired model is trained end to end toward the "
        "original's predictions; 0: none",
        panel=SCORES, commands=("prune",), minimum=0,
    )  # fmt: skip
    save_as: str | None = setting(
        None,
        "What the weights become on the way out: bf16, fp8 (in squares, as DeepSeek publishes), or "
        "w4a16 (INT4 in groups of 128, as llm-compressor writes it)",
        panel=RUNNING, commands=("prune",), choices=("bf16", "fp8", "w4a16"),
        usual="what they are",
    )  # fmt: skip
    heldout: tuple[str, ...] = setting(
        (), "Held-out text (as --calibration) on which original and pruned are measured",
        panel=TEXTS, commands=("prune", "eval"), shown=True,
    )  # fmt: skip
    heldout_samples: int = setting(
        1024, "Most held-out windows", panel=TEXTS, commands=("prune", "eval"), shown=("eval",),
        minimum=1,
    )  # fmt: skip
    stats: str | None = setting(
        None, "Directory that `calibrate` wrote; in a file relative to it",
        commands=("prune", "oracle"), shown=True,
    )  # fmt: skip
    plan: str | None = setting(
        None, "Plan file made before, in place of --stats; in a file relative to it",
        commands=("prune",), shown=True,
    )  # fmt: skip
    calibration_digest: str | None = setting(
        None,
        "Of the tokens that a recorded run has read; a run on others is refused. It goes where "
        "the settings of the text are replaced",
        commands=GATHERS, option=False,
    )  # fmt: skip
    heldout_digest: str | None = setting(
        None, "The same of the held-out text", commands=("prune",), option=False
    )
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if is_number(self.size):
            object.__setattr__(self, "size", str(self.size))
        coerce_all(self)
        if self.method is not None:
            self._check_method(self.method)
        changed = {n for n, default in SETTINGS.items() if getattr(self, n) != default}
        object.__setattr__(self, "given", self.given & SETTINGS.keys() | changed)
        if self.size is not None:
            parse_size(self.size)
        if self.self_share is not None and self.self_share < 0:
            raise ValueError(f"--self-share {self.self_share:g} must be 0 or more")
        if self.max_memory is not None:
            parse_bytes("--max-memory", self.max_memory)
        given = [t for t in TARGETS if getattr(self, t) is not None]
        if len(given) > 1:
            raise ValueError(f"give one target, not {' and '.join(map(flag, given))}")
        if self.plan is not None and self.stats is not None:
            raise ValueError("give --plan or --stats, not both: a plan already holds its decision")

    def _check_method(self, method: str) -> None:
        """The method and what its parts are also called agree."""
        written = parse_method(method)
        parts = {"removal" if n == "method" else n: part for n, part in written.items()}
        for name, part in parts.items():
            other = getattr(self, name)
            if other not in (None, part) and len(parts) > 1:
                raise ValueError(
                    f"--method {quote(method)} and {flag(name)} {quote(other)} contradict one "
                    "another; leave one out"
                )

    @property
    def parts(self) -> dict[str, str | None]:
        """Method, removal, protection, allocate and repair, in whichever way each was given."""
        own = {n: getattr(self, n) for n in ("method", "removal", *SIGNS)}
        return own | ({} if self.method is None else parse_method(self.method))

    def planning(self) -> dict[str, Any]:
        """The settings that decide a plan once the statistics are there."""
        found = {k: v for k, v in self.to_dict().items() if k in PLANNING}
        if self.method is not None:  # its repair does not
            found["method"] = _without(self.method, ["repair"])
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values without the unset ones."""
        plain = {k: v for k, v in asdict(self).items() if v is not None and k in SETTINGS}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    def to_yaml(self, without: Collection[str] = ()) -> str:
        """The recipe as YAML text, without these settings and what a file cannot say."""
        import yaml

        left_out = {*without, *TRUST}
        plain = {key_of(k): v for k, v in self.to_dict().items() if k not in left_out}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with these settings replaced, and what they contradict taken out.

        A target replaces whichever target was there, a plan the statistics, another text the digest
        of the one before; the parts of a method replace those that were there, in either form.

        Raises:
            ValueError: an unknown or impossible setting.
        """
        settings = renamed(settings)
        check_keys(settings, "settings")
        clear: dict[str, Any] = {}
        for names, cleared in REPLACED:
            if any(settings.get(n) is not None for n in names):
                clear |= dict.fromkeys(cleared)
        merged = {**clear, **self._parted(settings), **settings}
        none = {n for n, v in merged.items() if v is None}
        return replace(self, **merged, given=(self.given | merged.keys()) - none)

    def _parted(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What becomes of a method's parts from before where new ones come in the other form."""
        method = settings.get("method")
        if isinstance(method, str):
            parts = parse_method(method)
            older = [n for n in SIGNS if n in parts] + ["removal"] * (len(parts) > 1)
            return dict.fromkeys(older)
        named = [n for n in SIGNS if n in settings]
        return {"method": _without(self.method, named)} if self.method and named else {}


def _without(method: str, names: Collection[str]) -> str:
    """A method without these parts."""
    return join_method({n: part for n, part in parse_method(method).items() if n not in names})


# every setting, with its default
SETTINGS: dict[str, Any] = {n: s.default for n, s in settings_of(Recipe).items()}
# what decides a plan once the statistics are there
PLANNING = tuple(n for n, s in settings_of(Recipe).items() if "plan" in s.about.commands)
# settings -> those that are taken out where one of the former is given
REPLACED = (
    (TARGETS, TARGETS),
    (MADE, MADE),
    (TEXT, ("calibration_digest",)),
    (("heldout", "heldout_samples", "length"), ("heldout_digest",)),
)


def renamed(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """The same under the names that the settings have here."""
    return {name_of(k): v for k, v in settings.items()}


def check_taken(settings: Mapping[str, Any], command: str) -> None:
    """Every setting that is given, other than as it is by default, is one that the command takes.

    Raises:
        ValueError: one is not; says which.
    """
    given, usual = Recipe().with_settings(settings), Recipe()
    known = settings_of(Recipe)
    for name in renamed(settings):
        used = command in known[name].about.commands
        if not used and getattr(given, name) != getattr(usual, name):
            value = quote(getattr(given, name))
            raise ValueError(f"{command} does not use {name}={value}; leave it out")
    repair = given.parts["repair"]
    if repair is not None and command not in known["repair"].about.commands:
        raise ValueError(f"{command} does not use the +{repair} of --method; leave it out")


def check_keys(settings: Mapping[Any, Any], where: str) -> None:
    """Every key is a setting.

    Raises:
        ValueError: one is not; names the nearest.
    """
    check_settings(settings, SETTINGS, f" in {where}")
