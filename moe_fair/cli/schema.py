"""The options of a command that come from the fields of its settings, and how --help shows them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand

from moe_fair.cli.options import option
from moe_fair.core.recipe import MADE, PANELS
from moe_fair.core.registry import check_settings
from moe_fair.core.settings import Setting, flag, name_of, settings_of

SET = "assignments"  # the parameter of --set
FOOT = "Other settings: --set KEY=VALUE; `moe-fair settings` lists them."


class Command(TyperCommand):
    """A command whose help screen is plain text in sections, which shows at once."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, options without a heading, then each heading with its own."""
        titles = ("Arguments", "Options", *PANELS[:-1])  # what all runs have comes last
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in titles}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if isinstance(parameter, TyperArgument) else "Options"
                title = getattr(parameter, "rich_help_panel", None) or kind
                sections.setdefault(title, []).append(record)
        for title in sorted(sections, key=lambda title: title == PANELS[-1]):
            if sections[title]:
                with formatter.section(title):
                    formatter.write_dl(sections[title])


def takes(kind: type, command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each of its settings that it does not declare itself, and --set.

    Args:
        kind: the settings class.
        command: the name by which its fields know the command.

    Returns:
        a decorator: the function's first parameter gets the settings that were given, by name; its
        others are the command's own.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        declared = {p.name for p in own}
        known = {
            n: s
            for n, s in settings_of(kind).items()
            if command in s.about.commands and n not in declared
        }
        made = {n: s for n, s in known.items() if s.about.option}

        def run(**values: Any) -> None:
            given = {n: v for n in made if (v := values.pop(n)) is not None}
            given = {n: _parsed(made[n], v) for n, v in given.items()}
            for name, value in _assigned(values.pop(SET) or ()).items():
                _check_assigned(name, command, kind, known, declared)
                if name in given:
                    raise ValueError(f"{flag(name)} is given twice, once by --set; leave one out")
                given[name] = value
            function(given, **values)

        # a stub of typer's own kind: it reads options off a signature
        made_options = [_parameter(s, command) for s in made.values()]
        every = [p.replace(kind=p.KEYWORD_ONLY) for p in (*made_options, *own)]
        run.__signature__ = inspect.Signature([*every, _SET])  # type: ignore[attr-defined]
        run.__doc__, run.__name__ = function.__doc__, function.__name__
        return run

    return decorate


def _parameter(its: Setting, command: str) -> inspect.Parameter:
    """The option or argument of a setting."""
    flags = its.about.flags or (flag(its.name),)
    kind = Path if its.name in MADE else its.kind
    if its.about.parse is not None:
        kind = str
    elif kind == tuple[str, ...]:
        kind = list[str]
    if not flags[0].startswith("-"):
        info = typer.Argument(help=its.about.help, metavar=flags[0], show_default=False)
    else:
        text = its.about.help + (f"  [default: {its.usual}]" if its.usual else "")
        hidden = not its.shown_by(command)
        info = option(*flags, text=text, panel=its.about.panel, hidden=hidden)
    return inspect.Parameter(
        its.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, info],
    )


def _optional(name: str, kind: Any, info: Any) -> inspect.Parameter:
    """A parameter as typer reads it."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=None, annotation=Annotated[kind | None, info])


_SET = _optional(
    SET,
    list[str],
    option("--set", text="Any setting, its value as in YAML; repeat for more", metavar="KEY=VALUE"),
)


def _parsed(its: Setting, value: Any) -> Any:
    """What the option's text says, where its type does not."""
    if isinstance(value, Path):
        return str(value)
    return value if its.about.parse is None else its.about.parse(value)


def _assigned(texts: Any) -> dict[str, Any]:
    """The settings of --set.

    Raises:
        ValueError: one is not KEY=VALUE, no YAML, or given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        from moe_fair.core.yaml_file import parse_yaml

        key, sign, value = text.partition("=")
        name = name_of(key.strip().removeprefix("--").replace("-", "_"))
        if not sign or not name:
            raise ValueError(f"--set {text!r}: write key=value")
        if name in found:
            raise ValueError(f"--set {name} is given twice; leave one out")
        found[name] = parse_yaml(value, f"--set {text!r}")
    return found


def _check_assigned(
    name: str, command: str, kind: type, known: dict[str, Setting], declared: set[str]
) -> None:
    """The command takes this setting by --set.

    Raises:
        ValueError: there is none of the name (says the nearest), or the command has no use for it.
    """
    check_settings([name], settings_of(kind), " (`moe-fair settings` lists them)")
    if name in declared:
        raise ValueError(f"--set {name}: give it as {flag(name)} here")
    if name not in known:
        raise ValueError(f"{command} does not use {name}; leave it out")
