"""A model's own text, written before it is calibrated on: batch by batch, and kept.

Every batch has a seed of its own and lies in a file of its own until the text is whole; so it makes
no difference how many processes write, nor where a run was killed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_fair.core.lock import release as release_lock
from moe_fair.core.lock import take
from moe_fair.core.output import digest, partial_path, write_whole
from moe_fair.core.recipe import Recipe
from moe_fair.core.say import Say
from moe_fair.engines.device import pick_device
from moe_fair.engines.oom import release
from moe_fair.engines.processes import ALONE, Team, current_team
from moe_fair.engines.progress import Progress
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.engine_choice import weight_dtype
from moe_fair.moe.self_text import (
    DOCUMENTS,
    Author,
    Row,
    Written,
    find_author,
    write_batch,
    writes_chats,
)
from moe_fair.moe.text_writers import ModelWriter, ServerWriter, Writer
from moe_fair.pipelines.calibrate import choose_engine
from moe_fair.pipelines.opening import open_model

FORM = 2  # of what is sampled; another number wherever the same settings give another text
SUFFIXES = (".jsonl",)
LONG = 60.0  # seconds; how long it takes is said where it takes longer


class Unwritten(ValueError):
    """The model writes no text that can be used."""


@dataclass(frozen=True)
class Wanted:
    """How much text: tokens, or sequences of a length that are packed from it; and which.

    Attributes:
        length: most tokens of a document.
    """

    length: int
    seed: int
    tokens: int = 0
    sequences: int = 0

    @property
    def expected(self) -> int:
        """About how many tokens that is."""
        return max(self.tokens, self.sequences * self.length)

    @property
    def documents(self) -> int:
        """Of one batch: no more than the text may take."""
        return max(1, min(DOCUMENTS, -(-self.expected // self.length)))

    def met(self, rows: Sequence[Row]) -> bool:
        """So much is there."""
        packed = sum(r.tokens for r in rows if "text" in r.fields)
        chats = sum("messages" in r.fields for r in rows)
        return (
            sum(r.tokens for r in rows) >= self.tokens
            and packed // (self.length - 1) + chats >= self.sequences
        )


@dataclass(frozen=True)
class OwnText:
    """What is to be written, and by whom.

    Attributes:
        recipe: its model, device, data type and server.
    """

    recipe: Recipe
    source: Checkpoint
    wanted: Wanted
    key: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self._key())

    def _key(self) -> dict[str, Any]:
        """What the text depends on; who writes it, on what device, is no other text's reason."""
        return {
            "form": FORM, **self.source.fingerprint, **asdict(self.wanted),
            "documents": self.wanted.documents,
        }  # fmt: skip

    def writer_facts(self) -> dict[str, Any]:
        """What writes it."""
        if self.recipe.server is not None:
            return {"server": self.recipe.server}
        where = pick_device(self.recipe.device)
        dtype = weight_dtype(self.source, self.recipe.dtype, where)
        return {"dtype": str(dtype).removeprefix("torch."), "device": where.type}

    @cached_property
    def author(self) -> Author:
        """How the model starts and ends what it writes.

        Raises:
            ValueError: it cannot be told.
        """
        file = self.source.home / "generation_config.json"
        said = json.loads(file.read_text()) if file.is_file() else {}
        try:
            return find_author(self.source.tokenizer(), self.source.config, said)
        except ValueError as e:
            raise ValueError(f"{self.source.model}: {e}") from e

    def check(self, team: Team = ALONE) -> None:
        """It can be written here.

        Raises:
            ValueError: the model is not whole in memory, or how it starts is not known.
        """
        assert self.author
        why = "" if self.recipe.server is not None else streamed(self.recipe, self.source, team)
        if why:
            raise ValueError(
                f"{self.source.model}: own text is sampled by the whole model in memory, and it is "
                f"streamed here ({why}); start it on a server and give --server, or give -c FILE"
            )

    def writer(self) -> Writer:
        """The model, loaded, or the server that runs it."""
        recipe, tokenizer = self.recipe, self.author.tokenizer
        if recipe.server is not None:
            return ServerWriter(recipe.server, tokenizer)
        model = self.source.load(recipe.dtype, recipe.device, recipe.device_map)
        return ModelWriter(model, tokenizer)


