"""Input N: a sound adapter, one kind of damage, a target and options, all from the seed and N alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random
from typing import Any

from adapterops import architectures, registry
from adapterops.adapter import COMPONENTS
from fuzzing import archive_damage, byte_damage, header_damage, json_damage, meaning_damage, pickle_damage, seeds
from fuzzing.sample import Files, Sample, npz_bytes, pickle_bytes, safetensors_bytes, shards, state_dict

WEIGHTS = {
    "none": 2, "bytes": 14, "header": 20, "meaning": 19, "metadata": 9,
    "config": 12, "pickle": 10, "zip": 3, "npz": 5, "shards": 3, "others": 3,
}  # fmt: skip
"""How often each kind of damage is done, in parts of 100."""
_WHOLE = 40
"""One input in so many is made from a whole fixture rather than a small sample."""
FOLDER = "in"
_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Input:
    """What a run is given: files (paths below `FOLDER`), the path to open, and the options of the calls."""

    number: int
    sample: str
    kind: str
    what: str
    files: Files = field(repr=False)
    path: str
    to: str
    output: str
    reading: Mapping[str, Any] = field(default_factory=dict)
    writing: Mapping[str, Any] = field(default_factory=dict)
    norms: bool = False

    @property
    def title(self) -> str:
        """The damage in words."""
        return f"{self.sample}, {self.kind}: {self.what}"


def make(seed: int, number: int) -> Input:
    """Input `number` of a run with `seed`."""
    rng = Random(f"{seed}:{number}")
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    sample = rng.choice(seeds.fixtures() if rng.randrange(_WHOLE) == 0 else seeds.samples())
    what, path, files = _damaged(kind, sample, rng)
    # Of some targets the first to which nothing but the damage stands in the way.
    able = rng.sample(_written(), k=8)
    to = next((dialect for dialect in able if seeds.can_be(sample.name, dialect)), able[0])
    folder = registry.find(to)[0].is_folder
    return Input(
        number, sample.name, kind, what, files, f"{FOLDER}/{path}" if path else FOLDER, to,
        "out" if folder or rng.random() < 0.2 else "out.safetensors", _reading(rng), _writing(rng), rng.random() < 0.3,
    )  # fmt: skip


@cache
def _dialects() -> tuple[str, ...]:
    return tuple(d.name for form in registry.formats().values() for d in form.dialects)


@cache
def _written() -> tuple[str, ...]:
    return tuple(d.name for form in registry.formats().values() for d in form.dialects if d.written)


def _reading(rng: Random) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if rng.random() < 0.25:
        out["allow_drop"] = True
    if rng.random() < 0.3:
        out["alpha"] = rng.choice((1.0, 4.0, 4.0, 0.0, -2.0, 1e300, "tensors", "header", "config"))
    if rng.random() < 0.08:
        out["format"] = rng.choice(_dialects())
    if rng.random() < 0.1:
        out["arch"] = rng.choice(architectures.names())
    return out


def _writing(rng: Random) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if rng.random() < 0.1:
        out["dtype"] = rng.choice(("float32", "float16", "bfloat16", "float64"))
    if rng.random() < 0.1:
        out["fold_alpha"] = True
    if rng.random() < 0.05:
        out["verify"] = False
    return out


def _damaged(kind: str, sample: Sample, rng: Random) -> tuple[str, str, Files]:
    """(what was done, the path to open, files)."""
    others = seeds.samples()
    match kind:
        case "none":
            return "as it is", *_contained(sample, rng)
        case "bytes":
            what, path, files = "", *_contained(sample, rng)
            name = rng.choice(sorted(files))
            for _ in range(rng.choice((1, 1, 1, 3))):
                what, files[name] = byte_damage.damaged(files[name], rng, safetensors_bytes(rng.choice(others)))
            return what, path, files
        case "header":
            what, raw = header_damage.damaged(sample, rng)
            return what, *_in_place(sample, raw, rng)
        case "meaning":
            what = ""
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                what, sample = meaning_damage.damaged(sample, rng, rng.choice(others))
            return what, *_contained(sample, rng)
        case "metadata":
            what, sample = meaning_damage.damaged_metadata(sample, rng)
            return what, *_in_place(sample, safetensors_bytes(sample), rng)
        case "config":
            return _with_config(sample, rng)
        case "pickle":
            what, raw = pickle_damage.damaged(sample, rng, safetensors_bytes(sample))
            return what, *_in_place(sample, raw, rng, ".bin")
        case "zip":
            what, raw = archive_damage.zip_damage(pickle_bytes(state_dict(sample)), rng)
            return what, *_in_place(sample, raw, rng, ".bin")
        case "npz":
            what, raw = archive_damage.npz_damage(sample, rng)
            return what, *_in_place(sample, raw, rng, ".npz")
        case "others":
            files = dict(rng.choice(seeds.others()))
            name = rng.choice(sorted(files))
            what, files[name] = byte_damage.damaged(files[name], rng, files[rng.choice(sorted(files))])
            return what, rng.choice((name, "", "")), files
    what, path, files = archive_damage.shard_damage(sample, rng)
    if sample.config is not None:
        files[_CONFIG] = json_damage.dump(sample.config)
    return what, path, files


def _in_place(sample: Sample, raw: bytes, rng: Random, suffix: str = ".safetensors") -> tuple[str, Files]:
    """(the path to open, files): weights by themselves, or beside their config."""
    if sample.config is None and rng.random() < 0.9:
        name = "a" + rng.choice((suffix,) * 8 + (".safetensors", ".bin", ".pt", ".ckpt", ".npz", "", ".x"))
        return rng.choice((name, name, "")), {name: raw}
    name = "adapter_model" + (suffix if suffix in (".safetensors", ".bin") else rng.choice((suffix, ".bin")))
    files = {name: raw}
    if sample.config is not None and rng.random() < 0.95:
        files[_CONFIG] = json_damage.dump(sample.config)
    return rng.choice((name, "", "")), files


def _contained(sample: Sample, rng: Random) -> tuple[str, Files]:
    """(the path to open, files): the sample in one of the containers that adapters come in."""
    match rng.randrange(12):
        case 0:
            return _in_place(sample, pickle_bytes(state_dict(sample), rng.random() < 0.7), rng, ".bin")
        case 1 if all(len(key.encode("utf-8", "surrogatepass")) < 1 << 15 for key in sample.tensors):
            # A zip archive holds no longer names.
            return _in_place(sample, npz_bytes(sample, rng.random() < 0.3), rng, ".npz")
        case 2:
            index, files = shards(sample, rng.choice((1, 2)))
            stem = "adapter_model" if sample.config is not None else "model"
            files[f"{stem}.safetensors.index.json"] = json_damage.dump(index)
            if sample.config is not None:
                files[_CONFIG] = json_damage.dump(sample.config)
            return rng.choice(("", f"{stem}.safetensors.index.json")), files
        case 3:
            return _parts(sample, rng)
    return _in_place(sample, safetensors_bytes(sample), rng)


def in_folder(sample: Sample) -> Files:
    """The sample as peft writes it: weights, and the config if there is one."""
    files = {"adapter_model.safetensors": safetensors_bytes(sample)}
    return files if sample.config is None else files | {_CONFIG: json_damage.dump(sample.config)}


def _parts(sample: Sample, rng: Random) -> tuple[str, Files]:
    """(the path to open, files): a folder with a subfolder a component."""
    files: Files = {}
    with_config = [s for s in seeds.samples() if s.config is not None]
    names = rng.sample((*COMPONENTS, "default", "a b", ".hidden"), k=rng.choice((1, 2, 3)))
    for number, name in enumerate(names):
        part = sample if number == 0 else rng.choice(with_config)
        files |= {f"{name}/{file}": data for file, data in in_folder(part).items()}
    return "", files


def _with_config(sample: Sample, rng: Random) -> tuple[str, str, Files]:
    """(what was done, the path to open, files): weights beside a damaged config."""
    if sample.config is None:
        if rng.random() < 0.8:
            sample = rng.choice([s for s in seeds.samples() if s.config is not None])
        else:
            sample = replace(sample, config=rng.choice([s.config for s in seeds.samples() if s.config is not None]))
    config: Any = sample.config
    what = "structure"
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        config = json_damage.damaged(config, rng) if isinstance(config, dict | list) else config
    if isinstance(config, dict) and rng.random() < 0.4:
        what = "patterns"
        field = rng.choice(
            ("target_modules", "rank_pattern", "alpha_pattern", "exclude_modules", "modules_to_save", "layers_pattern")
        )
        pattern = rng.choice(json_damage.PATTERNS)
        config[field] = rng.choice((pattern, [pattern], {pattern: 2}, {pattern: 2, "q_proj": 3}, {pattern: "4"}))
    text = json_damage.dump(config)
    if rng.random() < 0.1:
        what, text = byte_damage.damaged(text, rng, text)
    return (
        what,
        rng.choice(("", "adapter_model.safetensors")),
        {
            "adapter_model.safetensors": safetensors_bytes(sample),
            _CONFIG: text,
        },
    )
