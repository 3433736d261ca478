"""Uploading a pruned checkpoint to the Hub in one commit, by huggingface_hub's own client.

Large files go up first and the commit names them all at the end: a repository never shows half a
model. After an interruption the same command goes on, because the client asks for every file's
digest whether the Hub has it before sending. The token is the client's own affair
(`hf auth login`, HF_TOKEN) and never passes through here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token

# HTTPError is that of the client's HTTP library, which differs by version
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from moe_fair.core.manifest import FOLDER, MANIFEST, WRITTEN_LATER, listed_files, unlisted
from moe_fair.core.quote import first_line
from moe_fair.pipelines.verify import verify
from moe_fair.publish.card import CARD, Base, read_metadata, write_card
from moe_fair.report.sources import Sources, gather
from moe_fair.report.write import FORMATS, write_report

# lm-eval's own JSON lists the machine and its packages, and its samples quote benchmarks
LEFT_OUT = ("*.partial", "*.lock", f"{FOLDER}/lm-eval/*")


@dataclass(frozen=True)
class Upload:
    """What goes, or went, up.

    Attributes:
        repo_id: user/name.
        files: path in the repository -> bytes.
        card: the text of the model card.
        left_out: what lies there and does not go; see `manifest.unlisted`.
        notes: what the user should know before it is public.
        url: of the commit, or None for a dry run.
    """

    repo_id: str
    files: dict[str, int]
    card: str
    notes: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    url: str | None = None


def push(
    output: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Upload:
    """Write the card and upload a pruned checkpoint.

    Args:
        output: the directory that `prune` wrote.
        repo_id: user/name; created where it is not there.
        private: of a repository that is created.
        revision: a branch; created where it is not there.
        base_model: Hub id of the original, for a model that was pruned from a local directory.
        license: in place of the base model's.
        dry_run: write the card, upload nothing.

    Raises:
        ValueError: not a pruned checkpoint, or one that does not verify, a file that is a link, a
            bad name, no token, or the Hub refuses; says why.
    """
    sources = gather(output)
    checked = verify(output)
    if not checked.ok:
        raise ValueError(f"{output} does not verify and is not uploaded: {checked.wrong}")
    for name in (repo_id, *((base_model,) if base_model else ())):
        _check_name(name)
    if not dry_run and get_token() is None:
        raise ValueError("no Hub token: log in with `hf auth login`, or set HF_TOKEN")
    base = find_base(sources, base_model)
    card = write_card(output, repo_id, base, license)
    for kind in FORMATS:  # no list vouches for a page that lies there; those that go are ours
        if (output / FOLDER / f"report.{kind}").exists():
            write_report(output, kind)
    notes = tuple(_notes(sources, base, output))
    names, left = _named(output)
    made = Upload(repo_id, {n: (output / n).stat().st_size for n in names}, card, notes, left)
    for note in notes:
        say(f"note: {note}")
    if left:
        say(f"left out, since nothing names it: {', '.join(left)}")
    if dry_run:
        return made
    size = sum(made.files.values())
    say(f"uploading {len(names)} files, {size / 1e9:.2f} GB, to {repo_id}")
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=output,
            revision=revision,
            allow_patterns=[escape(name) for name in names],
            commit_message=f"Pruned from {sources.model} with moe_fair",
        )
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError) as e:
        # the client wraps what stopped a large file into a RuntimeError
        cause = e.__cause__ if isinstance(e, RuntimeError) else e
        raise ValueError(_refusal(cause or e, repo_id)) from e
    return replace(made, url=str(commit.commit_url))


def _named(output: Path) -> tuple[list[str], tuple[str, ...]]:
    """What goes up: what the manifest lists, itself, the card, results and reports; and the rest.

    Raises:
        ValueError: one of them is a link, or lies in a folder that is: what it leads to may be
            anything, and may be another thing tomorrow.
    """
    listed = {*listed_files(output), MANIFEST}
    later = [p for pattern in WRITTEN_LATER for p in output.glob(pattern) if p.is_file()]
    names = {*listed, *(p.relative_to(output).as_posix() for p in later)}
    going = sorted(n for n in names if not any(fnmatch(n, p) for p in LEFT_OUT))
    for name in going:
        for part in (output / name, *(output / name).parents):
            if part == output:
                break
            if part.is_symlink():
                raise ValueError(
                    f"{part} is a link, and links are not uploaded; copy the file there"
                )
    return going, (*unlisted(output, listed), *sorted(names - set(going)))


def find_base(sources: Sources, base_model: str | None) -> Base:
    """The original's Hub id and card: as given, or as the plan's recipe names it."""
    named = str(sources.plan.recipe.get("model") or "")
    local = read_metadata(Path(named) / CARD) if Path(named).is_dir() else {}
    if base_model is None and Path(named).is_dir():
        return Base(None, local)
    name = base_model or named
    try:
        validate_repo_id(name)
        return Base(name, ModelCard.load(name, ignore_metadata_errors=True).data.to_dict())
    except (HFValidationError, HfHubHTTPError, HTTPError, OSError, ValueError):
        # not on the Hub, without a card, or out of reach; only what the user says is taken as given
        return Base(base_model, local)


def _notes(sources: Sources, base: Base, output: Path) -> list[str]:
    notes = []
    written = read_metadata(output / CARD)
    if base.id is None and "base_model" not in written:
        notes.append(
            f"the card names no base model: {sources.model} is not known to be on the Hub; "
            "say it with --base-model USER/NAME"
        )
    if not written.get("license"):
        notes.append(
            "the card has no licence line, and a model without one may not be used; the base "
            "model's card names none that could be read: say it with --license"
        )
    paths = [v for v in _texts(sources.plan.recipe) if v.startswith(("/", "~"))]
    if paths:
        notes.append(f"the recipe names paths of this machine, which will be public: {paths[0]}")
    return notes


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [t for v in value.values() for t in _texts(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _texts(v)]
    return [value.rpartition("=")[2]] if isinstance(value, str) else []


def _check_name(name: str) -> None:
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("there is no user in it")
    except HFValidationError as e:
        raise ValueError(f"{name!r} is not a Hub name: {e}; write USER/NAME") from e


def _refusal(e: BaseException, repo_id: str) -> str:
    response = getattr(e, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403):
        return (
            f"{repo_id}: the Hub does not let this token write there (HTTP {status}); log in with "
            "`hf auth login` and a token that may write"
        )
    line = first_line(e)
    return (
        f"{repo_id}: the upload stopped: {line}; run the same command again, what has arrived is "
        "not sent twice"
    )
