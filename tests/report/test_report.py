"""The report: what it says, that it stands alone, and that names are only names in it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import HELDOUT, MODEL

import moe_fair
from moe_fair.cli import main
from moe_fair.core.plan import Plan
from moe_fair.evaluate import Agreement, Agreements
from moe_fair.evaluate.compare import Row
from moe_fair.evaluate.record import save_agreement, save_benchmarks
from moe_fair.report import html
from moe_fair.report.document import Code, Document, Figure, Section, Table, Text, Tile, Tiles
from moe_fair.report.markdown import fenced
from moe_fair.report.sources import gather
from moe_fair.report.write import write_report

pytestmark = pytest.mark.slow  # whole runs, by and large

HOSTILE = "</title><script>fetch('/stolen')</script><img src=/seen onerror=fetch('/stolen')>`\"'&"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """Tags with their attributes, headings, table cells and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.headings.append("")
        if tag not in ("meta", "link", "img"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._inside or self._inside[-1] == "style":
            return
        self.text += data
        if self._inside[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self._inside[-1] == "h2":
            self.headings[-1] += data

    @property
    def images(self) -> list[bytes]:
        found = [a["src"] or "" for t, a in self.tags if t == "img"]
        assert all(src.startswith("data:image/png;base64,") for src in found)
        return [base64.b64decode(src.partition(",")[2]) for src in found]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "out"
    moe_fair.prune(
        str(MODEL),
        folder,
        method="fair",
        experts=40,
        heldout=str(HELDOUT),
        heldout_samples=8,
        repair="scale",
        **settings,
    )
    one = Agreement(100, 2.5, 2.75, 0.125, 0.875, 0.9375)
    save_agreement(folder / "moe_fair", Agreements(one, {"python": one}))
    save_benchmarks(folder / "moe_fair", [
        Row("boolq", "acc", 0, 3270, 0, True, 0.7321, 0.0077, 0.7512, 0.0075, -0.0191, 0.005,
            0.0002, "McNemar"),
        Row("wiki", "bits_per_byte", 0, 9, 0, False, 1.25, None, 1.5, None, -0.25, 0.1, 0.04,
            "paired t"),
    ])  # fmt: skip
    return folder


@pytest.fixture
def out(pruned: Path, tmp_path: Path) -> Path:
    """A copy that a test may write into."""
    return Path(shutil.copytree(pruned, tmp_path / "out"))


def written(out: Path) -> Page:
    return Page(write_report(out).read_text())


@pytest.fixture(scope="module")
def html_text(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The whole report; drawing it takes a second."""
    return write_report(pruned, path=tmp_path_factory.mktemp("page") / "page.html").read_text()


@pytest.fixture(scope="module")
def page(html_text: str) -> Page:
    return Page(html_text)


def test_prune_writes_it(pruned: Path) -> None:
    """Written before the benchmarks came; nothing half-written beside it."""
    page = Page((pruned / "moe_fair" / "report.html").read_text())
    assert "None was run" in page.text
    assert not list(pruned.rglob("*.partial"))


def test_every_number_is_in_it(pruned: Path, page: Page) -> None:
    assert page.headings == [
        "In short", "Experts kept per layer", "Tolerance of Difference", "Scores",
        "Which domain uses which experts", "Repair", "Size", "Held-out loss",
        "Agreement with the original", "Benchmarks", "Serving", "Recipe",
    ]  # fmt: skip
    sources = gather(pruned)
    budget, covered, repair, size, heldout, agreement, benchmarks, _, prints = page.tables
    assert [[int(x) for x in row[:4]] for row in budget[1:]] == [
        [g.layer, g.size, len(g.kept), g.size - len(g.kept)] for g in sources.plan.groups
    ]
    shares = sources.plan.explanation["coverage"]["routed"]
    assert [r[:2] for r in covered[1:]] == [[d, f"{v:.1%}"] for d, v in shares.items()]
    assert sources.repairs is not None
    assert repair[0] == ["layer", "repair", "expert error before", "fitted"]
    assert [r[0] for r in repair[1:]] == [g.name for g in sources.plan.groups]
    assert [r[2:4] for r in repair[1:]] == [
        [f"{r.before:.4f}", f"{r.after:.4f}"] for r in sources.repairs
    ]
    assert size[1][1:] == ["8.05 M", "5.82 M", "-27.7%"]
    assert sources.heldout is not None
    assert [r[0] for r in heldout[1:]] == [*sources.heldout[0].domains, "all"]
    assert heldout[-1][1:3] == [f"{h.mean:.4f}" for h in sources.heldout]
    assert agreement[1] == [
        "python", "100", "2.5000", "2.7500", "0.1250", "87.50%", "93.75%"
    ]  # fmt: skip
    assert benchmarks[1] == [
        "boolq", "acc ↑", "3,270", "0.7512", "0.7321", "-0.0191", "0.0050", "<0.001", "McNemar",
    ]  # fmt: skip
    assert benchmarks[2][1] == "bits_per_byte ↓"
    assert benchmarks[2][7:] == ["0.040", "paired t"]
    assert {r[0] for r in prints[1:]} == set(sources.plan.fingerprint)
    assert sources.recipe in page.text
    for note in sources.plan.notes:
        assert note[1:] in page.text


def test_it_stands_alone(html_text: str, page: Page) -> None:
    """Nothing in it points anywhere, and its own policy would forbid it."""
    assert {t for t, _ in page.tags}.isdisjoint({"script", "iframe", "object", "form", "a"})
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            if name in attributes:
                assert (attributes[name] or "").startswith("data:"), tag
    assert "url(" not in html_text
    assert "@import" not in html_text
    [policy] = [a["content"] for _, a in page.tags if "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_pictures_are_whole_and_described(page: Page) -> None:
    assert len(page.images) == 5
    for png in page.images:
        assert png.startswith(b"\x89PNG")
        assert png.endswith(b"IEND\xaeB`\x82")
    for tag, attributes in page.tags:
        assert tag != "img" or len(attributes["alt"] or "") > 20


def test_the_same_numbers_give_the_same_bytes(out: Path, html_text: str) -> None:
    """Also after another plan was drawn, every picture of which is another."""
    path, page = out / "moe_fair" / "plan.json", Page(html_text)
    plan = Plan.load(path)
    statistics = moe_fair.Statistics.load(out / "moe_fair")
    moe_fair.plan(statistics, experts=30, method="fair").save(path)
    other = written(out)
    assert len(other.images) == len(page.images)
    assert not set(other.images) & set(page.images)
    plan.save(path)
    assert write_report(out).read_text() == html_text


def hostile(out: Path) -> None:
    """Give every name that a stranger may choose in a checkpoint's files a hostile one."""
    folder = out / "moe_fair"
    plan = Plan.load(folder / "plan.json")
    recipe = dict(plan.recipe) | {"model": HOSTILE, "heldout": [HOSTILE]}
    replace(plan, recipe=recipe, removal=HOSTILE, notes=(HOSTILE,)).save(folder / "plan.json")
    (folder / "recipe.yaml").write_text(f"model: {json.dumps(HOSTILE)}\n")
    one = Agreement(100, 2.5, 2.75, 0.125, 0.875, 0.9375)
    save_agreement(folder, Agreements(one, {HOSTILE: one}))
    save_benchmarks(folder, [Row(HOSTILE, HOSTILE, 0, 1, 0, True, 0.5, 0.1, test=HOSTILE)])
    losses = json.loads((folder / "heldout.json").read_text())
    for side in losses.values():
        side["domains"] = {HOSTILE: 1.0}
    (folder / "heldout.json").write_text(json.dumps(losses))


def test_hostile_names_are_read_and_nothing_else(out: Path, page: Page) -> None:
    hostile(out)
    found = written(out)
    assert {t for t, _ in found.tags}.isdisjoint({"script", "a"})
    kinds = [[t for t, _ in p.tags if t not in ("tr", "td", "code", "p")] for p in (found, page)]
    assert kinds[0] == kinds[1]
    assert found.text.count("<script>fetch('/stolen')</script>") >= 6
    markdown = write_report(out, "md").read_text()
    outside = "".join(re.split(r"```+yaml.*?```+", markdown, flags=re.DOTALL))
    assert "<" not in re.sub(r"\\<|&nbsp;", "", outside)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
@pytest.mark.parametrize("names", ["plain", "hostile"])
def test_a_browser_asks_for_nothing_and_complains_of_nothing(
    out: Path, names: str, tmp_path: Path
) -> None:
    if names == "hostile":
        hostile(out)
    write_report(out)
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(out / "moe_fair"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = subprocess.run(
            [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
             "--virtual-time-budget=3000", "--dump-dom",
             f"http://127.0.0.1:{server.server_port}/report.html"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0
    assert "Written by moe_fair" in done.stdout
    assert asked == ["/report.html"]
    assert "CONSOLE" not in done.stderr


def test_markdown(out: Path) -> None:
    path = write_report(out, "md")
    text = path.read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(linked) == 5
    assert all((path.parent / name).read_bytes().startswith(b"\x89PNG") for name in linked)
    assert "| boolq | acc ↑ | 3,270 |" in text
    assert "## Benchmarks" in text


def test_plans_without_what_pictures_need(out: Path) -> None:
    """No statistics beside the plan, no protection scores, other code's fields in the JSON."""
    (out / "moe_fair" / "statistics.tensors").unlink()
    page = written(out)
    assert "The statistics are not in this folder" in page.text
    assert len(page.images) == 4  # the plan itself has scores and curves
    path = out / "moe_fair" / "plan.json"
    plan = Plan.load(path)
    bare = replace(
        plan, protection=None, tolerance=None,
        groups=tuple(replace(g, protection=None, tod=None, null_depth=None, ceiling=None)
                     for g in plan.groups),
    )  # fmt: skip
    bare.save(path)
    page = written(out)
    assert "no protection scores" in page.text
    assert len(page.images) == 3


@pytest.mark.parametrize("method", ["second-order", "reap"])
def test_methods_without_protection_scores(out: Path, statistics_folder: Path, method: str) -> None:
    """No ToD to draw, and the page says so and what to run; counts per layer as planned."""
    # of the same model and text, and of more than what `fair` needs
    shutil.copy(statistics_folder / "statistics.safetensors", out / "moe_fair/statistics.tensors")
    statistics = moe_fair.Statistics.load(out / "moe_fair")
    plan = moe_fair.plan(statistics, experts=40, method=method)
    plan.save(out / "moe_fair" / "plan.json")
    page = written(out)
    assert "no protection scores" in page.text
    assert "Where the cut falls" in page.headings
    assert "Tolerance of Difference" not in page.headings
    assert ("One threshold holds for all layers" in page.text) == (method == "second-order")
    assert len(page.images) == 4
    said = re.search(r"moe-fair (plan OUT/moe_fair --method fair)", page.text)
    assert said is not None
    command, _, *rest = said[1].split()
    with pytest.raises(SystemExit, match="0"):
        main([command, str(out / "moe_fair"), *rest, "--experts", "40"])
    assert [int(row[2]) for row in page.tables[0][1:]] == [len(g.kept) for g in plan.groups]


def test_ids_that_do_not_follow_from_the_scores(out: Path) -> None:
    path = out / "moe_fair" / "plan.json"
    plan = Plan.load(path)
    first = plan.groups[0]
    swapped = sorted({*first.kept[1:], next(i for i in range(60) if i not in first.kept)})
    groups = (replace(first, kept=tuple(swapped)), *plan.groups[1:])
    replace(plan, groups=groups).save(path)
    assert "do not follow from the scores alone" in written(out).text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("plan.json", None, "give a directory that `moe-fair prune` wrote"),
        ("plan.json", "{", "plan.json"),
        ("benchmarks.json", "{", "is not JSON"),
        ("agreement.json", "{}", "is not a table of ours"),
        ("heldout.json", '{"original": 1}', "is not a table of ours"),
        ("repair.json", '[{"name": 1}]', "is not a table of repairs"),
        ("statistics.tensors", "x", "cannot be read as a statistics file"),
    ],
)
def test_broken_files(
    out: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, said: str
) -> None:
    file = out / "moe_fair" / name
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(out)])
    shown = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(shown) == 1
    assert said in shown[0]


def test_formats_and_places(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def report(*more: str) -> object:
        with pytest.raises(SystemExit) as stop:
            main(["report", str(out), *more])
        return stop.value.code

    assert report("-o", str(tmp_path / "deep" / "page.html")) == 0
    assert (tmp_path / "deep" / "page.html").is_file()
    assert report("--format", "pdf") == 2
    assert "--format 'pdf' is none of html, md" in capsys.readouterr().err
    assert report("-o", str(tmp_path)) == 2
    assert "is a directory" in capsys.readouterr().err


def test_any_document_can_be_drawn() -> None:
    """Nothing in html or markdown knows experts: a report on channels is the same blocks."""
    from moe_fair.report import figures, markdown

    marked = [figures.Marked("conv1", np.array([0.0, 1.0, 3.0]), [0]),
              figures.Marked("conv2", np.array([2.0, 2.0]), [])]  # fmt: skip
    picture = Figure("map", figures.score_map(marked, "channel"), "A map", "caption")
    blocks = (Text("a `b` c"), Tiles((Tile("x", "1"),)), Table(("a", "b"), (("1", "2"),)),
              picture, Code("```\nrun", "sh"))  # fmt: skip
    made = Document("t", "s", (Section("h", blocks),))
    page = Page(html.render(made, "f"))
    assert page.tables == [[["a", "b"], ["1", "2"]]]
    text = markdown.render(made, "f", "pictures")
    assert "pictures/map.png" in text
    assert fenced("```\nrun", "sh") in text
    assert text.count("````") == 2
    half = figures.routing_maps([("\udcff", marked)], "channel")  # of a name in bytes
    assert half.startswith(b"\x89PNG")
    width, height = html.png_size(picture.png)
    assert width > height > 100


def test_drawing_leaves_torch_and_matplotlib_alone(out: Path) -> None:
    """Reports are drawn inside other people's programs."""
    import matplotlib

    style, state = dict(matplotlib.rcParams), torch.random.get_rng_state()
    write_report(out)
    assert dict(matplotlib.rcParams) == style
    assert torch.equal(torch.random.get_rng_state(), state)
