"""Which auto class loads a checkpoint: what its name alone says is what transformers says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers
from transformers import CONFIG_MAPPING

from moe_fair.engines import auto


def names() -> list[tuple[str, str]]:
    """Type and class name, of all that an auto class of ours knows."""
    found = []
    for kind in CONFIG_MAPPING:
        for name in auto.NAMES:
            mapping = getattr(transformers, name)._model_mapping
            if CONFIG_MAPPING[kind] in mapping:
                known = mapping[CONFIG_MAPPING[kind]]
                known = known if isinstance(known, (list, tuple)) else (known,)
                found += [(kind, c.__name__) for c in known]
    return found


@pytest.mark.nightly
def test_the_ending_says_the_class() -> None:
    """Of every class of transformers with that ending."""
    ours = [(k, n) for k, n in names() if n.endswith(auto.LANGUAGE)]
    assert len(ours) > 100
    for kind, name in ours:
        config = CONFIG_MAPPING[kind]
        asked = config.__new__(config)
        vars(asked).update(architectures=[name])
        want = auto.auto_class(asked).__name__
        assert (want == auto.NAMES[0]) == (name not in auto.ELSEWHERE), (kind, name)
        if name not in auto.ELSEWHERE:
            assert auto.auto_name({"model_type": kind, "architectures": [name]}) == want


def test_code_of_its_own_comes_first() -> None:
    named = {"auto_map": {auto.NAMES[1]: "x.y"}, "architectures": ["XForCausalLM"]}
    assert auto.auto_name(named) == auto.NAMES[1]
    assert auto.auto_class(SimpleNamespace(**named)).__name__ == auto.NAMES[1]
