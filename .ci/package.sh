#!/usr/bin/env bash
# Wheel and sdist: built from the files of the repository, each installed into an empty environment
# and used there, from outside the repository. Dependencies are those of the Python that runs this,
# which has to have moe_fair's and `build`.
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

# from a copy: what an earlier build has left in the working tree stays out
mkdir "$work/source"
python - "$work/source" <<'COPY'
import shutil, subprocess, sys
from pathlib import Path

LISTED = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
for name in subprocess.check_output(LISTED, text=True).rstrip("\0").split("\0"):
    if Path(name).is_file() and name.split("/")[0] not in ("eval", "tests"):
        to = Path(sys.argv[1], name)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, to)
COPY
python -m build --outdir "$work/dist" "$work/source" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }

dependencies=$(python -c 'import sys; print(*(p for p in sys.path if "-packages" in p), sep="\n")')
cd "$work"
for file in dist/*.whl dist/*.tar.gz; do
    venv=$work/${file##*.}
    python -m venv --without-pip "$venv"
    # only the paths: what is installed there editably is not seen
    echo "$dependencies" >"$("$venv/bin/python" -c \
        'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
    python -m pip --quiet --python "$venv/bin/python" install --no-deps --force-reinstall "$file" \
        >log 2>&1 || { cat log; exit 1; }
    "$venv/bin/python" - "$venv" <<'CHECK'
import sys
from pathlib import Path

import moe_fair

folder = Path(moe_fair.__file__).parent
assert folder.is_relative_to(sys.argv[1]), folder
assert (folder / "py.typed").is_file()
CHECK
    command=$venv/bin/moe-fair
    "$command" --help >help.txt
    "$command" recipes >recipes.txt
    grep --quiet "files: $venv" recipes.txt
    names=$(cd "$repository/recipes" && ls moe/*.yaml rivals/*.yaml vision/*.yaml calibration/*.yaml | wc -l)
    [ "$(wc -l <recipes.txt)" -eq $((names + 1)) ]
    if [ ! -d statistics ]; then
        "$command" calibrate "$repository/eval/tiny-qwen2-moe" -o statistics --length 32 \
            -c "$repository/eval/text/calibration" --samples 4 --no-taylor --no-counterfactual \
            >log 2>&1 || { cat log; exit 1; }
    fi
    "$command" plan statistics --recipe reap --ratio .25 --json >plan.json
    grep --quiet '"removal": "reap"' plan.json
    echo "package: ${file#dist/}: installed and used"
done
