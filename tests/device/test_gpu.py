"""Every stage on a CUDA device that is there: `python -m pytest -m gpu`.

test_pretend_device.py runs the same stages on a pretend one, which torch must not see beside a real
one: in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moe_fair.engines.oom import release

sys.path.insert(0, str(Path(__file__).parent))
import stages

pytestmark = pytest.mark.gpu
# of the largest number of a kind: sums, whose parts are float32; losses; and weights, in which a
# training makes more of what rounding began
SUMS, LOSSES, WEIGHTS = 1e-4, 1e-3, 5e-2


@pytest.mark.parametrize("name", stages.STAGES)
def test_a_stage_gives_what_it_gives_on_the_cpu(name: str, model: Path, tmp_path: Path) -> None:
    if name == "two devices" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    held = _held()
    # a device draws text by a generator of its own: another sample, the same every time
    against = "cuda" if name == "own text" else "cpu"
    [(_, expected)] = stages.run(model, tmp_path / "first", against, [name])
    [(_, found)] = stages.run(model, tmp_path / "cuda", "cuda", [name])
    assert _held() == held  # nothing stays
    assert found["numbers"].keys() == expected["numbers"].keys()
    for what, values in expected["numbers"].items():
        a, b = torch.tensor(values).double(), torch.tensor(found["numbers"][what]).double()
        if what.startswith("kept "):
            assert torch.equal(a, b), what
            continue
        loss = what.startswith(("heldout", "trial"))
        most = LOSSES if loss else WEIGHTS if what.endswith("weight") else SUMS
        largest = float(a.abs().max()) if len(a) else 0.0
        assert float((b - a).abs().max()) <= most * largest + 1e-9, what


def _held() -> int:
    """Bytes in use on the device, but for what cuBLAS keeps to work in once it has been asked."""
    torch._C._cuda_clearCublasWorkspaces()
    release()
    return torch.cuda.memory_allocated()
