"""The command line: parse, call, print. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_fair.cli import terminal
from moe_fair.cli.options import (
    Against,
    AllowPickle,
    ApplyChatTemplate,
    Baseline,
    BaseModel,
    Checkpoint,
    Converter,
    Debug,
    DryRun,
    EvalBatchSize,
    EvalDtype,
    EvalOutput,
    ExportFile,
    ExportTo,
    Format,
    IncludePath,
    Json,
    License,
    Limit,
    LogSamples,
    MeasureAgreement,
    NamedOutput,
    NumFewshot,
    Output,
    OutType,
    Pad,
    PlanOutput,
    Private,
    Pruned,
    PruneDryRun,
    PushRevision,
    RecipeFile,
    RepoId,
    ReportOutput,
    Revision,
    SampleOutput,
    SettingName,
    StatisticsFolder,
    Tasks,
    Trust,
    WriteList,
    option,
)
from moe_fair.cli.recipes import recipes
from moe_fair.cli.schema import FOOT, Command, takes
from moe_fair.cli.vision import app as vision_app
from moe_fair.core.garbage import uncollected
from moe_fair.core.made_files import find_statistics
from moe_fair.core.manifest import check_result
from moe_fair.core.printable import printable
from moe_fair.core.recipe import Recipe, check_taken
from moe_fair.engines import processes
from moe_fair.pipelines.choices import check_spelling
from moe_fair.pipelines.early_checks import (
    check_local,
    check_made,
    check_model_folder,
    check_texts,
    target,
)
from moe_fair.version import __version__

if TYPE_CHECKING:
    from moe_fair.core.units import Statistics

app = typer.Typer(
    name="moe-fair",
    help="Prune the routed experts of Hugging Face mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(vision_app, name="vision")
app.command()(recipes)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, option("--version", text="Print the version")] = False,
) -> None:
    if version:
        print(f"moe-fair {__version__}")
        raise typer.Exit


@app.command(cls=Command, epilog=FOOT)
@takes(Recipe, "calibrate")
def calibrate(
    given: dict[str, Any], output: NamedOutput = None, recipe: RecipeFile = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Gather statistics of every routed expert from calibration text."""
    settings = _settings(given, recipe, "calibrate")
    check_model_folder(settings.model)
    check_texts(settings.calibration)
    with uncollected():
        from moe_fair.pipelines.methods import check_names
    check_names(settings)
    from moe_fair.pipelines import moe as pipeline
    from moe_fair.pipelines.default_output import statistics_output

    if output is None:
        output = statistics_output(settings)
        _say(f"output: {output}")
    statistics = pipeline.calibrate(settings, output, _say)
    if statistics is None:  # another process of this run has them
        return
    experts, name = sum(g.size for g in statistics.groups), printable(output)
    print(
        f"{name}: statistics of {experts} experts in {len(statistics.groups)} layers over "
        f"{int(statistics.tokens.sum()):,} tokens\nnext: moe-fair plan {name} --experts N"
    )


@app.command(cls=Command, epilog=FOOT)
@takes(Recipe, "sample")
def sample(
    given: dict[str, Any], output: SampleOutput = ..., debug: Debug = False,  # type: ignore[assignment]
) -> None:  # fmt: skip
    """Sample calibration text from the model itself, for -c FILE or to be looked at."""
    settings = _settings(given, None, "sample")
    check_model_folder(settings.model)
    from moe_fair.pipelines import own_text as pipeline

    pipeline.sample(settings, output, _say)
    if processes.is_first():
        model = printable(settings.model)
        print(f"next: moe-fair prune {model} -c self={printable(output)} --experts N")


