"""`adapterops validate`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from adapterops.cli.progress import counting
from adapterops.cli.text import plural

if TYPE_CHECKING:
    from adapterops.validation.baseline import Baseline
    from adapterops.validation.fix import Mended
    from adapterops.validation.report import Report
    from adapterops.validation.settings import Settings

_FORMATS = ("text", "json", "sarif", "junit", "github")


def _words(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...] | None:
    """Comma lists, given once or several times; None where the option was not given."""
    words = tuple(word.strip() for value in values for word in value.split(",") if word.strip())
    if values and not words:
        raise click.BadParameter("names nothing")
    return words or None


@click.command(short_help="Lint adapters: what is wrong, why it matters, how to mend it.")
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
@click.option("--arch", metavar="NAME", help="The base model: sd1, sdxl, flux … (adapterops architectures).")
@click.option(
    "--base",
    metavar="BASE",
    type=click.Path(),
    help="Any other base model: its config.json, its folder, its weights (only the header is read), or hf://owner/repo.",
)
@click.option(
    "--targets",
    metavar="LOADERS",
    multiple=True,
    callback=_words,
    help="The loaders that the adapters are for: peft, diffusers, comfy, vllm, sglang, mlx, gguf.",
)
@click.option("--load-test", is_flag=True, help="Load them with peft or diffusers, into a model without weights.")
@click.option(
    "--select",
    metavar="CODES",
    multiple=True,
    callback=_words,
    help="The rules to ask, instead of all: codes (T101), their beginnings (T), names.",
)
@click.option(
    "--ignore",
    metavar="CODES",
    multiple=True,
    callback=_words,
    help="Rules not to ask, spelled alike; the more exact of --select and --ignore wins.",
)
@click.option("--header-only", is_flag=True, help="Only the rules that read no tensor's bytes: fast.")
@click.option(
    "--fix", is_flag=True, help="Mend, in place, what can be mended without touching what the adapters compute."
)
@click.option("--diff", is_flag=True, help="Show what --fix would do; change nothing.")
@click.option("--strict/--no-strict", default=None, help="Warnings count as errors for the exit status.")
@click.option("--exit-zero", is_flag=True, help="Exit with 0 whatever is found.")
@click.option("--format", "output_format", type=click.Choice(_FORMATS), help="How to report; text without it.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("-o", "--output", metavar="FILE", type=click.Path(), help="Write the report there instead of stdout.")
@click.option("--statistics", is_flag=True, help="Counts by rule instead of findings.")
@click.option(
    "-j",
    "--jobs",
    metavar="N",
    type=click.IntRange(min=1),
    help="Cores to use, by processes and threads; default: all.",
)
@click.option("--baseline", metavar="FILE", type=click.Path(), help="Tell only what this baseline does not accept.")
@click.option("--write-baseline", metavar="FILE", type=click.Path(), help="Accept all of today's findings.")
@click.option(
    "--config", metavar="FILE", type=click.Path(), help="Settings; else the nearest .adapterops.toml or pyproject.toml."
)
@click.option("--isolated", is_flag=True, help="No settings but those of the command line.")
def validate(
    sources: tuple[str, ...],
    arch: str | None,
    base: str | None,
    targets: tuple[str, ...] | None,
    load_test: bool,
    select: tuple[str, ...] | None,
    ignore: tuple[str, ...] | None,
    header_only: bool,
    fix: bool,
    diff: bool,
    strict: bool | None,
    exit_zero: bool,
    output_format: str | None,
    as_json: bool,
    output: str | None,
    statistics: bool,
    jobs: int | None,
    baseline: str | None,
    write_baseline: str | None,
    config: str | None,
    isolated: bool,
) -> None:
    """Check the adapters SRC: files, folders, trees of folders, or hf://owner/repo[@revision].

    Every finding has a code, what is wrong and what to do; [*] marks what --fix mends.  adapterops rule CODE says more.

    Exit status: 1 where there is an error (--strict: or a warning), else 0; 2 where SRC does not exist, or for wrong usage.

    \b
    Examples:
      adapterops validate style.safetensors
      adapterops validate zoo --select T,C --ignore D
      adapterops validate my-peft-folder --targets peft,vllm --base hf://owner/base-model
      adapterops validate my-peft-folder --diff
      adapterops validate my-peft-folder --fix
      adapterops validate zoo --format sarif -o adapterops.sarif
      adapterops validate zoo --write-baseline baseline.json
      adapterops rule T101
    """
    from adapterops.validation import baseline as baselines
    from adapterops.validation import settings as configuration

    if config is not None and isolated:
        raise click.UsageError("--config names settings and --isolated takes none; give one of them")
    if diff and fix:
        raise click.UsageError("--diff changes nothing and --fix does; give one of them")
    if as_json and output_format not in (None, "json"):
        raise click.UsageError(f"--json and --format {output_format} contradict each other; give one of them")
    output_format = "json" if as_json else output_format
    output = None if output == "-" else output
    _insist_on_one_report(output_format, output, diff, statistics)
    if write_baseline is not None and (fix or diff):
        raise click.UsageError("--write-baseline accepts findings and --fix mends them; do one after the other")
    settings = configuration.Settings() if isolated else configuration.load(config)
    if arch is None and base is None:  # one on the command line takes the place of either
        arch, base = settings.arch, settings.base
    options: dict[str, Any] = {
        "select": select or settings.select or ("ALL",),
        "ignore": (*((settings.ignore or ()) if ignore is None else ignore), *settings.extend_ignore),
        "arch": arch,
        "base": base,
        "targets": settings.targets if targets is None else targets,
        "load_test": load_test,
        "header_only": header_only,
        "jobs": jobs or settings.jobs,
    }
    strict = settings.strict if strict is None else strict
    baseline = None if write_baseline is not None else baseline or settings.baseline
    accepted = baselines.load(baseline) if baseline is not None else None
    run = _Run(sources, settings, options, accepted)
    report = run.report()
    if write_baseline is not None:
        baselines.write(write_baseline, report)
        click.echo(
            f"accepted {plural(len(report.findings), 'finding')} of {_adapters(report)} in {write_baseline}", err=True
        )
        return
    if diff:
        run.notes = (*run.notes, *_show_diff(report))
    else:
        if fix:
            report = _mended(report, run)
        name = output_format or ("text" if statistics else settings.format or "text")
        _print(report, name, output, strict, statistics)
    for note in run.notes:
        click.echo(f"note: {note}", err=True)
    raise SystemExit(0 if exit_zero else report.exit_code(strict))


def _insist_on_one_report(output_format: str | None, output: str | None, diff: bool, statistics: bool) -> None:
    if statistics and output_format not in (None, "text"):
        raise click.UsageError(f"--statistics is a table of text; --format {output_format} has a summary of its own")
    if statistics and diff:
        raise click.UsageError("--statistics counts findings and --diff shows changes; give one of them")
    if diff and (output_format not in (None, "text") or output is not None):
        raise click.UsageError("--diff shows differences; it takes no --format and no -o")


@dataclass(slots=True)
class _Run:
    """A validation that can be repeated after mending."""

    sources: tuple[str, ...]
    settings: Settings
    options: dict[str, Any]
    baseline: Baseline | None
    notes: tuple[str, ...] = ()

    def report(self) -> Report:
        from adapterops.validation import baseline as baselines
        from adapterops.validation.run import validate

        left_out: list[str] = []

        def skip(path: str) -> bool:
            if self.settings.exclude and self.settings.excludes(path):
                left_out.append(path)
                return True
            return False

        with _progress() as progress:
            report = validate(*self.sources, **self.options, skip=skip, progress=progress)
        report = self.settings.without_ignored(report)
        notes = []
        if left_out:
            notes.append(
                f"{plural(len(left_out), 'adapter')} left out ({os.path.relpath(self.settings.path)}: exclude)"
            )
        if self.baseline is not None:
            report, stale = baselines.apply(self.baseline, report)
            if stale:
                entries = "1 entry matches" if stale == 1 else f"{stale} entries match"
                path = self.baseline.path
                notes.append(f"{path}: {entries} nothing any more; --write-baseline {path} makes it anew")
        self.notes = tuple(notes)
        return report


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar, once it is known that there are many adapters."""
    from adapterops.validation.workers import MANY

    with contextlib.ExitStack() as stack:
        show: Callable[[int, int], None] | None = None

        def progress(done: int, total: int) -> None:
            nonlocal show
            if show is None and total > MANY:
                show = stack.enter_context(counting("validating", "adapters"))
            if show is not None:
                show(done, total)

        yield progress


