"""Where the reference model and its texts lie."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "eval" / "tiny-qwen2-moe"
CALIBRATION = ROOT / "eval" / "text" / "calibration"
HELDOUT = ROOT / "eval" / "text" / "heldout"
