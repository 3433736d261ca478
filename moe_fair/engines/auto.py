"""Which auto class of transformers loads a checkpoint as the class it was saved as.

A multimodal checkpoint (`Qwen3VLMoeForConditionalGeneration`) must not be opened by
`AutoModelForCausalLM`, which either does not know it or takes its language model out of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
# every other class of this ending is the first one's, so that nothing has to be imported to know it
LANGUAGE, ELSEWHERE = "ForCausalLM", ("Mistral4ForCausalLM",)


def auto_class(config: Any) -> Any:
    """The auto class for this config: that of its `architectures`, else the first that knows it.

    Args:
        config: a transformers config; one that brings code names the auto class (`auto_map`).
    """
    import transformers

    autos = {n: getattr(transformers, n) for n in NAMES if hasattr(transformers, n)}
    for name in getattr(config, "auto_map", None) or {}:
        if name in autos:
            return autos[name]
    knowing = {n: _class_names(a, config) for n, a in autos.items()}
    saved_as = set(getattr(config, "architectures", None) or ())
    for fits in (lambda known: saved_as & known, lambda known: known):
        for name, known in knowing.items():
            if fits(known):
                return autos[name]
    return autos[NAMES[0]]


def auto_name(config: Mapping[str, Any]) -> str:
    """Name of the auto class for a checkpoint, from what lies in its `config.json`."""
    for name in config.get("auto_map") or {}:
        if name in NAMES:
            return str(name)
    architectures = config.get("architectures")
    if architectures and all(
        str(a).endswith(LANGUAGE) and a not in ELSEWHERE for a in architectures
    ):
        return NAMES[0]
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return NAMES[0]
    return str(auto_class(CONFIG_MAPPING[kind](architectures=architectures)).__name__)


def _class_names(auto: Any, config: Any) -> set[str]:
    """Names of the classes that an auto class has for this type of config."""
    if type(config) not in auto._model_mapping:
        return set()
    found = auto._model_mapping[type(config)]
    return {c.__name__ for c in (found if isinstance(found, (list, tuple)) else (found,))}
