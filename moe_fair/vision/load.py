"""Image classifiers by name: a Hub id or folder, `module:function`, or a pruned checkpoint."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from moe_fair.engines.pickles import read
from moe_fair.vision.graph import CHOSEN
from moe_fair.vision.pictures import converted
from moe_fair.vision.preprocessing import Preprocessing, Transform
from moe_fair.vision.trace import detach_computed

# modules whose model functions a checkpoint may name: these are then called unasked
TRUSTED = ("moe_fair.vision.zoo", "torchvision.models", "timm")
WRAPPED = "module."  # before every name of a model in DataParallel
SIZE = 32  # of images, where nothing says it
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PICKLED = (
    "is a pickle, which can run code when read; weights are read from safetensors only: "
    "--allow-pickle reads its tensors and runs nothing"
)
# what these modules call weights to download or unpickle; a checkpoint brings its own
WEIGHT_KEYWORDS = ("weights", "weights_backbone", "pretrained", "pretrained_cfg", "checkpoint_path")


@dataclass(frozen=True)
class Source:
    """A model and what its files say about images.

    Attributes:
        model: the module, in eval mode.
        base: how to build the model before any cut; goes into a pruned checkpoint as JSON.
        transform: PIL image -> tensor.
        preprocessing: the transform's numbers where it is our own, else None.
        transforms: parts of the user's function that gave the transform, if one did.
        processor: the transformers image processor, if there is one.
        labels: names of the classes where the model knows them.
        history: cuts that have been made already.
    """

    model: nn.Module
    base: dict[str, Any]
    transform: Transform
    preprocessing: Preprocessing | None
    processor: Any
    labels: tuple[str, ...] | None
    history: tuple[list, ...] = ()
    transforms: dict[str, Any] | None = None


def parse_function(spec: str) -> dict[str, Any] | None:
    """`module:function` or `module:function(1, key=2)` as its parts, or None.

    Raises:
        ValueError: arguments that are no plain values.
    """
    found = re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)(\(.*\))?", spec)
    if not found:
        return None
    module, name, arguments = found.groups()
    try:
        call = ast.parse(f"f{arguments or '()'}", mode="eval").body
        assert isinstance(call, ast.Call)
        positional = [ast.literal_eval(a) for a in call.args]
        keywords = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"{spec}: arguments must be plain values, as f(10, width=16)") from None
    return {"module": module, "function": name, "arguments": positional, "keywords": keywords}


def is_known(base: Mapping[str, Any]) -> bool:
    """The code that builds it may run unasked."""
    return base["kind"] == "transformers" or base["module"] in TRUSTED


def build(base: Mapping[str, Any], *, trusted: bool, folder: Path | None = None) -> nn.Module:
    """A fresh model of a base architecture.

    Args:
        trusted: call any function as it is given. Otherwise those of `TRUSTED` modules only, and
            without the keywords by which they would fetch weights.
        folder: holds `config.json` of a transformers model.

    Raises:
        ValueError: no such function, or one that must not be called unasked.
    """
    if base["kind"] == "transformers":
        import transformers
        from transformers.initialization import no_init_weights

        # not left open: transformers would ask on the terminal whether to run its code
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        cls = getattr(transformers, base["class"], None)
        if cls is None or not issubclass(cls, transformers.PreTrainedModel):
            raise ValueError(f"transformers has no model class {base['class']!r}")
        with no_init_weights():  # they come from the folder
            return cls(config)
    module = str(base["module"])
    keywords = dict(base["keywords"])
    if module in TRUSTED:
        if not trusted:
            keywords = {k: v for k, v in keywords.items() if k not in WEIGHT_KEYWORDS}
    elif not trusted:
        raise ValueError(
            f"the checkpoint wants to run {module}:{base['function']}; if you know that code, "
            "load it with trust_remote_code=True"
        )
    try:
        function = getattr(importlib.import_module(module), str(base["function"]))
    except (ImportError, AttributeError) as e:
        raise ValueError(f"no model {module}:{base['function']}: {e}") from e
    if not trusted:
        _check_positions(function, base["arguments"], f"{module}:{base['function']}")
    try:
        model = function(*base["arguments"], **keywords)
    except TypeError as e:
        raise ValueError(f"{module}:{base['function']}: {e}") from e
    if not isinstance(model, nn.Module):
        raise ValueError(f"{module}:{base['function']} gives no torch.nn.Module")
    model = _plain(model, f"{module}:{base['function']}")
    if base.get("logits") is not None:
        setattr(model, CHOSEN, str(base["logits"]))
    return model


def _plain(model: nn.Module, name: str) -> nn.Module:
    """The module whose layers can be changed.

    Raises:
        ValueError: there is none.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile was given
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{name} gives a scripted model, whose layers cannot be changed; give the function "
            "that makes the module before torch.jit sees it"
        )
    for n, t in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(t):
            raise ValueError(
                f"{name}: {n} has no size before the first images are seen (a lazy layer), so the "
                "model could not be built from its files; give its layers their sizes"
            )
    try:
        model.eval()
    except NotImplementedError as e:
        raise ValueError(
            f"{name} gives an exported program, whose layers cannot be changed; give the function "
            "that makes the module before torch.export sees it"
        ) from e
    detach_computed(model)
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        model.float()  # as Hub models are: images, scores and what is trained are of this precision
    return model


def _check_positions(function: Any, arguments: Sequence[Any], name: str) -> None:
    """No argument names weights by its place: those that name them by keyword are left out.

    Raises:
        ValueError: one does.
    """
    try:
        places = list(inspect.signature(function).parameters)[: len(arguments)]
    except (TypeError, ValueError):
        places = []  # of what has no signature nothing is a model function
    if named := set(places) & set(WEIGHT_KEYWORDS):
        raise ValueError(
            f"{name}: the checkpoint asks for other weights than its own ({min(named)}); if you "
            "know it, load it with trust_remote_code=True"
        )


