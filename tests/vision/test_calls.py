"""Scores of units whose reader runs more than once, or sees its images in an order of its own.

Compared with what is computed for one image at a time by other means: the gate's derivative is
Σ w·∂L/∂w over the columns that read the unit, and a U-Score that of scipy's distance, summed over
the calls.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from moe_fair.core.distances import directions
from moe_fair.vision.collect import collect
from moe_fair.vision.graph import logits
from moe_fair.vision.image_axis import ImageAxis, image_axes
from moe_fair.vision.proof import find_groups
from moe_fair.vision.unit_outputs import MeasureConfig

IMAGES, SIDE, D = 6, 12, 3
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Net(nn.Module):
    """`a` makes 5 units that `b` reads; what comes between is the subclasses' matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3), nn.Linear(4, 3)

    def branch(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()).mean((2, 3)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.branch(x))


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.branch(x) - self.branch(2 * x.flip(-1)))


class Stacked(Net):
    """[k S, ...]"""

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.branch(torch.cat([x, 2 * x.flip(-1)])).chunk(2)
        return self.head(one - two)


class Windows(Net):
    """[S k, ...]"""

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.stack(x.chunk(2, -1), 1)
        found = self.branch(parts.flatten(0, 1)).unflatten(0, (len(x), 2))
        return self.head(found[:, 0] - found[:, 1])


class Sequence(Net):
    """[T, S, C], of which T is the number of images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 5), nn.Linear(5, 4)  # type: ignore[assignment]
        self.stem = nn.Conv2d(3, 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = self.stem(x).flatten(2)[..., :IMAGES].permute(2, 0, 1)
        return self.head(self.b(self.a(places).tanh()).tanh().mean(0))


class Keywords(Net):
    def branch(self, x: Tensor) -> Tensor:
        return self.b(input=self.a(input=x).tanh()).mean((2, 3)).tanh()


class Checkpointed(Net):
    reentrant = False

    def branch(self, x: Tensor) -> Tensor:
        run: Any = torch.utils.checkpoint.checkpoint
        return run(super().branch, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


NETS = [Net, Twice, Stacked, Windows, Sequence, Keywords, Checkpointed, Reentrant]


@pytest.fixture(scope="module", params=NETS, ids=lambda n: n.__name__)
def measured(request: pytest.FixtureRequest) -> tuple[Any, Tensor, Tensor, Any]:
    net = request.param().eval()
    x = torch.rand(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    graph = find_groups(net, x[:2])
    assert "a" in [g.name for g in graph.groups]
    found = collect(
        net, graph, x, y, needs=("u_score", "rows", "feature_rank"),
        watch=MeasureConfig(batch_size=IMAGES, directions=D),
    )  # fmt: skip
    return net, x, y, found


def test_gates_of_each_image(measured: tuple[Any, Tensor, Tensor, Any]) -> None:
    net, x, y, found = measured
    for i in range(len(x)):
        net.zero_grad()
        images = x[i : i + 1].clone().requires_grad_()  # which a reentrant checkpoint needs
        nn.functional.cross_entropy(logits(net, images), y[i : i + 1]).backward()
        wanted = (net.b.weight * net.b.weight.grad).transpose(0, 1).flatten(1).sum(1).double()
        torch.testing.assert_close(found.rows["a"][i], wanted, rtol=1e-4, atol=1e-7)


def test_u_scores_are_summed_over_the_calls(measured: tuple[Any, Tensor, Tensor, Any]) -> None:
    net, x, y, found = measured
    read: list[list[Tensor]] = []  # of each image the inputs of every call

    def look(_: nn.Module, inputs: tuple, named: dict[str, Tensor]) -> None:
        read[-1].append((*inputs, *named.values())[0].detach())

    handle = net.b.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        for i in range(len(x)):
            read.append([])
            logits(net, x[i : i + 1])
    handle.remove()
    channels = 1 if isinstance(net.b, nn.Conv2d) else -1
    wanted = torch.zeros(5, dtype=torch.float64)
    for call in range(len(read[0])):
        units = [r[call].movedim(channels, 0).flatten(1) for r in read]  # [n, P] of each image
        along = directions(units[0].shape[1], D, 0)
        for n in range(5):
            at = torch.stack([u[n] @ along for u in units]).double().numpy()  # [S, D]
            gaps = [wasserstein_distance(at[y == 0, d], at[y == 1, d]) for d in range(D)]
            wanted[n] += sum(gaps) / D
    torch.testing.assert_close(found.constants["a"]["u_score"], wanted, rtol=1e-4, atol=1e-7)


def test_where_images_are() -> None:
    x = torch.rand(3, 3, SIDE, SIDE)
    expected = {Net: {}, Windows: {}, Stacked: {"b": ImageAxis(0, last=True)},
                Sequence: {"b": ImageAxis(1)}}  # fmt: skip
    for kind, axes in expected.items():
        assert image_axes(kind().eval(), ["b"], x) == axes, kind


class Mixed(Net):
    """Rows that are of no image alone."""

    def branch(self, x: Tensor) -> Tensor:
        y = self.a(x).tanh()
        return self.b(torch.cat([y + y.flip(0), y])).chunk(2)[0].mean((2, 3))


def test_images_in_no_known_order_are_refused() -> None:
    with pytest.raises(ValueError, match="b is given its images in an order of its own"):
        image_axes(Mixed().eval(), ["a", "b"], torch.rand(2, 3, SIDE, SIDE))


class OnlyForward(Net):
    """What its gradient needs is overwritten."""

    def branch(self, x: Tensor) -> Tensor:
        y = self.a(x).sigmoid()
        z = self.b(y.sigmoid_()).mean((2, 3))
        return F.relu(z).mul_(2)


def test_what_cannot_be_differentiated_is_told() -> None:
    net, x = OnlyForward().eval(), torch.rand(4, 3, SIDE, SIDE)
    graph = find_groups(net, x[:2])
    with pytest.raises(ValueError, match="cannot be differentiated; take scores without gradients"):
        collect(net, graph, x, torch.tensor([0, 1, 0, 1]), needs=("rows",))
