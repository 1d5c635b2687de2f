"""Write docs/corpus-validation.md: what `adapterops validate` finds in the corpus of published adapters.

    python scripts/corpus_validation.py [CORPUS] > docs/corpus-validation.md

CORPUS defaults to ../shared/corpus.  Exit status 1 where an oddity that a rule covers is not found, where one is not
accounted for, or where an error or a warning is neither announced by an oddity nor judged true.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "formats"), str(ROOT / "scripts")]

from corpus_files import fill, skeletons  # noqa: E402
from corpus_oddities import JUDGED, ODDITIES  # noqa: E402

import adapterops as ao  # noqa: E402

LARGE = 600 << 20
"""Bytes from which on a skeleton is filled with zeros, of which the rules that read numbers would say so."""
BAD = ("error", "warning")


@dataclass(frozen=True)
class Oddity:
    """Something that the manifest calls peculiar of one file or of all of a folder."""

    slug: str
    text: str

    @property
    def verdict(self) -> tuple[str, ...] | str | None:
        """The codes that find it, or why none does; None where nobody has said."""
        for (slug, start), verdict in ODDITIES.items():
            is_own = slug == self.slug or (slug.endswith("-") and self.slug.startswith(slug))
            if is_own and self.text.startswith(start):
                return verdict
        return None


def main() -> int:
    """Print the page."""
    corpus = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "corpus"
    report = ao.validate(corpus / "files", jobs=0)
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    oddities = oddities_of(manifest)
    problems = [*unaccounted(oddities, codes_by_slug(report, corpus)), *unjudged(report, oddities, corpus)]
    print(
        "\n".join([*_head(report), *_files(report, corpus), *_oddities(oddities), *_others(report, oddities, corpus)])
    )
    print("\n".join(_skeletons(corpus)))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def oddities_of(manifest: list[dict[str, Any]]) -> list[Oddity]:
    """The oddities of the files, in the manifest's order."""
    own = [entry for entry in manifest if entry["kind"] in ("file", "not-an-adapter")]
    return list(dict.fromkeys(Oddity(e["slug"], text) for e in own for text in e.get("peculiar") or ()))


def codes_by_slug(report: ao.Report, corpus: Path) -> dict[str, set[str]]:
    """The codes that are found in each folder of the corpus."""
    found: dict[str, set[str]] = {}
    for adapter in report.adapters:
        found.setdefault(_slug(adapter.path, corpus), set()).update(f.code for f in adapter.findings)
    return found


def _slug(path: str, corpus: Path) -> str:
    return Path(path).relative_to(corpus / "files").parts[0]


def _codes(findings: Iterable[ao.Finding]) -> str:
    counts = Counter((f.code, str(f.severity)) for f in findings)
    order = {str(severity): at for at, severity in enumerate(ao.Severity)}
    by_severity: dict[str, list[str]] = {}
    for (code, severity), n in sorted(counts.items(), key=lambda item: (order[item[0][1]], item[0])):
        by_severity.setdefault(severity, []).append(code + (f" ×{n}" if n > 1 else ""))
    return "; ".join(f"{severity} {', '.join(codes)}" for severity, codes in by_severity.items())


def _head(report: ao.Report) -> Iterator[str]:
    worst = [{str(f.severity) for f in adapter.findings} for adapter in report.adapters]
    errors = sum("error" in severities for severities in worst)
    warnings = sum("error" not in severities and "warning" in severities for severities in worst)
    yield "# What `adapterops validate` finds in published files\n"
    yield (
        f"Written by `scripts/corpus_validation.py`, which fails where an oddity that a rule covers is not found, or where an\n"
        f"error or a warning is neither announced as an oddity nor judged true. {len(report.adapters)} files and folders, "
        f"{len(report.rules)} rules asked\n(no `--targets`): {errors} have an error, {warnings} a warning and no error, "
        f"{len(worst) - errors - warnings} neither. The files are other people's and not\npart of this repository; "
        "D601 (no model card) is left out below, since the corpus has no cards.\n"
    )


def _files(report: ao.Report, corpus: Path) -> Iterator[str]:
    yield "## Findings by file\n\n| file or folder | recognised as | findings |\n| --- | --- | --- |"
    for adapter in report.adapters:
        name = Path(adapter.path).relative_to(corpus / "files")
        findings = [f for f in adapter.findings if f.code != "D601"]
        yield f"| {name} | {adapter.dialect or '—'} | {_codes(findings) or '—'} |"
    yield "\n| code | rule | severity | findings |\n| --- | --- | --- | --- |"
    for rule, count in report.by_rule.items():
        yield f"| {rule.code} | {rule.name} | {rule.severity} | {count} |"
    yield ""


