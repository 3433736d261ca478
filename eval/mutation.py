"""Mutation testing of `moe_fair/core`: change the code a little, and see whether a test notices.

    python -m venv mutants && . mutants/bin/activate
    pip install -c constraints.txt -e ".[test]" cosmic-ray
    python eval/mutation.py                      # every mutant
    python eval/mutation.py --share 0.3 --seed 0 # of each module three in ten, evenly drawn
    python eval/mutation.py --only sketch.py --show -o tried.json
    python eval/mutation.py --again tried.json   # what survived there

Mutants are cosmic-ray's; each is tried by the tests named in TESTS, in a fork of a process that has
torch and the test tools imported already, on a copy of the tree. Left out are those that cannot be
noticed or are noticed by any test: changes of type annotations, shifts and bit operations in the
place of arithmetic, `is` for `==` and the other way round, `frozen=True` of the dataclasses, and
zip's `strict=True`, which guards what cannot be.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import hypothesis
import numpy  # noqa: F401  # imported once, for all mutants
import pytest
import safetensors.torch  # noqa: F401
import scipy.optimize
import scipy.stats  # noqa: F401
import torch
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from hypothesis import Phase

ROOT = Path(__file__).parent.parent
CORE = ROOT / "moe_fair" / "core"
ALLOCATION = ("test_registry.py", "test_climb.py", "test_tolerance.py", "test_cost_curves.py")
# what tries a module's mutants, in tests/core
TESTS = {
    "criterion.py": ("test_refusals.py", "test_plans_and_statistics.py"),
    "distances.py": ("test_distances.py",),
    "evolution.py": ("test_evolution.py",),
    "exact_sum.py": ("test_exact_sum.py",),
    "greedy.py": ("test_greedy.py",),
    "manifest.py": ("test_manifest.py",),
    "oracle.py": ("test_oracle.py", "test_refusals.py"),
    "output.py": ("test_output.py",),
    "registry.py": ("test_registry.py",),
    "sketch.py": ("test_sketch.py",),
    "units.py": ("test_refusals.py", "test_plans_and_statistics.py", "test_exact_sum.py"),
    "cost_curves.py": ("test_cost_curves.py",),
    "engine_facts.py": ("test_engine_facts.py",),
    "interrupts.py": ("test_interrupts.py",),
    "lock.py": ("test_lock.py",),
    "method.py": ("test_method.py",),
    "printable.py": ("test_printable.py",),
    "yaml_file.py": ("test_yaml_file.py",),
    "allocate/__init__.py": ("test_registry.py",),
    "plan.py": ("test_refusals.py", "test_plans_and_statistics.py", "test_climb.py"),
    "ranking.py": ("test_climb.py", "test_tolerance.py"),
    "allocate/climb.py": ("test_climb.py",),
    "allocate/curves.py": ("test_registry.py", "test_climb.py", "test_cost_curves.py"),
    "allocate/fisher.py": ("test_registry.py", "test_climb.py", "test_cost_curves.py"),
    "allocate/tod.py": ("test_registry.py", "test_climb.py", "test_tolerance.py"),
    "allocate/naee.py": ("test_registry.py", "test_greedy.py", "test_climb.py"),
}
SMALL = 5.0  # seconds of a processor beyond three times what a module's tests take as it is
# replacements that no test could tell, or any would
PLAIN = ("Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow")
ORDER = ("Eq", "NotEq", "Lt", "LtE", "Gt", "GtE")


@dataclass(frozen=True)
class Mutant:
    """A change: the module, cosmic-ray's operator and which of its places, and what came of it."""

    module: str
    operator: str
    occurrence: int
    line: int
    outcome: str = ""
    diff: str = ""


def fair(operator: str) -> bool:
    """The operator's mutants say something about tests."""
    kind = operator.removeprefix("core/")
    if kind.startswith("ReplaceBinaryOperator"):
        return all(k in PLAIN for k in kind.split("_")[1:])
    if kind.startswith("ReplaceComparisonOperator"):
        old, new = kind.split("_")[1:]
        return (old in ORDER) == (new in ORDER)
    return not kind.startswith("Variable")  # these need to be told which variables


def left_alone(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where no test looks: annotations, the arguments of @dataclass, and zip's `strict`."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        found = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.ClassDef):
            found += [k for d in node.decorator_list if isinstance(d, ast.Call) for k in d.keywords]
        if isinstance(node, ast.keyword) and node.arg == "strict":
            found.append(node)  # a guard of our own, as assert is
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            name = getattr(node.targets[0], "id", "")  # Document = str | list[...]
            found += [node.value] if name[:1].isupper() and not name.isupper() else []
        spans += [((f.lineno, f.col_offset), (f.end_lineno, f.end_col_offset)) for f in found if f]
    return spans


def mutants(module: str) -> Iterator[Mutant]:
    """Every fair mutant of a module."""
    source = (CORE / module).read_text()
    spans = left_alone(source)
    for name in sorted(filter(fair, operator_names())):
        operator = get_operator(name)()
        places = [p for n in ast_nodes(get_ast(source)) for p in operator.mutation_positions(n)]
        for i, (start, end) in enumerate(places):
            if not any(a <= start and end <= b for a, b in spans):
                yield Mutant(module, name, i, start[0])


def changed(m: Mutant) -> tuple[str, str] | None:
    """The mutated source and what changed; None where it is the same program, or none at all."""
    source = (CORE / m.module).read_text()
    code = mutate_code(source, get_operator(m.operator)(), m.occurrence)
    assert code is not None
    try:
        if ast.dump(ast.parse(code)) == ast.dump(ast.parse(source)):
            return None
    except SyntaxError:  # the star of `*, keyword` taken for a multiplication
        return None
    lines = difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm="")
    return code, "\n".join(x for x in lines if x[:3] not in ("---", "+++") and x[:2] != "@@")


