"""Cards, licences, and what headers say of files: every rule on an adapter that breaks it, and on some that do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sound import CARD, codes, edit, found, kohya_file, load, peft_folder, set_config

from adapterops.validation import hashes, registry
from adapterops.validation.rules.card_texts import front_matter
from adapterops.validation.subject import LazyTensor

_TAGS = {"10_ohwx man": {"ohwx man": 20, "beach": 7}, "5_dog": {"a dog": 3}}
_DIRS = {"10_ohwx man": {"n_repeats": 10, "img_count": 20}, "5_dog": {"n_repeats": 5, "img_count": 9}}


def card(text: str) -> Callable[[Path], Path]:
    """A sound PEFT folder with another card."""

    def make(tmp_path: Path) -> Path:
        folder = peft_folder(tmp_path)
        (folder / "README.md").write_text(text)
        return folder

    return make


def without(line: str) -> Callable[[Path], Path]:
    """The sound card without the lines that hold `line`."""
    return card("\n".join(text for text in CARD.split("\n") if line not in text))


def no_card(tmp_path: Path) -> Path:
    folder = peft_folder(tmp_path)
    (folder / "README.md").unlink()
    return folder


def headed(told: str = "A style.", **metadata: str) -> Callable[[Path], Path]:
    """A Kohya file with these entries in its header, beside a card that says `told`."""

    def make(tmp_path: Path) -> Path:
        (tmp_path / "README.md").write_text(f"# LoRA\n\n{told}\n")
        return edit(kohya_file(tmp_path), metadata={key.replace("__", "."): value for key, value in metadata.items()})

    return make


def wrong_hash(tmp_path: Path) -> Path:
    return edit(kohya_file(tmp_path), metadata={"sshs_model_hash": "ab" * 32}, hashes=False)


_TEMPLATE = CARD + "\n".join(
    f"- **{n}:** [More Information Needed]" for n in ("By", "Type", "Languages", "Uses", "Bias")
)

BROKEN: dict[str, Callable[[Path], Path]] = {
    "D601": no_card,
    "D602": card("---\nlicense: apache-2.0: yes\n---\n# An adapter\n"),
    "D603": card("# An adapter\n"),
    "D604": without("base_model: "),
    "D605": card(CARD.replace("base_model: meta-llama/Llama-3.2-1B", "base_model: meta-llama/Llama-3.2-3B")),
    "D606": without("license"),
    "D607": without("library_name"),
    "D608": card(_TEMPLATE),
    "D609": headed(modelspec__trigger_phrase="ohwx man"),
    "D620": wrong_hash,
    "D621": headed(ss_sd_model_name="/home/jane/models/sd15.safetensors"),
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_broken_adapter_is_found_exactly(tmp_path: Path, code: str) -> None:
    assert codes(BROKEN[code](tmp_path)) == [code]


def test_every_rule_has_its_broken_adapter() -> None:
    assert {rule.code for rule in registry.rules() if rule.code.startswith("D")} == BROKEN.keys()


PASSES: dict[str, Callable[[Path], Path]] = {
    "one open point": card(CARD + "\n## Bias\n\n[More Information Needed]\n"),
    "several bases": card(CARD.replace("base_model: ", "base_model:\n- other/base\n- ", 1)),
    "a base in other letters": card(CARD.replace("base_model: meta-llama/Llama-3.2-1B", "base_model: Meta-Llama/llama-3.2-1b")),
    "a base without its owner": card(CARD.replace("base_model: meta-llama/Llama-3.2-1B", "base_model: Llama-3.2-1B")),
    "Norwegian": card(CARD.replace("license: apache-2.0", "license: apache-2.0\nlanguage: no\ndate: 2024-01-01")),
    "a byte order mark": card("\ufeff" + CARD),
    "Windows' line ends": card(CARD.replace("\n", "\r\n")),
    "trigger words that are told": headed("Use OHWX  man in prompts.", modelspec__trigger_phrase="ohwx man"),
    "one of the tags is told": headed(
        "Trigger: ohwx man", ss_tag_frequency=json.dumps(_TAGS), ss_dataset_dirs=json.dumps(_DIRS)
    ),
    "tags of some images": headed(
        ss_tag_frequency=json.dumps({"5_dog": {"a dog": 3}}), ss_dataset_dirs=json.dumps(_DIRS)
    ),
    "tags that are no JSON": headed(ss_tag_frequency="{", ss_dataset_dirs="[]"),
    "LyCORIS' own hash": lambda p: edit(kohya_file(p), metadata={"sshs_model_hash": "0x" + "ab" * 32}, hashes=False),
    "a legacy hash of nothing": lambda p: edit(kohya_file(p), metadata={"sshs_legacy_hash": "e3b0c442"}),
    "a file's name": headed(ss_sd_model_name="sd15.safetensors", ss_dataset_dirs=json.dumps(_DIRS)),
    "a rented machine's path": headed(ss_sd_model_name="/workspace/sd15.safetensors"),
    "tags with backslashes": headed(ss_datasets=json.dumps([{"tag_frequency": {"a": {"falcon \\\\(game\\\\)": 3}}}])),
    "a repository": headed(ss_sd_model_name="stabilityai/stable-diffusion-xl-base-1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_what_is_sound_is_not_found(tmp_path: Path, name: str) -> None:
    assert [code for code in codes(PASSES[name](tmp_path)) if code.startswith("D")] == []


def test_a_lone_file_needs_no_card(tmp_path: Path) -> None:
    assert codes(kohya_file(tmp_path)) == []
    assert codes(edit(kohya_file(tmp_path), metadata={"modelspec.trigger_phrase": "ohwx man"})) == []


def test_a_component_of_an_adapter_needs_no_card_of_its_own(tmp_path: Path) -> None:
    peft_folder(tmp_path, name="text_encoder")
    (tmp_path / "text_encoder" / "README.md").unlink()
    assert "D601" not in codes(tmp_path)


def test_tags_on_every_image_are_trigger_words(tmp_path: Path) -> None:
    (finding,) = found(headed(ss_tag_frequency=json.dumps(_TAGS), ss_dataset_dirs=json.dumps(_DIRS))(tmp_path))
    assert finding.code == "D609"
    assert "'ohwx man'" in finding.message
    assert "a dog" not in finding.message


def test_a_base_that_is_a_local_path_is_not_compared(tmp_path: Path) -> None:
    folder = set_config(peft_folder(tmp_path), base_model_name_or_path="/models/llama")
    assert "D605" not in codes(folder)


def test_the_hash_that_is_written_is_the_files(tmp_path: Path) -> None:
    (finding,) = found(wrong_hash(tmp_path))
    assert finding.change is not None
    good = load(kohya_file(tmp_path, "good.safetensors"))[1]["sshs_model_hash"]
    assert finding.change.metadata == {"sshs_model_hash": good}


def test_a_wrong_hash_is_not_looked_for_in_headers_alone(tmp_path: Path) -> None:
    assert codes(wrong_hash(tmp_path), header_only=True) == []


class _Counting:
    """The bytes of a large tensor, of which nothing is kept; the longest read is."""

    path = "counted"
    longest = 0

    def readinto(self, start: int, buffer: memoryview) -> None:
        self.longest = max(self.longest, len(buffer))
        buffer[:] = bytes(len(buffer))


def test_hashing_reads_in_pieces() -> None:
    source = _Counting()
    tensors = {
        "a": LazyTensor("a", "F32", (1 << 20,), source, 100),
        "b": LazyTensor("b", "F32", (1 << 20,), source, 100 + (4 << 20)),
    }
    assert hashes.model_hash(tensors) is not None
    assert source.longest == 1 << 20
    assert hashes.model_hash({**tensors, "c": LazyTensor("c", "F32", (1,), source, 1 << 30)}) is None  # a gap


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("/home/jane/models/sd15.safetensors", "sd15.safetensors"),
        ("C:\\Users\\jane\\sd15.ckpt", "sd15.ckpt"),
        ("~/models/sd15.ckpt", "sd15.ckpt"),
    ],
)
def test_of_a_private_path_the_last_part_is_left(tmp_path: Path, value: str, left: str) -> None:
    (finding,) = found(headed(ss_sd_model_name=value)(tmp_path))
    assert finding.code == "D621"
    assert finding.change is not None
    assert finding.change.metadata == {"ss_sd_model_name": left}


def test_a_private_path_in_json_is_told_and_not_changed(tmp_path: Path) -> None:
    datasets = json.dumps([{"subsets": [{"image_dir": "/home/jane/photos/wedding"}]}])
    (finding,) = found(headed(ss_datasets=datasets)(tmp_path))
    assert finding.code == "D621"
    assert "/home/jane/photos/wedding" in finding.message
    assert finding.change is None


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x",
        "[" * 90_000,
        "a: {" * 20_000,
        "a: !!python/object/apply:os.system [ls]\n - b",
        "a: 1" + "1" * 50_000 + ": x",
        "x" * 100_001,
        "a: \x00",
        "- a\n- b",
    ],
)
def test_hostile_front_matter_is_a_sentence(text: str) -> None:
    """No traceback, and nothing is done of what the text says."""
    told = front_matter(f"---\n{text}\n---\n")
    assert isinstance(told, str)
    assert told


def test_a_tag_of_python_is_text() -> None:
    assert front_matter("---\na: !!python/object/apply:os.system [ls]\n---\n") == {"a": ["ls"]}


def test_front_matter_that_nobody_ends() -> None:
    assert front_matter("---\nlicense: mit\n") == "the --- that ends it is missing"
    assert front_matter("") is None
    assert front_matter("---\n---\n") is None
