"""The command with its defaults on families that differ from the reference model's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers
from places import CALIBRATION, MODEL
from tiny import tiny_model
from transformers import AutoTokenizer

from moe_fair.cli import main
from moe_fair.publish.card import Base, make_card
from moe_fair.report.sources import gather

pytestmark = pytest.mark.slow  # a run of the command each

# multimodal; layers that cannot be run one at a time; a router weight on the input; a table of
# token ids in half of the layers, so that equal counts elsewhere are no stock format
KINDS = {
    "qwen3_vl_moe": "AutoModelForImageTextToText",
    "glm_moe_dsa": "AutoModelForCausalLM",
    "llama4_text": "AutoModelForCausalLM",
    "deepseek_v4": "AutoModelForCausalLM",
}


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_and_loaded_as_the_screen_says(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = len(AutoTokenizer.from_pretrained(MODEL))
    tiny_model(kind, vocab_size=words).save_pretrained(tmp_path / "in")
    for file in MODEL.glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / "in" / file.name)
    out = tmp_path / "out"
    text = ["-c", str(CALIBRATION), "--samples", "4", "--length", "32"]
    with pytest.raises(SystemExit, match="0"):
        main(["prune", str(tmp_path / "in"), "--ratio", "0.25", *text, "-o", str(out)])
    screen = "".join(capsys.readouterr())
    assert ("not repaired: " in screen) == (kind != "qwen3_vl_moe")
    said = screen.partition("load it with ")[2].splitlines()[0]
    assert said.startswith(KINDS[kind] + ".from_pretrained(")
    model = eval(said, {KINDS[kind]: getattr(transformers, KINDS[kind])})
    assert hasattr(model, "generate")
    card = make_card(gather(out), "a/b", Base())
    trust = ", trust_remote_code=True" if "trust_remote_code" in said else ""
    assert f'{KINDS[kind]}.from_pretrained("a/b", dtype="auto"{trust})' in card
