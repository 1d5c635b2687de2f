"""What the library takes as a merge's arguments, and a recipe beside itself; which step says what is written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_adapters import Q, close, delta, deltas, file, lora, pair, peft, read, weights_of

import adapterops as ao
from adapterops.errors import UsageError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "gguf-llama"
PLAIN = "method: svd\nsources: [a, b]\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two PEFT folders in it."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        peft(tmp_path / name, pair(seed))
    return tmp_path


def digest(path: str) -> str:
    return hashlib.sha256(weights_of(Path(path)).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "weights",
    [[np.float32(0.5), np.int64(2)], np.array([0.5, 2.0]), torch.tensor([0.5, 2.0]), [torch.tensor(0.5), 2]],
    ids=["numpy numbers", "array", "tensor", "tensor of one number"],
)
def test_numbers_of_numpy_and_torch(weights: Any, here: Path) -> None:
    ao.merge(["a", "b"], "plain", "ties", weights=[0.5, 2], space="delta", density=0.5, rank=3)
    ao.merge(["a", "b"], "same", "ties", weights=weights, space="delta", density=np.float32(0.5), rank=np.int64(3))
    assert digest("same") == digest("plain")


def test_sources_and_paths_of_any_kind(here: Path) -> None:
    ao.merge(["a", "b"], "plain", "svd", base_weights="a/adapter_model.safetensors")
    base = Path("a") / "adapter_model.safetensors"
    ao.merge((Path(name) for name in "ab"), Path("same"), "svd", base_weights=base)  # type: ignore[arg-type]
    assert digest("same") == digest("plain")


@pytest.mark.parametrize("names", [("format", "fields"), ("from", "set")])
def test_options_of_reading_by_both_their_names(names: tuple[str, str], here: Path) -> None:
    form, fields = names
    ao.merge(["a", "b"], "out", "cat", reading={form: "peft", fields: {"lora_dropout": 0.25}})
    done = ao.merge(recipe="out", output="again")
    assert digest("again") == digest("out")
    assert [s.reading for s in done.recipe.steps[0].sources] == [{"from": "peft", "set": {"lora_dropout": 0.25}}] * 2
    assert json.loads(Path("again/adapter_config.json").read_text())["lora_dropout"] == 0.25


@pytest.mark.parametrize(
    ("option", "value"), [("alpha", 3), ("arch", "sd1"), ("format", "kohya"), ("fields", {"lora_dropout": 0.1})]
)
def test_a_recipe_says_how_its_sources_are_read(option: str, value: Any, here: Path) -> None:
    Path("r.yaml").write_text(PLAIN)
    word = {"format": "from", "fields": "set"}.get(option, option)
    with pytest.raises(UsageError, match=f"--recipe says it all; {word} would contradict it"):
        ao.merge(recipe="r.yaml", output="out", reading={option: value})
    assert not Path("out").exists()


CHAIN = """steps:
- {name: s, method: svd, sources: [folder, two.safetensors]}
- {method: svd, sources: [one.safetensors, {step: s, weight: 0.5}]}
"""


@pytest.fixture
def chained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose first source is a PEFT folder, and whose last step begins with a Kohya file."""
    monkeypatch.chdir(tmp_path)
    file(tmp_path / "one.safetensors", lora(1))
    file(tmp_path / "two.safetensors", lora(2))
    ao.convert(file(tmp_path / "three.safetensors", lora(3)), to="peft", output="folder")
    (tmp_path / "r.yaml").write_text(CHAIN)
    return tmp_path


def test_the_last_step_says_what_is_written(chained: Path) -> None:
    done = ao.merge(recipe="r.yaml", output="out.safetensors")
    assert done.written.dialect == "kohya"
    one, two, three = (deltas(chained / f"{name}.safetensors")[Q] for name in ("one", "two", "three"))
    rest = np.linalg.svd(two + three)
    middle = (rest[0][:, :4] * rest[1][:4]) @ rest[2][:4]
    whole = np.linalg.svd(one + 0.5 * middle)
    assert close(delta(read(chained / "out.safetensors")[Q]), (whole[0][:, :4] * whole[1][:4]) @ whole[2][:4], 1e-4)


@pytest.mark.parametrize(
    ("output", "to"), [("one.safetensors", None), ("two.safetensors", None), ("folder", "peft"), (".", "peft")]
)
def test_no_source_of_any_step_is_written_over(output: str, to: str | None, chained: Path) -> None:
    before = {path: path.read_bytes() for path in chained.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="never changed"):
        ao.merge(recipe="r.yaml", output=output, to=to, overwrite=True)
    assert {path: path.read_bytes() for path in chained.rglob("*") if path.is_file()} == before


def test_a_chain_that_begins_with_a_step_is_written_as_that_step_would_be(chained: Path) -> None:
    Path("r.yaml").write_text(CHAIN.replace("one.safetensors, {step: s, weight: 0.5}", "{step: s}, one.safetensors"))
    with pytest.raises(UsageError, match=r"out\.safetensors: PEFT folder .*is a folder"):
        ao.merge(recipe="r.yaml", output="out.safetensors")
    assert ao.merge(recipe="r.yaml", output="out").written.dialect == "peft"


def test_the_usual_name_of_an_output_is_one_of_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    source = FIXTURES / "peft"
    done = ao.merge([source, source], method="svd", to="gguf", reading={"base": FIXTURES / "base"})
    assert done.path == "merged.gguf"
    assert Path("merged.gguf").read_bytes()[:4] == b"GGUF"
