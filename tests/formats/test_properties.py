"""Properties of every dialect, method and architecture that is registered; a row added later is covered that day.

An adapter made of random updates is written in every dialect.  Where it is refused, the message names a module; where
not, it is proven, read back as what it was, written again as the same bytes, and comes back bit for bit through every
other dialect that holds it.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from adapterops_formats.peft_kinds import KIND_OF
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from raw import load_tensors
from safetensors.torch import save_file

import adapterops as ao
from adapterops import architectures, registry
from adapterops.adapter import Adapter, Certainty, Fact, Update
from adapterops.architectures import Architecture, Component, ModuleSpec
from adapterops.dialects.table import AlphaIn
from adapterops.dialects.write import EXCHANGED
from adapterops.errors import CannotRepresent, Conflict, UnknownArchitectureOfFile, UnknownFact
from adapterops.methods import METHODS
from adapterops.operations.fused import cut, pieces
from adapterops.storage import LazyTensor, dtypes
from adapterops.storage.tensor import MemorySource

EXAMPLES, OF_EACH = 240, 4
"""Adapters in all, and for each base besides."""
DIALECTS = {
    d.name: (form, d)
    for form in registry.formats().values()
    for d in form.dialects
    if form.name != "miss" and d.written
}
"""All but the one that holds MiSS alone, and those that are only read."""
REFUSALS = (CannotRepresent, UnknownArchitectureOfFile, UnknownFact, Conflict)
FLOATS = ("F32", "F16", "BF16")

_CLIP = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20, "projection_dim": 8,
}  # fmt: skip
_UNET = {
    "_class_name": "UNet2DConditionModel", "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 2,
    "cross_attention_dim": 8, "attention_head_dim": 4, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
_FLUX = {
    "_class_name": "FluxTransformer2DModel", "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
    "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 6,
    "axes_dims_rope": [1, 1, 2], "guidance_embeds": True,
}  # fmt: skip
_BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8, "intermediate_size": 12, "vocab_size": 20,
    "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny-flux": {"transformer": _FLUX},
    "tiny-flux-pipeline": {"transformer": _FLUX, "text_encoder": _CLIP},
    "tiny-sd": {"unet": _UNET, "text_encoder": _CLIP},
    "tiny-bert": {"": _BERT},
}
BASES = (*CONFIGS, *architectures.names())
POOLS: dict[str, Callable[[Component, ModuleSpec], bool]] = {
    "any": lambda c, s: True,
    "attention": lambda c, s: (
        s.kind == "linear" and s.name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0", ".proj_out"))
    ),
    "fused": lambda c, s: bool(s.joins) or s.name in c.whole,
    "convolutions": lambda c, s: s.kind == "conv",
    "norms": lambda c, s: s.kind == "norm",
    "small": lambda c, s: prod(s.shape) <= 1 << 12,
}


@dataclass(frozen=True)
class Case:
    """One adapter, as hypothesis draws it."""

    base: str
    pool: str
    method: str
    picks: tuple[int, ...]
    dtype: str
    rank: int
    alpha: float | None
    """None: the rank, so that the scale is 1."""
    kind: int
    """Chooses among the forms of a method: DoRA, cores, decompositions."""
    bare: bool
    """Written again without alphas and header, as other tools write it."""
    extra: str
    """A method that comes only beside others."""
    order: int


def drawn_case(seed: int, methods: Sequence[str]) -> Case:
    """A case from a seed: hypothesis' own draws crowd around the first choices."""
    random = Random(seed)
    case = Case(
        base=random.choice(BASES),
        pool=random.choice(sorted(POOLS)),
        method=random.choice(methods),
        picks=tuple(random.sample(range(10_000), random.randint(1, 4))),
        dtype=random.choice(FLOATS),
        rank=random.randint(1, 4),
        alpha=random.choice([None, None, 1.0, 4.0, 0.3]),
        kind=random.randrange(24),
        bare=random.random() < 0.5,
        extra=random.choice(["", "", "", *BESIDE]),
        order=random.randrange(1000),
    )
    if "lora" in methods and random.random() < 0.3:
        case = replace(case, **random.choice(_PLAIN), base=random.choice(_PIPELINES), method="lora", kind=2)
    if "lora" in methods and random.random() < 0.1:
        case = replace(case, base="tiny-bert", pool="any", method="lora", kind=2, extra="trainable_tokens")
    if "ia3" in methods and random.random() < 0.1:  # vectors of outputs alone, as T-Few has them
        case = replace(case, base="tiny-bert", pool="any", method="ia3", kind=random.choice((0, 2)), extra="")
    return case


