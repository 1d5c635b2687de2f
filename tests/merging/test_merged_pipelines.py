"""Merged adapters in diffusers pipelines, against weights into which the adapters' deltas were fused by hand."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

sys.path.append(str(Path(__file__).parents[1] / "integrations"))

import tiny
from diffusers.configuration_utils import ConfigMixin

import adapterops as ao
from adapterops.integrations.diffusers import load_into

pytestmark = pytest.mark.usefixtures("one_thread")

Raws = Mapping[tuple[str, str], tiny.Raw]


def ranks(*adapters: Raws) -> int:
    """Enough for every module: the sum of the largest ranks."""
    return sum(max(raw.rank for raw in adapter.values()) for adapter in adapters)


def base_of(pipe: Any, folder: Path) -> Path:
    """The configs of the pipeline's models, for `base`: Kohya's flattened names are looked up in one."""
    models: dict[str, Any] = dict(tiny.models(pipe))
    for name, model in models.items():
        if isinstance(model, ConfigMixin):
            model.save_config(folder / name)
        else:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("kind", "forms"),
    [("sd1", ("kohya", "diffusers")), ("sdxl", ("peft", "kohya")), ("sdxl", ("diffusers", "peft"))],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_sum_does_what_both_fused_do(kind: str, forms: tuple[str, str], tmp_path: Path) -> None:
    """Linear layers, convolutions and text encoders; ranks and alphas that differ by module."""
    pipe = tiny.pipeline(kind)
    one, two = tiny.adapter(pipe, 1), tiny.adapter(pipe, 2)
    base, wanted = tiny.outputs(pipe), tiny.fused(pipe, (one, 0.7), (two, -0.4))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    config = base_of(pipe, tmp_path / "base")
    sources = [
        ao.load(tiny.WRITERS[form](raw, tmp_path / name, pipe), base=config if "kohya" in forms else None)
        for form, raw, name in zip(forms, (one, two), ("one", "two"), strict=True)
    ]
    merged = ao.combine(sources, "svd", weights=[0.7, -0.4], rank=ranks(one, two))
    loaded = load_into(pipe, merged.adapter, "both")
    assert {(c, m) for c, names in loaded.modules.items() for m in names} == one.keys() | two.keys()
    tiny.assert_close(tiny.outputs(pipe), wanted)
    tiny.assert_differ(wanted, base, loaded.modules)
    pipe.set_adapters(["both"], [0.0])
    tiny.assert_close(tiny.outputs(pipe), base, 1e-6)


def test_flux(tmp_path: Path) -> None:
    pipe = tiny.pipeline("flux")
    one, two = tiny.adapter(pipe, 1), tiny.adapter(pipe, 2, only=["transformer"])
    wanted = tiny.fused(pipe, (one, 0.5), (two, 1.0))
    sources = [
        ao.load(tiny.write_diffusers(one, tmp_path / "one.safetensors")), ao.load(tiny.write_peft(two, tmp_path / "two"))
    ]  # fmt: skip
    load_into(pipe, ao.combine(sources, "svd", weights=[0.5, 1.0], rank=ranks(one, two)).adapter)
    tiny.assert_close(tiny.outputs(pipe), wanted)


@pytest.mark.parametrize("target", ["kohya", "diffusers", "peft"])
def test_files_of_every_format(target: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    one, two = tiny.adapter(pipe, 1), tiny.adapter(pipe, 2, only=["unet"])
    wanted = tiny.fused(pipe, (one, 0.7), (two, -0.4))
    first = tiny.write_kohya(one, tmp_path / "one.safetensors", two_encoders=False)
    second = tiny.write_diffusers(two, tmp_path / "two.safetensors")
    config = base_of(pipe, tmp_path / "base")
    for method in ("svd", "cat"):
        more: dict[str, Any] = {"rank": ranks(one, two)} if method == "svd" else {}
        out = tmp_path / method if target == "peft" else tmp_path / f"{method}.safetensors"
        ao.merge([first, second], out, method, weights=[0.7, -0.4], to=target, reading={"base": str(config)}, **more)
        load_into(pipe, out, method)
        tiny.assert_close(tiny.outputs(pipe), wanted)
        pipe.unload_lora_weights()


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_biases_of_factors(method: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    one, two = (tiny.adapter(pipe, seed, only=["text_encoder"], bias=True, root=seed == 2) for seed in (1, 2))
    wanted = tiny.fused(pipe, (one, 0.7), (two, -0.4))
    sources = [ao.load(tiny.write_peft(raw, tmp_path / name)) for raw, name in ((one, "one"), (two, "two"))]
    more: dict[str, Any] = {"rank": ranks(one, two)} if method == "svd" else {}
    load_into(pipe, ao.combine(sources, method, weights=[0.7, -0.4], **more).adapter)
    tiny.assert_close(tiny.outputs(pipe), wanted)


def test_one_adapter_minus_itself_is_nothing(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    raw = tiny.adapter(pipe)
    base = tiny.outputs(pipe)
    source = ao.load(tiny.write_diffusers(raw, tmp_path / "x.safetensors"))
    merged = ao.combine([source, source], "subtract")
    assert any(report.cancels or report.empty for report in merged.modules)
    load_into(pipe, merged.adapter)
    tiny.assert_close(tiny.outputs(pipe), base)
