"""Saved modules, trained tokens and bundled embeddings: what replaces something whole, and has no delta."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_adapters import Numbers, Q, Tensors, close, deltas, file, lora, pair, peft, read, weights_of

import adapterops as ao
from adapterops.errors import CannotRepresent, UsageError
from adapterops.merging import carried

WEIGHTS = (0.75, 0.5)
HEAD = "base_model.model.head.weight"
TOKENS = "l.emb.token_adapter.trainable_tokens_delta"


def headed(
    folder: Path, seed: int, head: int | None, dtype: torch.dtype = torch.float32, bias: int | None = None
) -> Path:
    tensors = pair(seed)
    if head is not None:
        tensors["head.weight"] = Numbers(head, dtype)(3, 12)
    if bias is not None:
        tensors["l.0.k.bias"] = Numbers(bias)(12)
    saved = ["head"] if head is not None else None
    return peft(folder, tensors, modules_to_save=saved, bias="all" if bias is not None else "none")


def test_the_same_in_all_is_kept_bit_for_bit(tmp_path: Path) -> None:
    sources = [headed(tmp_path / "a", 1, 7), headed(tmp_path / "b", 2, 7)]
    done = ao.merge(sources, tmp_path / "out", "svd", weights=WEIGHTS)
    assert torch.equal(tensor(tmp_path / "out", HEAD), tensor(sources[0], HEAD))
    assert any("head" in note and "weight" in note for note in done.notes)


def tensor(path: Path, key: str) -> torch.Tensor:
    return load_file(weights_of(path))[key]


@pytest.mark.parametrize("owner", [0, 1])
def test_what_only_one_has_is_kept_bit_for_bit(owner: int, tmp_path: Path) -> None:
    sources = [headed(tmp_path / "ab"[n], n, 7 if n == owner else None) for n in range(2)]
    ao.merge(sources, tmp_path / "out", "svd", weights=WEIGHTS)
    assert torch.equal(tensor(tmp_path / "out", HEAD), tensor(sources[owner], HEAD))


def test_different_ones_are_refused(tmp_path: Path) -> None:
    sources = [headed(tmp_path / "a", 1, 7), headed(tmp_path / "b", 2, 8)]
    with pytest.raises(CannotRepresent, match=r"a.adapter_model\.safetensors.*head.*--saved mean.*--saved first"):
        ao.merge(sources, tmp_path / "out", "svd")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_their_weighted_mean(tmp_path: Path) -> None:
    sources = [headed(tmp_path / "a", 1, 7), headed(tmp_path / "b", 2, 8)]
    done = ao.merge(sources, tmp_path / "out", "svd", weights=WEIGHTS, saved="mean")
    one, two = (tensor(s, HEAD).double().numpy() for s in sources)
    assert close(tensor(tmp_path / "out", HEAD).double().numpy(), (0.75 * one + 0.5 * two) / 1.25, 1e-6)
    assert any("head" in note and "mean" in note for note in done.notes)


def test_the_first_one(tmp_path: Path) -> None:
    sources = [headed(tmp_path / "a", 1, 7), headed(tmp_path / "b", 2, 8)]
    done = ao.merge(sources, tmp_path / "out", "svd", weights=WEIGHTS, saved="first")
    assert torch.equal(tensor(tmp_path / "out", HEAD), tensor(sources[0], HEAD))
    assert any("head" in note and "first" in note for note in done.notes)


def test_the_mean_of_two_types_holds_the_wider_ones_numbers(tmp_path: Path) -> None:
    """float16 has no 1e6: the mean of a float16 and a float32 head must not be stored as float16."""
    one, two = headed(tmp_path / "a", 1, 7, torch.float16), headed(tmp_path / "b", 2, 8)
    scaled = load_file(weights_of(two))
    scaled[HEAD] *= 1e6
    file(weights_of(two), scaled)
    ao.merge([one, two], tmp_path / "out", "svd", saved="mean")
    wanted = (tensor(one, HEAD).double() + tensor(two, HEAD).double()).numpy() / 2
    assert close(tensor(tmp_path / "out", HEAD).double().numpy(), wanted, 1e-5)


def test_a_mean_of_weights_that_cancel_is_none(tmp_path: Path) -> None:
    sources = [headed(tmp_path / "a", 1, 7), headed(tmp_path / "b", 2, 8)]
    with pytest.raises(UsageError, match=r"head.*add up to 0"):
        ao.merge(sources, tmp_path / "out", "svd", weights=(1, -1), saved="mean")


def test_saved_biases_of_the_base(tmp_path: Path) -> None:
    key = "base_model.model.l.0.k.bias"
    sources = [headed(tmp_path / "a", 1, None, bias=7), headed(tmp_path / "b", 2, None, bias=8)]
    with pytest.raises(CannotRepresent, match=r"l\.0\.k.*--saved mean"):
        ao.merge(sources, tmp_path / "out", "svd")
    ao.merge(sources, tmp_path / "out", "svd", weights=WEIGHTS, saved="mean")
    one, two = (tensor(s, key).double().numpy() for s in sources)
    assert close(tensor(tmp_path / "out", key).double().numpy(), (0.75 * one + 0.5 * two) / 1.25, 1e-6)


def test_another_shape_has_no_mean(tmp_path: Path) -> None:
    one, two = headed(tmp_path / "a", 1, 7), headed(tmp_path / "b", 2, 8)
    longer = {**load_file(weights_of(two)), HEAD: torch.ones(5, 12)}
    file(weights_of(two), longer)
    with pytest.raises(UsageError, match=r"head.*no mean.*--saved first"):
        ao.merge([one, two], tmp_path / "out", "svd", saved="mean")


# Trained tokens.


def tokens(folder: Path, seed: int, indices: list[int], **config: Any) -> Path:
    tensors: Tensors = {**pair(seed), TOKENS: Numbers(seed + 30)(len(indices), 16)}
    return peft(folder, tensors, trainable_token_indices={"emb": indices}, **config)


def test_the_same_tokens_are_kept(tmp_path: Path) -> None:
    one, two = tokens(tmp_path / "a", 1, [3, 5]), tokens(tmp_path / "b", 2, [3, 5])
    file(
        weights_of(two),
        {**load_file(weights_of(two)), f"base_model.model.{TOKENS}": tensor(one, f"base_model.model.{TOKENS}")},
    )
    ao.merge([one, two], tmp_path / "out", "svd")
    assert np.array_equal(read(tmp_path / "out")["l.emb"]["tokens"], read(one)["l.emb"]["tokens"])


def test_other_tokens_stand_side_by_side(tmp_path: Path) -> None:
    """A row belongs to its index, in whatever order peft reads them (it sorts none)."""
    one, two = tokens(tmp_path / "a", 1, [7, 5]), tokens(tmp_path / "b", 2, [3, 9, 1])
    ao.merge([one, two], tmp_path / "out", "svd")
    assert by_index(tmp_path / "out").keys() == {7, 5, 3, 9, 1}
    for index, row in {**by_index(one), **by_index(two)}.items():
        assert np.array_equal(by_index(tmp_path / "out")[index], row)


def by_index(folder: Path) -> dict[int, Any]:
    (indices,) = json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"].values()
    return dict(zip(indices, read(folder)["l.emb"]["tokens"], strict=True))


def test_a_token_in_both_is_refused_unless_told(tmp_path: Path) -> None:
    one, two = tokens(tmp_path / "a", 1, [7, 5]), tokens(tmp_path / "b", 2, [5, 9])
    with pytest.raises(CannotRepresent, match=r"l\.emb.*--saved"):
        ao.merge([one, two], tmp_path / "out", "svd")
    ao.merge([one, two], tmp_path / "out", "svd", saved="mean", weights=WEIGHTS)
    first, second, found = by_index(one), by_index(two), by_index(tmp_path / "out")
    assert found.keys() == {7, 5, 9}
    assert close(found[5], (0.75 * first[5] + 0.5 * second[5]) / 1.25, 1e-6)
    assert np.array_equal(found[7], first[7])
    assert np.array_equal(found[9], second[9])


def test_the_first_ones_tokens_lose_none_of_the_others(tmp_path: Path) -> None:
    """Tokens that only the second adapter has are nobody's to drop, whatever is done about the shared one."""
    one, two = tokens(tmp_path / "a", 1, [7, 5]), tokens(tmp_path / "b", 2, [5, 9])
    ao.merge([one, two], tmp_path / "out", "svd", saved="first")
    found = by_index(tmp_path / "out")
    assert found.keys() == {7, 5, 9}
    assert np.array_equal(found[5], by_index(one)[5])
    assert np.array_equal(found[9], by_index(two)[9])