_PLAIN: tuple[dict[str, Any], ...] = (
    {"pool": "attention", "alpha": None, "extra": ""},
    {"pool": "small", "alpha": None, "extra": ""},
)
_PIPELINES = ("tiny-sd", "tiny-flux", "sd1", "sdxl", "flux")
"""Older spellings have a place for plain LoRAs on these alone."""


def cases(methods: Sequence[str], base: str | None = None) -> st.SearchStrategy[Case]:
    """Adapters of one of the methods, for that base, or for any."""

    def case(seed: int) -> Case:
        drawn = drawn_case(seed, methods)
        return drawn if base is None else replace(drawn, base=base)

    return st.integers(0, 2**64 - 1).map(case)


class Numbers:
    """Seeded random tensors that are read as if from a file."""

    def __init__(self, seed: int, dtype: str) -> None:
        self._random, self._dtype = np.random.default_rng(seed), dtype

    def __call__(self, key: str, *shape: int) -> LazyTensor:
        values = np.round(self._random.standard_normal(shape) * 64) / 64 + 1 / 64
        data = dtypes.from_numpy(self._dtype, values)
        return LazyTensor(key, self._dtype, tuple(shape), MemorySource(bytes(data), "made.safetensors"), 0)


Tensors = dict[str, LazyTensor]
Options = dict[str, Any]


def magnitude(make: Numbers, spec: ModuleSpec, case: Case) -> tuple[Tensors, Options]:
    axis = {0: "out", 1: "in"}.get(case.kind % 4)
    if axis is None:
        return {}, {}
    return {"magnitude": make("magnitude", spec.shape[0 if axis == "out" else 1])}, {"dora_axis": axis}


def lora(make: Numbers, spec: ModuleSpec, case: Case) -> tuple[Tensors, Options] | None:
    if spec.kind not in ("linear", "conv", "embedding"):
        return None
    out, inputs, *kernel = spec.shape
    r, ones = case.rank, (1,) * len(kernel)
    if spec.kind == "embedding":
        return {"A": make("A", r, out), "B": make("B", inputs, r)}, {"kind": "embedding"}
    tensors = {"A": make("A", r, inputs, *kernel), "B": make("B", out, r, *ones)}
    if prod(kernel) > 1 and case.kind % 2:
        tensors |= {"A": make("A", r, inputs, *ones), "mid": make("mid", r, r, *kernel)}
    more, options = magnitude(make, spec, case)
    if case.kind >= 16:
        tensors["bias"] = make("bias", out)
    return tensors | more, options


def loha(make: Numbers, spec: ModuleSpec, case: Case) -> tuple[Tensors, Options] | None:
    if spec.kind not in ("linear", "conv"):
        return None
    out, inputs, *kernel = spec.shape
    tensors, r, core = {}, case.rank, prod(kernel) > 1 and case.kind % 2
    for n in "12":
        tensors[f"w{n}_a"] = make(f"w{n}_a", *((r, out) if core else (out, r)))
        tensors[f"w{n}_b"] = make(f"w{n}_b", r, inputs if core else inputs * prod(kernel))
        if core:
            tensors[f"t{n}"] = make(f"t{n}", r, r, *kernel)
    more, options = magnitude(make, spec, case)
    return tensors | more, options


