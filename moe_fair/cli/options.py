"""The options of the command line, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def option(*names: str, text: str, panel: str | None = None, hidden: bool = False) -> Any:
    """An option with its help text, in a panel of the help screen."""
    plain = text.replace("[", "\\[")  # a bracket is not markup here
    return typer.Option(
        *names, help=plain, rich_help_panel=panel, show_default=False, hidden=hidden
    )


TEXT, SCORE, TARGET, RUN = (
    "Calibration text",
    "Scores and budget",
    "Target (exactly one)",
    "Running",
)

Model = Annotated[str | None, typer.Argument(help="Model directory or Hub id", show_default=False)]
Output = Annotated[Path, option("-o", "--output", text="New directory for the result")]
NamedOutput = Annotated[
    Path | None,
    option(
        "-o",
        "--output",
        text="New directory for the result  [default: model and target, in this directory]",
    ),
]
Revision = Annotated[
    str | None, option("--revision", text="Branch, tag or commit on the Hub", panel=RUN)
]
Trust = Annotated[
    bool | None,
    option(
        "--trust-remote-code",
        text="Run a tokenizer's code that lies beside the weights; a model's own is never run, the "
        "stock class serves",
        panel=RUN,
    ),
]
AllowPickle = Annotated[
    bool | None,
    option(
        "--allow-pickle",
        text="Where a model has no safetensors, read its pickled weights (.bin): tensors only, "
        "nothing in them is run",
        panel=RUN,
    ),
]
Calibration = Annotated[
    list[str] | None,
    option(
        "-c",
        "--calibration",
        text="[domain=]WHERE[:weight]; WHERE is a .txt, .jsonl, .json, .csv or .parquet file, a "
        "directory of them, or a dataset id[:config][@split], whose first : is its config's: a "
        "weight is id@split:2. Repeat for a mix  [default: NeelNanda/pile-10k]",
        panel=TEXT,
    ),
]
Samples = Annotated[
    int | None, option("--samples", text="Calibration sequences  [default: 512]", panel=TEXT)
]
Length = Annotated[
    int | None, option("--length", text="Tokens in each  [default: 512]", panel=TEXT)
]
Seed = Annotated[
    int | None,
    option("--seed", text="Decides which documents are drawn  [default: 0]", panel=TEXT),
]
BatchSize = Annotated[
    int | None, option("--batch-size", text="Sequences per batch  [default: 8]", panel=RUN)
]
Dtype = Annotated[
    str | None,
    option(
        "--dtype",
        text="auto, checkpoint, float32, bfloat16 or float16  [default: auto: float32 on a CPU, "
        "as on disk elsewhere]",
        panel=RUN,
    ),
]
Device = Annotated[
    str | None, option("--device", text="auto, cpu, cuda, ...  [default: auto]", panel=RUN)
]
EngineName = Annotated[
    str | None,
    option(
        "--engine",
        text="auto, resident (the model in memory) or streaming (one layer at a time)  "
        "[default: auto, by size and free memory]",
        panel=RUN,
    ),
]
DeviceMap = Annotated[
    str | None,
    option(
        "--device-map",
        text="auto, balanced or a file of module: device lines: spread the model of one process "
        "over several devices, main memory (cpu) and disk",
        panel=RUN,
    ),
]
Checkpointing = Annotated[
    bool | None,
    option(
        "--checkpointing",
        text="Run each layer again in the backward: keeps the activations of one layer at a time",
        panel=RUN,
    ),
]
MaxMemory = Annotated[
    str | None,
    option("--max-memory", text="The most that weights may take in memory, as 16GB", panel=RUN),
]
SaveEvery = Annotated[
    int | None,
    option(
        "--save-every",
        text="Batches after which partial statistics are saved, for a killed run to go on from  "
        "[default: 32]",
        panel=RUN,
    ),
]
Fresh = Annotated[bool | None, option("--fresh", text="Discard what a killed run left", panel=RUN)]
For = Annotated[
    str | None,
    option(
        "--for",
        text="Collect exactly what these methods need: a,b,c of criterion, criterion/allocator, "
        "merge, and default for what is collected without this option",
        panel=TEXT,
    ),
]
# of earlier versions, for one release; see pipelines/collection.py
Taylor = Annotated[bool | None, option("--taylor/--no-taylor", text="See --for", hidden=True)]
Counterfactual = Annotated[
    bool | None, option("--counterfactual/--no-counterfactual", text="See --for", hidden=True)
]
UScore = Annotated[bool | None, option("--u-score/--no-u-score", text="See --for", hidden=True)]
Gram = Annotated[bool | None, option("--gram/--no-gram", text="See --for", hidden=True)]
Alone = Annotated[bool | None, option("--alone/--no-alone", text="See --for", hidden=True)]
Curves = Annotated[
    str | None,
    option(
        "--curves",
        text="Also measure what each layer's depth costs when experts leave in the order of this "
        "criterion, for plan --allocate curves",
        panel=TEXT,
    ),
]
CurveSamples = Annotated[
    int | None,
    option(
        "--curve-samples",
        text="Calibration sequences on which removals and cost curves are measured  [default: 16]",
        panel=TEXT,
    ),
]
Reduce = Annotated[
    str | None,
    option(
        "--reduce",
        text="prune, or merge: average clusters of experts with like outputs into one each "
        "(HC-SMoE); uniform budget, no repair  [default: prune]",
        panel=SCORE,
    ),
]
Mtp = Annotated[
    str | None,
    option(
        "--mtp",
        text="Heads for multi-token prediction: cut (as many experts as the layers have), drop, or "
        "keep (unequal counts only)  [default: cut where the head's layer is like the body's]",
        panel=SCORE,
    ),
]
HashLayers = Annotated[
    str | None,
    option(
        "--hash-layers",
        text="Layers that look experts up by token id (DeepSeek V4's first): keep them whole, or "
        "cut them like others, their table naming the nearest remaining experts  [default: keep]",
        panel=SCORE,
    ),
]
RepairName = Annotated[
    str | None,
    option(
        "--repair",
        text="Fit the remaining experts to the original model, layer by layer: none, scale, "
        "channel, variance, matrix, refit, distill or novice  [default: distill]",
        panel=SCORE,
    ),
]
Method = Annotated[
    str | None,
    option(
        "--method",
        text="second-order, fair (ToD), fair-u (ToD on U-Scores between calibration domains), or a "
        "criterion: reap, frequency, ean, ...  [default: second-order; fair with --tolerance]",
        panel=SCORE,
    ),
]
Removal = Annotated[
    str | None, option("--removal", text="Criterion whose lowest scores leave", panel=SCORE)
]
Protection = Annotated[
    str | None,
    option("--protection", text="Criterion whose highest scores are protected", panel=SCORE),
]
Allocate = Annotated[
    str | None,
    option(
        "--allocate",
        text="tod, uniform, global, global-normalised, curves (measured costs), tod-curves, "
        "fisher (all layers together, by Taylor rows) or naee (sets by reconstruction error)",
        panel=SCORE,
    ),
]
Rivals = Annotated[
    str | None,
    option(
        "--rivals",
        text="Methods whose plans are tried against the method's own on held-back calibration "
        "text, as reap,mone/global; none: none  [default: some where no --method is given]",
        panel=SCORE,
    ),
]
TrialSamples = Annotated[
    int | None,
    option(
        "--trial-samples",
        text="Calibration sequences held back for that, at most an eighth of all  [default: 64]",
        panel=TEXT,
    ),
]
Weights = Annotated[
    str | None,
    option(
        "--weights",
        text="Domain weights in the scores, 1 for those not named: python=2,rust-docs=0",
        panel=SCORE,
    ),
]
MinExperts = Annotated[
    int | None,
    option("--min-experts", text="Fewest kept in any layer (never below top-k)", panel=SCORE),
]
MultipleOf = Annotated[
    int | None, option("--multiple-of", text="Kept counts are multiples of this", panel=SCORE)
]
Experts = Annotated[
    float | None, option("--experts", text="Experts kept per layer on average", panel=TARGET)
]
Total = Annotated[int | None, option("--total", text="Experts kept over all layers", panel=TARGET)]
Ratio = Annotated[
    float | None, option("--ratio", text="Share of all experts removed, 0 to 1", panel=TARGET)
]
Size = Annotated[
    str | None,
    option(
        "--size", text="Most that the whole model may hold: 8B parameters, or 20GB", panel=TARGET
    ),
]
Tolerance = Annotated[
    float | None,
    option(
        "--tolerance",
        text="ToD's α and no budget: each layer goes as deep as it allows",
        panel=TARGET,
    ),
]
RecipeFile = Annotated[
    Path | None,
    option(
        "--recipe",
        text="YAML file of settings, or the name of one that comes along (moe-fair recipes); "
        "options given here win",
    ),
]
Heldout = Annotated[
    list[str] | None,
    option(
        "--heldout",
        text="Held-out text (as --calibration) on which original and pruned are measured",
        panel=TEXT,
    ),
]
HeldoutSamples = Annotated[
    int | None,
    option("--heldout-samples", text="Most held-out windows  [default: 1024]", panel=TEXT),
]
Json = Annotated[bool, option("--json", text="Print JSON for scripts")]
Debug = Annotated[bool, option("--debug", text="Show tracebacks")]


StatisticsFolder = Annotated[
    Path, typer.Argument(help="Directory that `calibrate` wrote", show_default=False)
]
PlanOutput = Annotated[Path | None, option("-o", "--output", text="Also write the plan here")]
PlanFile = Annotated[Path | None, option("--plan", text="Plan file made before")]
Stats = Annotated[Path | None, option("--stats", text="Directory that `calibrate` wrote")]

TASKS, PUBLISH = "Benchmarks", "Card"

Pruned = Annotated[Path, typer.Argument(help="Directory that `prune` wrote", show_default=False)]
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
AgreementText = Annotated[
    list[str] | None,
    option(
        "--heldout",
        text="Text (as --calibration of prune) for --agreement",
        panel="Agreement",
    ),
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
           panel=RUN),
]  # fmt: skip
EvalDtype = Annotated[
    str | None,
    option(
        "--dtype",
        text="auto, checkpoint, float32, bfloat16 or float16  [default: checkpoint for tasks, as "
        "lm_eval has it; auto for --agreement, as prune has it]",
        panel=RUN,
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
        panel=RUN,
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
