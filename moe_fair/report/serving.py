"""Who serves a checkpoint, as a table."""

from __future__ import annotations

from collections.abc import Iterator

from moe_fair.core.engine_facts import NO, NOT_RUN, Layout, Verdict, verdicts
from moe_fair.core.layout import parallel_sizes, tensor_parallel_sizes
from moe_fair.report.document import Block, Table, Text

GROUP = 128  # of weights that share a scale, in most quantised checkpoints


def serving(layout: Layout, out: str) -> Iterator[Block]:
    """The engines, what each does with the checkpoint, and what else should be known.

    Args:
        out: its name in commands.
    """
    found = verdicts(layout, out)
    yield Table(
        ("engine", "served", "versions", "how"),
        tuple((v.title, v.serves, v.versions, _how(v)) for v in found),
        words=(0, 1, 2, 3),
    )
    if any(v.serves == NOT_RUN for v in found):
        yield Text(f"{NOT_RUN}: nobody has tried this type so; nothing is known against it")
    for v in found:
        yield from (Text(f"{v.title}: {note}", note=True) for note in v.notes)
    for multiple in (1, GROUP):
        if sizes := ", ".join(map(str, tensor_parallel_sizes(layout, multiple))):
            what = "" if multiple == 1 else f", with weights quantised in groups of {multiple}"
            yield Text(
                f"tensor parallel{what}: numbers of devices that divide heads and experts' widths: "
                f"{sizes}"
            )
    sizes = ", ".join(map(str, parallel_sizes(layout)))
    yield Text(f"expert parallel: numbers of devices that divide every layer evenly: {sizes}")


def _how(v: Verdict) -> str:
    if v.serves == NO:
        return v.why
    return f"{v.command}, with {v.by}" if v.by else v.command