def streamed(recipe: Recipe, source: Checkpoint, team: Team = ALONE) -> str:
    """Why the model is not whole in memory here, or spread by a device map; empty where it is."""
    if recipe.device_map is not None:
        return ""
    chosen = team.broadcast(lambda: choose_engine(recipe, source, team.node_size))
    return "" if chosen.engine == "resident" else chosen.why


def write_own_text(text: OwnText, file: Path, say: Say, team: Team | None = None) -> None:
    """Sample the text and save it, whole or not at all; what a killed run has left is gone on with.

    Beside `self.jsonl` comes `self.yaml`: what it was made from, its digest and its counts.
    """
    team = current_team() if team is None else team
    name = digest(text.key)
    if team.broadcast(lambda: is_of(file, name)):
        say(f"own text: that of {file} is of this model and these settings")
        return
    text.check(team)
    folder = partial_path(file)
    done = team.broadcast(lambda: _finished(folder, name))
    say(
        f"own text: sampling about {text.wanted.expected:,} tokens from {text.source.model}, "
        f"documents of up to {text.wanted.length}, from {text.author.start_name}"
    )
    if text.author.why:
        say(f"note: own text has no chats: {text.author.why}")
    if done:
        say(f"going on: {len(done)} batches of own text were done before")
    started = time.perf_counter()
    if not text.wanted.met(_rows(done)):
        author, writer = _checked(text, say)
        with Progress("sampling own text", text.wanted.expected) as progress:
            write = _batch_writer(text, author, writer)
            _write_missing(text, write, done, folder, name, progress, say, team)
        del writer, write
        release()
    if team.first:
        _save(text, done, file, name, say, time.perf_counter() - started)
        shutil.rmtree(folder, ignore_errors=True)
    team.gather(None)  # the file is there before another looks for it


def _checked(text: OwnText, say: Say) -> tuple[Author, Writer]:
    """The writer, and the author without chats where the model turns out not to write them."""
    author, writer = text.author, text.writer()
    if author.layout is None or writes_chats(author, writer, text.wanted.length, text.wanted.seed):
        return author, writer
    say("note: own text has no chats: the model does not end what it writes in the user's place")
    return replace(author, layout=None), writer


def _batch_writer(text: OwnText, author: Author, writer: Writer) -> Callable[[int], Written]:
    w = text.wanted

    def write(index: int) -> Written:
        return write_batch(
            author, writer, index=index, documents=w.documents, length=w.length, seed=w.seed
        )

    return write


def _write_missing(
    text: OwnText, write: Callable[[int], Written], done: dict[int, Written], folder: Path,
    name: str, progress: Progress, say: Say, team: Team,
) -> None:  # fmt: skip
    """Batches from the first that is missing, one a process at a time, until it is enough."""
    began = time.perf_counter()
    while not text.wanted.met(_rows(done)):
        missing = [i for i in range(len(done) + team.size) if i not in done][: team.size]
        index = missing[team.rank]
        made = write(index)
        progress.advance(tokens := sum(r.tokens for r in made.rows) * team.size)
        left = max(0, text.wanted.expected - sum(r.tokens for r in _rows(done)) - tokens)
        seconds = (time.perf_counter() - began) * left / max(1, tokens)
        if began and seconds > LONG:
            say(f"own text: about {seconds / 60:.0f} minutes to go")
        began = 0.0
        for i, found in team.gather((index, made)):
            done[i] = found
            if team.first:
                _keep(folder, name, i, found)
        if not any(done[i].rows for i in sorted(done)[-8:]) and len(done) >= 8:
            raise Unwritten(
                f"{text.source.model} wrote nothing that can be used in {len(done)} batches: it "
                "ends every document at once, or runs in circles; give calibration text with -c"
            )


def _rows(done: dict[int, Written]) -> list[Row]:
    """The rows of the batches up to the first that is missing."""
    rows: list[Row] = []
    for i in range(len(done)):
        if i not in done:
            break
        rows += done[i].rows
    return rows


