"""Where the reference model, its texts and the record of families lie."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
EVAL = ROOT / "eval"
MODEL = EVAL / "tiny-qwen2-moe"
CALIBRATION = EVAL / "text" / "calibration"
HELDOUT = EVAL / "text" / "heldout"
