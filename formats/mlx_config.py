"""What MLX-LM's `adapter_config.json` says, and how one is made.

    {"fine_tune_type": "lora", "num_layers": 16,
     "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}, …}

`scale` is what the product of the factors is multiplied by, whatever the rank.  From March to June 2024 it was multiplied by
`alpha` / `rank` besides; files that may be of that time are asked about.  `num_layers` counts from the last layer (before
October 2024 it was called `lora_layers`); 0 and less mean all.  Without `keys` MLX-LM takes the layers' linear modules.  The
other fields are those of the training run.

Sources: ml-explore/mlx-lm `mlx_lm/tuner/utils.py` (`load_adapters`, `linear_to_lora_layers`), `mlx_lm/lora.py`
(`CONFIG_DEFAULTS`), and the history of `mlx_lm/tuner/lora.py`, commits 493e1c1 (2024-03-12) and 57b1672 (2024-06-02).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from adapterops_formats.mlx_names import covers

from adapterops.plugin import Certainty, errors

NAME = "adapter_config.json"
ENTRY = "mlx_adapter_config"
"""The header's entry for a config that came with the adapter, in files of other formats."""
_LONGEST = 64_000
"""Characters of a config that is carried in a header."""
_TYPES = ("lora", "dora", "full")
_LARGEST = 1e300


class MlxConfig(NamedTuple):
    """A checked config, and the place it stands in."""

    fields: Mapping[str, Any] = {}
    where: str = ""

    @classmethod
    def parse(
        cls, fields: Mapping[str, Any], where: str, tell: Callable[[errors.AdapterOpsError], None] | None = None
    ) -> MlxConfig:
        """Check the fields that have a meaning here; with `tell`, a wrong one is told of and left out.

        Raises `UnreadableFile` for values that are none.
        """
        kept = dict(fields)
        inner = fields.get("lora_parameters")
        inner = dict(inner) if isinstance(inner, Mapping) else inner
        own: list[tuple[str, Any, bool, str]] = [
            (
                "fine_tune_type",
                fields.get("fine_tune_type", "lora"),
                fields.get("fine_tune_type", "lora") in _TYPES,
                "",
            ),
            ("lora_parameters", inner, inner is None or isinstance(inner, dict), "a table"),
        ]
        own += [(name, fields.get(name), _is_count(fields.get(name)), "a whole number") for name in _COUNTS]
        table = inner if isinstance(inner, dict) else {}
        checks: list[tuple[str, Callable[[Any], bool], str]] = [
            ("rank", lambda v: _is_count(v) and (v is None or v > 0), "a whole number above 0"),
            *((name, _is_number, "a number") for name in ("scale", "alpha", "dropout")),
            ("keys", _is_names, "a list of names"),
        ]
        inside = [(name, table.get(name), test(table.get(name)), wanted) for name, test, wanted in checks]
        for name, value, sound, wanted in (*own, *inside):
            if sound:
                continue
            wanted = wanted or f"one of {', '.join(_TYPES)}"
            error = errors.UnreadableFile(
                f"{where}: {name} is {json.dumps(value, default=str)[:80]}, not {wanted}", fault="config-type"
            )
            if tell is None:
                raise error
            tell(error)
            kept.pop(name, None)
            table.pop(name, None)
        if isinstance(kept.get("lora_parameters"), Mapping):
            kept["lora_parameters"] = table
        return cls(kept, where)

    @property
    def inner(self) -> Mapping[str, Any]:
        """`lora_parameters`."""
        return self.fields.get("lora_parameters") or {}

    @property
    def kind(self) -> str:
        """`fine_tune_type`; LoRA where it is not said, as MLX-LM takes it."""
        return str(self.fields.get("fine_tune_type", "lora"))

    @property
    def num_layers(self) -> int | None:
        """`num_layers`, or `lora_layers` of older releases."""
        return next((self.fields[name] for name in _COUNTS if self.fields.get(name) is not None), None)

    def scale(self) -> float | None:
        """The literal scale.

        Raises `Conflict` where the file may be of the releases that multiplied it by alpha / rank.
        """
        scale, alpha, rank = (self.inner.get(name) for name in ("scale", "alpha", "rank"))
        if scale is None:
            return None
        dated = "fine_tune_type" in self.fields or "num_layers" in self.fields
        if alpha is not None and rank is not None and alpha != rank and not dated:
            raise errors.Conflict(
                f"{self.where}: scale {scale:g} beside alpha {alpha:g} and rank {rank}: mlx-lm of March to June 2024 applied "
                f"scale · alpha / rank = {scale * alpha / rank:g}, and before and since then {scale:g}; --set scale=X says "
                "which it was trained with",
                fault="two-alphas",
            )
        return float(scale)

    def note(self) -> str:
        """What the user should know of an alpha beside the scale."""
        scale, alpha = self.inner.get("scale"), self.inner.get("alpha")
        if scale is None or alpha is None:
            return ""
        return (
            f"lora_parameters has scale {scale:g} and alpha {alpha:g}: mlx-lm applies the scale and ignores the alpha"
        )


