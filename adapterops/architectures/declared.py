"""What files call base models, and the built-in architectures that those are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FIELDS = ("modelspec.architecture", "ss_base_model_version")
"""The entries of a header that name the base."""
IN_CONFIG = "base_model_name_or_path"
"""The field of a PEFT config that does."""
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
    (
        r"flux\.?1(_kontext)?|flux[-.]1(-(dev|schnell|fill-dev))?(/.*)?",
        "flux",
    ),  # …_kontext: ai-toolkit; fill: OneTrainer
    # OneTrainer (resources/sd_model_spec), ai-toolkit; bghira/SimpleTuner (helpers/training/save_hooks.py: family, flavour).
    (r"stable-diffusion-v3-medium(/.*)?", "sd3"),
    *((rf"stable-diffusion-v3\.5(/.*)?|sd3-{size}(/.*)?", f"sd35_{size}") for size in ("medium", "large")),
    *((r"sd_3", either) for either in ("sd3", "sd35_medium", "sd35_large")),
    (r"flux-(dev|krea|schnell|kontext)(/.*)?", "flux"),
    (r"(runwayml|CompVis|sd-legacy|stable-diffusion-v1-5|benjamin-paine)/stable-diffusion-v1-\d", "sd1"),
    (r"(stabilityai|sd2-community)/stable-diffusion-2(-1)?(-base)?", "sd2"),
    (r"stabilityai/stable-diffusion-xl-base-\S+", "sdxl"),
    (r"stabilityai/stable-diffusion-3-\S+", "sd3"),
    (r"stabilityai/stable-diffusion-3\.5-medium\S*", "sd35_medium"),
    (r"stabilityai/stable-diffusion-3\.5-large\S*", "sd35_large"),
    (r"black-forest-labs/FLUX\.1-\S+", "flux"),
    # OneTrainer's names of variants, and the Hub's.
    (r"stable-diffusion-v1-inpainting(/.*)?", "sd1_inpainting"),
    (
        r"(runwayml|sd-legacy|stable-diffusion-v1-5|benjamin-paine)/stable-diffusion(-v1-5)?-inpainting",
        "sd1_inpainting",
    ),
    (r"timbrooks/instruct-pix2pix", "sd1_instruct_pix2pix"),
    (r"stable-diffusion-v2-inpainting(/.*)?", "sd2_inpainting"),
    (r"(stabilityai|sd2-community)/stable-diffusion-2-inpainting", "sd2_inpainting"),
    (r"stable-diffusion-v2-depth(/.*)?|(stabilityai|sd2-community)/stable-diffusion-2-depth", "sd2_depth"),
    (
        r"stable-diffusion-xl-v1-base-inpainting(/.*)?|diffusers/stable-diffusion-xl-1\.0-inpainting-0\.1",
        "sdxl_inpainting",
    ),
    (r"stable-diffusion-xl-v1-refiner(/.*)?|stabilityai/stable-diffusion-xl-refiner-\S+", "sdxl_refiner"),
    (r"kolors(-[^/]*)?(/.*)?|(Kwai-Kolors/|terminusresearch/kwai-)kolors\S*", "kolors"),
    # What musubi-tuner (utils/sai_model_spec.py), ai-toolkit (flux2_model.py, flux2_klein_model.py) and OneTrainer say.
    (r"(flux\.?2-|flux_2_)dev(/.*)?", "flux2_dev"),
    *((rf"(flux\.?2-klein-|flux_?2_klein_){size}(/.*)?", f"flux2_klein_{size}") for size in ("4b", "9b")),
    *((r"flux\.?2(/.*)?", either) for either in ("flux2_dev", "flux2_klein_4b", "flux2_klein_9b")),
    (r"black-forest-labs/FLUX\.2-dev\S*", "flux2_dev"),
    *((rf"black-forest-labs/FLUX\.2-klein-(base-)?{size}\S*", f"flux2_klein_{size}") for size in ("4b", "9b")),
    # sd-scripts and ai-toolkit; OneTrainer.
    (r"chroma(1|-(base|hd|flash))?(/.*)?", "chroma"),
    (r"lodestones/Chroma(1-\S+)?", "chroma"),
    (r"Qwen/Qwen-Image(?!-2\.)\S*|qwen[-_]image(?![-_]2\.)([-_][^/]*)?(/.*)?", "qwen_image"),
    (r"Qwen/Qwen-Image-2\.1\S*|qwen[-_]image[-_]2\.1(/.*)?", "qwen_image_2_1"),
    (r"black-forest-labs/flux-3-image-klein\S*", "flux3_klein"),
    (r"meituan-longcat/LongCat-Image\S*|longcat_image-\w+(/.*)?", "longcat_image"),  # the latter: SimpleTuner
    (r"MiniMaxAI/MiniMax-H3\S*|minimax_h3(_ref2va)?", "minimax_h3"),  # the latter: ai-toolkit
    (r"Tencent-Hunyuan/(HunyuanDiT|Distillation)\S*", "hunyuan_dit"),
    (
        r"stable-cascade-v1-prior(/.*)?|stable_cascade-stage-c(/.*)?|stabilityai/stable-cascade\S*",
        "stable_cascade",
    ),  # the former: OneTrainer
    (r"ACE-Step/(Ace-Step1\.5|acestep-v15-(?!xl)\S+)", "ace_step_1_5"),
    (r"ACE-Step/acestep-v15-xl\S*", "ace_step_1_5_xl"),
    (r"Wan-AI/Wan2\.1-T2V-1\.3B\S*", "wan_1_3b"),
    (r"Wan-AI/Wan2\.\d-T2V-A?14B\S*", "wan_14b"),
    (r"Wan-AI/Wan2\.1-I2V-14B\S*", "wan_14b_i2v"),
    (r"Wan-AI/Wan2\.2-TI2V-5B\S*", "wan_5b"),
    (r"Wan-AI/Wan2\.1-FLF2V-14B\S*", "wan_14b_flf2v"),
    *((rf"Wan-AI/Wan2\.1-VACE-{said}\S*", f"wan_vace_{size}") for said, size in (("14B", "14b"), (r"1\.3B", "1_3b"))),
    (r"alibaba-pai/Wan2\.2-VACE-Fun-A14B\S*", "wan_vace_14b"),
    (r"Wan-AI/Wan2\.2-Animate-14B\S*", "wan_animate_14b"),
    # Alibaba-PAI's models with controls, and SkyReels V2, have the modules of Wan's.
    (r"alibaba-pai/Wan2\.1-Fun-(V1\.1-)?1\.3B-InP", "wan_1_3b_i2v"),
    (r"alibaba-pai/Wan2\.1-Fun-(V1\.1-)?14B-InP", "wan_14b_i2v"),
    (r"alibaba-pai/Wan2\.2-Fun-A14B-InP", "wan_14b"),
    *(
        (rf"Skywork/SkyReels-V2-(DF|T2V)-{said}-\S+", name)
        for said, name in (("14B", "wan_14b"), (r"1\.3B", "wan_1_3b"))
    ),
    *(
        (rf"Skywork/SkyReels-V2-I2V-{said}-\S+", f"wan_{size}_i2v")
        for said, size in (("14B", "14b"), (r"1\.3B", "1_3b"))
    ),
    # musubi-tuner says the same of every Wan; the image-to-video model of 2.2 has no modules of its own.
    *((r"wan_?2\.1(/.*)?", either) for either in ("wan_1_3b", "wan_14b", "wan_14b_i2v", "wan_5b")),
    (r"Wan-AI/Wan2\.2-I2V-A14B\S*|wan_2\.2_14b", "wan_14b"),
    (r"wan_2\.2_5b|wan-ti2v-5b-2\.2(/.*)?", "wan_5b"),
    (r"wan-t2v-480p-1\.3b-2\.1(/.*)?", "wan_1_3b"),
    (r"wan-(t2v-480p-14b-2\.1|i2v-14b-2\.2-(high|low))(/.*)?", "wan_14b"),
    (r"wan-i2v-14b-2\.1(-720p)?(/.*)?", "wan_14b_i2v"),
    (r"Tongyi-MAI/Z-Image\S*|z[-_]?image([-_][^/]*)?(/.*)?", "z_image"),
    # sd-scripts (library/sai_model_spec.py), musubi-tuner, OneTrainer, ai-toolkit; and the Hub.
    (r"anima(-\w+)?(/.*)?", "anima"),
    (r"circlestone-labs/Anima\S*|nvidia/Cosmos-Predict2(\.5)?-2B\S*", "anima"),
    (r"nvidia/Cosmos-Predict2(\.5)?-14B\S*", "cosmos_predict2_14b"),
    (r"lumina-2(/.*)?|lumina2", "lumina2"),
    (r"Alpha-VLLM/Lumina-Image-2\.0\S*", "lumina2"),
    (r"(newbieai-lab|newbie-ai)/newbie-image\S*|newbie([-_]image)?(/.*)?", "newbie"),
    (r"hidream[-_][ie]1(/.*)?", "hidream"),
    (r"HiDream-ai/HiDream-[IE]1\S*", "hidream"),
    (r"krea-?2(/.*)?|krea/Krea-2\S*", "krea2"),
    (r"fal/AuraFlow\S*|purplesmartai/pony-v7\S*", "auraflow"),
    (r"ernie(_image)?(/.*)?|(baidu|PaddlePaddle)/ERNIE-Image\S*", "ernie_image"),
    (r"ideogram(-?4)?(/.*)?|ideogram-ai/ideogram-4\S*", "ideogram4"),
    (r"hunyuan[-_]video(/.*)?|framepack(/.*)?", "hunyuan_video"),  # musubi-tuner, as above
    (r"(tencent|hunyuanvideo-community)/HunyuanVideo(-I2V(-33ch)?)?", "hunyuan_video"),
    (r"lllyasviel/FramePack\S*", "hunyuan_video"),
    (r"hunyuan-video-1\.5(/.*)?", "hunyuan_video_1_5"),  # musubi-tuner
    (r"(tencent|hunyuanvideo-community)/HunyuanVideo-?1\.5\S*", "hunyuan_video_1_5"),
    (r"hunyuan-image(-2\.1)?(/.*)?", "hunyuan_image"),  # sd-scripts (library/sai_model_spec.py)
    (r"(tencent|hunyuanvideo-community)/HunyuanImage-?2\.1\S*", "hunyuan_image"),
    # musubi-tuner says the same of every Kandinsky 5; bghira/SimpleTuner (helpers/models/kandinsky5_*/model.py) has the Hub's.
    *((r"kandinsky-?5(/.*)?", f"kandinsky5_{size}") for size in ("lite", "image", "pro")),
    (r"(kandinskylab|ai-forever)/Kandinsky-5\.0-[TI]2V-Lite\S*", "kandinsky5_lite"),
    (r"(kandinskylab|ai-forever)/Kandinsky-5\.0-[TI]2I-Lite\S*", "kandinsky5_image"),
    (r"(kandinskylab|ai-forever)/Kandinsky-5\.0-[TI]2V-Pro\S*", "kandinsky5_pro"),
    (r"Lightricks/LTX-Video\S*", "ltx_2b"),
    (r"Lightricks/LTX-Video\S*", "ltx_13b"),
    (r"Lightricks/LTX-2(?!\.[35])\S*", "ltx_2"),
    (r"Lightricks/LTX-2\.[35]\S*", "ltx_2_3"),
    *((r"ltx2", either) for either in ("ltx_2", "ltx_2_3")),  # ai-toolkit (ltx2.py) says so of 2.3, too
    (r"ltxvideo-0\.9\.\d(/.*)?", "ltx_2b"),
    # CogVideoX-Fun was trained from CogVideoX 1.0, and 1.5.
    *((rf"(THUDM|zai-org)/CogVideoX-{size}\S*", f"cogvideox_{size}") for size in ("2b", "5b")),
    *((rf"alibaba-pai/CogVideoX-Fun(-V1\.1)?-{size}\S*", f"cogvideox_{size}") for size in ("2b", "5b")),
    (r"(THUDM|zai-org)/CogVideoX1\.5-5B(-SAT)?", "cogvideox_1_5_5b"),
    (r"(THUDM|zai-org)/CogVideoX1\.5-5B-I2V", "cogvideox_1_5_5b_i2v"),
    (r"genmo/mochi-1-preview", "mochi"),
    # OneTrainer (resources/sd_model_spec), ai-toolkit, SimpleTuner; and the Hub.
    (r"cogview-?4(/.*)?|(THUDM|zai-org)/CogView4-6B\S*", "cogview4"),
    (r"pixart(-alpha)?(/.*)?|PixArt-alpha/PixArt-XL-2-1024\S*", "pixart_alpha"),
    (r"pixart[-_]sigma(-600m-[^/]*)?(/.*)?|PixArt-alpha/(PixArt-Sigma\S*|pixart_sigma\S*)", "pixart_sigma"),
    (r"pixart_sigma-900m-[^/]*(/.*)?|(terminusresearch|ptx0)/pixart-900m\S*", "pixart_900m"),
    # Of 256 and 512 pixels: the modules are those of Σ.
    *((r"PixArt-alpha/PixArt-XL-2-(256|512)\S*", either) for either in ("pixart_alpha", "pixart_sigma")),
    *((r"sana(/.*)?", f"sana_{size}") for size in ("600m", "1600m", "1_5_1600m", "1_5_4800m")),
    *((rf"sana-sana1\.0-{said}-\d+(/.*)?", f"sana_{size}") for said, size in (("600m", "600m"), (r"1\.6b", "1600m"))),
    *(
        (rf"sana-sana1\.5-{said}-\d+(/.*)?", f"sana_1_5_{size}")
        for said, size in ((r"1\.6b", "1600m"), (r"4\.8b", "4800m"))
    ),
    *((rf"Efficient-Large-Model/Sana_{size}_\S*", f"sana_{size}") for size in ("600m", "1600m")),
    *(
        (rf"Efficient-Large-Model/SANA1\.5_{said}_\S*", f"sana_1_5_{size}")
        for said, size in ((r"1\.6B", "1600m"), (r"4\.8B", "4800m"))
    ),
    (r"ltxvideo2-dev(-fp\d)?(/.*)?", "ltx_2"),
    (r"ltx2\.[35]", "ltx_2_3"),
)
"""As whole words; one of several architectures where a name has more than one row."""


def named(value: str) -> list[str]:
    """The built-in architectures that a file means by `value`; none where it is no known name."""
    return [architecture for pattern, architecture in _NAMES if re.fullmatch(pattern, value, re.IGNORECASE)]


def in_file(metadata: Mapping[str, str], config: Mapping[str, Any] | None = None) -> frozenset[str]:
    """The built-in architectures that a header names, or a config beside the file."""
    return frozenset(name for value in values(metadata, config) for name in named(value))


def values(metadata: Mapping[str, str], config: Mapping[str, Any] | None = None) -> list[str]:
    """What a header, or a config beside the file, calls the base."""
    said = [metadata.get(field, "") for field in FIELDS]
    base = (config or {}).get(IN_CONFIG)
    return [value for value in (*said, base) if isinstance(value, str)]