def load_weights(model: nn.Module, file: Path, *, allow_pickle: bool = False) -> None:
    """Fill a model from a safetensors file, every tensor of it.

    Args:
        allow_pickle: from a pickled state dict (.bin, .pt, .pth) otherwise.

    Raises:
        ValueError: no such file, a pickle that was not allowed, or other names or shapes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise ValueError(f"no weights at {file}")
    pickled = file.suffix in PICKLES
    if pickled and not allow_pickle:
        raise ValueError(f"{file} {PICKLED}")
    try:
        tensors = read(file) if pickled else load_file(file)
        whole = model.state_dict()
        if not any(n.startswith(WRAPPED) for n in whole):
            tensors = {n.removeprefix(WRAPPED): t for n, t in tensors.items()}
        # a name of a tensor that the file has under another: filled together with that one
        again = {n: tensors[first] for n, first in aliases(whole).items() if first in tensors}
        filled = OrderedDict({**again, **tensors})
        # versions of modules' layouts, which a file does not hold: those of the code at hand; but
        # of a file that lacks a tensor none, so that modules bring an older layout up to theirs
        if filled.keys() >= whole.keys():
            filled._metadata = whole._metadata  # type: ignore[attr-defined]
        model.load_state_dict(filled)
    except (RuntimeError, SafetensorError) as e:
        raise ValueError(f"{file} does not fit the model: {' '.join(str(e).split())[:300]}") from e


def aliases(state: Mapping[str, Any]) -> dict[str, str]:
    """Name -> the first name of the same tensor, of modules and parameters that have several."""
    first: dict[Any, str] = {}
    found = {}
    for name, t in state.items():
        key = (t.data_ptr(), t.shape, t.stride()) if isinstance(t, Tensor) and t.numel() else name
        if key in first:
            found[name] = first[key]
        else:
            first[key] = name
    return found


def once(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a state under its first name.

    Raises:
        ValueError: something in it is no tensor, or has no values yet.
    """
    others = aliases(state)
    for name, t in state.items():
        if not isinstance(t, Tensor):
            raise ValueError(f"{name} is no tensor")
    return {n: t for n, t in state.items() if n not in others}


def first_channels(model: nn.Module, size: int) -> int:
    """Channels of the images that a model takes, by its first layer; 3 where that does not say.

    Args:
        size: of the images, which a linear layer may see whole.
    """
    for m in model.modules():
        if isinstance(m, nn.Conv2d):  # of more channels it sees what was made of an image
            return m.in_channels if m.in_channels in (1, 3) else 3
        if isinstance(m, nn.Linear):
            return 1 if m.in_features == size * size else 3
    return 3


def example(source: Source, count: int = 2) -> Tensor:
    """[count, C, H, W] noise in the shape of the model's images."""
    from PIL import Image

    shape = source.transform(Image.new("RGB", (64, 64))).shape
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=generator)


def own_preprocessing(channels: int, own: Mapping[str, Any]) -> Preprocessing:
    given = {k: v for k, v in own.items() if v is not None}
    return Preprocessing(**{"channels": channels, "size": SIZE, **given})


def open_transformers(
    spec: str,
    own: Mapping[str, Any],
    revision: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> Source:
    import transformers

    try:
        model, info = transformers.AutoModelForImageClassification.from_pretrained(
            spec,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            # of pickles transformers reads the tensors alone, too (weights_only)
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
        )
    except (OSError, ValueError, UnpicklingError) as e:
        if pickles := sorted(Path(spec).glob("*.bin")):
            if not allow_pickle:
                raise ValueError(f"{pickles[0]} {PICKLED}") from e
            read(pickles[0])  # says what it asks for
        raise ValueError(
            f"{spec}: no image classifier there ({' '.join(str(e).split())[:200]}); give a Hub id, "
            "a folder, a pruned checkpoint or module:function"
        ) from e
    # some conversions left out the counter of batch normalisation, which only training reads
    missing = sorted(n for n in info["missing_keys"] if not n.endswith("num_batches_tracked"))
    if missing:
        raise ValueError(
            f"{spec}: its files hold no {missing[0]} ({len(missing)} tensors missing), which would "
            "be random numbers; give an image classifier with its head"
        )
    config = model.config
    base = {"kind": "transformers", "class": type(model).__name__}
    named = config.id2label or {}  # some types have none before their classes are named
    labels = tuple(named[i] for i in sorted(named)) or None
    given = any(v is not None for v in own.values())
    processor = None if given else find_processor(spec, revision, trust_remote_code)
    if processor is not None:
        return Source(model.eval(), base, processed(processor), None, processor, labels)
    size = own["size"] or getattr(config, "image_size", None) or 224
    preprocessing = own_preprocessing(first_channels(model, size), {**own, "size": size})
    return Source(model.eval(), base, preprocessing, preprocessing, None, labels)


def find_processor(where: str, revision: str | None = None, trusted: bool = False) -> Any:
    """The image processor beside a model, or None; one that is code of its own only if trusted."""
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(
            where, revision=revision, trust_remote_code=trusted
        )
    except (OSError, ValueError):
        return None


def processed(processor: Any) -> Transform:
    """An image processor as a transform of one image."""

    def transform(image: Any) -> Tensor:
        return processor(images=converted(image, "RGB"), return_tensors="pt")["pixel_values"][0]

    return transform