def _mended(report: Report, run: _Run) -> Report:
    """Mend what can be, and look again."""
    from adapterops.validation.fix import mend

    done: list[str] = []
    left: list[str] = []
    moved: dict[str, str] = {}
    for adapter in report.adapters:
        if any(finding.fixable for finding in adapter.findings):
            mended = mend(adapter, dry_run=False)
            done += [f"{adapter.path}: {line}" for line in mended.done]
            left += _left(mended)
            moved[os.path.abspath(adapter.path)] = mended.path
    if done:
        # A pickle that was named is a file of another name now.
        run.sources = tuple(moved.get(os.path.abspath(source), source) for source in run.sources)
        report = replace(run.report(), fixed=tuple(done))
    run.notes = (*run.notes, *left)
    return report


def _show_diff(report: Report) -> tuple[str, ...]:
    """Print what --fix would change; why it would not, where it would not."""
    from adapterops.validation.fix import mend

    count = 0
    left: list[str] = []
    for adapter in report.adapters:
        if any(finding.fixable for finding in adapter.findings):
            mended = mend(adapter, dry_run=True)
            count += len(mended.done)
            left += _left(mended)
            if mended.diff:
                click.echo(mended.diff.rstrip("\n"))
    would = f"--fix would change {plural(count, 'thing')}" if count else "--fix would change nothing"
    click.echo(f"{would}; {plural(len(report.findings), 'finding')} in {_adapters(report)}", err=True)
    return tuple(left)


def _left(mended: Mended) -> list[str]:
    return [f"{f.adapter}: {f.code} is not mended: {why}" for f, why in zip(mended.left, mended.why, strict=True)]


def _print(report: Report, name: str, output: str | None, strict: bool, statistics: bool) -> None:
    from adapterops.errors import OutputFailed
    from adapterops.validation.reporters import View, render
    from adapterops.validation.reporters.text_report import summary

    on_terminal = output is None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    text = render(name, report, View(strict, on_terminal, statistics, os.getcwd()))
    if output is None:
        click.echo(text)
        return
    try:
        with open(output, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")
    except OSError as error:
        raise OutputFailed(f"{output}: cannot be written: {error.strerror}") from error
    click.echo("\n".join(summary(report, View())), err=True)


def _adapters(report: Report) -> str:
    return plural(len(report.adapters), "adapter")
