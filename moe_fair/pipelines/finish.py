"""How every flow ends: what was written is listed and verified, and only then gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_fair.core.interrupts import closing
from moe_fair.core.manifest import write_manifest
from moe_fair.core.output import Place, discard, settle
from moe_fair.core.say import Say
from moe_fair.pipelines.verify import verify

if TYPE_CHECKING:  # imports transformers, which not every image classifier needs
    from moe_fair.moe.checkpoint_source import Checkpoint


def verify_result(
    folder: Path, say: Say, original: Checkpoint | None = None, *, trust_remote_code: bool
) -> None:
    """List the files of a whole result, and check it.

    Args:
        original: of a language model, to compare every expert with.

    Raises:
        RuntimeError: it is not what its plan says.
    """
    write_manifest(folder)
    found = verify(folder, original, hashes=False, trust_remote_code=trust_remote_code)
    if not found.ok:
        raise RuntimeError(f"the result does not verify and stays in {folder}: {found.wrong}")
    say(f"verified: {found.checks[-1].detail}")


def name_result(place: Place, output: Path, work: Path | None = None) -> None:
    """Give a whole result its name; what a killed run would have gone on with goes."""
    with closing(output):
        settle(place.partial, place.path)
        if work is not None:
            discard(work)
