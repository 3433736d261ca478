"""Finding a model on disk or on the Hub, knowing it before it is loaded, and loading it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from moe_fair.core.plan import ModelSize
from moe_fair.core.units import UnitGroup
from moe_fair.engines.auto import auto_class
from moe_fair.engines.names import Destination, destinations
from moe_fair.engines.packing import Packing, Scheme, find_packing, scheme_of
from moe_fair.engines.pickles import convert, pickle_files
from moe_fair.engines.processes import current_team
from moe_fair.engines.shards import (
    StoredTensor,
    checkpoint_tensors,
    shard_files,
    unnamed_files,
)
from moe_fair.engines.stock import stock_config
from moe_fair.moe.blocks import HASH_LAYERS, MoeBlock, find_blocks
from moe_fair.moe.device_map import check_map, read_map, without_overlap
from moe_fair.moe.folder_kind import check_folder, local_folder, other_weights
from moe_fair.moe.mtp import Heads, find_heads, is_head
from moe_fair.moe.quantised import check_admitted
from moe_fair.moe.side_files import COPIES, WEIGHTS, needs_code
from moe_fair.moe.tensor_slicing import ExpertTensor, classify, unit_sizes
from moe_fair.moe.trusted_code import named_kernel, not_ours

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADVICE = 400  # characters of what a library says
SAMPLED = 64  # pages of a large shard that enter its digest
PAGE = 65536
PROBE = "The 1st: a text, as it is."  # every tokenizer knows some of it


class Checkpoint:
    """A model's files: everything that can be known without loading the weights.

    Args:
        model: a local directory or a Hub id.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run the tokenizer's code that lies beside the weights, and our modeling
            file though it was changed. A model's own class is never run: the stock class serves.
        allow_pickle: where there are no safetensors, read pickled weights; see `engines.pickles`.
        hash_layers: `cut` where layers that look experts up by token id are cut like others; by
            default they stay whole.

    Attributes:
        home: where its files lie.
        published: its `config.json` as it lies there.
        brings_model: the model's class is our own modeling file, which lies beside the weights.

    Raises:
        ValueError: there is no such model, or its files cannot be used; says why.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        hash_layers: str = "keep",
    ) -> None:
        self.model, self.revision, self.allow_pickle = model, revision, allow_pickle
        self.home = _locate(model, revision)
        try:
            self.published = check_folder(self.home)
        except ValueError as e:
            raise ValueError(f"{model}: {e}") from e
        self.trust_remote_code = trust_remote_code
        if not trust_remote_code and (kernel := named_kernel(self.home)):
            raise ValueError(
                f"{model}: config.json asks for {kernel}, a kernel of the Hub, which is code that "
                "would be fetched and run; take it out, or allow it with --trust-remote-code"
            )
        # the file that our own pruning put there is run without asking; no other model's code is
        self.brings_model = self.published.get("moe_fair") is not None
        why = not_ours(self.home) if self.brings_model and not trust_remote_code else ""
        if why:
            raise ValueError(
                f"{model} brings code that is not moe_fair's alone: {why}; read it, then allow it "
                "with --trust-remote-code"
            )
        self.hash_layers = hash_layers
        self.config = self._config()
        vars(self.config).pop(HASH_LAYERS, None)  # a file does not say it
        if hash_layers == "cut":
            setattr(self.config, HASH_LAYERS, hash_layers)

    def with_hash_layers(self, hash_layers: str) -> Checkpoint:
        """The same model with this choice for layers that look experts up by token id."""
        if hash_layers == self.hash_layers:
            return self
        return Checkpoint(
            self.model, self.revision, self.trust_remote_code, self.allow_pickle, hash_layers
        )

    def _config(self) -> Any:
        try:
            if self.brings_model:
                return AutoConfig.from_pretrained(self.home, trust_remote_code=True)
            return stock_config(self.home)
        except (ValueError, OSError, KeyError, TypeError, StrictDataclassError) as e:
            why = advice(e.__cause__ or e)
            raise ValueError(f"{self.model}: config.json cannot be used: {why}") from e

    @cached_property
    def skeleton(self) -> torch.nn.Module:
        """The model on the meta device: structure without weights."""
        with torch.device("meta"):
            try:
                return auto_class(self.config).from_config(
                    self.config, trust_remote_code=self.brings_model
                )
            except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as e:
                raise ValueError(
                    f"{self.model}: transformers cannot build the model that config.json "
                    f"describes: {type(e).__name__}: {advice(e)}"
                ) from e

    @cached_property
    def blocks(self) -> list[MoeBlock]:
        """The MoE blocks of the skeleton.

        Raises:
            ValueError: a dense model, or an unknown structure; or hash layers shall be cut and
                there are none.
        """
        try:
            found = find_blocks(self.skeleton)
        except ValueError as e:
            raise ValueError(f"{self.model}: {e}") from e
        if self.hash_layers == "cut" and all(b.table is None for b in found):
            raise ValueError(
                f"{self.model}: --hash-layers cut: none of its layers looks experts up by token "
                "id; leave it out"
            )
        return found

    @cached_property
    def path(self) -> Path:
        """Where its files lie with the weights in safetensors: `home`, if they are not pickled.

        Pickled weights are converted into a temporary directory, once for all processes of a
        machine; it goes with this object.

        Raises:
            ValueError: pickles that cannot be read without running them.
        """
        if not self.allow_pickle or not self._pickled():
            return self.home
        team = current_team()
        found = team.broadcast_on_node(convert(self.home) if team.node_rank == 0 else None)
        assert found is not None
        if team.node_rank == 0:
            weakref.finalize(self, shutil.rmtree, found, True)
        return found

    def _pickled(self) -> bool:
        """There are pickles, and no safetensors; downloaded where needed."""
        local = Path(self.model).is_dir()
        for pattern in ("*.safetensors", "*.bin"):
            if not local:
                _locate(self.model, self.revision, pattern)
            if any(self.home.glob(pattern)):
                return pattern == "*.bin" and bool(pickle_files(self.home))
        return False

    @cached_property
    def shards(self) -> list[Path]:
        """The safetensors files that hold the weights, downloaded where needed.

        A file that the index does not name is one of them where all that it holds is of MTP heads.

        Raises:
            ValueError: there are none.
        """
        if not Path(self.model).is_dir() and not self.allow_pickle:
            _locate(self.model, self.revision, "*.safetensors")
        try:
            named = shard_files(self.path)
        except ValueError as e:
            found = other_weights(self.home)
            raise ValueError(f"{self.model}: {found}" if found else str(e)) from e
        depth = getattr(self.config.get_text_config(), "num_hidden_layers", 0)
        more = unnamed_files(self.path, lambda name: is_head(name, depth)) if depth else []
        return [*named, *more]

    @cached_property
    def tensors(self) -> list[StoredTensor]:
        """Every tensor of the checkpoint, as it lies on disk.

        Raises:
            ValueError: see `shards.checkpoint_tensors`.
        """
        return checkpoint_tensors(self.path, self.shards)

    @cached_property
    def size(self) -> ModelSize:
        """Parameters and bytes of the checkpoint, from its headers; scales are no parameters."""
        packing = self.packing
        numel = sum(packing.numel(t) if packing else t.numel for t in self.tensors)
        return ModelSize(numel, sum(t.bytes for t in self.tensors))

    @cached_property
    def scheme(self) -> Scheme | None:
        """How its weights are packed, by the config alone; None where it says nothing of it.

        Raises:
            ValueError: in a way that is not unpacked.
        """
        try:
            return scheme_of(self.published, self.home)
        except ValueError as e:
            raise ValueError(f"{self.model}: {e}") from e

    @cached_property
    def packing(self) -> Packing | None:
        """Its packed weights; None where the config says that none is.

        Raises:
            ValueError: they cannot be unpacked, or are not packed as the config says; or a scale is
                no number.
        """
        if self.scheme is None:
            return None
        try:
            found = find_packing(self.scheme, self.tensors)
            found.check_values()
        except ValueError as e:
            raise ValueError(f"{self.model}: {e}") from e
        return found

    @cached_property
    def parts(self) -> dict[str, ExpertTensor]:
        """Stored name -> what it is, for the tensors that a cut changes.

        Raises:
            ValueError: the checkpoint's layout of experts is unknown, or its weights are packed
                and its config does not say so.
        """
        names = {t.name: self.place(t.name) for t in self.tensors}
        state = self.skeleton.state_dict()
        places = {n: place for n, place in names.items() if place in state}
        apart = {t.name for t in self.heads.tensors}  # packed ones are dropped, and told
        try:
            check_admitted([t for t in self.tensors if t.name not in apart], places, self.packing)
        except ValueError as e:
            raise ValueError(f"{self.model}: {e}") from e
        names |= dict(self.heads.places)
        return classify(self.tensors, names, [*self.blocks, *self.heads.blocks])

    @cached_property
    def find(self) -> Callable[[str], Destination]:
        """Stored name -> place in the model, see `names.destinations`."""
        return destinations(self.skeleton)

    def place(self, stored: str) -> str:
        """Name in the model of a stored tensor, or of the weight whose codes it holds.

        What only goes with a weight keeps its own name, which the model does not know.
        """
        name = self.packing.weight_of(stored) if self.packing else stored
        return stored if name is None else self.find(name).name

    def weight_place(self, stored: str) -> str:
        """Name in the model of the weight that a stored tensor is, or is any part of."""
        return self.find(self.packing.owner_name(stored) if self.packing else stored).name

    @cached_property
    def heads(self) -> Heads:
        """Its heads for multi-token prediction, see `mtp`."""
        inner = self.published.get("text_config")
        text = self.published | inner if isinstance(inner, dict) else self.published
        return find_heads(self.skeleton, self.tensors, self.find, text)

    @cached_property
    def groups(self) -> tuple[UnitGroup, ...]:
        """The routed experts of every MoE layer as unit groups, with their sizes on disk.

        Those of MTP heads come last, and follow the others.

        Raises:
            ValueError: as `parts`.
        """
        numel = self.packing.numel if self.packing else None
        sizes = unit_sizes(self.tensors, self.parts, numel)
        heads = self.heads.blocks
        following = {b.name for b in heads}
        return tuple(
            replace(
                b.unit_group(0), unit_parameters=sizes[b.name][0], unit_bytes=sizes[b.name][1],
                follows=b.name in following,
            )
            for b in [*self.blocks, *heads]
        )  # fmt: skip

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Digests of the model and its tokenizer; a large shard is sampled, not read whole.

        What is measured with hash layers cut also says so.
        """
        digest = hashlib.sha256(_canonical(self.path / "config.json"))
        for shard in self.shards:
            digest.update(_shard_digest(shard))
        tokenizer = hashlib.sha256()
        for file in sorted(self.path.glob("tokenizer*")):
            tokenizer.update(file.name.encode() + file.read_bytes())
        chosen = {} if self.hash_layers == "keep" else {"hash_layers": self.hash_layers}
        return {"model": digest.hexdigest(), "tokenizer": tokenizer.hexdigest(), **chosen}

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            ValueError: it has none that loads and reads text.
        """
        code = needs_code(self.home)
        try:
            found = AutoTokenizer.from_pretrained(
                self.home, config=self.config, trust_remote_code=self.trust_remote_code
            )
            # where its files are missing, transformers makes one without a vocabulary
            reads = found.encode(PROBE, add_special_tokens=False)
        except Exception as e:  # code of its own, and parsers of many kinds, raise what they like
            if code is not None and not self.trust_remote_code:
                raise ValueError(
                    f"{self.model}: its tokenizer is code that lies beside the weights "
                    f"({code}.py); read it, then allow it with --trust-remote-code"
                ) from e
            raise ValueError(f"{self.model}: the tokenizer does not load: {advice(e)}") from e
        if not reads:
            raise ValueError(
                f"{self.model}: the tokenizer knows no token of {PROBE!r}; is its vocabulary "
                f"(tokenizer.json, tokenizer.model, ...) missing in {self.home}?"
            )
        return found

    def load(self, dtype: str = "auto", device: str = "auto", device_map: str | None = None) -> Any:
        """The model with its weights.

        Args:
            dtype: `float32`, `bfloat16`, `float16`, `checkpoint` (as on disk), or `auto`: as on
                disk on an accelerator, float32 on a CPU, whose low-precision kernels are slow.
            device: `cpu`, `cuda`, `cuda:1`, ..., or `auto`.
            device_map: spread the weights instead, see `placement`.
        """
        where = pick_device(device)
        self.shards  # noqa: B018  # a missing file is told before torch allocates anything
        if device_map is not None:
            return self._spread(pick_dtype(dtype, where), device_map)
        return self._from_files(pick_dtype(dtype, where)).to(where)

    def _from_files(self, dtype: torch.dtype | str, **more: Any) -> Any:
        """The model, filled by transformers from the files, or from weights unpacked as it asks."""
        if self.packing is not None:
            return self._unpacked(self.packing, dtype, **more)
        model, info = auto_class(self.config).from_pretrained(
            self.path,
            config=copy.deepcopy(self.config),
            dtype=dtype,
            trust_remote_code=self.brings_model,
            use_safetensors=True,
            output_loading_info=True,
            **more,
        )
        self._check_whole(info)
        return model

    def _unpacked(self, packing: Packing, dtype: torch.dtype | str, **more: Any) -> Any:
        config = plain_config(self.config)
        if isinstance(dtype, str):  # transformers would look for it in tensors that are none yet
            dtype = config.get_text_config().dtype or config.dtype or torch.bfloat16
        with ExitStack() as files:
            state: dict[str, Any] = {}
            for shard in self.shards:
                f = files.enter_context(safe_open(str(shard), framework="pt", device="cpu"))
                state |= {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            kind: Any = type(self.skeleton)
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=packing.unpacked(state),
                dtype=dtype,
                output_loading_info=True,
                **more,
            )
        self._check_whole(info)
        if (self.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.path)
        return model

    def _check_whole(self, info: dict[str, Any]) -> None:
        """Nothing was made up: transformers fills what is missing with random numbers."""
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{self.model}: its files hold no {missing[0]} ({len(missing)} tensors missing), "
                "which would be random numbers; download or copy it again"
            )

    def _spread(self, dtype: torch.dtype | str, device_map: str) -> Any:
        """The model over the devices of a map; what goes to disk lies in a temporary directory."""
        places = read_map(device_map)
        if isinstance(places, dict):
            check_map(device_map, places, self.skeleton)
            places = without_overlap(places, self.skeleton)
        folder = tempfile.mkdtemp(prefix="moe_fair-offload-")
        model = self._from_files(dtype, device_map=places, offload_folder=folder)
        weakref.finalize(model, shutil.rmtree, folder, True)
        return model


