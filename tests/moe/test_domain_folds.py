"""Which domains are left out at a time, so that they can judge."""

from __future__ import annotations

from moe_fair.moe.domain_folds import FOLDS, domain_folds


def test_no_part_that_is_left_out_has_more_than_half() -> None:
    assert domain_folds({0: 10}) == []
    assert domain_folds({0: 10, 1: 10}) == [{0}, {1}]
    assert domain_folds({0: 11, 1: 10, 2: 0}) == [{1}]
    many = domain_folds(dict.fromkeys(range(10), 3))
    assert many == [{0, 4, 8}, {1, 5, 9}, {2, 6}, {3, 7}]
    assert len(many) == FOLDS