@app.command(cls=Command, epilog=FOOT)
@takes(Recipe, "plan")
def plan(
    given: dict[str, Any], statistics: StatisticsFolder, output: PlanOutput = None,
    recipe: RecipeFile = None, as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Decide which experts stay: a budget per layer, in milliseconds."""
    settings = _settings(given, recipe, "plan")
    find_statistics(statistics)
    target(settings)
    with uncollected():
        from moe_fair.cli.tables import plan_table
        from moe_fair.pipelines.plan import plan as make
        from moe_fair.pipelines.rivals import rivals

    gathered = _statistics(statistics)
    made = make(gathered, settings)
    if rivals(settings) and gathered.metadata["calibration"].get("held_back"):
        _say("note: not tried against other plans, which takes the model: prune --stats does")
    if output is not None:
        made.save(output)
    if as_json:
        sys.stdout.write(made.to_json())
    else:
        plan_table(made)


@app.command(cls=Command, epilog=FOOT)
@takes(Recipe, "prune")
def prune(
    given: dict[str, Any], output: NamedOutput = None, recipe: RecipeFile = None,
    dry_run: PruneDryRun = False, as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Calibrate, plan and cut: a smaller checkpoint that loads with transformers."""
    settings = _settings(given, recipe, "prune")
    check_model_folder(settings.model)
    check_made(settings.stats, settings.plan)
    if settings.plan is None:
        target(settings)
    anew = settings.stats is None and settings.plan is None
    check_texts((*settings.heldout, *(settings.calibration if anew else ())))
    with uncollected():
        from moe_fair.pipelines.methods import check_names
    check_names(settings, repairs=True)
    from moe_fair.cli.tables import plan_table, pruned_json, pruned_summary
    from moe_fair.core.plan import Plan
    from moe_fair.pipelines import moe as pipeline
    from moe_fair.pipelines.default_output import pruned_output
    from moe_fair.pipelines.unused_settings import check_untargeted

    if "plan" in given:
        check_untargeted(given)
    ready = Plan.load(Path(settings.plan)) if settings.plan else None
    if output is None:
        output = pruned_output(settings, ready.target if ready else None)
        _say(f"output: {output}")
    gathered = _statistics(Path(settings.stats)) if settings.stats else None
    if dry_run:
        from moe_fair.cli.tables import dry_run_report
        from moe_fair.pipelines.dry_run import dry_run as try_out

        found = try_out(settings, output, statistics=gathered, ready=ready, say=_say)
        if processes.is_first():
            print(json.dumps(asdict(found), indent=1)) if as_json else dry_run_report(found)
        return
    done = pipeline.prune(settings, output, statistics=gathered, ready=ready, say=_say)
    if not processes.is_first():
        return
    if as_json:
        print(json.dumps(pruned_json(done), indent=1))
    else:
        plan_table(done.plan)
        pruned_summary(done)


@app.command(cls=Command, epilog=FOOT)
@takes(Recipe, "oracle")
def oracle(
    given: dict[str, Any], output: Output = ..., recipe: RecipeFile = None,  # type: ignore[assignment]
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Measure the loss change of each expert removed alone; compare every criterion with it."""
    settings = _settings(given, recipe, "oracle")
    check_model_folder(settings.model)
    check_made(settings.stats, settings.plan)
    from moe_fair.cli.tables import oracle_table
    from moe_fair.pipelines import moe as pipeline

    gathered = _statistics(Path(settings.stats)) if settings.stats else None
    found, table = pipeline.oracle(settings, output, statistics=gathered, say=_say)
    if as_json:
        print((output / "agreement.json").read_text(), end="")
    else:
        oracle_table(found, table)


@app.command(name="eval", cls=Command, epilog=FOOT)
@takes(Recipe, "eval")
def evaluate(
    given: dict[str, Any], baseline: Baseline = None, output: EvalOutput = None,
    tasks: Tasks = None, num_fewshot: NumFewshot = None, limit: Limit = None,
    apply_chat_template: ApplyChatTemplate = False, include_path: IncludePath = None,
    log_samples: LogSamples = False, agreement: MeasureAgreement = False,
    batch_size: EvalBatchSize = None, dtype: EvalDtype = None,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Run lm-eval's benchmarks, or measure agreement with the original."""
    model = given.get("model")
    if model is None or not (tasks or agreement):
        raise ValueError("give a MODEL and --tasks, or --agreement")
    if agreement and baseline is None:
        raise ValueError("--agreement compares with the original: name it with --baseline")
    from moe_fair.pipelines.unused_settings import check_used_by_eval

    own = {
        "num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": apply_chat_template,
        "include_path": include_path, "log_samples": log_samples,
    }  # fmt: skip
    check_used_by_eval({**own, **given}, {"--tasks": bool(tasks), "--agreement": agreement})
    if dtype is not None:
        given["dtype"] = dtype
    if batch_size is not None and batch_size.isdigit():
        given["batch_size"] = int(batch_size)
    settings = _settings(given, None, "eval")
    check_local(model)
    if baseline is not None:
        check_local(baseline)
    check_texts(settings.heldout)
    from moe_fair.cli.tables import evaluation, evaluation_json
    from moe_fair.moe.checkpoint_source import Checkpoint
    from moe_fair.pipelines import evaluate as evaluating

    rows = found = None
    trusted = (settings.trust_remote_code, settings.allow_pickle)
    with evaluating.claimed(model, output) as folder:
        source = Checkpoint(model, settings.revision, *trusted)
        original = Checkpoint(baseline, None, *trusted) if baseline else None
        if tasks:
            from moe_fair.evaluate.benchmark import Benchmark, names

            benchmark = Benchmark(
                tasks=names(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size or "8",
                dtype=dtype or "checkpoint",
                device=settings.device,
                apply_chat_template=apply_chat_template,
                include_path=include_path,
            )
            rows = evaluating.run_benchmarks(
                source, original, benchmark,
                folder=folder, log_samples=log_samples, say=_say, quiet=_without_bars,
            )  # fmt: skip
        if agreement and original is not None:
            found = evaluating.run_agreement(settings, source, original, folder, _say)
        if not processes.is_first():
            return
        if folder is not None and output is None:
            from moe_fair.report.write import write_report

            _say(f"report: {write_report(source.path)}")
    if as_json:
        print(json.dumps(evaluation_json(rows, found), indent=1))
    else:
        evaluation(rows, found)


@app.command(cls=Command)
def report(
    out: Pruned, output: ReportOutput = None, format: Format = "html", debug: Debug = False
) -> None:
    """Draw what a pruning run did: one page, written by prune and eval as well."""
    check_result(out)
    from moe_fair.report.write import write_report

    print(printable(write_report(out, format, output)))


@app.command(cls=Command)
def verify(
    out: Pruned, against: Against = None, write: WriteList = False, revision: Revision = None,
    trust_remote_code: Trust = None, allow_pickle: AllowPickle = None, as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Check a pruned checkpoint: hashes, code, plan against tensors, experts against the original.

    Exit code 1 where something is wrong.
    """
    if write and against is None:
        raise ValueError("--write lists what was compared: name the original with --against")
    check_result(out)
    if against is not None:
        check_local(against)
    from moe_fair.cli.tables import verified, verified_json
    from moe_fair.pipelines.verify import list_files
    from moe_fair.pipelines.verify import verify as check

    original = None
    if against is not None:
        from moe_fair.moe.checkpoint_source import Checkpoint

        original = Checkpoint(against, revision, bool(trust_remote_code), bool(allow_pickle))
    if write and original is not None:
        found = list_files(out, original)
    else:
        found = check(out, original, trust_remote_code=bool(trust_remote_code))
    if as_json:
        print(json.dumps(verified_json(found), indent=1))
    else:
        verified(found)
    raise typer.Exit(0 if found.ok else 1)


@app.command(cls=Command)
def check(out: Checkpoint, as_json: Json = False, debug: Debug = False) -> None:
    """List which engines serve a checkpoint, and how; any folder, pruned or not."""
    from moe_fair.cli.tables import serving_json, serving_report
    from moe_fair.core.layout import read_layout

    layout = read_layout(out)
    if as_json:
        print(json.dumps(serving_json(layout, str(out)), indent=1))
    else:
        serving_report(layout, str(out))


@app.command(cls=Command)
def export(
    out: Checkpoint, to: ExportTo, file: ExportFile = None, converter: Converter = None,
    outtype: OutType = "auto", pad: Pad = False, as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Write a checkpoint in another engine's format: GGUF, by llama.cpp's own converter."""
    if to != "gguf":
        raise ValueError(f"--to {to}: gguf is the one format there is")
    from moe_fair.publish.gguf import export_gguf

    made = export_gguf(out, file=file, converter=converter, outtype=outtype, pad=pad, say=_say)
    if as_json:
        print(json.dumps(asdict(made), default=str, indent=1))
    else:
        print(f"{made.file}: {made.bytes / 1e9:.2f} GB; serve it with llama-server -m {made.file}")


@app.command(cls=Command)
def push(
    out: Pruned, repo: RepoId, private: Private = False, revision: PushRevision = None,
    base_model: BaseModel = None, license: License = None, dry_run: DryRun = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Upload a pruned checkpoint to the Hub with its model card, in one commit."""
    check_result(out)
    from moe_fair.cli.tables import upload
    from moe_fair.publish import push as publish

    upload(
        publish.push(
            out, repo, private=private, revision=revision, base_model=base_model, license=license,
            dry_run=dry_run, say=_say,
        )
    )  # fmt: skip


@app.command(name="settings", cls=Command)
def list_settings(name: SettingName = None, as_json: Json = False, debug: Debug = False) -> None:
    """List every setting of a run with its default and commands, or show one in full."""
    from moe_fair.cli.settings import show

    show(name, as_json)


def _settings(given: dict[str, Any], file: Path | None, command: str) -> Recipe:
    """The recipe file, with the options of the command line over it."""
    from moe_fair.core.bundled_recipes import EXPERTS, recipe_path
    from moe_fair.core.recipe_file import load_recipe

    check_taken(given, command)
    base = load_recipe(recipe_path(file, EXPERTS)) if file else Recipe()
    recipe = base.with_settings(given)
    check_spelling(recipe)
    return recipe


def _statistics(path: Path) -> Statistics:
    from moe_fair.core.units import Statistics

    found = Statistics.load(path)
    if not found.digest:
        _say(
            f"note: {path} is of an earlier version, without a digest: whether its numbers are "
            "those that were measured cannot be seen"
        )
    return found


@contextmanager
def _without_bars() -> Iterator[None]:
    """Drop the progress bars that lm-eval writes whatever is set, but on a terminal.

    Of several processes the first alone shows them, and what lm-eval prints.
    """
    with ExitStack() as quiet:
        if not (processes.is_first() and sys.stderr.isatty()):
            quiet.enter_context(redirect_stderr(io.StringIO()))
        if not processes.is_first():
            quiet.enter_context(redirect_stdout(io.StringIO()))
        yield


def _say(line: str) -> None:
    if processes.is_first():
        terminal.say(line)