def lokr(make: Numbers, spec: ModuleSpec, case: Case) -> tuple[Tensors, Options] | None:
    if spec.kind not in ("linear", "conv") or prod(spec.shape) > 1 << 24:
        return None
    out, inputs, *kernel = spec.shape
    first = [max(f for f in range(1, n + 1) if n % f == 0 and f <= limit) for n, limit in ((out, 7), (inputs, 4))]
    if case.kind % 2:  # the larger factor first, which fused projections need to be split
        first = [out // min(first[0], 2), inputs // first[1]] if out % min(first[0], 2) == 0 else first
    (o1, i1), (o2, i2), r = first, (out // first[0], inputs // first[1]), case.rank
    tensors = {}
    if case.kind % 4 < 3:
        tensors["w1"] = make("w1", o1, i1)
    else:
        tensors |= {"w1_a": make("w1_a", o1, r), "w1_b": make("w1_b", r, i1)}
    if case.kind % 3 == 0:
        tensors["w2"] = make("w2", o2, i2, *kernel)
    elif prod(kernel) > 1 and case.kind % 3 == 1:
        tensors |= {"w2_a": make("w2_a", r, o2), "w2_b": make("w2_b", r, i2), "t2": make("t2", r, r, *kernel)}
    else:
        tensors |= {"w2_a": make("w2_a", o2, r), "w2_b": make("w2_b", r, i2 * prod(kernel))}
    more, options = magnitude(make, spec, case) if case.kind >= 12 else ({}, {})
    if case.kind % 3 == 0 and case.kind % 4 < 3 and case.kind >= 6:
        options["rank"] = r
    return tensors | more, options


def ia3(make: Numbers, spec: ModuleSpec, case: Case) -> tuple[Tensors, Options] | None:
    if spec.kind not in ("linear", "conv"):
        return None
    on_input, ones = bool(case.kind % 2), (1,) * (len(spec.shape) - 2)
    shape = (1, spec.shape[1], *ones) if on_input else (spec.shape[0], 1, *ones)
    initial = case.kind // 2 % 2
    if initial and len(spec.shape) > 2:
        shape = (1, spec.shape[1 if on_input else 0], *ones)
    return {"vector": make("vector", *shape)}, {"on_input": on_input, "initial": initial}


def diff(make: Numbers, spec: ModuleSpec, case: Case) -> tuple[Tensors, Options] | None:
    if spec.kind not in ("linear", "conv", "norm") or prod(spec.shape) > 1 << 20:
        return None
    tensors = {"weight": make("weight", *spec.shape)}
    if spec.bias and case.kind % 3 == 0:
        tensors["bias"] = make("bias", spec.shape[0])
    if spec.bias and case.kind % 6 == 1:
        tensors = {"bias": make("bias", spec.shape[0])}
    return tensors, {"kind": "norm"} if spec.kind == "norm" and case.kind % 2 == 0 else {}


MAKERS = {"lora": lora, "loha": loha, "lokr": lokr, "ia3": ia3, "diff": diff}
BESIDE = ("saved", "trainable_tokens", "bundled")
"""The methods that come only beside others."""


@functools.cache
def candidates(base: str, pool: str, root: Path) -> tuple[tuple[str, ModuleSpec], ...]:
    """(component, module) of a pool, the smaller ones of a large base first."""
    architecture = base_of(base, root)
    found = [
        (name, spec)
        for name, component in architecture.components.items()
        for spec in (*component.modules.values(), *component.fused.values())
        if POOLS[pool](component, spec) and spec.shape and not spec.transposed
    ]
    blocks = [f for f in found if ".1." not in f[1].name and prod(f[1].shape) < 1 << 26]
    return tuple(blocks[:200] or found[:200])


_bases: dict[tuple[str, Path], Architecture] = {}


def base_of(name: str, root: Path) -> Architecture:
    if name not in CONFIGS:
        return architectures.load(name)
    if (name, root) not in _bases:
        for component, config in CONFIGS[name].items():
            place = root / name / component
            place.mkdir(parents=True, exist_ok=True)
            (place / "config.json").write_text(json.dumps(config))
        _bases[name, root] = FROM_CONFIG(root / name)
    return _bases[name, root]


FROM_CONFIG = architectures.from_config


def made(case: Case, root: Path) -> Adapter | None:
    """The adapter of a case; None where the pool has no module for its method."""
    architecture = base_of(case.base, root)
    pool = candidates(case.base, case.pool, root)
    make = Numbers(hash((case.picks, case.rank)) & 0xFFFF, case.dtype)
    updates: dict[tuple[str, str, str], Update] = {}
    taken: set[tuple[str, str]] = set()
    for pick in case.picks if pool else ():
        name, spec = pool[pick % len(pool)]
        parts = {(name, part) for part, _, _ in spec.joins} or {(name, spec.name)}
        built = MAKERS[case.method](make, spec, case)
        if built is None or parts & taken:
            continue
        taken |= parts
        tensors, options = built
        keyed = {role: t._replace(key=f"{name}.{spec.name}.{role}") for role, t in tensors.items()}
        alpha: Fact[float | None] | None = None
        update = Update(name, spec.name, case.method, keyed, options=options)
        if METHODS[case.method].scaled:
            rank = METHODS[case.method].rank(update) or 1
            alpha = Fact(float(rank) if case.alpha is None else case.alpha, Certainty.READ, "drawn")
        rslora = case.method == "lora" and case.kind == 7
        update = replace(update, alpha=alpha, rslora=rslora)
        METHODS[case.method].check(update)
        updates[update.key] = update
    if not updates:
        return None
    for update in beside(case, architecture, make, taken):
        updates[update.key] = update
    return Adapter(updates, Fact(architecture.name, Certainty.GIVEN, "drawn"), base=architecture)


def beside(case: Case, architecture: Architecture, make: Numbers, taken: set[tuple[str, str]]) -> Iterator[Update]:
    component = architecture.components[min(taken)[0]]
    if case.extra == "bundled":
        tensors = {"emb_params": make("e", 2, 8)._replace(key="bundle_emb.cat.emb_params")}
        yield Update("embeddings", "cat", "bundled", tensors)
    if case.extra == "trainable_tokens":
        spec = next((s for s in component.modules.values() if s.kind == "embedding"), None)
        if spec is not None and (component.name, spec.name) not in taken:
            tensors = {"delta": make("delta", 2, spec.shape[1])._replace(key=f"{spec.name}.delta")}
            yield Update(component.name, spec.name, "trainable_tokens", tensors, options={"indices": [1, 3]})
    if case.extra == "saved":
        small = (s for s in component.modules.values() if s.shape and prod(s.shape) <= 1 << 14)
        spec = next((s for s in small if (component.name, s.name) not in taken), None)
        if spec is not None:
            tensors = {"weight": make("w", *spec.shape)._replace(key=f"{spec.name}.weight")}
            yield Update(component.name, spec.name, "saved", tensors)


def raw(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a file or folder: dtype, shape and bytes, read by the reference library."""
    out = {}
    for file in [path] if path.is_file() else sorted(path.glob("**/*.safetensors")):
        tensors = load_tensors(file)
        for key, t in tensors.items():
            # Of two whole factors of LoKr the alpha says nothing.
            if not {key.replace(".alpha", f".lokr_w{n}") for n in "12"} <= tensors.keys():
                data = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                at = "" if path.is_file() else str(file.parent.relative_to(path))
                out[f"{at}/{key}"] = (str(t.dtype), tuple(t.shape), data)
    return out


def differences(found: Path, wanted: Path) -> list[str]:
    """What is not bit for bit the same."""
    one, two = raw(found), raw(wanted)
    return [
        f"{key}: {one.get(key)} for {two.get(key)}" for key in one.keys() | two.keys() if one.get(key) != two.get(key)
    ]


def modules(adapter: Adapter, base: Architecture) -> set[tuple[str, str, str]]:
    """The modules that an adapter changes, fused ones as their parts."""
    out = set()
    for update in adapter:
        component = base.components.get(update.component)
        spec = component.fused.get(update.module) if component is not None else None
        if spec is None:
            out.add(update.key)
            continue
        for part in pieces(spec):
            out.add((update.component, part, update.method))
    return out


def biases(adapter: Adapter) -> set[tuple[str, str, str]]:
    """The changes of biases beside LoRAs, which some dialects say in the factors and others apart."""
    loras = {(u.component, u.module): u for u in adapter if u.method == "lora"}
    in_factors = {at for at, update in loras.items() if "bias" in update.tensors}
    apart = {(u.component, u.module) for u in adapter if u.method == "diff" and u.tensors.keys() == {"bias"}}
    return {(*at, "diff") for at in in_factors | (apart & loras.keys())}


def scales(adapter: Adapter, other: Adapter) -> dict[tuple[str, str, str], float | None]:
    """The scale of every update that both have; rounded, since the rank of one may be that of a block of the other."""
    found = {u.key: METHODS[u.method].scale(u) for u in adapter if u.key in other.updates}
    return {key: None if scale is None else round(scale, 12) for key, scale in found.items()}


def names(adapter: Adapter, base: Architecture) -> set[str]:
    """What a message may call the modules that an adapter changes: themselves, or what they are parts of."""
    out = {name for _, name, _ in modules(adapter, base)} | {u.module for u in adapter}
    return out | {whole for c in base.components.values() for name in out & c.whole.keys() for whole in c.whole[name]}


def unchanged(adapter: Adapter) -> set[tuple[str, str, str]]:
    return {u.key for u in adapter if METHODS[u.method].is_nothing(u)}


def bare(path: Path) -> Path | None:
    """The file as another tool would write it: no header, and no alphas, which all are the rank."""
    if path.is_dir():
        return None
    tensors = {key: t.contiguous() for key, t in load_tensors(path).items() if not key.endswith(".alpha")}
    file = path.with_name(f"bare-{path.name}")
    save_file(tensors, file)
    return file


class Run:
    """One case through every dialect."""

    def __init__(self, case: Case, root: Path, work: Path) -> None:
        self.case, self.root, self.work = case, root, work
        self.base = base_of(case.base, root)

    def load(self, path: Path, dialect: str, hinted: bool = False) -> Adapter:
        """Without any hint but a base that is not a known one; `hinted`: with all that a user can say."""
        said = dialect if hinted else None
        if self.case.base in CONFIGS:
            return ao.load(path, base=self.root / self.case.base, format=said)
        return ao.load(path, arch=self.case.base if hinted else None, format=said)

    def place(self, name: str, dialect: str) -> Path:
        return self.work / (name if DIALECTS[dialect][0].is_folder else f"{name}.safetensors")

    def write(self, adapter: Adapter, dialect: str, name: str, faithful: bool = False) -> Path | None:
        """None where the dialect refuses, with a message that names a module."""
        path = self.place(name, dialect)
        try:
            result = ao.save(adapter, path, format=None if faithful else dialect)
        except REFUSALS as error:
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            assert any(name in refusal for name in names(adapter, self.base)), refusal
            assert not path.exists()
            return None
        assert result.proof is not None
        assert result.proof.largest_error <= 1e-12, (dialect, str(result.proof))
        assert not result.dropped
        return Path(result.path)

    def back_again(self, path: Path, dialect: str, hinted: bool) -> Adapter:
        """The file read and written once more."""
        adapter = self.load(path, dialect, hinted)
        # Of two dialects that spell these modules alike, either may be the one that is recognised.
        again = self.write(adapter, dialect, f"again-{path.stem}", faithful=True)
        assert again is not None
        assert not differences(again, path), dialect
        return adapter

    def all(self, adapter: Adapter) -> Iterator[tuple[str, str]]:
        """(method, dialect) of everything that was written."""
        homes: dict[str, tuple[Path, Adapter]] = {}
        wanted = modules(adapter, self.base)
        for dialect in DIALECTS:
            path = self.write(adapter, dialect, f"first-{dialect}")
            if path is None:
                continue
            found = self.back_again(path, dialect, hinted=False)
            own = modules(found, self.base)
            assert scales(found, adapter) == scales(adapter, found), dialect
            assert wanted <= own | biases(found), dialect
            assert own - wanted - biases(adapter) <= unchanged_parts(found, self.base), dialect
            for method in {u.method for u in adapter}:
                yield method, dialect
            unit = self.case.alpha is None and not any(u.rslora for u in adapter)
            plain = DIALECTS[dialect][1].alpha is AlphaIn.TENSOR and unit
            stranger = (
                bare(path) if self.case.bare and plain and not any(u.options.get("rank") for u in adapter) else None
            )
            if stranger is not None:
                path = stranger
                self.back_again(path, dialect, hinted=True)
            homes[dialect] = path, self.load(path, dialect, hinted=True)
        names = sorted(homes)
        for number in range(min(4, len(names) * (len(names) - 1))):
            one = names[(self.case.order + number) % len(names)]
            two = [n for n in names if n != one][(self.case.order // 7 + number) % (len(names) - 1)]
            self.there_and_back(one, two, *homes[one])

    def there_and_back(self, home: str, other: str, path: Path, adapter: Adapter) -> None:
        there = self.write(adapter, other, f"{home}-to-{other}")
        if there is None:
            return
        back = self.write(self.load(there, other, hinted=True), home, f"{home}-from-{other}")
        assert back is not None, f"{home} to {other}, and no way back"
        assert not differences(back, path), f"{home} to {other} and back: {differences(back, path)[:4]}"


def unchanged_parts(adapter: Adapter, base: Architecture) -> set[tuple[str, str, str]]:
    """The parts of fused modules, or modules, whose rows change nothing."""
    out = unchanged(adapter)
    for update in adapter:
        component = base.components.get(update.component)
        spec = component.fused.get(update.module) if component is not None else None
        if spec is not None:
            try:
                out |= {part.key for part in cut(update, spec) if METHODS[part.method].is_nothing(part)}
            except CannotRepresent:
                continue
    return out


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def test_every_dialect_method_and_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "from_config", lambda path: base_of(Path(path).name, tmp_path))
    held: Counter[str] = Counter()
    drawn: Counter[str] = Counter()

    def check(case: Case) -> None:
        adapter = made(case, tmp_path)
        if adapter is None:
            return
        drawn.update({case.base, *(u.method for u in adapter)})
        with scratch(tmp_path) as work:
            for method, dialect in Run(case, tmp_path, work).all(adapter):
                held.update({method, dialect})

    assert {*MAKERS, *BESIDE} == EXCHANGED, "a new method needs a maker here"
    # test_lycoris_rotations, test_onetrainer_oft
    others = METHODS.keys() - EXCHANGED - {"lycoris_oft", "lycoris_glora", "onetrainer_oft"}
    assert others <= set(KIND_OF), "what only peft has is made by peft, in test_every_type"

    def run(found: st.SearchStrategy[Case], examples: int) -> None:
        settings(
            max_examples=examples, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate, Phase.shrink),
        )(given(found)(check))()  # fmt: skip

    run(cases(["lora"]), EXAMPLES // 2)
    run(cases([m for m in MAKERS if m != "lora"]), EXAMPLES // 2)
    for base in BASES:
        run(cases(["lora"], base), OF_EACH)
        more = 2
        while base not in drawn and more < 64:
            run(cases(["lora"], base).map(_with_any_modules), more)
            more *= 2
    for dialect, base in OF_ONE_BASE.items():
        more = 4
        while dialect not in held and more < 256:
            run(cases(["lora"], base).map(_plain_attention), more)
            more *= 2
    assert drawn.keys() >= EXCHANGED
    assert set(BASES) <= drawn.keys()
    # llama.cpp runs none of these bases: it refuses them all here, and test_gguf.py has its own.
    # What numbers modules holds whole walks, or SAM's blocks, alone: test_cloneofsimo.py and test_sam_lora.py.
    others = {"gguf", "cloneofsimo", "cloneofsimo-0.15", "sam-lora", "sd-scripts-oft", "sd-scripts-oft-flux"}
    never = DIALECTS.keys() - held.keys() - others
    assert not never, f"never written: {never}"
    assert held.keys() >= EXCHANGED, f"never held: {EXCHANGED - held.keys()}"


OF_ONE_BASE = {
    "comfy-hunyuan": "hunyuan_video",
    "comfy-down-hunyuan": "hunyuan_video",
    "tencent": "hunyuan_video",
    "kohya-hunyuan": "hunyuan_image",
    "genmo": "mochi",
}
"""Dialects that are of few bases' modules alone, which few draws meet."""


def _plain_attention(case: Case) -> Case:
    return replace(case, pool="attention", extra="", alpha=None, kind=2)


def _with_any_modules(case: Case) -> Case:
    """The case with modules from all of its base's, for bases that have none of some kinds."""
    return replace(case, pool="any", extra="")


def lone(tmp_path: Path, base: str, ending: str, method: str = "lora", **changes: Any) -> Adapter:
    """An adapter of one module, whose name ends so."""
    pool = candidates(base, "any", tmp_path)
    pick = next(n for n, (_, spec) in enumerate(pool) if spec.name.endswith(ending))
    case = Case(base, "any", method, (pick,), "F32", 2, 0.5, 2, False, "", 0)
    adapter = made(replace(case, **changes), tmp_path)
    if adapter is None:
        pytest.fail(f"no {method} for {ending}")
    return adapter


def test_a_header_speaks_for_every_spelling(tmp_path: Path) -> None:
    """The scale of a file in two of diffusers' spellings stands in its header, also where one alone would do."""
    adapter = lone(tmp_path, "tiny-sd", "self_attn.out_proj")
    path = ao.save(adapter, tmp_path / "made.safetensors", format="diffusers-mixed").path
    again = ao.load(path, base=tmp_path / "tiny-sd")
    if again.updates.keys() != adapter.updates.keys():
        pytest.fail("other modules")
    assert scales(again, adapter) == scales(adapter, again)


def test_the_recorded_architecture_decides_where_several_fit(tmp_path: Path) -> None:
    """Flux.1 and Qwen-Image have modules of the same names and shapes."""
    adapter = lone(tmp_path, "flux", "transformer_blocks.0.attn.to_k")
    path = ao.save(adapter, tmp_path / "made.safetensors", format="kohya-diffusers").path
    assert ao.load(path).architecture.value == "flux"


def test_embeddings_are_bundled_with_an_adapter_for_any_base(tmp_path: Path) -> None:
    adapter = lone(tmp_path, "tiny-sd", "attn1.to_q")
    values = Numbers(0, "F32")("bundle_emb.cat.emb_params", 2, 8)
    both = adapter.with_updates([*adapter, Update("embeddings", "cat", "bundled", {"emb_params": values})])
    ao.save(both, tmp_path / "made.safetensors", format="kohya")


def test_a_scale_that_only_a_config_can_say_is_refused(tmp_path: Path) -> None:
    """peft scales a LoKr of two whole factors; readers of other files do not."""
    adapter = lone(tmp_path, "tiny-sd", "attn1.to_q", "lokr", kind=0)
    ranked = adapter.with_updates(replace(u, options={**u.options, "rank": 4}) for u in adapter)
    with pytest.raises(CannotRepresent, match="--fold-alpha"):
        ao.save(ranked, tmp_path / "made.safetensors", format="kohya")