def pick_device(device: str) -> torch.device:
    """The device that a name or `auto` stands for.

    Raises:
        ValueError: no such device here, one that has no float64, or one for several processes.
    """
    if device == "auto" and os.environ.get("ACCELERATE_USE_CPU"):
        return torch.device("cpu")  # accelerate launch --cpu
    if device == "auto":
        accelerator = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        if accelerator is None or _no_float64(accelerator) is not None:
            return torch.device("cpu")
        return accelerator
    try:
        found = torch.device(device)
    except RuntimeError as e:
        raise ValueError(f"--device {device}: {first_line(e)}") from e
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here; use --device cpu")
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"--device {device}: torch sees {count} CUDA devices here, the last of them "
            f"cuda:{count - 1}"
        )
    if (reason := _no_float64(found)) is not None:
        raise ValueError(
            f"--device {device}: statistics are summed in float64, which it does not give here "
            f"({reason}); use --device cpu"
        )
    together = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    if found.type != "cpu" and found.index is not None and together > 1:
        raise ValueError(
            f"--device {device} is one device for {together} processes; give --device "
            f"{found.type}, and each takes its own"
        )
    return found


def _no_float64(device: torch.device) -> str | None:
    """What torch says when it is asked for a float64 number there; None where it gives one."""
    if device.type in ("cpu", "cuda"):
        return None
    try:
        torch.ones((), dtype=torch.float64, device=device).sum().item()
    except Exception as e:  # a backend that is not there raises whatever it meets first
        return first_line(e)
    return None


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """The torch data type that a name stands for; see `Checkpoint.load`.

    Raises:
        ValueError: an unknown name.
    """
    if dtype == "checkpoint" or (dtype == "auto" and device.type != "cpu"):
        return "auto"
    if dtype == "auto":
        return torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is none of auto, checkpoint, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def plain_config(config: Any) -> Any:
    """The config of the same model with weights that are not packed."""
    plain = copy.deepcopy(config)
    for part in {id(p): p for p in (plain, plain.get_text_config())}.values():
        for name in ("quantization_config", "compression_config"):
            vars(part).pop(name, None)
    return plain


