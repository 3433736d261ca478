"""Where the reference model, its texts and the record of families lie."""

import json
from pathlib import Path

import transformers
from packaging.version import Version

ROOT = Path(__file__).parent.parent
EVAL = ROOT / "eval"
MODEL = EVAL / "tiny-qwen2-moe"
CALIBRATION = EVAL / "text" / "calibration"
HELDOUT = EVAL / "text" / "heldout"
# what each family of transformers' registry does
RECORD = json.loads((EVAL / "families.json").read_text())


def older_than(version: str) -> bool:
    """The transformers that is installed is."""
    return Version(transformers.__version__) < Version(version)


def streamed(kind: str) -> bool:
    """Layers of this type can be run one at a time with the transformers that is installed."""
    late = RECORD["streamed_from"].get(kind)
    return kind not in RECORD["resident_only"] and (late is None or not older_than(late))
