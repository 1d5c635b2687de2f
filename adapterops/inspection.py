"""What a file is and holds, from its header alone (tensors are read only for norms and hashes)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import hypot, isfinite, isnan, nan
from typing import Any, NamedTuple

from adapterops import registry
from adapterops.adapter import Adapter, Certainty, Fact, Update
from adapterops.errors import AdapterOpsError
from adapterops.loading import PathLike, insist_on_use, load
from adapterops.methods import METHODS
from adapterops.storage import dtypes, safetensors
from adapterops.strength import notes_on_header, notes_on_nothing

Spread = Mapping[Any, int]
"""A value and the number of modules that have it."""


class ComponentReport(NamedTuple):
    """One component of the base model and what the adapter does to it."""

    name: str
    modules: int
    methods: Spread
    ranks: Spread
    alphas: Spread
    scales: Spread
    alpha_source: str
    extras: Spread
    """DoRA magnitudes, biases, Tucker cores, rsLoRA: what goes beyond two factors and an alpha."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The report that `inspect` gives; `to_dict` is what `--json` prints."""

    path: str
    size: int
    format: str
    dialect: str
    title: str
    architecture: Fact[str | None]
    components: tuple[ComponentReport, ...]
    dtypes: Mapping[str, int]
    tensors: int
    metadata: Mapping[str, str]
    config: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    hashes: Mapping[str, Any] = field(default_factory=dict)
    norms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def modules(self) -> int:
        """The number of modules with an update."""
        return sum(c.modules for c in self.components)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        arch = self.architecture
        return {
            "path": self.path,
            "size": self.size,
            "format": self.format,
            "dialect": self.dialect,
            "architecture": {"value": arch.value, "certainty": str(arch.certainty), "source": arch.source},
            "modules": self.modules,
            "tensors": self.tensors,
            "dtypes": dict(self.dtypes),
            "components": [
                {
                    "name": c.name,
                    "modules": c.modules,
                    "methods": dict(c.methods),
                    "ranks": {str(k): v for k, v in c.ranks.items()},
                    "alphas": {str(k): v for k, v in c.alphas.items()},
                    "scales": {str(k): v for k, v in c.scales.items()},
                    "alpha_source": c.alpha_source,
                    "extras": dict(c.extras),
                }
                for c in self.components
            ],
            # JSON has no NaN.
            "norms": {
                block: {name: value if isfinite(value) else None for name, value in sizes.items()}
                for block, sizes in self.norms.items()
            },
            "metadata": dict(self.metadata),
            "config": {k: dict(v) for k, v in self.config.items()},
            "hashes": dict(self.hashes),
            "notes": list(self.notes),
            "dropped": list(self.dropped),
        }


def inspect(path: PathLike, *, norms: bool = False, hashes: bool = False, **options: Any) -> Inspection:
    """Report on an adapter.

    `norms` adds the size of every block's weight delta (reads the tensors), `hashes` recomputes
    `sshs_model_hash`; `options` are those of `load`.

    An adapter whose base model no table knows, or whose header contradicts its alphas, is reported on too, with a note.

    Raises what `load` raises.
    """
    try:
        adapter = load(path, **options)
    except AdapterOpsError as refusal:
        from adapterops.looking import look  # a success has no use for it

        adapter = look(refusal, path, **options)
    insist_on_use(adapter, options.get("fields") or ())
    return report(adapter, norms=norms, hashes=hashes)


def report(adapter: Adapter, *, norms: bool = False, hashes: bool = False) -> Inspection:
    """The report on an adapter that is loaded already."""
    form, dialect = registry.find(adapter.provenance.dialect)
    if adapter.verbatim is not None:
        from adapterops.looking import neither  # for few files

        adapter = neither(adapter)
    files = {t.source.path for u in adapter for t in u.tensors.values()}
    # What a file holds once for many modules is one tensor.
    own = {(t.source.path, t.key, t.start) for u in adapter for t in u.tensors.values()}
    tensors = len(own) + len(adapter.provenance.folded)
    sizes, said = _norms(adapter) if norms else ({}, [])
    return Inspection(
        path=adapter.provenance.path,
        size=adapter.provenance.size,
        format=form.name,
        dialect=dialect.name,
        title=dialect.title,
        architecture=adapter.architecture,
        components=tuple(_component(name, adapter.of(name)) for name in adapter.components),
        dtypes=known_dtypes(adapter),
        tensors=tensors,
        metadata=adapter.metadata,
        config=adapter.config,
        notes=(*adapter.provenance.notes, *notes_on_nothing(adapter), *notes_on_header(adapter), *said),
        dropped=adapter.provenance.dropped,
        hashes=_hashes(files) if hashes else {},
        norms=sizes,
    )


