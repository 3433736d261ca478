"""Where the reference model, its texts and the record of families lie."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
EVAL = ROOT / "eval"
MODEL = EVAL / "tiny-qwen2-moe"
CALIBRATION = EVAL / "text" / "calibration"
HELDOUT = EVAL / "text" / "heldout"
# what each family of transformers' registry does; `swept_from`: not tried on older versions, where
# jamba's router is a plain linear layer and refused, and qwen4_exp has other layer types
RECORD = json.loads((EVAL / "families.json").read_text())
