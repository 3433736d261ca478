"""Reports and screens of image classifiers: every number, in all renderings; names as names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from report.test_report import Page

from moe_fair.cli.render import render
from moe_fair.core.plan import ModelSize, Plan, Target, make_plan
from moe_fair.core.units import Scores, UnitGroup
from moe_fair.report import channel_figures, figures, html, sparse, vision
from moe_fair.report.channel_figures import score_boxes
from moe_fair.report.document import Code, Document, Figure, Section, Table, Text, Tile, Tiles
from moe_fair.report.write import write_document

SCRIPT = "</title><script>fetch('/stolen')</script><img src=/seen onerror=fetch('/stolen')>`\"'&|"
# a formula, rich's markup, controls, a line, turned text, half a character, one without a glyph
OTHERS = "a$\\frac{$b[/x]\x1b[2Jx\x00\nmoe-fair: error: b\u202etxt\udcff你:smile:"
STEPS = [{"loss": 2.0, "operations": 900}, {"loss": 1.5, "operations": 800}]


def plan(name: str = "conv", protected: bool = True) -> Plan:
    groups = tuple(UnitGroup(f"{name}{i}", i, 6) for i in range(2))
    scores = [
        Scores(kind, {g.name: torch.arange(6).double().roll(k + g.layer) + 1 for g in groups})
        for k, kind in ((0, f"removal{name}"), (2, f"protection{name}"))
    ]
    made = make_plan(
        groups, scores[0], scores[1] if protected else None, target=Target(total=7),
        allocator="tod" if protected else "global", before=ModelSize(2_000, 8_000),
    )  # fmt: skip
    made.notes.append(f"a note of {name}")
    return made


def pruned(name: str = "conv", **step: Any) -> dict[str, Any]:
    record = {"top1_cut": 0.25, "top1": 0.75, "cost": {"operations": 800}, **step}
    return {
        "settings": {"model": f"model {name}", "data": f"data {name}"},
        "top1": {"dense": 0.875, "pruned": 0.25, "final": 0.75},
        "cost": {"dense": {"parameters": 2_000, "operations": 1_000},
                 "pruned": {"parameters": 1_500, "operations": 800}},
        "latency_ms": [
            {"batch": 1, "dense": 3.0, "pruned": 2.0},  # as an earlier version wrote it
            {"batch": 8, "dense": 9.0, "pruned": 4.0, "faster": 2.25, "low": 2.0, "high": 2.5},
        ],
        "steps": [record, record],
        "left_whole": {f"{name} head": f"why {name}"},
    }  # fmt: skip


def zeroed(name: str = "conv") -> dict[str, Any]:
    layer = {"name": name, "shape": [2, 3], "weights": 6, "kept": 1, "sparsity": 5 / 6,
             "shift": "nowhere", "raw": 0.5, "residual": 0.25, "rr": 0.5}  # fmt: skip
    return {
        "settings": {"model": f"model {name}", "data": f"data {name}", "sparsity": 0.8,
                     "allocate": "rr", "repair": "variance"},
        "top1": {"dense": 0.875, "pruned": 0.25, "final": 0.75},
        "sparsity": {"weights": 6, "zeros": 5, "parameters": 1_234},
        "layers": [layer],
        "left_dense": {f"{name} head": f"why {name}"},
    }  # fmt: skip


def documents(name: str = "conv") -> list[Document]:
    plans = [plan(name), plan(name)]
    return [
        vision.document(plans, pruned(name)),
        vision.document([plan(name, protected=False)], pruned(name, removal=STEPS)),
        sparse.document(zeroed(name)),
    ]


def screens(name: str = "conv") -> list[Document]:
    output = Path(f"out {name}")
    return [
        vision.summary([plan(name), plan(name)], pruned(name), output),
        sparse.summary(zeroed(name), output),
    ]


@pytest.fixture(scope="module")
def plain() -> list[Document]:
    """Drawn once."""
    return documents()


def test_pages_of_pruned_channels(plain: list[Document]) -> None:
    scored, gradual, _ = (Page(html.render(made, "f")) for made in plain)
    assert scored.headings == [
        "In short", "Latency, median ms per forward", "Units kept and removed",
        "Tolerance of Difference", "Scores", "Steps", "Left whole",
    ]  # fmt: skip
    costs, latency, groups, steps, whole = scored.tables
    assert costs[1:] == [
        ["parameters", "2,000", "1,500", "-25.0%"], ["multiply-adds", "1,000", "800", "-20.0%"],
        ["top-1 after the last cut", "87.50%", "25.00%", "-62.50 points"],
        ["top-1 after fine-tuning", "87.50%", "75.00%", "-12.50 points"],
    ]  # fmt: skip
    assert latency[1:] == [
        ["1", "3.00", "2.00", "1.50 ×"], ["8", "9.00", "4.00", "2.25 × (2.00–2.50)"],
    ]  # fmt: skip
    assert [row[:4] for row in groups[1:]] == [
        [g.name, "6", str(len(g.kept)), str(g.depth)] for g in plan().groups
    ]
    assert steps[1:] == [[str(i), "25.00%", "75.00%", "800"] for i in (1, 2)]
    assert whole[1:] == [["conv head", "why conv"]]
    assert "7 of 12 units kept in the last step, tod on removalconv against prot" in scored.text
    assert "a note of conv" in scored.text
    assert len(scored.images) == len(gradual.images) == 3
    assert "Removal while training" in gradual.headings
    assert {"Tolerance of Difference", "Steps"}.isdisjoint(gradual.headings)


def test_page_of_zeros(plain: list[Document]) -> None:
    page = Page(html.render(plain[2], "f"))
    assert page.headings == ["In short", "Layers", "Left dense"]
    facts, layers, dense = page.tables
    assert facts[2:4] == [["top-1, repair variance", "75.00%"], ["zeros", "5 of 6 weights"]]
    assert layers[1] == ["conv", "2 × 3", "6", "1", "83.33%", "0.500", "0.250", "0.500"]
    assert dense[1:] == [["conv head", "why conv"]]
    assert "the means of 1 layers could not be matched" in page.text


@pytest.mark.parametrize("name", [SCRIPT, OTHERS], ids=["markup", "others"])
def test_hostile_names_are_read_and_nothing_else(
    name: str, plain: list[Document], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In pages that can be written at all: what a run says at its end stops no run."""
    hostile = documents(name)
    for made, other in zip(hostile, plain, strict=True):
        page = Page(write_document(made, tmp_path / "page.html").read_text("utf-8"))
        assert {t for t, _ in page.tags}.isdisjoint({"script", "a"})
        expected = Page(html.render(other, "f"))
        assert [t for t, _ in page.tags if t != "code"] == [
            t for t, _ in expected.tags if t != "code"
        ]
        assert len(page.images) == len(expected.images)
        if name == SCRIPT:
            assert page.text.count("<script>fetch('/stolen')</script>") >= 4
        text = write_document(made, tmp_path / "page.md", "md").read_text("utf-8")
        assert "<" not in re.sub(r"\\<|&nbsp;|`[^`\n]*`", "", text)
        rows = [re.sub(r"\\.", "", line) for line in text.splitlines() if line.startswith("|")]
        tables = [b for s in made.sections for b in s.blocks if isinstance(b, Table)]
        wanted = [len(t.rows[0]) for t in tables for _ in range(len(t.rows) + 2)]
        assert [line.count("|") - 1 for line in rows] == wanted
        assert not {"\x1b", "\x00", "\u202e"} & set(page.text + text)
    for made in [*screens(name), *hostile]:
        render(made)
    said = capsys.readouterr().out
    assert not {"\x1b", "\x00", "\u202e", "\udcff"} & set(said)
    assert not [line for line in said.splitlines() if line.startswith("moe-fair")]


