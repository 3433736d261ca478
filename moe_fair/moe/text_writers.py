"""Who writes a model's own text: the model in memory, or a server that runs it.

Shape legend: B texts, L tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_fair.core.quote import clip
from moe_fair.engines.oom import out_of_memory, release
from moe_fair.moe.chat_layout import End

TIMEOUT = 3600.0  # seconds that a server may take for one text
# the whole distribution: else vLLM and SGLang take what generation_config.json says, and llama.cpp
# its own defaults, under these names; who does not know one passes over it
WHOLE = {
    "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
    "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Continuation:
    """What was written behind a prompt.

    Attributes:
        ids: its tokens, without what ended it.
        text: the same, special tokens among it written out.
        ended: it was ended, and not cut off at the most tokens.
        entropy: of the model's predictions on average, in nats; None where it is not known.
    """

    ids: tuple[int, ...]
    text: str
    ended: bool
    entropy: float | None = None


class Writer(Protocol):
    """Continues texts at temperature 1, from the whole distribution."""

    def write(
        self, prompts: Sequence[Sequence[int]], most: int, ends: Sequence[End], seed: int,
        forbidden: Sequence[int],
    ) -> list[Continuation]:  # fmt: skip
        """A continuation of each prompt.

        Args:
            most: tokens of one.
            ends: what ends one.
            seed: decides the texts.
            forbidden: ids that are not drawn.
        """
        ...


class ModelWriter:
    """The model in memory, by transformers' own `generate`."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from transformers import GenerationConfig

        self.model, self.tokenizer = model.eval(), tokenizer
        # else what the checkpoint says of temperature, penalties and the like would be filled in
        model.generation_config = GenerationConfig()

    @torch.no_grad()
    def write(
        self, prompts: Sequence[Sequence[int]], most: int, ends: Sequence[End], seed: int,
        forbidden: Sequence[int],
    ) -> list[Continuation]:  # fmt: skip
        """See `Writer`; on a device whose memory is too small, in halves."""
        try:
            return self._write(prompts, most, ends, seed, forbidden)
        except Exception as e:
            if not out_of_memory(e) or len(prompts) == 1:
                raise
        release()
        half = len(prompts) // 2
        return [
            text
            for part, number in ((prompts[:half], seed), (prompts[half:], seed + 1))
            for text in self.write(part, most, ends, number, forbidden)
        ]

    def _write(
        self, prompts: Sequence[Sequence[int]], most: int, ends: Sequence[End], seed: int,
        forbidden: Sequence[int],
    ) -> list[Continuation]:  # fmt: skip
        from transformers import GenerationConfig

        tokens = sorted({e.token for e in ends if e.token is not None})
        texts = sorted({e.text for e in ends if e.token is None})
        pad = tokens[0] if tokens else 0
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=most,
            eos_token_id=tokens or None, pad_token_id=pad,
        )  # fmt: skip
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), pad)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        device = self.model.get_input_embeddings().weight.device
        watch = _Watch(len(self.tokenizer), forbidden)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            rows = self.model.generate(
                ids.to(device), attention_mask=mask.to(device), generation_config=config,
                logits_processor=[watch],
                **({"stop_strings": texts, "tokenizer": self.tokenizer} if texts else {}),
            )  # fmt: skip
        entropy = torch.stack(watch.entropies, 1).cpu()  # [B, L]
        made = rows[:, longest:].tolist()
        return [
            self._continuation(row, mean, tokens, texts)
            for row, mean in zip(made, entropy, strict=True)
        ]

    def _continuation(
        self, row: list[int], entropy: Tensor, tokens: Sequence[int], texts: Sequence[str]
    ) -> Continuation:
        end = next((i for i, t in enumerate(row) if t in tokens), None)
        ids = row[:end]
        text, ended = decode(self.tokenizer, ids), end is not None
        found = [at for t in texts if (at := text.find(t)) >= 0]
        if found:
            text, ended = text[: min(found)], True
            ids = encode(self.tokenizer, text)
        mean = float(entropy[: max(1, len(ids))].mean())
        return Continuation(tuple(ids), text, ended, mean)


class _Watch:
    """Between logits and choice: takes out what shall not be drawn, and notes the entropy.

    Args:
        known: ids from here on are rows of the table that the tokenizer has no token for.
    """

    def __init__(self, known: int, forbidden: Sequence[int]) -> None:
        self.known = known
        self.forbidden = sorted(forbidden)
        self.never: Tensor | None = None
        self.entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, L] ids so far, [B, V] logits -> [B, V]."""
        scores = scores.float()
        scores[:, self.known :] = -torch.inf
        if self.never is None:  # brought to the device once, not at every token
            ids = [i for i in self.forbidden if i < scores.shape[1]]
            self.never = torch.tensor(ids, dtype=torch.int64, device=scores.device)
        scores[:, self.never] = -torch.inf
        p = scores.softmax(-1)
        self.entropies.append(torch.special.entr(p).sum(-1))  # read once all are there
        return scores


class ServerWriter:
    """An OpenAI-compatible server (vLLM, SGLang, llama.cpp) that runs the original.

    Prompts go as token ids to /v1/completions, so that no text is read twice.

    Args:
        url: with or without the `/v1`.

    Raises:
        ValueError: no such server answers, or it does not say which model it runs.
    """

    def __init__(self, url: str, tokenizer: Any) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--server {url}: write it as http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.tokenizer = tokenizer
        found = self._ask("models", None)
        try:
            self.name = str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"--server {url}: names no model at {self.url}/models") from None

    def write(
        self, prompts: Sequence[Sequence[int]], most: int, ends: Sequence[End], seed: int,
        forbidden: Sequence[int],
    ) -> list[Continuation]:  # fmt: skip
        """See `Writer`. A server draws special tokens as well, and does not show them.

        A request for each prompt, all at once: of several prompts in one request engines give all
        the same seed, and so the same text to the same start.
        """
        said = {
            "model": self.name, "max_tokens": most, "stop": sorted({e.text for e in ends})[:4],
            "stop_token_ids": sorted({e.token for e in ends if e.token is not None}), **WHOLE,
        }  # fmt: skip
        bodies = [
            {**said, "prompt": list(prompt), "seed": (seed + i) % 2**31}
            for i, prompt in enumerate(prompts)
        ]
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(self._complete, bodies))

    def _complete(self, body: dict[str, Any]) -> Continuation:
        answer = self._ask("completions", body)
        try:
            [choice] = answer["choices"]
            text, ended = str(choice["text"]), choice.get("finish_reason") == "stop"
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"--server {self.url}: gave no text for a prompt of token ids; is it an "
                "OpenAI-compatible server with /v1/completions?"
            ) from None
        return Continuation(tuple(encode(self.tokenizer, text)), text, ended)

    def _ask(self, what: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/{what}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # nosec B310
                return json.load(answer)
        except urllib.error.HTTPError as e:
            said = clip(" ".join(e.read().decode(errors="replace").split()), 200)
            raise ValueError(f"--server {self.url}/{what}: {e.code} {e.reason}: {said}") from e
        except (OSError, ValueError) as e:
            raise ValueError(f"--server {self.url}/{what}: {e}; is it running?") from e


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of these tokens, as nearly as it can be tokenised back."""
    found = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return str(found)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, without what a tokenizer puts around it."""
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return copy.copy(found)
