"""Known vulnerabilities of the tested versions, by pip-audit, where its service can be reached.

Exit code 1 where there is one. What could not be asked is said in one line, and is no failure: CI
may have no way to the service.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

VERSIONS = Path(__file__).parent.parent / "constraints.txt"
# the versions are exact: nothing has to be resolved or installed for it
COMMAND = (
    sys.executable, "-m", "pip_audit", "--requirement", str(VERSIONS), "--no-deps", "--disable-pip",
    "--format", "json", "--progress-spinner", "off", "--timeout", "10",
)  # fmt: skip


def main() -> int:
    """Print what was found."""
    if importlib.util.find_spec("pip_audit") is None:
        print("pip-audit: not installed; pip install -e '.[dev]'")
        return 1
    done = subprocess.run(COMMAND, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"pip-audit: not run, since its service did not answer: {why[:200]}")
        return 0
    asked = [p for p in packages if "skip_reason" not in p]
    unknown = [p["name"] for p in packages if "skip_reason" in p]
    if not asked:
        print(
            f"pip-audit: not run, its service knows none of {len(packages)} packages: an index "
            "that stands in for PyPI has no word of vulnerabilities"
        )
        return 0
    found = [(p["name"], p["version"], v["id"]) for p in asked for v in p["vulns"]]
    for name, version, number in found:
        print(f"pip-audit: {name} {version}: {number}")
    left = f"; not known to it: {', '.join(unknown)}" if unknown else ""
    print(f"pip-audit: {len(asked)} packages, {len(found)} known vulnerabilities{left}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
