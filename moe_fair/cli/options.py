"""The options that are no settings of a run; those come from the fields of `Recipe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_fair.core.recipe import RUNNING, Recipe
from moe_fair.core.settings import flag, settings_of


def option(*names: str, text: str, panel: str | None = None, **more: Any) -> Any:
    """An option with its help text, under a heading of the help screen."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


Output = Annotated[Path, option("-o", "--output", text="New directory for the result")]
SampleOutput = Annotated[
    Path, option("-o", "--output", text="New file for the text, as self.jsonl")
]
NamedOutput = Annotated[
    Path | None,
    option(
        "-o",
        "--output",
        text="New directory for the result  [default: model and target, in this directory]",
    ),
]


def of_setting(name: str) -> Any:
    """The option of a setting, for a command that takes no others."""
    about = settings_of(Recipe)[name].about
    return option(flag(name), text=about.help, panel=about.panel)


Revision = Annotated[str | None, of_setting("revision")]
Trust = Annotated[bool | None, of_setting("trust_remote_code")]
AllowPickle = Annotated[bool | None, of_setting("allow_pickle")]
RecipeFile = Annotated[
    Path | None,
    option(
        "--recipe",
        text="YAML file of settings, or the name of one that comes along (moe-fair recipes); "
        "options given here win",
    ),
]
Json = Annotated[bool, option("--json", text="Print JSON for scripts")]
Debug = Annotated[bool, option("--debug", text="Show tracebacks")]


StatisticsFolder = Annotated[
    Path, typer.Argument(help="Directory that `calibrate` wrote", show_default=False)
]
PlanOutput = Annotated[Path | None, option("-o", "--output", text="Also write the plan here")]

TASKS, PUBLISH = "Benchmarks", "Card"

Pruned = Annotated[Path, typer.Argument(help="Directory that `prune` wrote", show_default=False)]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="OUT", help="Directory of a checkpoint", show_default=False)
]
Baseline = Annotated[
    str | None, option("--baseline", text="The original model, run on the same items and text")
]
Against = Annotated[
    str | None, option("--against", text="The original model, to compare every expert with")
]
WriteList = Annotated[
    bool,
    option(
        "--write",
        text="With --against: list the files of a result that has no moe_fair/manifest.json yet, "
        "once everything else is right",
    ),
]
Tasks = Annotated[
    list[str] | None,
    option(
        "--tasks",
        text="lm-eval's tasks and groups, and the suites hc-smoe, reap-mc and quick; a,b,c or "
        "repeated",
        panel=TASKS,
    ),
]
NumFewshot = Annotated[
    int | None, option("--num-fewshot", text="Examples before each question", panel=TASKS)
]
Limit = Annotated[
    float | None,
    option("--limit", text="Items per task, or their share below 1: for trying out", panel=TASKS),
]
ApplyChatTemplate = Annotated[
    bool, option("--apply-chat-template", text="Ask through the chat template", panel=TASKS)
]
IncludePath = Annotated[
    Path | None,
    option("--include-path", text="Folder of task files of your own, as eval/tasks", panel=TASKS),
]
LogSamples = Annotated[
    bool, option("--log-samples", text="Also save every question and answer", panel=TASKS)
]
MeasureAgreement = Annotated[
    bool,
    option(
        "--agreement",
        text="Loss, KL, same top-1 and speculative acceptance against --baseline on --heldout",
        panel="Agreement",
    ),
]
EvalBatchSize = Annotated[
    str | None,
    option("--batch-size", text="Sequences per batch, or auto (tasks only)  [default: 8]",
           panel=RUNNING),
]  # fmt: skip
EvalDtype = Annotated[
    str | None,
    option(
        "--dtype",
        text="auto, checkpoint, float32, bfloat16 or float16  [default: checkpoint for tasks, as "
        "lm_eval has it; auto for --agreement, as prune has it]",
        panel=RUNNING,
    ),
]
EvalOutput = Annotated[
    Path | None,
    option(
        "-o",
        "--output",
        text="Directory for the results  [default: in MODEL/moe_fair, if prune wrote MODEL]",
    ),
]
Format = Annotated[str, option("--format", text="html or md  [default: html]")]
ReportOutput = Annotated[
    Path | None,
    option("-o", "--output", text="File to write  [default: OUT/moe_fair/report.html or .md]"),
]
RepoId = Annotated[str, typer.Argument(help="USER/NAME on the Hub", show_default=False)]
ExportTo = Annotated[str, option("--to", text="Format: gguf, for llama.cpp")]
ExportFile = Annotated[
    Path | None, option("-o", "--output", text="File to write  [default: OUT.gguf]")
]
Converter = Annotated[
    Path | None,
    option(
        "--converter",
        text="llama.cpp's convert_hf_to_gguf.py  [default: that of the folder LLAMA_CPP names, or "
        "on the PATH]",
    ),
]
OutType = Annotated[
    str, option("--outtype", text="Data type, as the converter takes it  [default: auto]")
]
Pad = Annotated[
    bool,
    option(
        "--pad",
        text="Give every layer the largest number of experts, with slots that are never chosen",
    ),
]
Private = Annotated[bool, option("--private", text="Make the repository private, if it is new")]
PushRevision = Annotated[
    str | None, option("--revision", text="Branch to push to, made if it is new  [default: main]")
]
DryRun = Annotated[bool, option("--dry-run", text="Show what would go, and write the card")]
PruneDryRun = Annotated[
    bool,
    option(
        "--dry-run",
        text="Make every check, time one layer, say what a run would do and take; write nothing",
        panel=RUNNING,
    ),
]
BaseModel = Annotated[
    str | None,
    option(
        "--base-model", text="Hub id of the original, if you pruned a local copy", panel=PUBLISH
    ),
]
License = Annotated[
    str | None,
    option("--license", text="Licence on the card, if not the base model's", panel=PUBLISH),
]
SettingName = Annotated[
    str | None, typer.Argument(metavar="NAME", help="One setting, in full", show_default=False)
]
