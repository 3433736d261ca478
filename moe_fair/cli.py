"""The command line: parse, call, print. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_fair import __version__

if TYPE_CHECKING:
    from moe_fair.recipe import Recipe

app = typer.Typer(
    name="moe-fair",
    help="Prune the routed experts of Hugging Face mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _option(*names: str, text: str, panel: str | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


TEXT, SCORE, TARGET, RUN = "Calibration text", "Scores and budget", "Target (exactly one)", "Running"

Model = Annotated[str | None, typer.Argument(help="Model directory or Hub id", show_default=False)]
Output = Annotated[Path, _option("-o", "--output", text="New directory for the result")]
Revision = Annotated[str | None, _option("--revision", text="Branch, tag or commit on the Hub", panel=RUN)]
Trust = Annotated[bool | None, _option("--trust-remote-code", text="Run code that lies beside the model's weights", panel=RUN)]
Calibration = Annotated[list[str] | None, _option("-c", "--calibration", text="[domain=]WHERE[:weight]; WHERE is a .txt, .jsonl or .parquet file, a directory of them, or a dataset id[:config][@split]. Repeat for a mix  [default: NeelNanda/pile-10k]", panel=TEXT)]
Samples = Annotated[int | None, _option("--samples", text="Calibration sequences  [default: 128]", panel=TEXT)]
Length = Annotated[int | None, _option("--length", text="Tokens in each  [default: 512]", panel=TEXT)]
Seed = Annotated[int | None, _option("--seed", text="Decides which documents are drawn  [default: 0]", panel=TEXT)]
BatchSize = Annotated[int | None, _option("--batch-size", text="Sequences per batch  [default: 8]", panel=RUN)]
Dtype = Annotated[str | None, _option("--dtype", text="auto, checkpoint, float32, bfloat16 or float16  [default: auto: float32 on a CPU, as on disk elsewhere]", panel=RUN)]
Device = Annotated[str | None, _option("--device", text="auto, cpu, cuda, ...  [default: auto]", panel=RUN)]
Taylor = Annotated[bool | None, _option("--taylor/--no-taylor", text="Also run the backward and collect gate Taylor scores  [default: --taylor]", panel=TEXT)]
Method = Annotated[str | None, _option("--method", text="fair (ToD), or a criterion: reap, frequency, ean, ...  [default: fair]", panel=SCORE)]
Removal = Annotated[str | None, _option("--removal", text="Criterion whose lowest scores leave", panel=SCORE)]
Protection = Annotated[str | None, _option("--protection", text="Criterion whose highest scores are protected", panel=SCORE)]
Allocate = Annotated[str | None, _option("--allocate", text="tod, uniform, global or global-normalised", panel=SCORE)]
Weights = Annotated[str | None, _option("--weights", text="Domain weights in the scores: python=2,rust-docs=1", panel=SCORE)]
MinExperts = Annotated[int | None, _option("--min-experts", text="Fewest kept in any layer (never below top-k)", panel=SCORE)]
MultipleOf = Annotated[int | None, _option("--multiple-of", text="Kept counts are multiples of this", panel=SCORE)]
Experts = Annotated[float | None, _option("--experts", text="Experts kept per layer on average", panel=TARGET)]
Total = Annotated[int | None, _option("--total", text="Experts kept over all layers", panel=TARGET)]
Ratio = Annotated[float | None, _option("--ratio", text="Share of all experts removed, 0 to 1", panel=TARGET)]
Size = Annotated[str | None, _option("--size", text="Most that the whole model may hold: 8B parameters, or 20GB", panel=TARGET)]
Tolerance = Annotated[float | None, _option("--tolerance", text="ToD's α and no budget: each layer goes as deep as it allows", panel=TARGET)]
RecipeFile = Annotated[Path | None, _option("--recipe", text="YAML file of settings; options given here win")]
Heldout = Annotated[list[str] | None, _option("--heldout", text="Held-out text (as --calibration) on which original and pruned are measured", panel=TEXT)]
HeldoutSamples = Annotated[int | None, _option("--heldout-samples", text="Most held-out windows  [default: 1024]", panel=TEXT)]
Json = Annotated[bool, _option("--json", text="Print JSON for scripts")]
Debug = Annotated[bool, _option("--debug", text="Show tracebacks")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, _option("--version", text="Print the version")] = False,
) -> None:
    if version:
        print(f"moe-fair {__version__}")
        raise typer.Exit


@app.command()
def calibrate(
    model: Model = None, output: Output = ..., recipe: RecipeFile = None,  # type: ignore[assignment]
    calibration: Calibration = None, samples: Samples = None, length: Length = None,
    seed: Seed = None, taylor: Taylor = None, batch_size: BatchSize = None, dtype: Dtype = None,
    device: Device = None, revision: Revision = None, trust_remote_code: Trust = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Gather statistics of every routed expert from calibration text."""
    settings = _settings(locals())
    from moe_fair import pipeline

    statistics = pipeline.calibrate(settings, output, _say)
    experts = sum(g.size for g in statistics.groups)
    print(
        f"{output}: statistics of {experts} experts in {len(statistics.groups)} layers over "
        f"{int(statistics.tokens.sum()):,} tokens\nnext: moe-fair plan {output} --experts N"
    )


