"""Text of domains that no calibration text of the lab holds, found on any machine with Python.

    python eval/unseen_text.py -o lab/unseen
    python eval/lab.py --unseen lab/unseen ...

Markup, languages of programs and of people: what lies in the installed packages and below
/usr/share, a file a domain, documents of up to 4,000 characters in an order that a seed decides.
Languages of people are the translated messages and manual pages of the system's programs. A domain
of which there is too little here is left out, and that is said.
"""

from __future__ import annotations

import argparse
import gettext
import gzip
import hashlib
import json
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

SITE, LIBRARY = (Path(sysconfig.get_paths()[k]) for k in ("purelib", "stdlib"))
SHARE = Path("/usr/share")
PROGRAMS = {  # domain -> names of its files
    "c": ("*.c",),
    "css": ("*.css",),
    "cython": ("*.pyx", "*.pxd"),
    "html": ("*.html",),
    "licences": ("LICENSE*", "COPYING*", "copyright"),
    "perl": ("*.pl", "*.pm"),
    "shell": ("*.sh", "*.bash"),
    "xml": ("*.xml", "*.svg"),
}
LANGUAGES = {"french": "fr", "german": "de", "japanese": "ja", "russian": "ru"}
LONGEST, BYTES, LEAST = 4000, 200_000, 60_000


def documents(patterns: tuple[str, ...]) -> Iterator[str]:
    """Files of these names, the same text once."""
    found = {p for root in (SITE, LIBRARY, SHARE) for n in patterns for p in root.rglob(n)}
    for path in sorted(found):
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def spoken(code: str) -> Iterator[str]:
    """Manual pages of a language, and the messages of each program."""
    for path in sorted((SHARE / "man" / code).rglob("*.gz")):
        try:
            yield gzip.decompress(path.read_bytes()).decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
    for path in sorted((SHARE / "locale" / code / "LC_MESSAGES").glob("*.mo")):
        try:
            with path.open("rb") as f:
                catalogue = gettext.GNUTranslations(f)._catalog  # type: ignore[attr-defined]
        except (OSError, UnicodeDecodeError):
            continue
        yield "\n".join(v for k, v in catalogue.items() if k and isinstance(v, str) and v != k)


def pick(texts: Iterator[str], seed: int) -> list[str]:
    """Documents cut to length, each once, in the seed's order, up to so many bytes."""
    once = {hashlib.sha256(t.encode()).hexdigest(): t for t in texts if len(t) > 200}
    parts = [t[i : i + LONGEST] for _, t in sorted(once.items()) for i in range(0, len(t), LONGEST)]
    random.Random(seed).shuffle(parts)
    taken, size = [], 0
    for part in parts:
        if size >= BYTES:
            break
        if len(part) > 200:
            taken.append(part)
            size += len(part.encode())
    return taken if size >= LEAST else []


def main() -> None:
    """Write a file for each domain."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("-o", "--output", type=Path, required=True)
    made.add_argument("--seed", type=int, default=0)
    args = made.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    sources: dict[str, Callable[[], Iterator[str]]] = {
        **{d: lambda n=names: documents(n) for d, names in PROGRAMS.items()},
        **{d: lambda c=code: spoken(c) for d, code in LANGUAGES.items()},
    }
    for domain, read in sorted(sources.items()):
        found = pick(read(), args.seed)
        if not found:
            print(f"{domain}: too little here, left out")
            continue
        lines = [json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in found]
        (args.output / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{domain}: {len(found)} documents, {sum(len(t.encode()) for t in found):,} bytes")


if __name__ == "__main__":
    sys.exit(main())
