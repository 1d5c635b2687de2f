"""The sound adapters that inputs are made from: the fixtures, one of each dialect's table, and conversions of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
from adapterops_formats.peft_kinds import KIND_OF, KINDS

import adapterops as ao
from adapterops import architectures, registry
from adapterops.architectures import Architecture
from adapterops.dialects.names import applies, book
from adapterops.dialects.table import Dialect, Place, Suffix
from adapterops.methods import METHODS
from adapterops.plugin import Format
from fuzzing.sample import Sample, Tensor, numbers, read_pickle, read_safetensors, safetensors_bytes

FIXTURES = Path(__file__).parents[2] / "fixtures"
RANK = 2
_FEW = 8
"""Modules of a small sample."""
_SMALL, _LARGE = 200_000, 30_000_000
"""Elements of a weight that is saved whole, and of one that a low-rank update stands on."""
ANY = "*"
"""The method of suffixes that several methods share (alpha, a DoRA magnitude)."""
_SCALED = ("lora", "loha", "lokr", "lycoris_glora")
RECIPES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "lora": (("A", "B", "alpha"), ("A", "B", "alpha", "magnitude")),
    "loha": (("w1_a", "w1_b", "w2_a", "w2_b", "alpha"),),
    "lokr": (("w1", "w2_a", "w2_b", "alpha"),),
    "ia3": (("vector",),),
    "diff": (("weight", "bias"),),
    "lycoris_oft": (("blocks", "alpha"),),
    "onetrainer_oft": (("R",), ("R", "scaled")),
    "lycoris_glora": (("a1", "a2", "b1", "b2", "alpha"),),
}
"""The roles that stand together in an update; of a method that is not here, all of its roles do."""
_FREE = {
    "model.layers.0.self_attn.q_proj": (12, 8),
    "model.layers.0.self_attn.v_proj": (6, 8),
    "model.layers.1.mlp.down_proj": (8, 10),
    "model.layers.11.self_attn.q_proj": (12, 8),
}
"""Modules of no known base, for dialects that take any dotted name."""


@cache
def samples() -> tuple[Sample, ...]:
    """Every seed, small ones first; the same in every run of the same tree."""
    small = [*_small_fixtures(), *from_tables()]
    return (*small, *_conversions(small))


@cache
def fixtures() -> tuple[Sample, ...]:
    """The fixtures' adapters, whole."""
    out = []
    folders = sorted(weights.parent for weights in FIXTURES.glob("**/adapter_model.*"))
    for path in sorted([*(p for p in FIXTURES.iterdir() if p.is_file()), *folders]):
        config = None
        weights = path
        if path.is_dir():
            weights = min(path.glob("adapter_model.*"))
            config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        name = str(path.relative_to(FIXTURES))
        if weights.suffix == ".safetensors":
            out.append(read_safetensors(name, weights.read_bytes(), config))
        elif weights.suffix == ".bin":
            out.append(read_pickle(name, weights.read_bytes(), config))
    return tuple(out)


@cache
def others() -> tuple[Mapping[str, bytes], ...]:
    """The files of the fixtures that are folders in other formats than PEFT's."""
    folders = sorted([*FIXTURES.glob("mlx-*"), *FIXTURES.glob("gguf-*")])
    return tuple({path.name: path.read_bytes() for path in sorted(f.iterdir()) if path.is_file()} for f in folders)


def memory() -> str | None:
    """A folder in memory, where there is one with room: what is looked for is not the disk's."""
    return "/dev/shm" if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 1 << 30 else None


def _small_fixtures() -> Iterator[Sample]:
    for sample in fixtures():
        yield thinned(sample) if len(sample.tensors) > 60 else sample


