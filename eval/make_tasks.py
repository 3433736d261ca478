"""Make lm-eval tasks from held-out text: nothing to download, any language, any domain.

    python eval/make_tasks.py --text eval/text/heldout -o eval/tasks

Every .jsonl file of the text folder (one {"text": ...} a line) is a domain, and gives two tasks:

- `local_choice_DOMAIN`: CONTEXT characters of a document, and four continuations of CONTINUATION
  characters each: its own, and three that continue other documents of the same domain.
- `local_passages_DOMAIN`: rolling log-likelihood of passages of at most PASSAGE characters.

The group `local` is all of them. The same text and seed give the same bytes. Run the tasks with

    moe-fair eval MODEL --baseline ORIGINAL --tasks local --include-path eval/tasks
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

CONTEXT, CONTINUATION, PASSAGE = 300, 100, 1500  # characters
CHOICES = 4
LOADER = Path(__file__).parent / "tasks" / "load_items.py"
# where a document is cut: before white space, so that no word is split between the two halves
BREAK = re.compile(r"(?<=\S)(?=\s)")


def main() -> None:
    """Write the items, a YAML file per task, and the groups."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path("eval/text/heldout"))
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/tasks"))
    parser.add_argument("--items", type=int, default=240, help="most choice items per domain")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / LOADER.name).exists():
        shutil.copyfile(LOADER, args.output / LOADER.name)
    domains = []
    for file in sorted(args.text.glob("*.jsonl")):
        documents = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        items = choices(documents, args.items, random.Random(f"{args.seed} {file.stem}"))
        passages = [{"text": p} for d in documents for p in cut_passages(d)]
        _write_task(args.output, f"local_choice_{file.stem}", items, CHOICE_TASK)
        _write_task(args.output, f"local_passages_{file.stem}", passages, PASSAGES_TASK)
        domains.append(file.stem)
        print(f"{file.stem}: {len(items)} choice items, {len(passages)} passages")
    if not domains:
        raise SystemExit(f"{args.text}: no .jsonl file in this folder")
    _write_groups(args.output, domains)


def choices(documents: list[str], most: int, draw: random.Random) -> list[dict]:
    """Items of a true continuation against those of other documents, spread over the text."""
    found = [(n, *pair) for n, text in enumerate(documents) for pair in windows(text)]
    if len(found) > most:
        found = [found[i * len(found) // most] for i in range(most)]
    items = []
    for document, context, continuation in found:
        others = [c for n, _, c in found if n != document and c != continuation]
        if len(set(others)) < CHOICES - 1:
            raise SystemExit("too few documents in a domain to draw wrong continuations from")
        wrong = draw.sample(sorted(set(others)), CHOICES - 1)
        label = draw.randrange(CHOICES)
        wrong.insert(label, continuation)
        items.append({"context": context, "choices": wrong, "label": label})
    return items


def windows(text: str) -> Iterator[tuple[str, str]]:
    """Neighbouring (context, continuation) pairs of one document."""
    start = 0
    while (cut := BREAK.search(text, start + CONTEXT)) and len(text) >= cut.end() + CONTINUATION:
        end = cut.end() + CONTINUATION
        continuation = text[cut.end() : end]
        if len("".join(continuation.split())) >= CONTINUATION // 2:  # not mostly indentation
            yield text[start : cut.end()], continuation
        start = end


def cut_passages(text: str) -> Iterator[str]:
    """The document in parts of at most PASSAGE characters, cut between lines where it can be."""
    while text.strip():
        end = len(text) if len(text) <= PASSAGE else text.rfind("\n", 1, PASSAGE) + 1 or PASSAGE
        if text[:end].strip():
            yield text[:end]
        text = text[end:]


CHOICE_TASK = {
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": "",
    # all continuations have the same number of characters, so acc_norm would be the same number
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
PASSAGES_TASK = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    ],
}


def _write_task(folder: Path, name: str, items: list[dict], task: dict) -> None:
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    head = f"task: {name}\ncustom_dataset: !function {LOADER.stem}.load\n"
    body = {
        "dataset_kwargs": {"file": f"{name}.jsonl"},
        "test_split": "test",
        **task,
        "metadata": {"version": 1},
    }
    (folder / f"{name}.yaml").write_text(head + yaml.safe_dump(body, sort_keys=False))


def _write_groups(folder: Path, domains: list[str]) -> None:
    choice, passages = ([f"local_{k}_{d}" for d in domains] for k in ("choice", "passages"))
    mean = [{"metric": "acc", "weight_by_size": True}]
    groups = {
        "local_choice": {"task": choice, "aggregate_metric_list": mean},
        "local": {"task": ["local_choice", *passages]},
    }
    for name, body in groups.items():
        text = yaml.safe_dump({"group": name, **body, "metadata": {"version": 1}}, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text)


if __name__ == "__main__":
    main()