def _oddities(oddities: list[Oddity]) -> Iterator[str]:
    ruled = [oddity for oddity in oddities if isinstance(oddity.verdict, tuple)]
    yield (
        f"## Oddities of the manifest\n\n{len(oddities)} oddities: {len(ruled)} are found by a rule, "
        f"{len(oddities) - len(ruled)} are no fault or not to be seen.\n"
    )
    yield "| file | oddity | found by |\n| --- | --- | --- |"
    for oddity in oddities:
        verdict = oddity.verdict
        text = oddity.text.replace("|", "/")
        yield f"| {oddity.slug} | {text} | {', '.join(verdict) if isinstance(verdict, tuple) else f'none: {verdict}'} |"
    yield ""


def _announced(oddities: list[Oddity]) -> set[tuple[str, str]]:
    return {(o.slug, code) for o in oddities if isinstance(o.verdict, tuple) for code in o.verdict}


def _judgement(code: str, slug: str) -> str | None:
    return next((why for (own, start), why in JUDGED.items() if own == code and slug.startswith(start)), None)


def _others(report: ao.Report, oddities: list[Oddity], corpus: Path) -> Iterator[str]:
    announced = _announced(oddities)
    counts: Counter[tuple[str, str, str]] = Counter()
    for finding in report:
        slug = _slug(finding.adapter, corpus)
        if finding.severity in BAD and (slug, finding.code) not in announced:
            counts[finding.code, str(finding.severity), _judgement(finding.code, slug) or "not judged"] += 1
    yield "## Errors and warnings that the manifest does not announce\n"
    yield "| code | severity | files | true of them |\n| --- | --- | --- | --- |"
    for (code, severity, why), count in sorted(counts.items()):
        yield f"| {code} | {severity} | {count} | {why} |"
    yield ""


def unaccounted(oddities: list[Oddity], found: dict[str, set[str]]) -> Iterator[str]:
    """What is odd and neither found as it should be nor given a reason."""
    for oddity in oddities:
        verdict = oddity.verdict
        if verdict is None:
            yield f"{oddity.slug}: {oddity.text!r} is not accounted for"
        elif isinstance(verdict, tuple) and not set(verdict) <= found.get(oddity.slug, set()):
            yield f"{oddity.slug}: {oddity.text!r} is not found by {', '.join(verdict)}"


def unjudged(report: ao.Report, oddities: list[Oddity], corpus: Path) -> Iterator[str]:
    """The errors and warnings of which nobody has said that they are true."""
    announced = _announced(oddities)
    for finding in report:
        slug = _slug(finding.adapter, corpus)
        known = (slug, finding.code) in announced or _judgement(finding.code, slug) is not None
        if finding.severity in BAD and not known:
            yield f"{slug}: {finding.code} is neither announced nor judged: {finding.message}"


def _skeletons(corpus: Path) -> Iterator[str]:
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    peculiar = {entry["slug"]: "; ".join(entry["peculiar"]) for entry in manifest if entry["kind"] == "skeleton"}
    yield "## Skeletons\n"
    yield "Keys and shapes of larger files, filled with random numbers; those that the manifest calls hand-made are impossible.\n"
    yield "| skeleton | oddity | recognised as | findings |\n| --- | --- | --- | --- |"
    with tempfile.TemporaryDirectory() as folder:
        for name, path in skeletons(corpus):
            target = Path(folder) / f"{name}.safetensors"
            fill(path, target)
            (checked,) = ao.validate(target, header_only=target.stat().st_size > LARGE).adapters
            said = _codes(checked.findings) or "—"
            arch = next((arch for arch in ("flux", "qwen_image") if arch in name), None)
            if arch is not None and any(f.code == "B303" for f in checked.findings):
                (named,) = ao.validate(target, arch=arch, header_only=True).adapters
                said += f"; with `--arch {arch}`: {_codes(named.findings) or '—'}"
            target.unlink()
            odd = peculiar.get(name, "").replace("|", "/")
            yield f"| {name} | {odd} | {checked.dialect or '—'} | {said} |"
    yield "\nThe manifest's configs without weights are not validated: of each, F041 says that the weights are missing."


if __name__ == "__main__":
    raise SystemExit(main())
