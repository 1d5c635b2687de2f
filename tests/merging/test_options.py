"""What a merge is told apart from its method: weights, recipes, seeds' places, and what its output says of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_adapters import CONV, Q, Tensors, added, close, deltas, file, header, lora, pair, peft, read, weights_of

import adapterops as ao
from adapterops.errors import OutputExists, UsageError

TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
MID = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def both(seed: int) -> Tensors:
    return {**lora(seed), **lora(seed + 100, TEXT, sizes=(768, 768)), **lora(seed + 200, MID, sizes=(1280, 1280))}


def digest(path: Path) -> str:
    return hashlib.sha256(weights_of(path).read_bytes()).hexdigest()


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [file(tmp_path / f"{name}.safetensors", both(seed)) for name, seed in (("a", 1), ("b", 2), ("c", 3))]


@pytest.mark.parametrize("method", ["svd", "cat", "ties", "dare_ties_svd"])
def test_a_weight_of_zero_leaves_an_adapter_out(method: str, sources: list[Path], tmp_path: Path) -> None:
    """It counts for nothing: neither for ranks, nor for signs, nor for what its modules are."""
    more: dict[str, Any] = {"density": 0.5} if "ties" in method else {}
    extra = file(tmp_path / "c.safetensors", both(3), lora(9, CONV, sizes=(320, 36)))
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    ao.merge([*sources[:2], extra], one, method, weights=(0.5, 0.25, 0), **more)
    ao.merge(sources[:2], two, method, weights=(0.5, 0.25), **more)
    assert read(one).keys() == read(two).keys()
    for module, change in deltas(two).items():
        assert close(deltas(one)[module], change, 1e-6)


def test_one_of_two_may_be_left_out(sources: list[Path], tmp_path: Path) -> None:
    """The end of any search over weights: the adapters fit together, whatever their weights are."""
    out = tmp_path / "out.safetensors"
    ao.merge(sources[:2], out, "svd", weights=(0.5, 0))
    for module, change in deltas(sources[0]).items():
        assert close(deltas(out)[module], 0.5 * change)


def test_the_unet_of_one_and_the_encoder_of_another(sources: list[Path], tmp_path: Path) -> None:
    rules = tmp_path / "weights.yaml"
    rules.write_text('- {default: 0, patterns: {"unet*": 1}}\n- {default: 0, patterns: {"text_encoder*": 1}}\n')
    out = tmp_path / "out.safetensors"
    ao.merge(sources[:2], out, "svd", weights=str(rules))
    for module, source in ((Q, sources[0]), (TEXT, sources[1]), (MID, sources[0])):
        assert close(deltas(out)[module], deltas(source)[module])


def test_all_weights_zero_is_nothing_to_merge(sources: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"every weight is 0"):
        ao.merge(sources, tmp_path / "out.safetensors", "svd", weights=(0, 0, 0))


def test_a_weights_file(sources: list[Path], tmp_path: Path) -> None:
    """Patterns over component and module, the last that fits; twelve values of SD 1's blocks would be refused."""
    rules = tmp_path / "weights.yaml"
    rules.write_text('- 0.5\n- {default: 1, patterns: {"text_encoder*": 0.25, "unet.mid_block*": -1}}\n- 0\n')
    out = tmp_path / "out.safetensors"
    ao.merge(sources, out, "cat", weights=str(rules))
    one, two = deltas(sources[0]), deltas(sources[1])
    for module, weight in ((Q, 1.0), (TEXT, 0.25), (MID, -1.0)):
        assert close(deltas(out)[module], 0.5 * one[module] + weight * two[module]), module


def test_weights_of_blocks(sources: list[Path], tmp_path: Path) -> None:
    """26 values: BASE, IN00-11, MID, OUT00-11; `down_blocks.0.attentions.0` is IN01."""
    values = [0.1 * n for n in range(26)]
    rules = tmp_path / "weights.yaml"
    rules.write_text(f"- {{blocks: {values}}}\n- 0.5\n")
    out = tmp_path / "out.safetensors"
    ao.merge(sources[:2], out, "cat", weights=str(rules), reading={"arch": "sd1"})
    one, two = deltas(sources[0]), deltas(sources[1])
    for module, number in ((TEXT, 0), (Q, 2), (MID, 13)):
        if number:
            assert close(deltas(out)[module], values[number] * one[module] + 0.5 * two[module]), module
        else:
            assert close(deltas(out)[module], 0.5 * two[module])


