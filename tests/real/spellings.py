"""The table of trainers' spellings: who writes a base model's adapters how, and as what such a file must be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from base_rows import Base
from checks import EVERYWHERE
from image_bases import (
    ANIMA,
    AURAFLOW,
    COGVIEW4,
    COSMOS_14B,
    ERNIE,
    FLUX_2_DEV,
    HIDREAM,
    IDEOGRAM,
    KLEIN_4B,
    KLEIN_9B,
    KREA,
    LUMINA,
    PIXART,
    SANA,
    SANA_600M,
    Z_IMAGE,
)
from trainers import DOWN_UP, Modules, Tensors, comfy, musubi, pairs
from video_bases import (
    COGVIDEOX_1_5_I2V,
    COGVIDEOX_2B,
    HUNYUAN,
    HUNYUAN_1_5,
    HUNYUAN_IMAGE,
    KANDINSKY_IMAGE,
    KANDINSKY_LITE,
    KANDINSKY_PRO,
    LTX_2,
    LTX_2_3,
    LTX_2B,
    LTX_13B,
    MOCHI,
    WAN_1_3B,
    WAN_5B,
    WAN_14B,
    WAN_14B_I2V,
)


def down(modules: Modules) -> Tensors:
    """Nerogar/OneTrainer's COMFY (`modules/util/convert_lora_util.py`)."""
    return pairs(modules, "diffusion_model.", DOWN_UP, 2.0)


def down_without_alphas(modules: Modules) -> Tensors:
    """ModelTC/LightX2V `tools/convert/lora_extractor.py`."""
    return pairs(modules, "diffusion_model.", DOWN_UP)


def onetrainer(modules: Modules) -> Tensors:
    """Nerogar/OneTrainer's LEGACY; ai-toolkit's older PixArt files."""
    return pairs(modules, "lora_transformer_", DOWN_UP, 1.0, flat=True)


def original(modules: Modules) -> Tensors:
    """Nerogar/OneTrainer's ORIGINAL (`modules/model/*Model.py`, `diffusers_to_original`)."""
    return pairs(modules, alpha=1.0)


def animas_original(modules: Modules) -> Tensors:
    """Nerogar/OneTrainer `modules/model/AnimaModel.py` (`diffusers_to_original`): as in the authors' checkpoint."""
    return pairs(modules, "net.", alpha=1.0)


def diffsynth(modules: Modules) -> Tensors:
    """modelscope/DiffSynth-Studio `diffsynth/diffusion/training_module.py`: no component, no alpha."""
    return pairs(modules)


def pefts(modules: Modules) -> Tensors:
    """huggingface/peft's prefix, as fal's trainers leave it."""
    return pairs(modules, "base_model.model.")


def diffusers(modules: Modules) -> Tensors:
    """huggingface/diffusers' scripts, a-r-r-o-w/finetrainers, bghira/SimpleTuner, ostris/ai-toolkit; by the authors' names
    tdrussell/diffusion-pipe of HunyuanVideo (`models/hunyuan_video.py`, `save_adapter`)."""
    return pairs(modules, "transformer.")


def with_alphas(modules: Modules) -> Tensors:
    """Nerogar/OneTrainer's DIFFUSERS."""
    return pairs(modules, "transformer.", alpha=2.0)


def backup(modules: Modules) -> Tensors:
    """Nerogar/OneTrainer's backups: dotted names, Kohya's tensors."""
    return pairs(modules, "transformer.", DOWN_UP, 1.0)


def lycoris(modules: Modules) -> Tensors:
    """KohakuBlueleaf/LyCORIS around a model of diffusers: bghira/SimpleTuner."""
    return pairs(modules, "lycoris_", DOWN_UP, 1.0, flat=True)


def tencent(modules: Modules) -> Tensors:
    """Tencent-Hunyuan/HunyuanVideo-I2V `train_image2video_lora.py` (`get_module_kohya_state_dict`)."""
    return pairs(modules, "Hunyuan_video_I2V_lora_", DOWN_UP, 8.0, flat=True)