_COUNTS = ("num_layers", "lora_layers")


def _is_count(value: Any) -> bool:
    return value is None or type(value) is int


def _is_number(value: Any) -> bool:
    # A whole number may be too large for a float.
    return value is None or (type(value) in (int, float) and -_LARGEST <= value <= _LARGEST)


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def as_entry(config: Mapping[str, Any]) -> dict[str, str]:
    """The header's entry that carries a config; none where it is longer than any that MLX-LM writes."""
    text = json.dumps(dict(config), sort_keys=True, separators=(",", ":"))
    return {ENTRY: text} if len(text) <= _LONGEST else {}


def from_entry(metadata: Mapping[str, str]) -> MlxConfig:
    """The config that a header carries; empty where there is none, or where someone else wrote something else there."""
    try:
        value = json.loads(metadata.get(ENTRY, "{}"))
        return MlxConfig.parse(value if isinstance(value, dict) else {}, ENTRY)
    except (ValueError, RecursionError, errors.UnreadableFile):
        return MlxConfig()


def scale_given(value: Any) -> tuple[float, Certainty, str]:
    """What `--set scale` says.  Raises `UsageError` for what is no number."""
    if not _is_number(value) or value is None:
        raise errors.UsageError(f"--set scale={json.dumps(value, default=str)[:60]}: must be a number")
    return float(value), Certainty.GIVEN, "--set scale"


def alpha_of(scale: float, rank: int) -> float:
    """The alpha whose alpha / rank is the scale: the roundest, where several have that quotient."""
    alpha = scale * rank
    short = float(f"{alpha:.12g}")
    return short if short / rank == scale or alpha / rank != scale else alpha


def made(
    carried: MlxConfig,
    common: Mapping[str, Any],
    *,
    kind: str,
    rank: int,
    scale: float,
    names: Sequence[str],
    chosen: tuple[int, list[str]],
) -> dict[str, Any]:
    """The config of an adapter.

    `carried` is the one that it came with, which is kept where it holds; `common` the fields of a PEFT config; `chosen` the
    `num_layers` and `keys` that name its modules, where those of `carried` do not.
    """
    own, inner = dict(carried.fields), dict(carried.inner)
    count, keys = carried.num_layers, inner.get("keys")
    before = inner.get("scale")
    if before is None or alpha_of(float(before), rank) / rank != scale:
        inner["scale"] = scale
        inner.pop("alpha", None)  # said of another scale
    if count is None or not covers(names, count, keys):
        count, inner["keys"] = chosen
    dropout = common.get("lora_dropout")
    inner.setdefault("dropout", dropout if type(dropout) in (int, float) else 0.0)
    model = common.get("base_model_name_or_path")
    own.pop("lora_layers", None)
    return {
        **({"model": model} if isinstance(model, str) and model else {}),
        **own,
        "fine_tune_type": kind,
        "num_layers": count,
        "lora_parameters": {**inner, "rank": rank},
    }
