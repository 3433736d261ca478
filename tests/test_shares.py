"""Who does what: every batch once, nobody much more than another."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moe_fair.engines.processes import ALONE, Team


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 9))
def test_shares(costs: list[int], size: int) -> None:
    items = list(enumerate(costs))
    shares = [Team(rank, size).share(items, lambda item: item[1]) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares)
    loads = [sum(cost for _, cost in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_alone() -> None:
    assert ALONE.share("abc", lambda _: 1) == ["a", "b", "c"]
    assert ALONE.broadcast(lambda: 3) == 3
    assert ALONE.gather(3) == [3]
    assert ALONE.broadcast_on_node(3) == 3
    assert ALONE.reduce(None) is None