def advice(e: BaseException) -> str:
    """An exception's text in one line, whole: what a library advises stands behind its first."""
    text = " ".join(str(e).split())
    return text if len(text) <= ADVICE else text[: ADVICE - 2].rstrip() + " …"


def first_line(e: BaseException) -> str:
    """The first line of an exception's text."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def _locate(model: str, revision: str | None, weights: str | None = None) -> Path:
    """The folder of a model; from the Hub with every file beside the weights.

    Args:
        weights: a pattern of root-level weights to bring too; None: none yet.
    """
    if (folder := local_folder(model)) is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # `*` matches `/` here: a copy in a folder, as `original/`, is not fetched with the weights
    left = [*(p for p in WEIGHTS if p != weights), *(f"{c}/*" for c in COPIES)]
    left = [p for p in left if p != "*.index.json"] + ["*/*.safetensors", "*/*.bin"]
    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=left))
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError) as e:
        raise ValueError(
            f"{model}: no such local directory, and the Hub did not give it ({type(e).__name__}); "
            "check the name, the network and `hf auth login`, or give a local model directory"
        ) from e


def _canonical(path: Path) -> bytes:
    return json.dumps(json.loads(path.read_text()), sort_keys=True).encode()


def _shard_digest(path: Path) -> bytes:
    """Header, size and content; of a file over SAMPLED pages, evenly spread pages of it."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as f:
        if size <= SAMPLED * PAGE * 16:
            while chunk := f.read(PAGE * 16):
                digest.update(chunk)
        else:
            for i in range(SAMPLED):
                f.seek((size - PAGE) * i // (SAMPLED - 1))
                digest.update(f.read(PAGE))
    return digest.digest()
