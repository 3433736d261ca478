"""Numbers of FP8 codes: torch's own, code for code."""

from __future__ import annotations

import pytest
import torch

from moe_fair.engines.packing.fp8 import numbers


@pytest.mark.parametrize("bad", [False, True])
def test_every_code_is_the_number_that_torch_makes_of_it(bad: bool) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    codes = bits[(bits & 127 != 127) | bad].view(torch.float8_e4m3fn)
    found, wanted = numbers(codes), codes.float()
    assert found.isnan().sum() == wanted.isnan().sum() == 2 * bad
    real = ~wanted.isnan()
    assert torch.equal(found[real].view(torch.int32), wanted[real].view(torch.int32))
    assert numbers(codes[:0]).shape == (0,)
