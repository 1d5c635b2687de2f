"""The `adapterops` command: parses, calls the library, prints.  Commands are imported when they are used."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import sys
from itertools import pairwise
from typing import Any, NoReturn

import click

from adapterops import __version__
from adapterops.cli.interrupts import spare_imports
from adapterops.errors import AdapterOpsError

COMMANDS = {
    "inspect": "What an adapter file is and holds.",
    "convert": "Convert an adapter to another format, with proof.",
    "merge": "Make one adapter of several.",
    "validate": "Lint adapters: what is wrong, why, and how to mend it.",
    "to-lora": "Make a plain LoRA of an adapter of any method.",
    "loftq": "Start a LoRA as what quantisation takes from the base.",
    "formats": "The formats and dialects that are read and written.",
    "architectures": "The base models whose module names are built in.",
    "methods": "The adapter methods that are understood (--merge: the ways to merge).",
    "rules": "The rules of validate.",
    "rule": "What one rule is about: why, what to do, examples.",
}
_MODULES = {"formats": "lists", "architectures": "lists", "methods": "lists", "rule": "rules"}
"""The files of commands that share one."""


class LazyGroup(click.Group):
    """A group whose commands live in one file each, imported only when called."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        attribute = name.replace("-", "_")
        command = getattr(importlib.import_module(f"adapterops.cli.{_MODULES.get(name, attribute)}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(context, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if near:
                raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", context) from error
            raise


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="adapterops")
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
def main(debug: bool) -> None:
    """Read, understand, convert, merge and validate LoRA adapters and their kin, with proof.

    \b
    Examples:
      adapterops inspect style.safetensors
      adapterops convert style.safetensors --to peft
      adapterops convert my-peft-folder --to kohya -o style.safetensors
      adapterops merge style.safetensors face.safetensors --method svd --weights 0.7,0.5
      adapterops validate zoo
    """


def run(arguments: list[str] | None = None) -> None:
    """The command with these arguments, or the process's own.

    Every expected error becomes one message; exit status 0, 1 or 2 (130 after Ctrl-C).
    """
    # A command makes tens of thousands of small objects and ends; collecting among them costs a twentieth of its time.
    gc.set_threshold(50_000, 20, 50)
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Where the terminal or the file has no → or ‖, that is no reason to fail after the work.
            stream.reconfigure(errors="replace")
    debug = "--debug" in arguments
    # An option of the whole command, taken wherever it stands.
    arguments = [a for a in arguments if a != "--debug"]
    wants_json = "--json" in arguments or "--format=json" in arguments or ("--format", "json") in pairwise(arguments)
    try:
        main.main(args=arguments, prog_name="adapterops", standalone_mode=False, color=_color())
    except AdapterOpsError as error:
        if debug:
            raise
        _fail(error, wants_json, error.exit_code)
    except click.exceptions.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # click takes it for the end of a dialogue, and there is none
            _confess(abort.__cause__, wants_json)
        _stop()
    except KeyboardInterrupt:
        _stop()
    except click.ClickException as error:
        if wants_json:
            print_json({"error": {"kind": "UsageError", "message": error.format_message()}})
        error.show()
        sys.exit(2)
    except BrokenPipeError:
        # The reader (`| head`) has had enough; Python must not complain about it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if isinstance(error, OSError) and _was_printing(error):
            # The disk that the output goes to is full; what a command has written elsewhere by then stays.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            click.echo(f"error: the standard output cannot be written: {error.strerror}", err=True)
            sys.exit(2)
        if debug:
            raise
        _confess(error, wants_json)


def script() -> None:
    """The console script: `run`, and then the end of the process at once.

    Everything that was opened for writing is closed by then; taking apart the names of thousands of tensors, one by
    one, would cost a command a tenth of its time.
    """
    code = 0
    spare_imports()
    try:
        run()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except OSError:  # not even a message can be written
        code = 2
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as where a service was started with its outputs closed
            with contextlib.suppress(OSError):  # the reader of a pipe has had enough, or the disk is full
                stream.flush()
    os._exit(code)


def _was_printing(error: OSError) -> bool:
    import traceback  # only ever needed for a message

    return any(frame.f_code is click.echo.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def _color() -> bool | None:
    """None lets click decide by the terminal; https://no-color.org says when not even there."""
    return False if os.environ.get("NO_COLOR") else None


def _stop() -> NoReturn:
    click.echo("stopped; nothing was written", err=True)
    sys.exit(130)


def _fail(error: AdapterOpsError, wants_json: bool, code: int) -> NoReturn:
    if wants_json:
        print_json({"error": {"kind": type(error).__name__, "message": str(error)}})
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True, color=_color())
    sys.exit(code)


def _confess(error: Exception, wants_json: bool) -> NoReturn:
    """A bug of ours: still no traceback, but what to send us."""
    if wants_json:
        print_json({"error": {"kind": type(error).__name__, "message": str(error)}})
    click.echo(
        f"error: {type(error).__name__}: {error}\nThis is a fault of adapterops. Please report it with the output "
        "of the same command under --debug.",
        err=True,
    )
    sys.exit(2)


def print_json(value: Any) -> None:
    """The one JSON document of `--json`, in ASCII: file names may hold bytes that no text encoding has."""
    click.echo(json.dumps(value, indent=2))


if __name__ == "__main__":
    script()