# Bundled embeddings.


def bundle(path: Path, seed: int, name: str, embedding: int) -> Path:
    return file(path, lora(seed), {f"bundle_emb.{name}.string_to_param.*": Numbers(embedding)(2, 768)})


def test_bundled_embeddings(tmp_path: Path) -> None:
    one, two = bundle(tmp_path / "a.safetensors", 1, "cat", 7), bundle(tmp_path / "b.safetensors", 2, "dog", 8)
    out = tmp_path / "out.safetensors"
    ao.merge([one, two], out, "cat", weights=WEIGHTS)
    for source, name in ((one, "cat"), (two, "dog")):
        key = f"bundle_emb.{name}.string_to_param.*"
        assert torch.equal(tensor(out, key), tensor(source, key))
    plain = [deltas(file(tmp_path / "plain.safetensors", lora(seed)))[Q] for seed in (1, 2)]
    wanted = WEIGHTS[0] * plain[0] + WEIGHTS[1] * plain[1]
    merged = {k: t for k, t in load_file(out).items() if not k.startswith("bundle_emb")}
    assert close(deltas(file(tmp_path / "rest.safetensors", merged))[Q], wanted)


def test_bundled_embeddings_of_one_name(tmp_path: Path) -> None:
    one, two = bundle(tmp_path / "a.safetensors", 1, "cat", 7), bundle(tmp_path / "b.safetensors", 2, "cat", 8)
    with pytest.raises(CannotRepresent, match=r"cat.*--saved"):
        ao.merge([one, two], tmp_path / "out.safetensors", "svd")
    ao.merge([one, two], tmp_path / "out.safetensors", "svd", saved="mean", weights=WEIGHTS)
    key = "bundle_emb.cat.string_to_param.*"
    first, second = (tensor(s, key).double().numpy() for s in (one, two))
    assert close(tensor(tmp_path / "out.safetensors", key).double().numpy(), (0.75 * first + 0.5 * second) / 1.25, 1e-6)


