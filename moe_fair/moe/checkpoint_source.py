"""A model's files, and everything that can be known of it before its weights are loaded."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer

from moe_fair.core.plan import ModelSize
from moe_fair.core.quote import advice
from moe_fair.core.units import UnitGroup
from moe_fair.engines.auto import auto_class
from moe_fair.engines.device import pick_device, pick_dtype
from moe_fair.engines.empty_weights import uninitialised
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
from moe_fair.moe.checkpoint_files import locate, model_digest, tokenizer_digest
from moe_fair.moe.folder_kind import check_folder, other_weights
from moe_fair.moe.loading import load_model, spread_model
from moe_fair.moe.mtp import Heads, find_heads, is_head
from moe_fair.moe.quantised import check_admitted
from moe_fair.moe.side_files import needs_code
from moe_fair.moe.tensor_slicing import ExpertTensor, classify, unit_sizes
from moe_fair.moe.trusted_code import named_kernel, not_ours

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
        self.home = locate(model, revision)
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
        with torch.device("meta"), uninitialised():
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
                locate(self.model, self.revision, pattern)
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
            locate(self.model, self.revision, "*.safetensors")
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
        chosen = {} if self.hash_layers == "keep" else {"hash_layers": self.hash_layers}
        model = model_digest(self.path / "config.json", self.shards)
        return {"model": model, "tokenizer": tokenizer_digest(self.path), **chosen}

    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded once.

        Raises:
            ValueError: it has none that loads and reads text.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
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
            return spread_model(self, pick_dtype(dtype, where), device_map)
        return load_model(self, pick_dtype(dtype, where)).to(where)