def thinned(sample: Sample, modules: int = _FEW) -> Sample:
    """A spread of a file's modules: keys that differ in their endings only stay together."""
    stems: dict[str, list[str]] = {}
    for key in sample.tensors:
        stem = key.partition(".lora")[0].partition(".alpha")[0].partition(".dora")[0]
        stems.setdefault(stem, []).append(key)
    chosen = list(stems)[:: max(1, len(stems) // modules)]
    return replace(
        sample, name=f"{sample.name} (thinned)", tensors={k: sample.tensors[k] for s in chosen for k in stems[s]}
    )


@cache
def can_be(name: str, dialect: str) -> bool:
    """Whether the seed of this name can be converted to `dialect` as it is."""
    sample = next(s for s in (*samples(), *fixtures()) if s.name == name)
    return bool(_converted(sample, *registry.find(dialect)))


@cache
def from_tables() -> tuple[Sample, ...]:
    """For each dialect, the architectures that it spells, and each method: a small sample.

    LoRA on every architecture; other methods on two, which differ in names and not in what the method is.
    """
    out: list[Sample] = []
    known = [*map(architectures.load, architectures.names()), None]
    for form in registry.formats().values():
        for dialect in form.dialects:
            for method in sorted({s.method for p in dialect.places for s in p.suffixes} - {ANY}):
                for roles in RECIPES.get(method, (None,)):
                    made = (from_table(dialect, architecture, method, roles) for architecture in known)
                    of_method = [sample for sample in made if sample is not None]
                    out += of_method if method == "lora" and roles == RECIPES["lora"][0] else of_method[:2]
    return tuple(out)


def from_table(
    dialect: Dialect, architecture: Architecture | None, method: str, roles: tuple[str, ...] | None
) -> Sample | None:
    """A sample of `method` on a few modules as `dialect` spells them; None where the table has no place for it."""
    generator = np.random.default_rng(7)
    tensors: dict[str, Tensor] = {}
    taken: set[tuple[str, str]] = set()
    most = max(2, _FEW // len(dialect.places))
    whole = not RECIPES.get(method) or method == "diff"
    for place in dialect.places:
        component = (architecture and place.among(architecture.components)) or place.component
        modules = [m for m in _modules(place, architecture, whole) if (component, m[0]) not in taken]
        for name, spelled, shape in modules[:: max(1, len(modules) // most)][:most]:
            taken.add((component, name))
            for suffix in _row(place, method, name, roles):
                key = place.prefix + spelled + suffix.text.replace("{adapter}", "")
                if suffix.role == "alpha":
                    tensors[key] = Tensor("F16", (), b"\0\x3c")
                else:
                    own = _shape(method, suffix.role, shape)
                    turned = suffix.transposed and len(own) == 2
                    tensors[key] = numbers("F16", own[::-1] if turned else own, generator)
    if not tensors:
        return None
    config = None
    if registry.find(dialect.name)[0].is_folder:
        kind = KINDS[KIND_OF.get(method, "LORA")]
        said = {
            "peft_type": kind.kind, "r": RANK, "lora_alpha": 4, "alpha": 4, "bias": "none",
            "task_type": None, "target_modules": sorted({n.rpartition(".")[2] for n in _FREE}), "rank_pattern": {},
            "alpha_pattern": {}, "use_dora": "magnitude" in (roles or ()), "feedforward_modules": [],
        }  # fmt: skip
        config = {name: value for name, value in said.items() if name in kind.all_fields}
    base = architecture.name if architecture else "free names"
    return Sample(
        f"{dialect.name}/{base}/{method}{'' if roles is None else ' of ' + ' '.join(roles)}", tensors, {}, config
    )


def _modules(place: Place, architecture: Architecture | None, whole: bool) -> list[tuple[str, str, tuple[int, ...]]]:
    """(canonical name, spelled name, weight's shape) of modules that a low-rank update, or a whole weight, can stand on."""
    named: list[tuple[str, str, tuple[int, ...]]]
    if architecture is None or place.component == "*":
        # Behind a prefix of its own a name that no base model has is kept, however it is spelled.
        kept = place.prefix or not (place.flat or place.names != "canonical")
        free = place.component == "*" or (kept and not place.only)
        # A prefix may be where transformers' layers begin ("layers." of Mistral's code).
        own = f"model.{place.prefix}" if place.prefix else ""
        names = _FREE.items() if free and architecture is None else ()
        named = [(n, n.replace(".", "_") if place.flat else n.removeprefix(own), s) for n, s in names]
    elif not applies(place, architecture):
        return []
    else:
        component = architecture.components[place.among(architecture.components) or ""]
        least, most = (1, _SMALL) if whole else (2, _LARGE)
        named = [
            (name, spelled, spec.shape)
            for spelled, name in book(architecture, place).table.items()
            if (spec := component.spec(name)) is not None and least <= len(spec.shape) and prod(spec.shape) <= most
        ]
    if place.tails:
        named = [
            (name, spelled[: -len(end)] + tail, shape)
            for name, spelled, shape in named
            for end, tail in place.tails
            if spelled.endswith(end)
        ]
    return named


def _row(place: Place, method: str, name: str, roles: tuple[str, ...] | None) -> list[Suffix]:
    """The first suffix of each role of a method that the table has for this module."""
    out: dict[str, Suffix] = {}
    for suffix in place.suffixes:
        own_alpha = bool(METHODS[method].alpha_role) and suffix.role == "alpha"
        meant = suffix.method == method or (suffix.method == ANY and (method in _SCALED or own_alpha))
        if meant and (roles is None or suffix.role in roles) and (not suffix.after or name.endswith(suffix.after)):
            out.setdefault(suffix.role, suffix)
    return list(out.values())


def _shape(method: str, role: str, weight: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a role's tensor on a module with this weight; that of the weight for roles that are not known here."""
    outputs, inputs, kernel = weight[0], prod(weight[1:2]), weight[2:]
    ones = (1,) * len(kernel)
    two = 2 if outputs % 2 == 0 and inputs % 2 == 0 else 1
    part = two if method == "lokr" else 1
    known: dict[str, tuple[int, ...]] = {
        "A": (RANK, inputs, *kernel),
        "B": (outputs, RANK, *ones),
        "bias": (outputs,),
        "magnitude": (outputs,),
        "w1_a": (outputs, RANK),
        "w1_b": (RANK, inputs * prod(kernel)),
        "w1": (two, two),
        "w2_a": (outputs // part, RANK),
        "w2_b": (RANK, inputs // part * prod(kernel)),
        "vector": (outputs,),
        "block": (RANK, outputs),
        "blocks": (outputs // two, two, two),
        "rescale": (outputs, *ones, 1),
        "a1": (inputs, RANK, *ones),
        "a2": (RANK, inputs, *ones),
        "b1": (outputs, RANK, *ones),
        "b2": (RANK, inputs, *kernel),
    }
    if method in ("oft", "onetrainer_oft"):
        turned = inputs * prod(kernel)
        side = next((b for b in range(2, 9) if turned % b == 0), turned)
        known |= {"R": (turned // side, side * (side - 1) // 2), "scaled": ()}
    return known.get(role, weight)


def _conversions(seeds: list[Sample]) -> list[Sample]:
    """Outputs of adapterops itself: only they have its header entry."""
    dialects = [(form, dialect) for form in registry.formats().values() for dialect in form.dialects]
    return [out for n, sample in enumerate(seeds) for out in _converted(sample, *dialects[n % len(dialects)])]


def _converted(sample: Sample, form: Format, dialect: Dialect) -> list[Sample]:
    """The weights that a conversion of the sample writes; none where the target cannot hold it."""
    out = []
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        source = Path(folder)
        (source / "adapter_model.safetensors").write_bytes(safetensors_bytes(sample))
        if sample.config is not None:
            (source / "adapter_config.json").write_text(json.dumps(sample.config), encoding="utf-8")
        place = source / ("out" if form.is_folder else "out.safetensors")
        # A refusal says that this is no pair; a fault shows when the seed itself is an input.
        with contextlib.suppress(Exception):
            for file in ao.convert(source, dialect.name, place, alpha=4.0, verify=False).files:
                if not file.endswith(".safetensors"):
                    continue
                beside = Path(file).with_name("adapter_config.json")
                config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else None
                name = f"{sample.name} as {dialect.name} {os.path.relpath(file, place)}"
                out.append(read_safetensors(name, Path(file).read_bytes(), config))
    return out
