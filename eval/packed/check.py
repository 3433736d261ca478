"""Whether a checkpoint that a packer wrote is read as that packer unpacks it, and cut packed.

    python eval/packed/check.py FOLDER...

FOLDER: what `make_tiny.py` wrote. In moe_fair's environment. One line each: weights bitwise those
of the packer's own unpacking, statistics streamed, in memory and of the unpacked
model bitwise equal in float32, the cut loaded again bitwise the cut of the unpacked model, and a
repaired result verified against the original.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from moe_fair.engines.batch import Batch
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.engine_choice import start, start_layerwise
from moe_fair.moe.repacking import Repacking
from moe_fair.moe.repair import Repairer
from moe_fair.moe.statistics import collecting, names_of
from moe_fair.moe.surgery import cut


def main() -> None:
    """A line for each folder."""
    for name in sys.argv[1:]:
        print(name, check(Path(name)))


def check(folder: Path) -> str:
    """What was seen, or an AssertionError."""
    source = Checkpoint(str(folder / "packed"))
    assert source.packing is not None
    said = [f"{source.packing.scheme.name}: {len(source.packing.weights)} packed weights"]
    model = source.load("float32", "cpu").eval()
    wanted = measured(source, "resident")
    plain = Checkpoint(str(folder / "plain"))
    theirs = plain.load("float32", "cpu").state_dict()
    most = max(float((t - theirs[n]).abs().max()) for n, t in model.state_dict().items())
    if most == 0:
        same(wanted, measured(plain, "resident"))
        said.append("weights and statistics are bitwise those of the packer's unpacking")
    else:
        said.append(f"weights are at most {most:.1e} from those of the packer's unpacking")
    same(wanted, measured(source, "streaming"))
    said.append("streamed = resident")
    kept = {b.name: list(range(0, b.num_experts, 2)) for b in source.blocks}
    with tempfile.TemporaryDirectory() as work:
        out = Path(work)
        write_model(source, kept, out / "cut")
        cut(model, kept)
        found = Checkpoint(str(out / "cut")).load("float32", "cpu").state_dict()
        assert all(torch.equal(t, found[k]) for k, t in model.state_dict().items())
        said.append("cut = cut of the unpacked")
        (out / "layers").mkdir()
        engine = start_layerwise(source, "streaming", "float32", "cpu", all_of)
        done = Repairer(
            engine, kept, "refit", folder=out / "layers", repacking=Repacking(source, kept)
        ).run(batches())
        write_model(source, kept, out / "repaired", repaired=out / "layers")
        Checkpoint(str(out / "repaired")).load("float32", "cpu")
        said.append(f"{sum(d.repair != 'none' for d in done)} of {len(done)} layers repaired")
    return "; ".join(said)


def batches() -> list[Batch]:
    """Random tokens, with padding."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 100, (10, 24), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return [Batch(ids, mask, torch.arange(10), 0)]


def all_of(_: str, __: int | None, batches: Any) -> Any:
    """A pass without a bar."""
    return iter(batches)


def measured(source: Checkpoint, engine: str) -> Any:
    """Every statistic of every layer."""
    found, model = start(source, engine, "float32", "cpu", all_of)
    names = names_of("routing", "output_norms", "output_vectors", "weights", "taylor")
    families = collecting(names, backward=True)
    collector = ExpertCollector(find_blocks(model), source.groups, ("a",), families)
    with collector:
        found.run(batches(), collector)
    return collector.statistics()


def same(a: Any, b: Any) -> None:
    """Bit for bit."""
    for g in a.groups:
        assert torch.equal(a.rows[g.name], b.rows[g.name]), g.name
        for key, value in a.sums[g.name].items():
            assert torch.equal(value, b.sums[g.name][key]), (g.name, key)


if __name__ == "__main__":
    main()
