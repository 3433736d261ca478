"""The model card of a pruned checkpoint: what it is made from, its numbers, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moe_fair.core.output import write_whole
from moe_fair.core.yaml_file import ERRORS, WithoutAliases
from moe_fair.engines.auto import NAMES
from moe_fair.report.document import Block, Table
from moe_fair.report.markdown import fenced, plain, table
from moe_fair.report.numbers import (
    PAIRED_NOTE,
    agreement_table,
    amount,
    benchmark_table,
    change,
    heldout_table,
    layer_label,
)
from moe_fair.report.serving import serving
from moe_fair.report.sources import Sources, gather

CARD = "README.md"
# a card with this line is ours to write again; without it the card is the user's and stays
OURS = (
    "<!-- Written by moe-fair push, which writes it anew. Remove this line to keep your edits. -->"
)
# The Hub knows four relations to a base model: adapter, merge, quantized, finetune. A pruned model
# is none of them. finetune is what the Hub takes where nothing is said and no other fits; it puts
# the model into the base model's tree, and the card's first lines say what really was done.
RELATION = "finetune"
PIPELINES = {
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
}
INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Base:
    """The original model: its Hub id where it has one, and what its own card says."""

    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_metadata(card: Path) -> dict[str, Any]:
    """The front matter of a card file; empty where there is none or it cannot be read."""
    if not card.is_file():
        return {}
    head, fence, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    if head.strip() or not fence:
        return {}
    try:
        found = yaml.load(rest.split("\n---", 1)[0], Loader=WithoutAliases)
    except ERRORS:
        return {}
    return found if isinstance(found, dict) else {}


def write_card(output: Path, repo_id: str, base: Base, license: str | None = None) -> str:
    """Write the card into the checkpoint, unless the user keeps a card of their own there.

    Returns:
        the card that the checkpoint now has.
    """
    path = output / CARD
    if path.is_file() and OURS not in path.read_text(encoding="utf-8"):
        return path.read_text(encoding="utf-8")
    text = make_card(gather(output), repo_id, base, license)
    write_whole(path, text)
    return text


def make_card(s: Sources, repo_id: str, base: Base, license: str | None = None) -> str:
    """Front matter and text."""
    front = yaml.safe_dump(front_matter(s, base, license), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{OURS}\n\n" + "\n\n".join(_text(s, repo_id, base)) + "\n"


def front_matter(s: Sources, base: Base, license: str | None = None) -> dict[str, Any]:
    """The card's metadata; the licence and language are the base model's unless one is given."""
    inherited = {k: base.metadata[k] for k in INHERITED if base.metadata.get(k)}
    if license is not None:
        inherited = {k: v for k, v in inherited.items() if not k.startswith("license")}
        inherited["license"] = license
    found: dict[str, Any] = {
        **inherited,
        "library_name": "transformers",
        "pipeline_tag": base.metadata.get("pipeline_tag")
        or PIPELINES.get(s.auto, "text-generation"),
        "tags": ["moe", "expert-pruning", "pruned", "moe_fair"]
        + (["custom_code"] if s.brings_code else []),
    }
    if base.id is not None:
        found |= {"base_model": base.id, "base_model_relation": RELATION}
    return found


def _text(s: Sources, repo_id: str, base: Base) -> Iterator[str]:
    plan = s.plan
    kept, size = sum(len(g.kept) for g in plan.groups), sum(g.size for g in plan.groups)
    original = (
        f"[{plain(base.id)}](https://huggingface.co/{base.id})" if base.id else plain(s.model)
    )
    scores = plan.removal + (f" against {plan.protection}" if plan.protection else "")
    yield f"# {plain(repo_id.rpartition('/')[2])}"
    after = "Nothing was fine-tuned."
    done = sorted({r.repair for r in s.repairs or () if r.repair != "none"})
    if done:
        after = (
            f"What remains was then repaired ({plain(', '.join(done))}) on calibration text, "
            "layer by layer, to give what the original's layers give; no labels were used."
        )
    if s.healing is not None and not s.healing.refused:
        healed = "The layers were trained end to end toward the original's predictions, on text."
        after = f"{after} {healed}" if done else healed
    how = "merged by hierarchical clustering (HC-SMoE) with" if plan.merges else "pruned by"
    how = "merged neuron by neuron (REAM) with" if plan.aligned else how
    yield (
        f"{original} with {kept} of its {size} routed experts: {how} moe_fair, "
        f"{plain(plan.allocator)} on {plain(scores)}. {after}"
    )
    yield table(_sizes(s))
    yield "## Load it"
    yield from _loading(s, repo_id)
    yield "## What it is worth"
    yield from _numbers(s)
    yield "## The plan"
    rows = ((layer_label(g), str(g.size), str(len(g.kept))) for g in plan.groups)
    yield table(Table(("layer", "experts", "kept"), tuple(rows)))
    yield (
        "Every number behind it is in `moe_fair/plan.json`; `moe_fair/report.html` draws it "
        "(download and open). `moe_fair/statistics.tensors`, a safetensors file, gives plans at "
        "other budgets in milliseconds: `moe-fair plan`."
    )
    yield "## The recipe"
    yield fenced(s.recipe, "yaml")


def _sizes(s: Sources) -> Table:
    before, after = s.plan.before, s.plan.after
    return Table(
        ("", "original", "pruned", "change"),
        (
            ("parameters", amount(before.parameters), amount(after.parameters),
             change(before.parameters, after.parameters)),
            ("size", f"{amount(before.bytes)}B", f"{amount(after.bytes)}B",
             change(before.bytes, after.bytes)),
        ),
    )  # fmt: skip


def _loading(s: Sources, repo_id: str) -> Iterator[str]:
    trust = ", trust_remote_code=True" if s.brings_code else ""
    text = ("processor", "AutoProcessor") if s.sees else ("tokenizer", "AutoTokenizer")
    lines = (
        f"from transformers import {s.auto}, {text[1]}",
        "",
        f'model = {s.auto}.from_pretrained("{repo_id}", dtype="auto"{trust})',
        f'{text[0]} = {text[1]}.from_pretrained("{repo_id}")',
    )
    yield fenced("\n".join(lines), "python")
    if not s.brings_code:
        yield "All layers keep the same number of experts, so this is the stock format."
    else:
        yield (
            "Layers keep different numbers of experts. The short file `modeling_moe_fair.py` in "
            "this repository builds the stock model with those numbers; it is what "
            "`trust_remote_code` allows."
        )
    if s.layout is not None:
        yield "Who serves it, as far as that was tried:"
        yield from map(_block, serving(s.layout, repo_id))
    if s.auto != NAMES[0]:
        return  # lm-eval's `hf` takes a multimodal model for a causal one
    yield "lm-evaluation-harness:"
    trust = ",trust_remote_code=True" if s.brings_code else ""
    arguments = f"--model hf --model_args pretrained={repo_id}{trust}"
    yield fenced(f"lm_eval {arguments} --tasks arc_challenge,hellaswag", "sh")


def _block(block: Block) -> str:
    return table(block) if isinstance(block, Table) else plain(getattr(block, "text", ""))


def _numbers(s: Sources) -> Iterator[str]:
    if s.heldout is None and s.agreement is None and s.benchmarks is None:
        yield "Not measured yet."
    if s.benchmarks is not None:
        yield table(benchmark_table(s.benchmarks))
        if any(r.p is not None for r in s.benchmarks):
            yield plain(PAIRED_NOTE)
    if s.agreement is not None:
        yield table(agreement_table(s.agreement))
    if s.heldout is not None:
        yield f"Next-token loss in nats on {s.heldout[0].tokens:,} tokens of held-out text:"
        yield table(heldout_table(*s.heldout))