def tests_of(module: str) -> list[str]:
    """The files that try a module's mutants."""
    return [f"tests/core/{t}" for t in TESTS.get(module, ALLOCATION)]


def passes(folder: Path, module: str, limit: float) -> tuple[str, float]:
    """`survived`, `killed` or `timeout`, and the seconds of a processor that it took, in a fork."""
    child = os.fork()
    if child == 0:
        said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        most = 2**33 + int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(spent + limit) + 1,) * 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        code = 1
        try:
            options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider"]
            code = int(pytest.main([*options, *tests_of(module)]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    late = code in (-signal.SIGXCPU, -signal.SIGKILL)
    outcome = "survived" if code == 0 else "timeout" if late else "killed"
    return outcome, usage.ru_utime + usage.ru_stime


def draw(found: list[Mutant], share: float, seed: int) -> list[Mutant]:
    """This share of a module's mutants, every one as likely as the others."""
    count = -(-len(found) * round(share * 1000) // 1000)
    chosen = random.Random(seed).sample(range(len(found)), count)
    return [found[i] for i in sorted(chosen)]


def main() -> None:
    """Try the mutants, print what came of each module and of all, and write it all down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--share", type=float, default=1.0, help="of each module's mutants")
    parser.add_argument("--seed", type=int, default=0, help="decides which are drawn")
    parser.add_argument("--only", action="append", help="a module of core, as sketch.py")
    parser.add_argument("--show", action="store_true", help="print every survivor's change")
    parser.add_argument("--again", type=Path, help="JSON of a run: its survivors alone")
    parser.add_argument("-o", "--output", type=Path, help="JSON of all mutants tried")
    chosen = parser.parse_args()
    hypothesis.settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
    hypothesis.settings.load_profile("mutants")  # a failure is enough: no smaller one is wanted
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    for name in ("moe_fair", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "eval").symlink_to(ROOT / "eval")
    shutil.copy(ROOT / "pyproject.toml", folder)
    sys.dont_write_bytecode = True
    tried: list[Mutant] = []
    earlier = [Mutant(**m) for m in json.loads(chosen.again.read_text())] if chosen.again else []
    left = [m for m in earlier if m.outcome == "survived"]
    modules = sorted(f.relative_to(CORE).as_posix() for f in CORE.rglob("*.py"))
    if chosen.again:
        modules = [m for m in modules if any(x.module == m for x in left)]
    for module in chosen.only or [m for m in modules if m != "__init__.py"]:
        outcome, seconds = passes(folder, module, 600)
        if outcome != "survived":
            sys.exit(f"{module}: its tests fail as it is:\n{(folder / 'said.txt').read_text()}")
        every = list(mutants(module))
        mine = []
        wanted = [m for m in left if m.module == module]
        for m in wanted if chosen.again else draw(every, chosen.share, chosen.seed):
            if (change := changed(m)) is None:
                continue
            (folder / "moe_fair" / "core" / module).write_text(change[0])
            outcome, _ = passes(folder, module, 3 * seconds + SMALL)
            mine.append(Mutant(m.module, m.operator, m.occurrence, m.line, outcome, change[1]))
        shutil.copy(CORE / module, folder / "moe_fair" / "core" / module)
        tried += mine
        report(module, mine, len(every))
        for m in mine if chosen.show else ():
            if m.outcome == "survived":
                print(f"  {m.module}:{m.line}\n    " + m.diff.replace("\n", "\n    "))
        if chosen.output:
            chosen.output.write_text(json.dumps([asdict(m) for m in tried], indent=1) + "\n")
    report("all", tried, len(tried))
    shutil.rmtree(folder)


def report(what: str, tried: list[Mutant], of: int) -> None:
    """One line: tried, survived, the share killed."""
    survived = sum(m.outcome == "survived" for m in tried)
    late = sum(m.outcome == "timeout" for m in tried)
    share = 100 * (1 - survived / len(tried)) if tried else 100.0
    print(
        f"{what:32} {len(tried):5} tried of {of:5}, {survived:4} survived, {late:3} by time: "
        f"{share:5.1f} % killed",
        flush=True,
    )


if __name__ == "__main__":
    main()
