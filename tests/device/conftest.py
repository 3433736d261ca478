"""The model that stages run on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from places import MODEL
from tiny import tiny_model
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    made = tiny_model(
        "qwen2_moe", vocab_size=len(tokenizer), num_hidden_layers=2, num_experts=8,
        hidden_size=32, moe_intermediate_size=16,
    )  # fmt: skip
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