WRITERS: dict[str, Callable[[Modules], Tensors]] = {
    "comfy": comfy,
    "comfy-down": down,
    "comfy-diffusers": comfy,
    "comfy-hunyuan": comfy,
    "comfy-down-hunyuan": down,
    "kohya": musubi,
    "kohya-diffusers": musubi,
    "kohya-hunyuan": musubi,
    "onetrainer": onetrainer,
    "onetrainer-original": original,
    "diffusers": diffusers,
    "diffusers-alpha": with_alphas,
    "diffusers-lycoris": backup,
    "diffusion-pipe": diffusers,
    "diffsynth": diffsynth,
    "lycoris": lycoris,
    "tencent": tencent,
    "bfl-peft": pefts,
    "peft": pefts,
}
"""Who writes a dialect."""


class File(NamedTuple):
    """A file, and what it must be read as."""

    base: Base
    dialect: str
    modules: Modules
    ways: tuple[str, ...]
    """The dialects through which it comes back."""
    make: Callable[[Modules], Tensors]

    @property
    def tensors(self) -> Tensors:
        """The file's tensors."""
        return self.make(self.modules)


def files(base: Base, modules: Modules, dialects: str, ways: tuple[str, ...] = EVERYWHERE) -> list[File]:
    """A row for each dialect."""
    return [File(base, dialect, modules, ways, WRITERS[dialect]) for dialect in dialects.split()]


def everywhere(
    base: Base, few: str, dialects: str = "diffusers diffusers-alpha lycoris diffsynth onetrainer"
) -> list[File]:
    """Rows by the authors' names (`few`), and by diffusers'."""
    rows = files(base, base.authors or base.diffusers, few)
    return rows + files(base, base.diffusers, dialects + (" kohya-diffusers" if base.authors else ""))


def hunyuan(base: Base) -> list[File]:
    """Of HunyuanVideo 1.5, HunyuanImage 2.1 and Kandinsky 5, of which Comfy has names of its own for the first two."""
    ways = ("comfy", "kohya", "kohya-diffusers", "peft", "diffusers")
    ways += ("comfy-hunyuan", "kohya-hunyuan") if base.comfys else ()
    return [
        *files(base, base.authors, "kohya comfy", ways),
        *files(base, base.few, "kohya comfy", ways),
        *files(base, base.diffusers or base.authors, "diffusers lycoris onetrainer diffsynth", ways),
        *(files(base, base.comfys, "comfy-hunyuan comfy-down-hunyuan kohya-hunyuan", ways) if base.comfys else ()),
        # Its scale has to be said: it is looked at, and no more.
        *files(base, base.diffusers or base.authors, "peft", ()),
    ]


OF_LTX = ("comfy", "comfy-down", "kohya", "kohya-diffusers", "lycoris", "peft", "diffusers")
OF_HUNYUAN = ("comfy", "kohya", "kohya-diffusers", "diffusion-pipe", "tencent", "comfy-hunyuan", "peft", "diffusers")
OF_FLUX_2 = (
    *("comfy", "comfy-down", "comfy-diffusers", "kohya", "kohya-diffusers", "onetrainer", "lycoris"),
    *("diffusers", "diffusers-alpha", "diffusers-lycoris", "diffusers-down", "diffsynth", "peft"),
)
OF_THE_AUTHORS = "comfy comfy-down kohya onetrainer-original"

