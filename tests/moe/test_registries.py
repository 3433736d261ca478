"""Every rule that is found by file says where it comes from, and a test has its name."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moe_fair.core import allocate
from moe_fair.moe import criteria, repairs, statistics
from moe_fair.vision import criteria as vision_criteria
from moe_fair.vision.sparse import rules

TESTS = Path(__file__).parent.parent


def modules(package: ModuleType) -> Iterator[ModuleType]:
    """The files of a package."""
    for found in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"{package.__name__}.{found.name}")


def entries() -> list[tuple[str, ModuleType, str]]:
    """(name, its module, its source or formula) of every rule and every statistic."""
    found = []
    for package in (allocate, criteria, repairs, statistics, vision_criteria, rules):
        for module in modules(package):
            document = (module.__doc__ or "").strip()
            for c in getattr(module, "criteria", ()):
                found.append((c.name, module, c.source))
            for name, statistic in getattr(module, "names", {}).items():
                found.append((name, module, statistic.about))
            if hasattr(module, "allocate") or hasattr(module, "fit"):
                found.append((module.name, module, document))
    return found


@pytest.fixture(scope="module")
def tests() -> str:
    """The text of all other tests."""
    files = (f for f in sorted(TESTS.rglob("test_*.py")) if f != Path(__file__))
    return "\n".join(f.read_text() for f in [*files, TESTS / "flow.py", TESTS / "collected.py"])


@pytest.mark.parametrize(("name", "module", "source"), entries(), ids=lambda x: str(x)[:40])
def test_it_has_a_source_and_a_test(name: str, module: ModuleType, source: str, tests: str) -> None:
    assert source
    assert len((module.__doc__ or "").splitlines()[0]) > 20
    assert re.search(rf"[\"'/=]{re.escape(name)}[\"'/+]", tests), f"no test names {name!r}"


def test_what_is_found_by_file_is_what_the_registries_have() -> None:
    names = {name for name, _, _ in entries()}
    assert names >= criteria.criteria().keys() | statistics.statistics().keys()
    assert names >= allocate.allocators().keys() | repairs.repairs().keys()
    assert names >= vision_criteria.criteria().keys() | rules.rules().keys()
    needed = {n for c in criteria.criteria().values() for n in c.needs}
    assert needed <= statistics.statistics().keys()
