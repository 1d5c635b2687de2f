"""Prompts of IBM's server: a bare tensor, which is a PEFT prompt where the user says that it is one."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import adapterops as ao
from adapterops import errors

PROMPT = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=4)).eval()


def test_peft_puts_it_before_the_input_as_the_server_does(tmp_path: Path) -> None:
    torch.save(PROMPT, tmp_path / "decoder.pt")
    fields = {"task_type": "CAUSAL_LM"}
    result = ao.convert(tmp_path / "decoder.pt", "peft", tmp_path / "p", format="tgis", fields=fields)
    assert result.proof is not None
    assert result.proof.exact
    assert result.modules == 1
    assert torch.equal(load_file(tmp_path / "p" / "adapter_model.safetensors")["prompt_embeddings"], PROMPT)
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"], config["token_dim"]) == ("PROMPT_TUNING", 3, 16)
    model, words = gpt2(), torch.arange(1, 9).reshape(2, 4)
    with torch.no_grad():
        inputs = model.transformer.wte(words)
        expected = model(inputs_embeds=torch.cat([PROMPT.expand(2, 3, 16), inputs], 1)).logits
        adapted = PeftModel.from_pretrained(model, tmp_path / "p")
        torch.testing.assert_close(adapted(input_ids=words, attention_mask=torch.ones_like(words)).logits, expected)


def test_the_published_prompt(corpus: Path, tmp_path: Path) -> None:
    path = corpus / "files" / "bloom-sentiment-tgis-decoder" / "decoder.pt"
    with pytest.raises(errors.NotAnAdapter, match=r"bare Tensor \[8, 1024\].*say --from tgis"):
        ao.convert(path, "peft", tmp_path / "p")
    with pytest.raises(errors.UnknownFact, match="--set task_type"):
        ao.convert(path, "peft", tmp_path / "p", format="tgis")
    ao.convert(path, "peft", tmp_path / "p", format="tgis", fields={"task_type": "CAUSAL_LM"})
    assert torch.equal(
        load_file(tmp_path / "p" / "adapter_model.safetensors")["prompt_embeddings"],
        torch.load(path, weights_only=True),
    )


def test_what_one_file_cannot_say(tmp_path: Path) -> None:
    torch.save(PROMPT, tmp_path / "decoder.pt")
    with pytest.raises(errors.UnsupportedFormat, match="SEQ_2_SEQ_LM"):
        ao.load(tmp_path / "decoder.pt", format="tgis", fields={"task_type": "SEQ_2_SEQ_LM"})
    with pytest.raises(errors.CannotRepresent, match=r"never written.*--to peft"):
        ao.convert(tmp_path / "decoder.pt", "tgis", tmp_path / "t.safetensors", format="tgis")
    torch.save(PROMPT, tmp_path / "encoder.pt")
    with pytest.raises(errors.UnsupportedFormat, match="an encoder's and a decoder's"):
        ao.load(tmp_path / "decoder.pt", format="tgis")
    with pytest.raises(errors.UnsupportedFormat, match="prompt of an encoder"):
        ao.load(tmp_path / "encoder.pt", format="tgis")
    torch.save(torch.ones(4), tmp_path / "vector.pt")
    with pytest.raises(errors.UnsupportedFormat, match="no key reads as tgis"):
        ao.load(tmp_path / "vector.pt", format="tgis")


def test_a_pickle_in_json_is_refused_for_what_it_is(tmp_path: Path) -> None:
    """mkultra's soft prompts: `pickle.dumps(tensor, protocol=4)` in base64."""
    for protocol in range(2, 6):
        text = base64.b64encode(pickle.dumps(PROMPT, protocol=protocol)).decode()
        (tmp_path / "soft.json").write_text(json.dumps({"metadata": {"name": "x", "epoch": 1}, "tensor": text}))
        with pytest.raises(errors.UnsafePickle, match=r"soft\.json.*field 'tensor'.*prompt_embeddings"):
            ao.load(tmp_path / "soft.json")
    (tmp_path / "plain.json").write_text(json.dumps({"tensor": "gALore"}))
    with pytest.raises(errors.NotAnAdapter, match="is a JSON file"):
        ao.load(tmp_path / "plain.json")


def test_the_published_soft_prompt_is_refused(corpus: Path) -> None:
    with pytest.raises(errors.UnsafePickle, match="field 'tensor'"):
        ao.load(corpus / "files" / "softprompt-json-protein-rita" / "soft_prompt.json")
