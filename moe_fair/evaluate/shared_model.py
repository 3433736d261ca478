"""A model of lm-eval whose forward passes several processes share, of any auto class.

Every process asks all questions and scores all answers, as one alone would; only the batches in
between are dealt out. They hold the very requests that they hold in one process, so that padding,
and with it the last digit of every number, is the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator

from moe_fair.engines.processes import Team

# ((context, continuation), token ids of the one, of the other)
Request = tuple[Any, list[int], list[int]]
Answer = tuple[float, bool]


class SharedModel(HFLM):
    """lm-eval's `hf` model; each process runs its share of the batches.

    Args:
        team: the processes that ask the same questions at the same time.
        auto_class: what loads the model; stock `hf` knows `AutoModelForCausalLM` alone, and of a
            multimodal model the language model is asked.
        config: of the model, as its stock class reads it.
        given: as HFLM takes it.
    """

    def __init__(self, team: Team, auto_class: Any, config: Any, **given: Any) -> None:
        self._team, self._given_config = team, config
        self.AUTO_MODEL_CLASS = auto_class
        self._largest: int | None = None
        super().__init__(config=config, **given)

    def _get_config(self, *_: Any, **__: Any) -> None:
        self._config = self._given_config

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        def run(mine: list[Request]) -> list[Answer]:
            return HFLM._loglikelihood_tokens(self, mine, disable_tqdm, override_bs)

        return self._dealt(requests, self._scored_together(requests, override_bs), run)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Stock code cuts texts into batches of windows: noted first, then answered in turn."""
        noted: list[tuple[Any, ...]] = []

        def note(requests: list[Request], *rest: Any, **keywords: Any) -> list[Answer]:
            noted.append((requests, rest, keywords))
            return [(0.0, False)] * len(requests)

        def run(mine: list[tuple[Any, ...]]) -> list[list[Answer]]:
            stock = HFLM._loglikelihood_tokens
            return [stock(self, asked, *rest, **keywords) for asked, rest, keywords in mine]

        stock = super().loglikelihood_rolling
        self._answer(note, stock, requests, disable_tqdm)
        alone = [[i] for i in range(len(noted))]
        answers = iter(self._dealt(noted, alone, run))
        return self._answer(lambda *_, **__: next(answers), stock, requests, disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Texts; where they are sampled, other processes draw otherwise than one alone."""
        stock = super().generate_until
        together = self._written_together([r.args for r in requests])
        return self._dealt(requests, together, lambda mine: stock(mine, disable_tqdm))

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        if requests is not None:  # each on its own, in the midst of its share
            return super()._detect_batch_size(requests, pos)
        if self._largest is None:
            self._largest = min(self._team.gather(super()._detect_batch_size()))
        return self._largest

    def _answer(self, how: Callable[..., Any], stock: Any, *given: Any) -> Any:
        """Run stock code that asks `_loglikelihood_tokens`, with another answering."""
        self._loglikelihood_tokens = how  # type: ignore[method-assign]
        try:
            return stock(*given)
        finally:
            del self._loglikelihood_tokens

    def _dealt(
        self, items: Sequence[Any], together: list[list[int]], run: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        """What `run` gives for every item, in order and in every process.

        Args:
            together: the items of each batch, by number; the first batches are the largest.
        """
        mine = sorted(i for batch in together[self._team.rank :: self._team.size] for i in batch)
        found = dict(zip(mine, run([items[i] for i in mine]), strict=True))
        for part in self._team.gather(found):
            found |= part
        return [found[i] for i in range(len(items))]

    def _scored_together(self, requests: list[Request], size: int | None) -> list[list[int]]:
        """Numbers of the requests of each batch that stock code makes of all of them.

        It runs one of those that begin alike up to the last token, and sorts by length.
        """
        alike: dict[Any, list[int]] = {}
        share = self.backend == "causal" and self.logits_cache
        for i, (_, context, continuation) in enumerate(requests):
            key = tuple(context + continuation[:-1]) if share else i
            alike.setdefault(key, []).append(i)

        def length(group: list[int]) -> tuple[int, tuple[int, ...]]:
            _, context, continuation = requests[max(group, key=lambda i: len(requests[i][2]))]
            return -len(context + continuation), tuple(context + continuation)

        groups = sorted(alike.values(), key=length)
        step = size or 1 if self.batch_size == "auto" else int(self.batch_size)
        return [
            [i for group in groups[start : start + step] for i in group]
            for start in range(0, len(groups), step)
        ]

    def _written_together(self, asked: Sequence[tuple[str, Any]]) -> list[list[int]]:
        """Numbers of the requests of each batch of texts that stock code makes of all of them."""
        order = Collator(
            [(context, settings, i) for i, (context, settings) in enumerate(asked)],
            sort_fn=lambda a: (-len(self.tok_encode(a[0])), a[0]),
            group_by="gen_kwargs",
            group_fn=lambda a: a[1],
        )
        size = self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size)
        return [[a[2] for a in chunk] for chunk in order.get_batched(n=size)]
