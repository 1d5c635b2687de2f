"""One adapter from the components that a folder keeps in subfolders."""

from __future__ import annotations

from dataclasses import replace

from adapterops import architectures
from adapterops.adapter import Adapter, Certainty, Fact
from adapterops.architectures import Architecture
from adapterops.errors import AmbiguousFormat, UnknownArchitectureOfFile
from adapterops.methods import METHODS
from adapterops.storage import Source


def join(source: Source, parts: list[Adapter]) -> Adapter:
    """One adapter of the components that a folder keeps in subfolders.

    Raises `AmbiguousFormat` where a subfolder holds something else than its component.
    """
    for name, part in zip(source.parts, parts, strict=True):
        if part.components != (name,):
            raise AmbiguousFormat(
                f"{source.path}: its folder {name} holds updates of {', '.join(part.components)}: the folders are not the "
                "components of one adapter; name one of them"
            )
    nameless = next((p.verbatim for p in parts if p.verbatim is not None), None)
    if nameless is not None:
        raise UnknownArchitectureOfFile(nameless.why)
    names = {p.architecture.value for p in parts if p.architecture.value is not None}
    bases = [p.base for p in parts if p.base is not None]
    fact, base = parts[0].architecture, parts[0].base
    if (
        len(names) > 1
        or len(bases) < len(parts)
        or any(set(p.components) - set(b.components) for b in bases for p in parts)
    ):
        fact, base = _common(parts)
    first = parts[0].provenance
    provenance = replace(
        first,
        path=source.path,
        notes=tuple(dict.fromkeys(n for p in parts for n in p.provenance.notes)),
        folded={k: v for p in parts for k, v in p.provenance.folded.items()},
        stated={k: v for p in parts for k, v in p.provenance.stated.items()},
        dropped=tuple(k for p in parts for k in p.provenance.dropped),
        size=source.size,
    )
    mutated = next((p.mutated_init for p in parts if p.mutated_init), None)
    config = {k: v for p in parts for k, v in p.config.items()}
    joined = Adapter({}, fact, provenance, _metadata(parts), config, base, mutated)
    return joined.with_updates(u for p in parts for u in p)


def _metadata(parts: list[Adapter]) -> dict[str, str]:
    """The header strings of all parts; where two say different things the first one's stand."""
    out: dict[str, str] = {}
    for part in reversed(parts):
        out.update(part.metadata)
    return out


def _common(parts: list[Adapter]) -> tuple[Fact[str | None], Architecture | None]:
    """The one built-in architecture that has the modules of every part."""
    for name in architectures.names():
        arch = architectures.load(name)
        fits = all(
            u.component in arch.components
            and (u.method == "saved" or u.module in arch.components[u.component].modules)
            and (u.method == "saved" or METHODS[u.method].fits(u, arch.components[u.component].modules[u.module].shape))
            for p in parts
            for u in p
        )
        if fits:
            return Fact(name, Certainty.DERIVED, "module names and shapes of all components"), arch
    return Fact(None, Certainty.UNKNOWN, "the components fit no one base model"), None
