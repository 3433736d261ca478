"""Settings: what is known of one stands at its field, and all else is made from there.

A settings class is a frozen dataclass whose fields are made by `setting`. From a field come the
command line's option, the key in YAML, the type of its value, its checks and its help text.
"""

from __future__ import annotations

import keyword
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from os import PathLike
from typing import Any

from moe_fair.core.quote import clip, quote
from moe_fair.core.registry import nearest

LARGEST = 10**18  # of any number in a recipe
ABOUT = "about"  # key in a field's metadata


@dataclass(frozen=True)
class About:
    """What is known of one setting.

    Attributes:
        help: what it is, its first clause by itself enough for a list.
        panel: heading under which help screens show it.
        commands: those that take it.
        shown: of these, the commands whose --help shows it; True: all. The others take it all the
            same.
        flags: of its option, where not --its-name; a word without dashes is an argument.
        option: whether it has one; else it is for files and --set.
        usual: the default in words, where the value does not say it.
        minimum: least value.
        choices: its values, or the name of the registry that has them, which is read elsewhere.
        parse: text of the command line -> value, where the type does not say how.
    """

    help: str
    panel: str | None = None
    commands: tuple[str, ...] = ()
    shown: bool | tuple[str, ...] = False
    flags: tuple[str, ...] = ()
    option: bool = True
    usual: str | None = None
    minimum: int | None = None
    choices: tuple[str, ...] | str | None = None
    parse: Callable[[str], Any] | None = None


@dataclass(frozen=True)
class Setting:
    """A field of a settings class.

    Attributes:
        hint: its annotation, evaluated.
    """

    name: str
    default: Any
    hint: Any
    about: About

    @property
    def kind(self) -> Any:
        """Its type where it is set."""
        return kinds(self.hint)[0]

    @property
    def usual(self) -> str:
        """The default in words; empty for none."""
        if self.about.usual is not None:
            return self.about.usual
        if isinstance(self.default, bool):
            on, _, off = "".join(self.about.flags[-1:]).partition("/")
            return (on if self.default else off) if off else ""
        if self.default in (None, MISSING, ()):
            return ""
        return " ".join(self.default) if isinstance(self.default, tuple) else str(self.default)

    def shown_by(self, command: str) -> bool:
        """Whether the command's --help has it."""
        shown = self.about.shown
        return shown if isinstance(shown, bool) else command in shown


def setting(default: Any, help: str, **about: Any) -> Any:
    """A field of a settings class; see `About`. Without a default (MISSING) it must be given."""
    return field(default=default, metadata={ABOUT: About(help, **about)})


def settings_of(kind: Any) -> dict[str, Setting]:
    """Every setting of a class by name, in its order."""
    return _settings_of(kind)


@cache
def _settings_of(kind: Any) -> dict[str, Setting]:
    hints = typing.get_type_hints(kind)
    return {
        f.name: Setting(f.name, f.default, hints[f.name], f.metadata[ABOUT])
        for f in fields(kind)
        if ABOUT in f.metadata
    }


def coerce_all(settings: Any, finite: bool = True) -> None:
    """Give every setting of a new object its type, and check its least value and its choices.

    Args:
        finite: numbers must be; else the class has a range for each, and says that.

    Raises:
        ValueError: a value is not of its type, below its minimum or none of its choices.
    """
    known = settings_of(type(settings))
    for name, its in known.items():
        value = getattr(settings, name)
        if finite or its.kind is not float or not isinstance(value, float):
            object.__setattr__(settings, name, coerce(name, value, its.hint))
    for name, its in known.items():
        check(name, getattr(settings, name), its.about)


def check(name: str, value: Any, about: About) -> None:
    """A value of the right type is one that the setting may have.

    Raises:
        ValueError: it is not.
    """
    if value is None:
        return
    if about.minimum is not None and value < about.minimum:
        raise ValueError(f"{flag(name)} {value} is below {about.minimum}")
    if isinstance(about.choices, tuple) and value not in about.choices:
        raise ValueError(
            f"{flag(name)} {quote(value)}{nearest(value, about.choices)} is none of "
            f"{', '.join(about.choices)}"
        )


def flag(name: str) -> str:
    """The option of a setting's name."""
    return "--" + key_of(name).replace("_", "-")


def key_of(name: str) -> str:
    """A setting's key in a file; here `for_`, which Python could not call `for`."""
    return name.rstrip("_")


def name_of(key: Any) -> Any:
    """The setting's name of a key in a file."""
    return f"{key}_" if isinstance(key, str) and keyword.iskeyword(key) else key


def kinds(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation allows."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or an error that says what is wanted."""
    options = kinds(hint)
    if value is None:
        if type(None) in options:
            return None
        raise ValueError(f"{flag(name)} has no value")
    kind = options[0]
    if kind == tuple[str, ...]:
        items = (value,) if isinstance(value, (str, PathLike)) else value
        if isinstance(items, (list, tuple)) and all(isinstance(i, (str, PathLike)) for i in items):
            return tuple(map(str, items))
        raise ValueError(f"{flag(name)} must be text or a list of texts, not {quote(value)}")
    if kind == tuple[float, ...]:
        items = value if isinstance(value, (list, tuple)) else (value,)
        if all(is_number(i) for i in items):
            return tuple(float(i) for i in items)
        raise ValueError(f"{flag(name)} must be a number or a list of numbers, not {quote(value)}")
    if kind == Mapping[str, str]:
        return _texts(name, value)
    if typing.get_origin(kind) is not None:  # weights
        return _weights(name, value)
    if kind is str and isinstance(value, PathLike):
        return str(value)
    if isinstance(value, Integral) and abs(int(value)) > LARGEST:
        raise ValueError(f"{flag(name)} is out of every range")
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)  # also numpy's
    if kind is float and is_number(value):
        return float(value)
    if not isinstance(value, kind) or kind in (int, float):
        wanted = {
            "int": "a whole number",
            "float": "a finite number" if isinstance(value, float) else "a number",
            "str": "text",
            "bool": "true or false",
        }
        raise ValueError(f"{flag(name)} must be {wanted[kind.__name__]}, not {quote(value)}")
    return value


def is_number(value: Any) -> bool:
    """It is one, and of a size that a setting may have."""
    return (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and (math.isfinite(value) if not isinstance(value, int) else abs(value) <= LARGEST)
    )


def _texts(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(
        isinstance(text, str) and text for pair in value.items() for text in pair
    ):
        raise ValueError(f"{flag(name)} must map names to names, not {quote(value)}")
    return dict(value)


def _weights(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{flag(name)} must map domains to weights, not {quote(value)}")
    for domain, weight in value.items():
        if not isinstance(domain, str) and (not isinstance(domain, int) or domain in (True, False)):
            raise ValueError(
                f"{flag(name)}: the domain {quote(domain)} is no text; put it in quotes"
            )
        if not is_number(weight) or not 0 <= weight <= LARGEST:
            raise ValueError(
                f"{flag(name)}: {clip(str(domain))}: {quote(weight)} is not a weight of 0 or more"
            )
    return {str(k): float(v) for k, v in value.items()}
