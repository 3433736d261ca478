"""README.md and docs/: commands parse, links and cited sections exist, tables are up to date."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from places import ROOT

from moe_fair.cli import app
from moe_fair.core.bundled_recipes import EXPERTS, VISION, recipe_path

sys.path.insert(0, str(ROOT / "docs"))
import make_tables

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "eval").glob("*.md")]
# what is ours; CHANGELOG.md and the record of measurements tell of their own time
CURRENT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
CURRENT = [p for p in CURRENT if p.name != "RELIABILITY.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# options of other programs
FOREIGN = {"--cpu", "--multi_gpu", "--config_file", "--nproc_per_node", "--nodes", "--strict"}
FOREIGN |= {"--repository", "--hf-overrides", "--trust-remote-code", "--speculative-config"}
OURS = ("moe-fair ", "accelerate launch ", "torchrun ", "sbatch ", "python eval/")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def spans(text: str) -> list[str]:
    """Code within lines; one may be broken over two."""
    return [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of ours in the pages and in the recipes' headers, and where it is."""
    for page in CURRENT:
        text = page.read_text()
        lines = "\n".join(body for _, body in FENCE.findall(text)).replace("\\\n", " ")
        for line in [*lines.splitlines(), *spans(text)]:
            for part in line.split("&&"):
                # an ellipsis or a name alone is no command to type
                if part.strip().startswith(OURS) and "..." not in part:
                    words = shlex.split(part, comments=True)
                    if words[0] != "accelerate" or "moe_fair" in words:
                        yield named(page), words
    for file in sorted((ROOT / "recipes").glob("*/*.yaml")):
        head = "\n".join(x[1:] for x in file.read_text().splitlines() if x.startswith("#"))
        for line in head.replace("\\\n", " ").splitlines():
            if line.strip().startswith(OURS):
                yield named(file), shlex.split(line)


def leaf(words: list[str]) -> tuple[Any, list[str]]:
    """The command that these words name, and its arguments."""
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    assert not hasattr(command, "commands") or not words, f"no command {words[0]}"
    return command, words


def parsed(words: list[str]) -> None:
    command, arguments = leaf(words)
    if not arguments:  # a command that is only named
        return
    # what a line leaves out because it is about something else
    outputs = [o for p in command.params if p.required for o in p.opts if o == "-o"]
    if outputs and not {"-o", "--output"} & set(arguments):
        arguments = [*arguments, "-o", "out"]
    needed = [p for p in command.params if p.param_type_name == "argument" and p.required]
    if needed and arguments[0].startswith("-"):
        arguments = ["NAME"] * len(needed) + arguments
    command.make_context(command.name, list(arguments))
    if "--recipe" in arguments:
        given = Path(arguments[arguments.index("--recipe") + 1])
        if given.parts[:1] != ("out",):  # of a result
            recipe_path(given, VISION if words[0] == "vision" else EXPERTS)


@pytest.mark.parametrize(("where", "words"), list(commands()), ids=lambda x: str(x)[:60])
def test_command_lines_parse(where: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[0] == "python":
        text = Path(words[1]).read_text()
        for option in (w for w in words[2:] if w.startswith("-")):
            assert f'"{option}"' in text, f"{where}: {words[1]} has no {option}"
        return
    if words[0] == "moe-fair":
        return parsed(words[1:])
    start = words.index("moe_fair") + 1 if "moe_fair" in words else None
    if start is None:  # Slurm's script hands on what follows it
        start = next(i for i, w in enumerate(words) if w.endswith(".sh")) + 1
    for word in words[:start]:
        if word.startswith("recipes/"):
            assert Path(word).is_file(), f"{where}: no {word}"
    parsed(words[start:])


def test_there_are_command_lines() -> None:
    found = [words for _, words in commands()]
    assert len(found) > 60
    assert {w[0] for w in found} == {"moe-fair", "accelerate", "torchrun", "sbatch", "python"}


def options(command: Any) -> Iterator[str]:
    for p in command.params:
        yield from (*p.opts, *p.secondary_opts)
    for c in getattr(command, "commands", {}).values():
        yield from options(c)


@pytest.mark.parametrize("page", CURRENT, ids=named)
def test_options_exist(page: Path) -> None:
    known = {*options(typer.main.get_command(app)), *FOREIGN}
    scripts = "".join(p.read_text() for p in (ROOT / "eval").glob("*.py"))
    known |= set(re.findall(r'"(--[\w-]+)"', scripts + (ROOT / "docs/make_tables.py").read_text()))
    for span in spans(page.read_text()):
        if span.startswith(("python -m pytest", "pip ")):
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
            assert option in known, f"{named(page)}: no option {option}"


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs both make them."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", h.replace("`", "")).strip().lower() for h in heads]
    return {re.sub(r"\s", "-", h) for h in plain}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{named(page)}: no {target}"
        assert not anchor or anchor in anchors(file), f"{named(page)}: no heading {target}"


def test_cited_sections_exist() -> None:
    sections = re.findall(r"^## (\d+)\. ", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
    assert sections == [str(i + 1) for i in range(len(sections))]
    cited = []
    for file in (
        f for d in ("moe_fair", "eval", "tests", "docs") for f in (ROOT / d).rglob("*.py")
    ):
        text = " ".join(file.read_text().split())
        for number in re.findall(r"docs/methods\.md,? section (\d+)", text):
            assert number in sections, f"{named(file)} cites section {number}"
            cited.append(number)
    assert len(cited) >= 9


def test_tables_are_those_of_the_registries() -> None:
    for page, name, table in make_tables.tables():
        text = (ROOT / "docs" / page).read_text()
        now = make_tables.replaced(text, name, table)
        assert now == text, f"docs/{page}: run python docs/make_tables.py --write"


def test_the_readme_fits_a_screen_or_two_and_says_how_to_begin() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) < 7_000
    assert "\npython -m pytest -n 3\n" in text
    version = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert version
    assert f"pip install -c constraints.txt torch=={version[1]} &&" in text


def test_quoted_errors_are_ours() -> None:
    """What the first column of docs/errors.md quotes is said by the package, word for word."""
    source = "".join(p.read_text() for p in (ROOT / "moe_fair").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)  # a line that goes on in the next
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(rows) > 5
    for row in rows:
        for part in re.split(r"\.\.\.|\b[ABN]\b", row):
            if len(part.strip(" :;,")) > 5:
                assert part.strip(" :;,") in source, f"docs/errors.md quotes {row!r}"
