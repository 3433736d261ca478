"""A line for whoever watches a run."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