def _keep(folder: Path, name: str, index: int, batch: Written) -> None:
    write_whole(folder / f"{index:06d}.json", json.dumps({"of": name, **asdict(batch)}))


def _finished(folder: Path, name: str) -> dict[int, Written]:
    """The batches that an earlier run with the same settings has left; others are thrown away.

    Raises:
        ValueError: something else is in their place.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is in the way of what is kept there; remove it")
    found: dict[int, Written] = {}
    for file in sorted(folder.glob("[0-9]*.json")) if folder.is_dir() else ():
        try:
            raw = {} if file.is_symlink() else json.loads(file.read_text())
            if raw.pop("of") == name:
                rows = [Row(**r) for r in raw.pop("rows")]
                found[int(file.stem)] = Written(rows, **raw)
        except (KeyError, TypeError, ValueError):
            continue
    if not found:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _save(
    text: OwnText, done: dict[int, Written], file: Path, name: str, say: Say, seconds: float
) -> None:
    """The text, then what is known of it."""
    batches: list[Written] = []
    while not text.wanted.met([r for b in batches for r in b.rows]):
        batches.append(done[len(batches)])
    rows = [r for b in batches for r in b.rows]
    lines = "".join(json.dumps(r.fields, ensure_ascii=False) + "\n" for r in rows)
    counts = {
        "rows": len(rows), "tokens": sum(r.tokens for r in rows),
        "chats": sum("messages" in r.fields for r in rows),
        "loops_replaced": sum(b.loops for b in batches),
        "without_end_replaced": sum(b.unended for b in batches),
        "left_out": sum(b.missing for b in batches),
    }  # fmt: skip
    facts = {
        "model": text.source.model, "start": text.author.start_name, "made_from": name,
        "sha256": hashlib.sha256(lines.encode()).hexdigest(), **counts, **text.writer_facts(),
        "settings": text.key,
    }  # fmt: skip
    import yaml

    write_whole(file, lines)
    write_whole(facts_of(file), yaml.safe_dump(facts, sort_keys=False, allow_unicode=True))
    say(
        f"own text: {counts['tokens']:,} tokens in {counts['rows']:,} rows ({counts['chats']:,} "
        f"chats) in {seconds:.0f} s; {counts['loops_replaced']} loops and "
        f"{counts['without_end_replaced']} without a beginning or an end were written anew, "
        f"{counts['left_out']} left out"
    )


def sample(recipe: Recipe, file: Path, say: Say = lambda _: None) -> None:
    """Own text in a file, by itself: what `moe-fair sample` does.

    Raises:
        ValueError: no such model, it cannot be sampled from here, or the file is there.
    """
    team = current_team()
    if team.first:
        check_file(file)
    tokens = recipe.tokens or Recipe().samples * recipe.length
    wanted = Wanted(recipe.length, recipe.seed, tokens=tokens)
    lock = file.with_name(f"{file.name}.lock")
    if team.first:
        take(lock, file)
    try:
        write_own_text(OwnText(recipe, open_model(recipe), wanted), file, say, team)
    finally:
        if team.first:
            release_lock(lock)


def facts_of(file: Path) -> Path:
    """Where it is said what a text was made from."""
    return file.with_suffix(".yaml")


def is_of(file: Path, name: str) -> bool:
    """The file is the text of these settings, as it was written."""
    from moe_fair.core.yaml_file import read_yaml

    facts = facts_of(file)
    if not file.is_file() or not facts.is_file():
        return False
    try:
        found = read_yaml(facts)
    except ValueError:
        return False
    same = isinstance(found, dict) and found.get("made_from") == name
    return same and hashlib.sha256(file.read_bytes()).hexdigest() == found.get("sha256")


def check_file(file: Path) -> None:
    """A text may be written there.

    Raises:
        ValueError: it is of another kind, there already, or its folder is not.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"-o {file}: own text is written as .jsonl; give such a name")
    for path in (file, facts_of(file)):
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path} is there already; give another name, or remove it first")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"-o {file}: there is no directory {file.parent}; make it first")