def test_the_terminal_draws_any_document(capsys: pytest.CaptureFixture[str]) -> None:
    """A whole report as well: headings, a picture by what it shows, no number cut short."""
    marked = [figures.Marked("conv1", np.array([0.0, 1.0, 3.0]), [0])]
    blocks = (
        Text("a text", note=True), Tiles((Tile("label", "1", "detail"),)),
        Table(("name", "number", "words"), (("x" * 70, "1" * 70, "left"),), words=(0, 2)),
        Table((), (("fact", "long " * 30),)),
        Figure("map", figures.score_map(marked, "unit"), "A map", "caption"), Code("run\n  it"),
    )  # fmt: skip
    render(Document("Title", "Below it", (Section("First", blocks), Section("", (Text("end"),)))))
    said = capsys.readouterr().out.splitlines()
    assert said[:5] == ["Title", "Below it", "", "First", "note: a text"]
    assert said[5].split() == ["label", "1", "detail"]
    assert said[7].split() == ["x" * 70, "1" * 70, "left"]
    assert said[6].startswith("name ")
    assert sum(line.count("long") for line in said[8:12]) == 30
    assert max(map(len, said[8:12])) <= 80
    assert said[-5:] == ["picture: A map", "run", "  it", "", "end"]


def test_a_page_says_of_which_images_and_what_every_group_carries() -> None:
    made = plan()
    shares = {g.name: [0.125, 0.5] for g in made.groups}
    result = {
        **pruned(shares=shares),
        "images": {"train": 1_200, "test": 300, "classes": 7},
        "notes": ["a note of the run"],
    }
    page = Page(html.render(vision.document([made], result), "f"))
    assert "1,200 images to score and train on, 300 to test on, 7 classes." in page.text
    assert "a note of the run" in page.text
    [groups] = [t for t in page.tables if "units" in t[0]]
    assert groups[0][-2:] == ["of the parameters", "of the multiply-adds"]
    assert [row[-2:] for row in groups[1:]] == [["12.5%", "50.0%"]] * len(made.groups)


def test_boxes_are_those_of_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for groups in (1, 5, 40):
        drawn = [generator.normal(1, i + 1, 9 + i) for i in range(groups)]
        kinds = [("few", [d[:2] for d in drawn]), ("many", drawn)]
        names = [f"layer{i}" for i in range(groups)]
        ours = score_boxes(kinds, names)
        with monkeypatch.context() as patched:
            patched.setattr(channel_figures, "_boxes", _stock_boxes)
            assert score_boxes(kinds, names) == ours


def _stock_boxes(axes: Axes, values: list[np.ndarray]) -> None:
    axes.boxplot(values, whis=(5, 95), showfliers=False, widths=0.6)
