"""Files that are sound and empty: what `convert` refuses, `validate` finds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import adapterops as ao

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def _write(path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({}, path)
    elif path.suffix == ".npz":
        np.savez(path)
    else:
        torch.save({}, path)


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.bin", "adapters.npz", "folder/adapter_model.safetensors"])
def test_a_file_without_tensors_is_an_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    _write(path)
    if path.parent != tmp_path:
        (path.parent / "adapter_config.json").write_text(json.dumps(CONFIG))
        path = path.parent
    with pytest.raises(ao.AdapterOpsError, match="holds no tensors") as refused:
        ao.convert(path, "peft", tmp_path / "out")
    report = ao.validate(path)
    errors = [finding for finding in report if finding.severity == "error"]
    assert [finding.code for finding in errors] == ["F020"]
    assert errors[0].message in str(refused.value)
    assert report.exit_code() == 1


def test_an_optimizers_state_alone_is_told_of_once(tmp_path: Path) -> None:
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}, tmp_path / "optimizer.pt")
    errors = [finding for finding in ao.validate(tmp_path / "optimizer.pt") if finding.severity == "error"]
    assert [finding.code for finding in errors] == ["F020"]
