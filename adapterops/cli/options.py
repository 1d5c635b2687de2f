"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class Reading(NamedTuple):
    """The options of `reading`, named as `ao.load` names them."""

    format: str | None
    arch: str | None
    base: str | None
    layout: str | None
    alpha: float | str | None
    fields: dict[str, Any]
    rename: tuple[str, ...]
    allow_drop: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """For `ao.load`."""
        return self._asdict()

    @property
    def given(self) -> dict[str, Any]:
        """Those that say something, but for `allow_drop`."""
        return {k: v for k, v in self._asdict().items() if k != "allow_drop" and v is not None and v != {} and v != ()}


class Writing(NamedTuple):
    """The options of `writing`."""

    output: str | None
    dtype: str | None
    overwrite: bool
    no_verify: bool
    as_json: bool


def parse_output(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """`--output`: a place on disk, where what was written can be read back before it appears."""
    if value == "-":
        raise click.BadParameter("an adapter is not written to the standard output; name a file or a folder")
    return value


def parse_alpha(context: click.Context, parameter: click.Parameter, value: str | None) -> float | str | None:
    """`--alpha`: a number, the source to believe, or the scale of the training."""
    if value is None or value in ("tensors", "header", "config", "trained"):
        return value
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if number != number or number in (float("inf"), float("-inf")):
        raise click.BadParameter(f"{value!r} is neither a number nor one of tensors, header, config, trained")
    return number


def parse_fields(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """`--set FIELD=VALUE`: VALUE is JSON, or else a plain string."""
    fields: dict[str, Any] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{text!r} is not FIELD=VALUE")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return fields


def reading(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that reads an adapter, which takes them as `read_with`, a `Reading`."""
    options = (
        click.option("--from", "format", metavar="FORMAT", help="Read as this format or dialect; else recognised."),
        click.option("--arch", metavar="NAME", help="The base model: sd1, sdxl, flux … (adapterops architectures)."),
        click.option(
            "--base",
            metavar="CONFIG",
            type=click.Path(),
            help="Any other base: its config.json, or a model's or pipeline's folder (diffusers or transformers; no weights "
            "are read).",
        ),
        click.option(
            "--layout",
            type=click.Choice(["installed", "published"]),
            help="With --base: name modules as the installed library's class does (the default), or as the published "
            "checkpoints do, for older versions of it.",
        ),
        click.option(
            "--alpha",
            metavar="X",
            callback=parse_alpha,
            help="Alpha of the modules for which the file holds none, or 0; or tensors, header, config: which of two to believe; "
            "or trained: the training's scale for sd-scripts' split_qkv files.",
        ),
        click.option(
            "--set",
            "fields",
            metavar="FIELD=VALUE",
            multiple=True,
            callback=parse_fields,
            help="A PEFT config field that no source holds, or that is wrong; VALUE is JSON. May be repeated.",
        ),
        click.option(
            "--rename",
            metavar="PATTERN=REPLACEMENT",
            multiple=True,
            help="Repair keys before they are read: a regular expression and its replacement. May be repeated.",
        ),
        click.option("--allow-drop", is_flag=True, help="Leave out what cannot be understood or held, and list it."),
    )
    return _gathered(command, options, "read_with", Reading)


def writing(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that writes an adapter, which takes them as `write_with`, a `Writing`."""
    options = (
        click.option(
            "-o",
            "--output",
            metavar="OUT",
            type=click.Path(),
            callback=parse_output,
            help="File or folder to write.",
        ),
        click.option("--dtype", metavar="TYPE", help="Round the tensors to float32, float16, bfloat16 or float64."),
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
        click.option("--no-verify", is_flag=True, help="Skip the proof (reading the output back and comparing)."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else."),
    )
    return _gathered(command, options, "write_with", Writing)


def _gathered(
    command: Callable[..., Any], options: Sequence[Callable[..., Any]], name: str, kind: Callable[..., Any]
) -> Callable[..., Any]:
    """The command with these options, whose values it takes together, as one argument of that kind."""

    @wraps(command)
    def gathered(*arguments: Any, **values: Any) -> Any:
        own = {field: values.pop(field) for field in kind.__annotations__}
        return command(*arguments, **values, **{name: kind(**own)})

    for option in reversed(options):
        gathered = option(gathered)
    return gathered