def known_dtypes(updates: Iterable[Update]) -> dict[str, int]:
    """How many tensors there are of each dtype, widest first; one that several updates share counts once."""
    own = {(t.source.path, t.key, t.start): t.dtype for update in updates for t in update.tensors.values()}
    out: dict[str, int] = {}
    for dtype in own.values():
        out[dtype] = out.get(dtype, 0) + 1
    return dict(sorted(out.items(), key=lambda item: (-dtypes.BITS[item[0]], item[0])))


def _component(name: str, updates: list[Update]) -> ComponentReport:
    scaled = [u for u in updates if u.alpha is not None]
    sources = Counter(str(u.alpha.certainty) for u in scaled if u.alpha is not None)
    extras: Counter[str] = Counter()
    for update in updates:
        if "magnitude" in update.tensors:
            extras[f"DoRA per {update.options['dora_axis']}put"] += 1
        for role, title in (("bias", "lora_bias"), ("mid", "Tucker core")):
            if role in update.tensors and update.method == "lora":
                extras[title] += 1
        if update.rslora:
            extras["rsLoRA"] += 1
        if update.options.get("kind") == "embedding":
            extras["embedding"] += 1
        extras.update(_settings(update))
    return ComponentReport(
        name=name,
        modules=len({u.module for u in updates}),
        methods=_ordered(Counter(u.method for u in updates)),
        ranks=_ordered(Counter(r for u in updates if (r := METHODS[u.method].rank(u)) is not None)),
        alphas=_ordered(Counter(_tidy(u.alpha.value) for u in scaled if u.alpha is not None)),
        scales=_ordered(Counter(_tidy(METHODS[u.method].scale(u)) for u in scaled)),
        alpha_source=", ".join(sources),
        extras=_ordered(extras),
    )


_INNER = frozenset(
    {"kind", "dora_axis", "shape", "initial", "on_input", "indices", "rank", "projection", "index", "group"}
)
"""Options that are said elsewhere, or that are no field of any config."""


def _settings(update: Update) -> list[str]:
    """The facts of a config that change what the update's tensors mean."""
    said = []
    for name, value in update.options.items():
        text = json.dumps(value, default=str)
        if name not in _INNER | METHODS[update.method].compared and len(text) <= 40:
            said.append(f"{name}={text}")
    return said


def _tidy(value: float | None) -> float | str:
    return "unknown" if value is None else float(f"{value:.6g}")


def _ordered(counts: Counter[Any]) -> dict[Any, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], str(item[0]))))


def block_of(module: str) -> str:
    """The block a module is in: its path up to the first number (`down_blocks.1`), or its first name."""
    match = re.match(r"(.*?\.\d+)(\.|$)", module)
    return match.group(1) if match else module.split(".")[0]


def _norms(adapter: Adapter) -> tuple[dict[str, dict[str, float]], list[str]]:
    """For every block the Frobenius norm of its deltas together and the largest of a module, and what they leave out."""
    sums: dict[str, list[float]] = {}
    without: Counter[str] = Counter()
    before_dora = unscaled = 0
    for update in adapter:
        method = METHODS[update.method]
        if method.scaled and method.scale(update) is None:
            unit: Fact[float | None] = Fact(float(method.rank(update) or 1), Certainty.ASSUMED)
            update, unscaled = replace(update, alpha=unit, rslora=False), unscaled + 1
        norm = method.norm(update)
        if norm is None:
            without[method.title] += 1
            continue
        before_dora += "magnitude" in update.tensors
        sums.setdefault(f"{update.component}: {block_of(update.module)}", []).append(norm)
    notes = [
        *(
            f"the norms leave out {count} of {title}: no delta without the base weight"
            for title, count in without.items()
        ),
        *([f"the norms of {before_dora} modules are those before DoRA's normalisation"] if before_dora else []),
        *([f"the scale of {unscaled} modules is unknown and counts as 1 in their norms"] if unscaled else []),
    ]
    sizes = {
        block: {
            "norm": hypot(*values),
            "largest": nan if any(map(isnan, values)) else max(values),
            "modules": len(values),
        }
        for block, values in sums.items()
    }
    return sizes, notes


def _hashes(files: set[str]) -> dict[str, Any]:
    """`sshs_model_hash` (sha256 of the bytes after the header) of each safetensors file, recorded and computed.

    Source: kohya-ss/sd-scripts `library/train_util.py`, `addnet_hash_safetensors`.
    """
    import hashlib  # a fortieth of the time of a command that needs none

    out: dict[str, Any] = {}
    for path in sorted(files):
        if not path.endswith(".safetensors"):
            continue
        _, metadata = safetensors.read_header(path)
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            file.seek(int.from_bytes(file.read(8), "little") + 8)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        recorded = metadata.get("sshs_model_hash")
        out[path] = {
            "computed": digest.hexdigest(),
            "recorded": recorded,
            "agree": None if recorded is None else recorded == digest.hexdigest(),
        }
    return out
