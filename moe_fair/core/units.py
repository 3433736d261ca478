"""Units in groups, and what is known about them: the data that every stage hands to the next.

An MoE layer's experts and a layer's channels are both *units* of a *unit group*. Nothing in this
package knows which of the two it is looking at.

Shape legend: D calibration domains, N units of a group, S calibration sequences.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_fair.core.domain_weights import domain_weights
from moe_fair.core.exact_sum import two_sum
from moe_fair.core.made_files import RESULT_FILE as RESULT_FILE
from moe_fair.core.made_files import STATISTICS_FILE as STATISTICS_FILE
from moe_fair.core.made_files import find_statistics
from moe_fair.core.made_files import statistics_file as statistics_file
from moe_fair.core.sketch import Sketch

STATISTICS_FORMAT = "moe_fair.statistics/1"


@dataclass(frozen=True)
class UnitGroup:
    """Units among which some are removed: the routed experts of one MoE layer.

    Attributes:
        name: where the group lives, a module path (`model.layers.3.mlp`).
        layer: index of the decoder layer.
        size: number of units N.
        floor: fewest units that may be kept (at least top_k for experts).
        unit_parameters: parameters that leave the model with one unit.
        unit_bytes: bytes that leave the checkpoint with one unit.
        blocks: the units lie in this many equal consecutive runs, and every run must keep the same
            number (group-limited routing); 1 where there is no such rule.
        multiple: kept counts are multiples of this.
        follows: no budget is allocated to it: it keeps as many units as the other groups on
            average (the head for multi-token prediction, whose loss is another).
    """

    name: str
    layer: int
    size: int
    floor: int = 1
    unit_parameters: int = 0
    unit_bytes: int = 0
    blocks: int = 1
    multiple: int = 1
    follows: bool = False

    def __post_init__(self) -> None:
        numbers = (self.layer, self.size, self.floor, self.blocks, self.multiple)
        if not isinstance(self.name, str) or not all(isinstance(n, Integral) for n in numbers):
            raise ValueError(f"{self.name!r}: layer, size and floor must be whole numbers")
        if self.size < 1 or not 0 <= self.floor <= self.size:
            raise ValueError(f"{self.name}: floor {self.floor} outside 0..{self.size} units")
        if self.blocks < 1 or self.size % self.blocks:
            raise ValueError(f"{self.name}: {self.size} units in {self.blocks} equal blocks")
        if self.multiple < 1:
            raise ValueError(f"{self.name}: kept counts cannot be multiples of {self.multiple}")


@dataclass(frozen=True)
class GroupView:
    """What a criterion sees of one group: sums over the calibration domains.

    `view["name"]` is the sum over the domains, [N, ...]; `by_domain["name"]` is [D, N, ...], not
    weighted, and `domain_weights` is [D]; `rows` is [S, N], one row of Taylor values per
    calibration sequence; `row_weights` is [S]; `total_tokens` and `total_sequences` count the
    calibration set, weighted like the sums. `domain_tokens` is [D], 0 for a domain without weight;
    `sketch` holds each unit's outputs per domain.
    """

    group: UnitGroup
    sums: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    rows: Tensor
    row_weights: Tensor
    total_tokens: float
    total_sequences: float
    by_domain: Mapping[str, Tensor]
    domain_weights: Tensor
    domain_tokens: Tensor
    sketch: Sketch | None = None

    def scaled_rows(self) -> np.ndarray:
        """[S, N] rows times the square root of their weight's share: sums of products are means."""
        share = self.row_weights / self.row_weights.sum()
        return (self.rows * share.sqrt().unsqueeze(1)).numpy()

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[name] if name in self.sums else self.constants[name]

    def __contains__(self, name: str) -> bool:
        return (
            name in self.sums
            or name in self.constants
            or (name == "rows" and len(self.rows) > 0)
            or (name == "sketch" and self.sketch is not None)
        )


