"""What files call base models, and the built-in architectures that those are."""

from __future__ import annotations

import re
from collections.abc import Mapping

FIELDS = ("modelspec.architecture", "ss_base_model_version")
"""The entries of a header that name the base."""
_NAMES = (
    # `ss_base_model_version` and `modelspec.architecture` of sd-scripts (library/sai_model_spec.py, train_util.py), and the
    # names on the Hub of the models themselves: what was made from them has names that tell nothing.
    (r"sd_v1\w*|stable-diffusion-v1(/.*)?", "sd1"),
    (r"sd_v2\w*|stable-diffusion-v2-(512|768-v)(/.*)?", "sd2"),
    (r"sdxl_base_\S*|stable-diffusion-xl-v1-base(/.*)?", "sdxl"),
    *((r"sd3\w*|stable-diffusion-3(/.*)?", either) for either in ("sd3", "sd35_medium", "sd35_large")),
    (r"stable-diffusion-3-m(edium)?(/.*)?", "sd3"),
    (r"(stable-diffusion-3[-.])?5-medium(/.*)?", "sd35_medium"),
    (r"(stable-diffusion-3[-.])?5-large(/.*)?", "sd35_large"),
    (r"flux\.?1(_kontext)?|flux[-.]1-(dev|schnell)(/.*)?", "flux"),  # …_kontext: ai-toolkit
    (r"(runwayml|CompVis|sd-legacy|stable-diffusion-v1-5|benjamin-paine)/stable-diffusion-v1-\d", "sd1"),
    (r"(stabilityai|sd2-community)/stable-diffusion-2(-1)?(-base)?", "sd2"),
    (r"stabilityai/stable-diffusion-xl-base-\S+", "sdxl"),
    (r"stabilityai/stable-diffusion-3-\S+", "sd3"),
    (r"stabilityai/stable-diffusion-3\.5-medium\S*", "sd35_medium"),
    (r"stabilityai/stable-diffusion-3\.5-large\S*", "sd35_large"),
    (r"black-forest-labs/FLUX\.1-\S+", "flux"),
    # What musubi-tuner (utils/sai_model_spec.py), ai-toolkit (flux2_model.py, flux2_klein_model.py) and OneTrainer say.
    (r"(flux\.2-|flux_2_)dev(/.*)?", "flux2_dev"),
    *((rf"(flux\.2-klein-|flux_?2_klein_){size}(/.*)?", f"flux2_klein_{size}") for size in ("4b", "9b")),
    *((r"flux\.?2(/.*)?", either) for either in ("flux2_dev", "flux2_klein_4b", "flux2_klein_9b")),
    (r"black-forest-labs/FLUX\.2-dev\S*", "flux2_dev"),
    *((rf"black-forest-labs/FLUX\.2-klein-(base-)?{size}\S*", f"flux2_klein_{size}") for size in ("4b", "9b")),
    # sd-scripts and ai-toolkit; OneTrainer.
    (r"chroma1?(/.*)?", "chroma"),
    (r"lodestones/Chroma(1-\S+)?", "chroma"),
    (r"Qwen/Qwen-Image\S*", "qwen_image"),
    (r"Wan-AI/Wan2\.1-T2V-1\.3B\S*", "wan_1_3b"),
    (r"Wan-AI/Wan2\.\d-T2V-A?14B\S*", "wan_14b"),
    (r"Wan-AI/Wan2\.1-I2V-14B\S*", "wan_14b_i2v"),
    (r"Wan-AI/Wan2\.2-TI2V-5B\S*", "wan_5b"),
    (r"Tongyi-MAI/Z-Image\S*", "z_image"),
    (r"hunyuan[-_]video(/.*)?|framepack(/.*)?", "hunyuan_video"),  # musubi-tuner, as above
    (r"(tencent|hunyuanvideo-community)/HunyuanVideo(-I2V(-33ch)?)?", "hunyuan_video"),
    (r"lllyasviel/FramePack\S*", "hunyuan_video"),
    (r"Lightricks/LTX-Video\S*", "ltx_2b"),
    (r"Lightricks/LTX-Video\S*", "ltx_13b"),
    (r"Lightricks/LTX-2\S*", "ltx_2"),
    (r"ltx2(\.\d)?", "ltx_2"),  # ai-toolkit (ltx2.py)
)
"""As whole words; one of several architectures where a name has more than one row."""


def named(value: str) -> list[str]:
    """The built-in architectures that a file means by `value`; none where it is no known name."""
    return [architecture for pattern, architecture in _NAMES if re.fullmatch(pattern, value, re.IGNORECASE)]


def in_header(metadata: Mapping[str, str]) -> frozenset[str]:
    """The built-in architectures that a header names."""
    return frozenset(name for field in FIELDS for name in named(metadata.get(field, "")))
