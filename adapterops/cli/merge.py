"""`adapterops merge`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

import adapterops.merging.methods  # noqa: F401  (fills the table that the options are made from)
from adapterops.cli.main import print_json
from adapterops.cli.merge_text import as_dict, lines
from adapterops.cli.options import Command, Reading, Writing, reading, writing
from adapterops.cli.progress import counting
from adapterops.merging.registry import ALIASES, METHODS, Parameter


def _parameters() -> dict[str, tuple[Parameter, list[str]]]:
    """Every parameter of any method, and the methods that have it."""
    found: dict[str, tuple[Parameter, list[str]]] = {}
    for method in METHODS.values():
        for parameter in method.parameters:
            found.setdefault(parameter.name, (parameter, []))[1].append(method.name)
    return found


def _option(parameter: Parameter, methods: Sequence[str]) -> Callable[[Command], Command]:
    usual = "" if parameter.default is None else f" [default: {parameter.default}]"
    text = f"{', '.join(methods)}: {parameter.help}.{usual}"
    if parameter.choices:
        return click.option(parameter.option, parameter.name, type=click.Choice(parameter.choices), help=text)
    kind = "N" if parameter.type is int else "X"
    return click.option(parameter.option, parameter.name, metavar=kind, type=parameter.type, help=text)


def _of_methods(command: Command) -> Command:
    for parameter, methods in reversed(_parameters().values()):
        command = _option(parameter, methods)(command)
    return command


@click.command(short_help="Make one adapter of several.")
@click.argument("sources", metavar="SRC...", nargs=-1)
@click.option(
    "--method",
    metavar="METHOD",
    help="How to merge: " + ", ".join(METHODS) + "; or PEFT's " + ", ".join(ALIASES) + ". `adapterops methods --merge` "
    "explains each. svd and cat are the exact weighted sum; linear is PEFT's sum of the factors, which is not.",
)
@click.option("--recipe", metavar="FILE", help="Run a recipe: a YAML file, or the output of an earlier merge.")
@click.option("--print-recipe", is_flag=True, help="Print the recipe as YAML, and merge nothing.")
@click.option(
    "--weights",
    metavar="W,W…|FILE",
    help="A number for each adapter (1 each where nothing is said), or a YAML file with weights per block and pattern.",
)
@click.option(
    "--rank",
    metavar="R",
    type=int,
    help="The output's rank at most; a module whose exact rank is smaller has that. [default: the largest input's]",
)
@click.option("--space", type=click.Choice(["factors", "delta"]), help="Act on the factors, or on the weight deltas.")
@_of_methods
@click.option("--seed", metavar="N", type=int, help="What random masks are drawn from. [default: 0]")
@click.option(
    "--svd",
    type=click.Choice(["auto", "exact"]),
    help="How dense deltas are factorised: iterated to --svd-tolerance, or in full. [default: auto]",
)
@click.option(
    "--svd-tolerance",
    metavar="X",
    type=float,
    help="By how much an iterated factorisation may miss the best one, relative to that one's error. [default: 1e-5]",
)
@click.option(
    "--split",
    type=click.Choice(["even", "b", "a"]),
    help="Singular values go as roots into both factors, or into one (b, as PEFT does). [default: even]",
)
@click.option(
    "--saved",
    type=click.Choice(["refuse", "mean", "first"]),
    help="Where adapters hold different saved modules, trained tokens or embeddings. [default: refuse]",
)
@click.option(
    "--base-weights",
    metavar="BASE",
    type=click.Path(),
    help="The base model's weights (a file, or a model's or pipeline's folder): DoRA magnitudes are folded against them.",
)
@click.option("--allow-disjoint", is_flag=True, help="Merge adapters that share no module.")
@click.option("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:N or mps. [default: auto]")
@click.option(
    "--workers", metavar="N", type=click.IntRange(0), default=0, help="Modules at a time; the result is the same."
)
@click.option("--to", metavar="FORMAT", help="Format or dialect to write. [default: the first source's]")
@reading
@click.option("--fold-alpha", is_flag=True, help="Bake the scale into the factors, for readers that ignore alpha.")
@click.option("-v", "--verbose", is_flag=True, help="List every module.")
@writing
def merge(
    sources: tuple[str, ...],
    method: str | None,
    recipe: str | None,
    print_recipe: bool,
    weights: str | None,
    space: str | None,
    device: str,
    workers: int,
    to: str | None,
    read_with: Reading,
    fold_alpha: bool,
    verbose: bool,
    write_with: Writing,
    **parameters: Any,
) -> None:
    """Merge the adapters SRC… (files, folders, hf:// names; of any formats, methods, ranks and types) into one.

    No base model is needed.  The output is read back and compared with what was computed before it appears; its header
    holds the recipe, which `--recipe OUTPUT` runs again.  Without -o it is merged/ or merged.safetensors.

    \b
    Examples:
      adapterops merge style.safetensors face.safetensors --method svd --weights 0.7,0.5 --rank 32
      adapterops merge a.safetensors b.safetensors --method dare_ties --density 0.5 -o both.safetensors
      adapterops merge a b c --method ties --space delta --density 0.2 --rank 16 --to peft -o abc
      adapterops merge model skill --method subtract -o without
      adapterops merge --recipe recipe.yaml --device cuda
    """
    from adapterops.merging.arguments import recipe_of
    from adapterops.merging.merge import merge as run_merge

    options = _as_in_recipes(read_with)
    if print_recipe:
        stated = {
            "to": to, "dtype": write_with.dtype, "fold_alpha": fold_alpha or None, "path": write_with.output
        }  # fmt: skip
        asked = recipe_of(sources, method, recipe, weights, space, options, parameters, stated)
        click.echo(asked.to_yaml(), nl=False)
        return
    with counting("merging", "modules", quiet=write_with.as_json) as progress:
        result = run_merge(
            sources,
            write_with.output,
            method,
            recipe=recipe,
            weights=weights,
            to=to,
            space=space,
            reading=options,
            dtype=write_with.dtype,
            device=device,
            workers=workers,
            overwrite=write_with.overwrite,
            verify=not write_with.no_verify,
            fields=read_with.fields,
            fold_alpha=fold_alpha,
            progress=progress,
            **parameters,
        )
    if write_with.as_json:
        print_json(as_dict(result))
        return
    for line in lines(result, verbose):
        click.echo(line)


def _as_in_recipes(read_with: Reading) -> dict[str, Any]:
    """The options of reading that say something, of types that a recipe can hold."""
    options = {name: list(value) if name == "rename" else value for name, value in read_with.given.items()}
    return {**options, "allow_drop": True} if read_with.allow_drop else options