@dataclass
class Statistics:
    """Float64 sums per (domain, unit) of every group, and one Taylor row per sequence.

    Sums of two shards of the data add up to the sums of their union, so processes, devices and
    resumed runs are all `merge`.

    Attributes:
        groups: the unit groups, in model order.
        domains: names of the calibration domains; the first axis of every sum.
        sums: group name -> statistic -> [D, N, ...] float64.
        constants: group name -> statistic -> [N, ...]: facts about the weights, the same in every
            shard of the data.
        rows: group name -> [S, N] float64, Taylor values summed over each sequence's tokens.
        sequence_ids, sequence_domains: [S] int64, which sequence each row is and its domain.
        tokens, sequences: [D] float64, size of the calibration set per domain.
        fingerprint: digests of what the numbers were measured on (model, tokenizer, calibration).
        metadata: whatever explains the run: model id, data type, sizes of the model.
        compensation: what rounding has taken from the sums so far, in their shapes; nothing once
            `rounded`. With it a sum does not depend on the order in which shards were merged.
        sketches: group name -> distributions of each unit's output per domain, where collected.
        digest: of the file that they were read from, whose numbers it fits; empty where the file
            is of an earlier version and has none, or where they were not read.
    """

    groups: tuple[UnitGroup, ...]
    domains: tuple[str, ...]
    sums: dict[str, dict[str, Tensor]]
    constants: dict[str, dict[str, Tensor]]
    rows: dict[str, Tensor]
    sequence_ids: Tensor
    sequence_domains: Tensor
    tokens: Tensor
    sequences: Tensor
    fingerprint: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    compensation: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    sketches: dict[str, Sketch] = field(default_factory=dict)
    digest: str = ""

    def without_following(self) -> Statistics:
        """The same of the groups that are allocated a budget."""
        return replace(self, groups=tuple(g for g in self.groups if not g.follows))

    def view(self, group: UnitGroup, weights: Mapping[str, float] | None = None) -> GroupView:
        """One group's sums over the domains, each domain times its weight (default 1)."""
        w = torch.tensor(domain_weights(self.domains, weights), dtype=torch.float64)
        stored = self.sums.get(group.name, {})  # of scores without data there are none
        sums = {k: torch.tensordot(w, v, dims=1) for k, v in stored.items()}
        return GroupView(
            group=group,
            sums=sums,
            constants=self.constants.get(group.name, {}),
            rows=self.rows.get(group.name, torch.zeros(0, group.size, dtype=torch.float64)),
            row_weights=w[self.sequence_domains],
            total_tokens=float(w @ self.tokens),
            total_sequences=float(w @ self.sequences),
            by_domain=stored,
            domain_weights=w,
            domain_tokens=self.tokens * (w > 0),
            sketch=self.sketches.get(group.name),
        )

    def holds(self, name: str) -> bool:
        """Every group that is allocated a budget has the statistic of this name."""
        return all(
            name in self.sums.get(g.name, {})
            or name in self.constants.get(g.name, {})
            or (name == "rows" and len(self.rows.get(g.name, ())) > 0)
            or (name == "sketch" and g.name in self.sketches)
            for g in self.groups
            if not g.follows
        )

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both shards of the data together.

        Raises:
            ValueError: the two were measured on different models, domains or statistics, or share
                a sequence.
        """
        for what in ("groups", "domains", "fingerprint"):
            if getattr(self, what) != getattr(other, what):
                raise ValueError(f"statistics differ in their {what} and cannot be merged")
        ids = torch.cat([self.sequence_ids, other.sequence_ids])
        if len(torch.unique(ids)) != len(ids):
            raise ValueError("the statistics to merge share calibration sequences")
        order = torch.argsort(ids)
        sums: dict[str, dict[str, Tensor]] = {g: {} for g in self.sums}
        lost: dict[str, dict[str, Tensor]] = {g: {} for g in self.sums}
        for g, mine in self.sums.items():
            for k, v in mine.items():
                sums[g][k], lost[g][k] = two_sum(v, other.sums[g][k])
                for part in (self, other):
                    if g in part.compensation:
                        lost[g][k] += part.compensation[g][k]
        return Statistics(
            groups=self.groups,
            domains=self.domains,
            sums=sums,
            constants=self.constants,
            rows={g: torch.cat([r, other.rows[g]])[order] for g, r in self.rows.items()},
            sequence_ids=ids[order],
            sequence_domains=torch.cat([self.sequence_domains, other.sequence_domains])[order],
            tokens=self.tokens + other.tokens,
            sequences=self.sequences + other.sequences,
            fingerprint=self.fingerprint,
            metadata=self.metadata,
            compensation=lost,
            sketches={g: s.merge(other.sketches[g]) for g, s in self.sketches.items()},
        )

    def rounded(self) -> Statistics:
        """The same with what was lost added back: the sums rounded once."""
        sums = {
            g: {
                k: v + self.compensation[g][k] if g in self.compensation else v
                for k, v in kinds.items()
            }
            for g, kinds in self.sums.items()
        }
        return replace(self, sums=sums, compensation={})

    def save(self, folder: Path, name: str = STATISTICS_FILE) -> Path:
        """Write them into `folder`; the same statistics give the same bytes."""
        header, tensors = self.rounded().pack()
        header["digest"] = digest_of(header, tensors)
        folder.mkdir(parents=True, exist_ok=True)
        path, partial = folder / name, folder / (name + ".partial")
        # one metadata key: the writer does not keep the order of several
        save_file(tensors, partial, {"moe_fair": json.dumps(header, sort_keys=True)})
        partial.chmod(0o666 & ~_umask())  # the writer leaves it readable by its owner alone
        partial.replace(path)
        return path

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What is JSON, and the tensors by name; `unpack` is the way back."""
        header = {
            "format": STATISTICS_FORMAT,
            "groups": [asdict(g) for g in self.groups],
            "domains": list(self.domains),
            "fingerprint": self.fingerprint,
            "facts": self.metadata,
        }
        return header, dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "sequence_ids", self.sequence_ids
        yield "sequence_domains", self.sequence_domains
        yield "tokens", self.tokens
        yield "sequences", self.sequences
        kinds = {"sums": self.sums, "constants": self.constants, "lost": self.compensation}
        for kind, store in kinds.items():
            for group, tensors in store.items():
                for name, t in tensors.items():
                    yield f"{kind}/{group}/{name}", t.contiguous()
        for group, t in self.rows.items():
            yield f"rows/{group}", t.contiguous()
        for group, sketch in self.sketches.items():
            for name, t in sketch.pack().items():
                yield f"sketches/{group}/{name}", t

    @staticmethod
    def load(path: Path) -> Statistics:
        """Read a statistics file, or the folder that holds one.

        Raises:
            ValueError: there is no such file, it is not a statistics file of this version, or its
                numbers are not those that were written.
        """
        file = find_statistics(path)
        header, tensors = _read(file)
        if header.get("format") != STATISTICS_FORMAT:
            raise ValueError(
                f"{file} is not a moe_fair statistics file of this version "
                f"(format {header.get('format')!r}, expected {STATISTICS_FORMAT!r}); redo it"
            )
        digest = header.pop("digest", "")
        if digest != "" and digest != digest_of(header, tensors):
            raise ValueError(
                f"{file} holds not the bytes that were measured (their sha256 is another): it was "
                "damaged or changed; redo it"
            )
        try:
            found = replace(Statistics.unpack(header, tensors), digest=digest)
            found.check()
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as e:
            raise ValueError(f"{file} cannot be read as a statistics file: {e}; redo it") from e
        return found

    def check(self) -> None:
        """The header's groups and domains are those of the tensors.

        Raises:
            ValueError: they are not; says which.
        """
        if not self.groups or not all(isinstance(d, str) for d in self.domains):
            raise ValueError("no groups, or domains without a name")
        if not isinstance(self.fingerprint, dict) or not isinstance(self.metadata, dict):
            raise ValueError("its fingerprint or facts are not a table")
        d, s = len(self.domains), len(self.sequence_ids)
        if self.tokens.shape != (d,) or self.sequences.shape != (d,):
            raise ValueError(f"counts that are not those of {d} domains")
        for g in self.groups:
            if not any(g.name in s for s in (self.sums, self.constants, self.rows, self.sketches)):
                raise ValueError(f"{g.name}: neither sums nor constants, rows or a sketch")
            for name, t in self.sums.get(g.name, {}).items():
                if t.shape[:2] != (d, g.size) or t.dtype != torch.float64:
                    raise ValueError(f"{g.name}: {name} {t.dtype} {list(t.shape)}, {g.size} units")
            for name, t in self.constants.get(g.name, {}).items():
                # measured curves have a value a depth
                if t.shape[:1] != (g.size,) and not name.startswith("curve_"):
                    raise ValueError(f"{g.name}: {name} {list(t.shape)} for {g.size} units")
            if g.name in self.rows and self.rows[g.name].shape != (s, g.size):
                raise ValueError(f"{g.name}: {len(self.rows[g.name])} rows of {s} sequences")

    @staticmethod
    def unpack(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Statistics:
        """From what `pack` gives."""
        stores: dict[str, dict[str, dict[str, Tensor]]] = {"sums": {}, "constants": {}, "lost": {}}
        rows: dict[str, Tensor] = {}
        packed: dict[str, dict[str, Tensor]] = {}
        for key, t in tensors.items():
            kind, _, rest = key.partition("/")
            group, _, name = rest.rpartition("/")
            if kind in stores:
                stores[kind].setdefault(group, {})[name] = t
            elif kind == "rows":
                rows[rest] = t
            elif kind == "sketches":
                packed.setdefault(group, {})[name] = t
        return Statistics(
            groups=tuple(UnitGroup(**g) for g in header["groups"]),
            domains=tuple(header["domains"]),
            rows=rows,
            sequence_ids=tensors["sequence_ids"],
            sequence_domains=tensors["sequence_domains"],
            tokens=tensors["tokens"],
            sequences=tensors["sequences"],
            fingerprint=header["fingerprint"],
            metadata=header["facts"],
            sums=stores["sums"],
            constants=stores["constants"],
            compensation=stores["lost"],
            sketches={g: Sketch.unpack(t) for g, t in packed.items()},
        )


def digest_of(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 of a header and of every tensor's name, type, shape and bytes.

    Tensors are hashed side by side: files of large models are gigabytes, most of it in a few.
    """
    plain = json.loads(json.dumps(header))  # as it is read again: keys are texts
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    named = sorted(tensors.items())
    try:
        with ThreadPoolExecutor() as pool:  # hashlib lets others run
            parts = list(pool.map(_tensor_digest, named))
    except RuntimeError:  # no thread can be started where memory is short, and none is needed
        parts = list(map(_tensor_digest, named))
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _tensor_digest(named: tuple[str, Tensor]) -> bytes:
    name, t = named
    digest = hashlib.sha256(f"{name} {t.dtype} {list(t.shape)}\0".encode())
    digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(file), framework="pt") as f:
            header = json.loads((f.metadata() or {}).get("moe_fair", "{}"))
            if not isinstance(header, dict):
                raise ValueError("its header is no table")
            return header, {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, ValueError, RecursionError) as e:
        raise ValueError(f"{file} cannot be read as a statistics file: {e}") from e


@dataclass(frozen=True)
class Scores:
    """One number per unit, and the criterion that gave it. `values`: group name -> [N] float64."""

    criterion: str
    values: dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """Units kept per group, and how an allocator came to it.

    Attributes:
        kept: group name -> number of units kept.
        allocator: its name.
        explanation: numbers that explain the budget (the tolerance reached, what a fill added).
        orders: group name -> [N] unit ids in the order in which they leave, from an allocator that
            chooses units itself; without one they leave by rising removal score.
    """

    kept: dict[str, int]
    allocator: str
    explanation: dict[str, Any] = field(default_factory=dict)
    orders: Mapping[str, np.ndarray] = field(default_factory=dict)