# Recipes.


def test_two_steps(sources: list[Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "steps:\n"
        "- {name: sum, method: cat, sources: [{path: a.safetensors, weight: 0.5}, b.safetensors]}\n"
        "- {method: svd, rank: 12, sources: [{step: sum, weight: -1}, {path: c.safetensors, weight: 2}]}\n"
        "output: {path: made.safetensors}\n"
    )
    out = tmp_path / "out.safetensors"
    ao.merge(recipe=recipe, output=out)
    one, two, three = (deltas(s) for s in sources)
    for module in (Q, TEXT, MID):
        assert close(deltas(out)[module], -(0.5 * one[module] + two[module]) + 2 * three[module]), module


def test_what_one_step_hands_to_the_next_is_not_rounded(tmp_path: Path) -> None:
    one, two = (file(tmp_path / f"{n}.safetensors", lora(n), dtype=torch.float16) for n in (1, 2))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "steps:\n- {name: sum, method: svd, rank: 8, sources: [1.safetensors, 2.safetensors]}\n"
        "- {method: svd, sources: [{step: sum, weight: 2}]}\n"
    )
    out = tmp_path / "out.safetensors"
    ao.merge(recipe=recipe, output=out, dtype="float32")
    assert close(deltas(out)[Q], 2 * (deltas(one)[Q] + deltas(two)[Q]))