def test_rows_of_a_layer_that_another_adapter_changes_whole(tmp_path: Path) -> None:
    n = Numbers(3)
    tokens = peft(tmp_path / "tokens", {**pair(1), TOKENS: n(2, 8)}, trainable_token_indices={"l.emb": [1, 3]})
    whole = peft(tmp_path / "whole", {**pair(2), "l.emb.lora_embedding_A": n(4, 20), "l.emb.lora_embedding_B": n(8, 4)})
    with pytest.raises(CannotRepresent, match=r"tokens.*rows that replace those of model: l\.emb, which .*whole"):
        ao.merge([tokens, whole], tmp_path / "out", "svd")
    assert not (tmp_path / "out").exists()
    (tmp_path / "weights.yaml").write_text("[1, {default: 1, patterns: [['*.emb', 0]]}]")
    ao.merge([tokens, whole], tmp_path / "out", "svd", weights=tmp_path / "weights.yaml")
    assert torch.equal(
        tensor(tmp_path / "out", f"base_model.model.{TOKENS}"), tensor(tokens, f"base_model.model.{TOKENS}")
    )


@pytest.mark.parametrize(("owners", "kept"), [("ab", "a"), ("b", "b")])
def test_whose_head_would_be_kept_is_told(owners: str, kept: str, tmp_path: Path) -> None:
    sources = [headed(tmp_path / name, n, 7 + n if name in owners else None) for n, name in enumerate("ab")]
    with pytest.raises(
        CannotRepresent, match=rf"b.adapter_model.*cannot be .*--saved first keeps that of \S*{kept}.adapter"
    ):
        ao.merge(sources, tmp_path / "out", "subtract")
    ao.merge(sources, tmp_path / "out", "subtract", saved="first")
    assert torch.equal(tensor(tmp_path / "out", HEAD), tensor(tmp_path / kept, HEAD))


def test_what_becomes_of_tokens_is_told(tmp_path: Path) -> None:
    def trained(name: str, seed: int, indices: list[int]) -> Path:
        tensors = {TOKENS: Numbers(seed)(len(indices), 6), **pair(seed)}
        return peft(tmp_path / name, tensors, trainable_token_indices={"emb": indices}, target_modules=["q"])

    sources = [trained("a", 1, [1, 3]), trained("b", 2, [3, 7])]
    mean = ao.merge(sources, tmp_path / "mean", "svd", saved="mean").notes
    assert any("emb: tokens that adapters trained differently (3): the weighted mean" in note for note in mean)
    first = ao.merge(sources, tmp_path / "first", "svd", saved="first", weights=[0.5, 1]).notes
    assert any("(3): as in the first adapter (--saved first)" in note for note in first)
    assert any("emb: trained tokens" in note and "weight 0.5 or not" in note for note in first)
    apart = ao.merge([sources[0], trained("c", 4, [5])], tmp_path / "apart", "svd").notes
    assert not any("tokens" in note for note in apart)


@pytest.mark.parametrize("piece", [7, 36])
def test_a_mean_taken_a_piece_at_a_time(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [headed(tmp_path / "a", 1, 7, torch.bfloat16), headed(tmp_path / "b", 2, 8, torch.bfloat16)]
    monkeypatch.setattr(carried, "PIECE", piece)
    ao.merge(sources, tmp_path / "out", "svd", weights=WEIGHTS, saved="mean")
    one, two = (tensor(s, HEAD).double() for s in sources)
    wanted = one * (WEIGHTS[0] / sum(WEIGHTS)) + two * (WEIGHTS[1] / sum(WEIGHTS))
    assert torch.equal(tensor(tmp_path / "out", HEAD), wanted.bfloat16())