FILES: list[File] = [
    *files(ANIMA, ANIMA.whole, "comfy comfy-down kohya diffsynth"),
    File(ANIMA, "onetrainer-original", ANIMA.whole, EVERYWHERE, animas_original),
    *files(ANIMA, ANIMA.diffusers, "diffusers diffusers-alpha lycoris"),
    *files(COSMOS_14B, COSMOS_14B.authors, "comfy kohya"),
    *files(COSMOS_14B, COSMOS_14B.diffusers, "diffusers lycoris"),
    *files(AURAFLOW, AURAFLOW.diffusers, "diffusers lycoris"),
    *files(AURAFLOW, AURAFLOW.comfys, "comfy kohya"),
    File(AURAFLOW, "comfy-down", AURAFLOW.comfys, EVERYWHERE, down_without_alphas),
    *files(ERNIE, ERNIE.authors, "comfy comfy-down kohya diffusers diffusers-alpha lycoris diffsynth"),
    *files(HIDREAM, HIDREAM.authors, "comfy comfy-down kohya diffusers diffusers-alpha lycoris onetrainer-original"),
    *files(IDEOGRAM, IDEOGRAM.whole, "comfy comfy-down kohya onetrainer-original diffsynth"),
    *files(IDEOGRAM, IDEOGRAM.diffusers, "diffusers lycoris"),
    *files(KREA, KREA.whole, "comfy comfy-down kohya onetrainer-original diffsynth"),
    *files(KREA, KREA.diffusers, "diffusers diffusers-alpha lycoris"),
    *files(LUMINA, LUMINA.authors, "comfy comfy-down kohya"),
    *files(LUMINA, LUMINA.diffusers, "diffusers lycoris"),
    *files(Z_IMAGE, Z_IMAGE.authors, "comfy kohya"),
    *files(Z_IMAGE, Z_IMAGE.diffusers, "diffusers comfy-diffusers kohya-diffusers"),
    *files(KLEIN_4B, KLEIN_4B.authors, "comfy comfy-down kohya onetrainer-original bfl-peft", OF_FLUX_2),
    *files(KLEIN_4B, KLEIN_4B.diffusers, "comfy-diffusers onetrainer diffusers-lycoris diffusers", OF_FLUX_2),
    *files(KLEIN_4B, KLEIN_4B.diffusers, "diffsynth lycoris", OF_FLUX_2),
    *files(KLEIN_9B, KLEIN_9B.authors, "comfy kohya", ()),
    *files(FLUX_2_DEV, FLUX_2_DEV.authors, "comfy kohya", ()),
    *files(LTX_2_3, LTX_2_3.whole, "comfy kohya", OF_LTX),
    *files(LTX_2_3, LTX_2_3.authors, "diffusers", OF_LTX),
    *files(LTX_2, LTX_2.authors, "comfy diffusers", OF_LTX),
    *files(LTX_2B, LTX_2B.authors, "comfy diffusers diffsynth kohya", OF_LTX),
    *files(LTX_13B, LTX_13B.authors, "comfy diffusers diffsynth kohya", OF_LTX),
    *files(WAN_1_3B, WAN_1_3B.authors, "comfy comfy-down kohya diffsynth"),
    *files(WAN_1_3B, WAN_1_3B.diffusers, "diffusers lycoris"),
    *files(WAN_14B, WAN_14B.authors, "comfy kohya", ()),
    *files(WAN_14B_I2V, WAN_14B_I2V.authors, "comfy kohya", ()),
    *files(WAN_5B, WAN_5B.authors, "comfy kohya", ()),
    *files(HUNYUAN, HUNYUAN.authors, "kohya comfy diffusion-pipe tencent", OF_HUNYUAN),
    *files(HUNYUAN, HUNYUAN.diffusers, "diffusers kohya-diffusers onetrainer", OF_HUNYUAN),
    *files(HUNYUAN, HUNYUAN.comfys, "comfy-hunyuan comfy-down-hunyuan", OF_HUNYUAN),
    *hunyuan(HUNYUAN_1_5),
    *hunyuan(HUNYUAN_IMAGE),
    *hunyuan(KANDINSKY_LITE),
    *hunyuan(KANDINSKY_IMAGE),
    *hunyuan(KANDINSKY_PRO),
    *everywhere(COGVIDEOX_2B, OF_THE_AUTHORS),
    *everywhere(COGVIDEOX_1_5_I2V, OF_THE_AUTHORS),
    *everywhere(COGVIEW4, OF_THE_AUTHORS),
    *everywhere(MOCHI, OF_THE_AUTHORS),
    *everywhere(SANA, OF_THE_AUTHORS),
    *everywhere(SANA_600M, OF_THE_AUTHORS),
    *everywhere(PIXART, OF_THE_AUTHORS),
]
