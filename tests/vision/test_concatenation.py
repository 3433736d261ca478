"""Features beside a part that no layer makes: the picture itself, coordinates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moe_fair.vision.proof import find_groups, uneven_plan
from moe_fair.vision.surgery import cut, cuts_of


class Net(nn.Module):
    """`together` makes 8 + 3 channels of 8 features and 3 of the picture."""

    def __init__(self, together: str) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(11)
        self.b, self.head = nn.Conv2d(11, 6, 3), nn.Linear(6, 4)
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        match self.together:
            case "before":
                y = torch.cat([x, y], 1)
            case "behind":
                y = torch.concat((y, x), dim=-3)
            case "around":
                y = torch.cat(tensors=[x[:, :1], y, x[:, 1:].square()], dim=1)
        return self.head(self.b(self.norm(y)).relu().mean((2, 3)))


@pytest.mark.parametrize(("together", "first"), [("before", 3), ("behind", 0), ("around", 1)])
def test_features_are_cut_out_of_what_reads_both(together: str, first: int) -> None:
    torch.manual_seed(0)
    net, x = Net(together).eval(), torch.rand(2, 3, 16, 16)
    graph = find_groups(net, x)
    assert graph.whole == {"head": "sets the model's outputs"}
    features, _ = graph.groups
    for name in ("norm", "b"):
        [member] = [m for m in features.members if m.module == name]
        assert member.index == tuple((first + i,) for i in range(8))
    kept = uneven_plan(graph.groups)
    silent = Net(together).eval()
    silent.load_state_dict(net.state_dict())
    gone = [first + i for i in range(8) if i not in kept["a"]]
    with torch.no_grad():
        silent.b.weight[:, gone] = 0
        silent.head.weight[:, [i for i in range(6) if i not in kept["b"]]] = 0
        cut(net, cuts_of(graph.groups, kept))
        assert net.norm.num_features == 3 + len(kept["a"])
        assert torch.allclose(net(x), silent(x), atol=1e-6)
