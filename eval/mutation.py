"""Mutation testing of `moe_fair/core` and `moe_fair/moe/statistics`.

Change the code a little, and see whether a test notices.

    python -m venv mutants && . mutants/bin/activate
    pip install -c constraints.txt -e ".[test]" cosmic-ray coverage
    python eval/mutation.py                      # every mutant
    python eval/mutation.py --share 0.3 --seed 0 # of each module three in ten, evenly drawn
    python eval/mutation.py --only core/sketch.py --show -o tried.json
    python eval/mutation.py --again tried.json   # what survived there

Mutants are cosmic-ray's; each is tried, on a copy of the tree, by the files of unit tests that run
the changed line (coverage says which), those quickest that together take SPAN seconds, in a fork
of a process that has torch and the test tools imported already. Left out are those that cannot be
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
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import coverage
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
PACKAGE = ROOT / "moe_fair"
FOLDERS = ("core", "moe/statistics")  # whose modules are tried
SPAN = 60.0  # seconds of the tests that try a mutant
QUICK = "not slow and not nightly and not gpu"  # unit tests
SMALL = 5.0  # seconds of a processor beyond three times what the tests take as it is
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
    source = (PACKAGE / module).read_text()
    spans = left_alone(source)
    for name in sorted(filter(fair, operator_names())):
        operator = get_operator(name)()
        places = [p for n in ast_nodes(get_ast(source)) for p in operator.mutation_positions(n)]
        for i, (start, end) in enumerate(places):
            if not any(a <= start and end <= b for a, b in spans):
                yield Mutant(module, name, i, start[0])


def changed(m: Mutant) -> tuple[str, str] | None:
    """The mutated source and what changed; None where it is the same program, or none at all."""
    source = (PACKAGE / m.module).read_text()
    code = mutate_code(source, get_operator(m.operator)(), m.occurrence)
    assert code is not None
    try:
        if ast.dump(ast.parse(code)) == ast.dump(ast.parse(source)):
            return None
    except SyntaxError:  # the star of `*, keyword` taken for a multiplication
        return None
    lines = difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm="")
    return code, "\n".join(x for x in lines if x[:3] not in ("---", "+++") and x[:2] != "@@")


class Watch:
    """A pytest plugin: coverage by file of tests, and the seconds that each file takes."""

    def __init__(self, folder: Path) -> None:
        self.coverage = coverage.Coverage(data_file=None, include=[f"{folder}/moe_fair/*"])
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """What fails here as it is."""
        if report.failed:
            self.failed.add(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """One test with all that is set up for it."""
        file = item.nodeid.split("::")[0]
        self.coverage.switch_context(file)
        started = time.process_time()
        result = yield
        self.seconds[file] = self.seconds.get(file, 0.0) + time.process_time() - started
        return result


def watch(folder: Path) -> int:
    """Run the unit tests here, and write to runs.json who runs what; an exit code.

    Tests that fail, as those that need the clone's git, are left out and named.
    """
    plugin = Watch(folder)
    plugin.coverage.start()
    plain = ["-q", "--assert=plain", "-p", "no:cacheprovider"]
    code = int(pytest.main([*plain, "-m", QUICK, "tests"], plugins=[plugin]))
    plugin.coverage.stop()
    data = plugin.coverage.get_data()
    modules = {
        f: Path(f).relative_to(folder / "moe_fair").as_posix() for f in data.measured_files()
    }
    lines = {m: data.contexts_by_lineno(f) for f, m in modules.items()}
    found = [plugin.seconds, lines, sorted(plugin.failed)]
    (folder / "runs.json").write_text(json.dumps(found))
    return 0 if code == pytest.ExitCode.TESTS_FAILED else code


class Runs:
    """Which files of unit tests run which lines, the seconds that each takes, and what fails."""

    def __init__(self, file: Path) -> None:
        self.seconds, self.lines, self.failed = json.loads(file.read_text())

    def of(self, module: str, line: int) -> list[str]:
        """The files that run a line, or, were it run on importing alone, any of its module.

        The quickest ones, of SPAN seconds together.
        """
        lines = self.lines.get(module, {})
        files = {f for f in lines.get(str(line), ()) if f}
        files = files or {f for some in lines.values() for f in some if f}
        chosen, spent = [], 0.0
        for file in sorted(files, key=lambda f: (self.seconds[f], f)):
            spent += self.seconds[file]
            if chosen and spent > SPAN:
                break
            chosen.append(file)
        return chosen


def forked(folder: Path, limit: float, work: Callable[[], int]) -> tuple[int, float]:
    """How `work` ends in a fork, in the folder, and the seconds of a processor that it took."""
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
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def tried(folder: Path, files: list[str], without: list[str], limit: float) -> str:
    """What these files of tests say of a mutant: `survived`, `killed` or `timeout`."""
    left_out = [f"--deselect={n}" for n in without]
    options = ["-x", "-q", "--assert=plain", "-m", QUICK, "-p", "no:cacheprovider"]
    code, _ = forked(folder, limit, lambda: int(pytest.main([*options, *left_out, *files])))
    late = code in (-signal.SIGXCPU, -signal.SIGKILL)
    return "survived" if code == 0 else "timeout" if late else "killed"


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
    parser.add_argument("--only", action="append", help="a module, as core/sketch.py")
    parser.add_argument("--show", action="store_true", help="print every survivor's change")
    parser.add_argument("--again", type=Path, help="JSON of a run: its survivors alone")
    parser.add_argument("--runs", type=Path, help="JSON of who runs what; made where it is missing")
    parser.add_argument("-o", "--output", type=Path, help="JSON of all mutants tried")
    chosen = parser.parse_args()
    hypothesis.settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
    hypothesis.settings.load_profile("mutants")  # a failure is enough: no smaller one is wanted
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    folder.chmod(0o755)  # tests that run as nobody look into it
    kept = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    for name in kept.stdout.decode().split("\0")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    os.environ["PYTHONPATH"] = str(folder)  # for what tests start
    sys.dont_write_bytecode = True
    file = chosen.runs or folder / "runs.json"
    if not file.exists():
        code, _ = forked(folder, 3600, lambda: watch(folder))
        if code != 0:
            sys.exit(f"the tests do not run:\n{(folder / 'said.txt').read_text()}")
        if chosen.runs:
            shutil.copy(folder / "runs.json", file)
    runs = Runs(file)
    print(*(f"left out, as it fails here: {n}" for n in runs.failed), sep="\n", flush=True)
    seen: list[Mutant] = []
    earlier = [Mutant(**m) for m in json.loads(chosen.again.read_text())] if chosen.again else []
    left = [m for m in earlier if m.outcome == "survived"]
    found = [f for d in FOLDERS for f in (PACKAGE / d).rglob("*.py") if f.stat().st_size > 200]
    modules = sorted(f.relative_to(PACKAGE).as_posix() for f in found)
    if chosen.again:
        modules = [m for m in modules if any(x.module == m for x in left)]
    for module in chosen.only or modules:
        every = list(mutants(module))
        mine = []
        wanted = [m for m in left if m.module == module]
        for m in wanted if chosen.again else draw(every, chosen.share, chosen.seed):
            if (change := changed(m)) is None:
                continue
            (folder / "moe_fair" / module).write_text(change[0])
            files = runs.of(module, m.line)
            limit = 3 * sum(runs.seconds[f] for f in files) + SMALL
            outcome = tried(folder, files, runs.failed, limit) if files else "survived"
            mine.append(Mutant(m.module, m.operator, m.occurrence, m.line, outcome, change[1]))
        shutil.copy(PACKAGE / module, folder / "moe_fair" / module)
        seen += mine
        report(module, mine, len(every))
        for m in mine if chosen.show else ():
            if m.outcome == "survived":
                print(f"  {m.module}:{m.line}\n    " + m.diff.replace("\n", "\n    "))
        if chosen.output:
            chosen.output.write_text(json.dumps([asdict(m) for m in seen], indent=1) + "\n")
    report("all", seen, len(seen))
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