@app.command()
def plan(
    statistics: Annotated[Path, typer.Argument(help="Directory that `calibrate` wrote", show_default=False)],
    output: Annotated[Path | None, _option("-o", "--output", text="Also write the plan to this file")] = None,
    recipe: RecipeFile = None, experts: Experts = None, total: Total = None, ratio: Ratio = None,
    size: Size = None, tolerance: Tolerance = None, method: Method = None, removal: Removal = None,
    protection: Protection = None, allocate: Allocate = None, weights: Weights = None,
    min_experts: MinExperts = None, multiple_of: MultipleOf = None, as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Decide which experts stay: a budget per layer, in milliseconds."""
    settings = _settings(locals())
    from moe_fair import pipeline
    from moe_fair.core.units import Statistics
    from moe_fair.tables import plan_table

    made = pipeline.plan(Statistics.load(statistics), settings)
    if output is not None:
        made.save(output)
    if as_json:
        sys.stdout.write(made.to_json())
    else:
        plan_table(made)


@app.command()
def prune(
    model: Model = None, output: Output = ..., recipe: RecipeFile = None,  # type: ignore[assignment]
    plan: Annotated[Path | None, _option("--plan", text="Plan file made before")] = None,
    stats: Annotated[Path | None, _option("--stats", text="Directory that `calibrate` wrote")] = None,
    experts: Experts = None, total: Total = None, ratio: Ratio = None, size: Size = None,
    tolerance: Tolerance = None, method: Method = None, removal: Removal = None,
    protection: Protection = None, allocate: Allocate = None, weights: Weights = None,
    min_experts: MinExperts = None, multiple_of: MultipleOf = None,
    calibration: Calibration = None, samples: Samples = None, length: Length = None,
    seed: Seed = None, taylor: Taylor = None, heldout: Heldout = None,
    heldout_samples: HeldoutSamples = None, batch_size: BatchSize = None, dtype: Dtype = None,
    device: Device = None, revision: Revision = None, trust_remote_code: Trust = None,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Calibrate, plan and cut: a smaller checkpoint that loads with transformers."""
    settings = _settings(locals())
    from moe_fair import pipeline
    from moe_fair.core.plan import Plan
    from moe_fair.core.units import Statistics
    from moe_fair.tables import plan_table, pruned_json, pruned_summary

    if plan is not None and stats is not None:
        raise ValueError("give --plan or --stats, not both: a plan already holds its decision")
    if plan is not None and any(getattr(settings, t) is not None for t in ("experts", "total", "ratio", "size", "tolerance")):
        raise ValueError("a --plan already meets its own target; leave the target out, or give --stats")
    done = pipeline.prune(
        settings,
        output,
        statistics=Statistics.load(stats) if stats else None,
        ready=Plan.load(plan) if plan else None,
        say=_say,
    )
    if as_json:
        print(json.dumps(pruned_json(done), indent=1))
    else:
        plan_table(done.plan)
        pruned_summary(done)


def _settings(given: dict[str, Any]) -> Recipe:
    """The recipe file, with the options of the command line over it."""
    from moe_fair.recipe import Recipe, load_recipe

    base = load_recipe(given["recipe"]) if given.get("recipe") else Recipe()
    names = set(Recipe.__dataclass_fields__)
    chosen = {k: v for k, v in given.items() if k in names and v is not None}
    if "weights" in chosen:
        chosen["weights"] = _parse_weights(chosen["weights"])
    return base.with_settings(chosen)


def _parse_weights(text: str) -> dict[str, float]:
    try:
        pairs = [item.rsplit("=", 1) for item in text.split(",")]
        return {domain.strip(): float(weight) for domain, weight in pairs}
    except ValueError:
        raise ValueError(f"--weights {text!r}: write domain=weight,domain=weight") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit code 2 and one line for bad input, a traceback with --debug."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _quieten()
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="moe-fair", standalone_mode=False)
    except KeyboardInterrupt:
        _say("moe-fair: interrupted")
        sys.exit(130)
    except Exception as e:
        if "--debug" in arguments:
            traceback.print_exc()
        sys.exit(_fail(e))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(e: Exception) -> int:
    """Print one line for an exception and return the exit code: 2 where the user can mend it."""
    format_message = getattr(e, "format_message", None)  # what the option parser raises
    if format_message is not None:
        text = format_message()
        if not text:  # no arguments at all: the help was printed
            return getattr(e, "exit_code", 2)
        _say(f"moe-fair: error: {' '.join(text.split())} (--help lists the options)")
        return 2
    text = " ".join(str(e).split()) or type(e).__name__
    if isinstance(e, (ValueError, OSError)):
        _say(f"moe-fair: error: {text}")
        return 2
    _say(f"moe-fair: internal error: {type(e).__name__}: {text} (--debug shows where)")
    return 1


def _quieten() -> None:
    """Leave the screen to our own progress: no bars or advice of the libraries below."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.captureWarnings(True)


if __name__ == "__main__":
    main()
