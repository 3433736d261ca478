"""llama.cpp's converter for our tiny models: LLAMA_CPP=SOURCE python convert_tiny.py MODEL ...

With CONVERTER=FILE that of serving/llama.cpp, for layers of different sizes.

The converter knows tokenizers by a digest, and refuses ours, which is nobody's. Here it is told to
take it for GPT-2's; checks give tokens, not text. Everything else is the stock converter.
"""

from __future__ import annotations

import os
import runpy
import sys

root = os.environ["LLAMA_CPP"]
sys.path[:0] = [root, f"{root}/gguf-py"]
from conversion import base, glm  # noqa: E402

base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
glm.Glm4MoeModel.set_vocab = base.TextModel._set_vocab_gpt2  # which lacks GLM's own tokens
sys.argv[0] = os.environ.get("CONVERTER", f"{root}/convert_hf_to_gguf.py")
runpy.run_path(sys.argv[0], run_name="__main__")