@pytest.mark.parametrize("output", ["sub/out.safetensors", "made"])
def test_the_recipe_of_an_output_finds_what_the_first_one_found(
    output: str, sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe's sources are beside it; the output is elsewhere, and so is who runs it again."""
    recipe, elsewhere = tmp_path / "recipe.yaml", tmp_path / "elsewhere"
    recipe.write_text("{method: svd, sources: [a.safetensors, b.safetensors]}")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    to = None if output.endswith("safetensors") else "kohya"
    ao.merge(recipe=recipe, output=output, to=to)
    made = next(Path(output).rglob("*.safetensors")) if to else Path(output)
    ao.merge(recipe=made, output="again.safetensors")
    assert deltas(Path("again.safetensors")).keys() == deltas(made).keys()


def test_the_recipe_of_an_output_makes_it_again(sources: list[Path], tmp_path: Path) -> None:
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    ao.merge(sources, out, "dare_ties", density=0.5, weights=(1, 0.5, -0.25), seed=5)
    ao.merge(recipe=out, output=again)
    assert digest(again) == digest(out)


@pytest.mark.parametrize(
    "more",
    [
        {"dtype": "bfloat16", "split": "b", "rank": 6},
        {"to": "peft"},
        {"fold_alpha": True},
    ],
)
def test_the_recipe_of_an_output_makes_it_as_it_was_asked_for(more: Any, sources: list[Path], tmp_path: Path) -> None:
    folder, refolded = tmp_path / "folder", tmp_path / "refolded"
    ao.merge(sources, folder, "cat" if more.get("fold_alpha") else "svd", weights=(0.5, 0.5, 0.5), **more)
    ao.merge(recipe=next(folder.rglob("*.safetensors")) if "to" not in more else folder, output=refolded)
    assert content(refolded) == content(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_changed_input_is_noticed(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    ao.merge(sources, out, "svd")
    file(sources[1], both(7))
    with pytest.raises(UsageError, match=r"b\.safetensors is not what the recipe was run with"):
        ao.merge(recipe=out, output=tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


def test_an_input_under_other_words_is_the_same(sources: list[Path], tmp_path: Path) -> None:
    """The hash is of what the adapter does: neither a header nor the order of keys changes it."""
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    ao.merge(sources, out, "svd")
    file(sources[1], both(2), metadata={"title": "new"})
    ao.merge(recipe=out, output=again)
    assert deltas(again).keys() == deltas(out).keys()
    assert all(np.array_equal(deltas(again)[m], change) for m, change in deltas(out).items())


def test_a_merged_file_moved_beside_its_sources(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths of a recipe are looked for where it stands, too."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    ao.merge([s.name for s in sources], "out.safetensors", "svd")
    first = digest(Path("out.safetensors"))
    monkeypatch.chdir(elsewhere)
    ao.merge(recipe=tmp_path / "out.safetensors", output="again.safetensors")
    assert digest(Path("again.safetensors")) == first


# The output's header.


def test_the_header_says_the_merge_and_not_one_training(tmp_path: Path) -> None:
    trained = {
        "ss_network_alpha": "2.0", "ss_network_dim": "4", "ss_output_name": "style", "ss_tag_frequency": "{}",
        "ss_base_model_version": "sd_v1", "sshs_model_hash": "0" * 64, "modelspec.title": "style",
    }  # fmt: skip
    sources = [file(tmp_path / f"{n}.safetensors", lora(n), metadata=trained) for n in (1, 2)]
    out = tmp_path / "out.safetensors"
    ao.merge(sources, out, "ties", density=0.5, weights=(1, 0.5), seed=3)
    found = header(out)
    recipe = json.loads(found["adapterops_recipe"])
    (step,) = recipe["steps"]
    assert (step["method"], step["density"], step["seed"]) == ("ties", 0.5, 3)
    assert [s["path"] for s in step["sources"]] == [str(s) for s in sources]
    assert step["sources"][1]["weight"] == 0.5
    assert all(len(s["hash"]) == 64 for s in step["sources"])
    assert found["ss_base_model_version"] == "sd_v1"
    for stale in (
        "ss_network_alpha",
        "ss_network_dim",
        "ss_output_name",
        "ss_tag_frequency",
        "sshs_model_hash",
        "modelspec.title",
    ):
        assert found.get(stale) != trained[stale], stale


def test_a_config_says_what_the_tensors_are(tmp_path: Path) -> None:
    """Rank, alpha and targets of the output are its own; what no tensor decides is the first adapter's."""
    one = peft(tmp_path / "a", {**pair(1), **pair(2, "l.1.k")}, 8, task_type="CAUSAL_LM", target_modules=["q", "k"])
    two = peft(tmp_path / "b", pair(3, "l.0.q", rank=2), 3, use_rslora=True, target_modules=["q"])
    ao.merge([one, two], tmp_path / "out", "cat")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    found = read(tmp_path / "out")  # which holds ranks and scales against the config
    assert len(found["l.0.q"]["down"]) == 6
    assert close(deltas(tmp_path / "out")["l.0.q"], deltas(one)["l.0.q"] + deltas(two)["l.0.q"])
    assert close(deltas(tmp_path / "out")["l.1.k"], deltas(one)["l.1.k"])


@pytest.mark.parametrize("split", ["even", "b", "a"])
def test_where_the_singular_values_go(split: str, sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    ao.merge(sources[:2], out, "svd", rank=8, split=split)
    got = read(out)[Q]
    up, down = np.linalg.norm(got["up"], axis=0), np.linalg.norm(got["down"], axis=1)
    wanted = {"even": down, "a": np.ones(8), "b": up}[split]
    assert np.allclose(up, wanted, rtol=1e-5)
    if split == "b":
        assert np.allclose(down, 1, rtol=1e-5)


def test_an_existing_output_is_said_before_the_work(sources: list[Path], tmp_path: Path) -> None:
    out = file(tmp_path / "out.safetensors", {"x": torch.ones(1)})
    before, done = digest(out), []
    with pytest.raises(OutputExists, match=r"--overwrite"):
        ao.merge(sources, out, "svd", progress=lambda number, count: done.append(number))
    assert digest(out) == before
    assert done == []


def test_a_number_of_workers_that_is_none(sources: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="workers"):
        ao.merge(sources, tmp_path / "out.safetensors", "svd", workers=-1)


def test_loaded_adapters_combine_as_files_do(sources: list[Path], tmp_path: Path) -> None:
    made = ao.combine([ao.load(s) for s in sources], "svd", weights=(1, 0.5, -0.25), rank=12)
    ao.save(made.adapter, tmp_path / "out.safetensors")
    for module in (Q, TEXT, MID):
        wanted = added(w * deltas(s)[module] for w, s in zip((1, 0.5, -0.25), sources, strict=True))
        assert close(deltas(tmp_path / "out.safetensors")[module], wanted)


def test_the_sources_stay_as_they_are(sources: list[Path], tmp_path: Path) -> None:
    before = [digest(s) for s in sources]
    ao.merge(sources, tmp_path / "out.safetensors", "dare_ties_svd", density=0.5)
    assert [digest(s) for s in sources] == before
