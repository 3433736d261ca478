"""The tokens that ordinary texts give: with others, earlier results could not be made again."""

from __future__ import annotations

from places import CALIBRATION, HELDOUT, MODEL
from transformers import AutoTokenizer

from moe_fair.moe.calibration_text import sample, windows
from moe_fair.moe.text_sources import parse_source


def test_the_reference_texts_give_the_same_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    drawn = sample([parse_source(str(CALIBRATION))], tokenizer, samples=96, length=256, seed=0)
    held = windows([parse_source(str(HELDOUT))], tokenizer, samples=400, length=256)
    assert [drawn.digest, held.digest] == [
        "11920258a828899f07b1a50cb9700ee18eafe3566a12e25b7d9a58fba1dcdedc",
        "d9e4a5b11c794963176563c211d33a6e5dd87f05e0043cab5f97c1e4c8132c68",
    ]
    assert drawn.notes == held.notes == ()
