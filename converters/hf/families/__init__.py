# SPDX-License-Identifier: MIT
"""The families that are converted, by the class names in config.json. A new one is a module and a line here."""

from __future__ import annotations

import gguf

from edgemoe.errors import ConversionError

from ..family import Family, Hparams
from .afmoe import AFMOE
from .deepseek import DEEPSEEK_MOE, DEEPSEEK_V2, DEEPSEEK_V3
from .ernie import ERNIE_4_5_MOE
from .glm import GLM_4_MOE
from .gpt_oss import GPT_OSS
from .granite import GRANITE_MOE
from .lfm2 import LFM2_MOE
from .mixtral import MIXTRAL
from .olmoe import OLMOE
from .phi import PHI_3_5_MOE
from .qwen import QWEN2_MOE, QWEN3_MOE

FAMILIES: tuple[Family, ...] = (
    AFMOE,
    DEEPSEEK_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    ERNIE_4_5_MOE,
    GLM_4_MOE,
    GPT_OSS,
    GRANITE_MOE,
    LFM2_MOE,
    MIXTRAL,
    OLMOE,
    PHI_3_5_MOE,
    QWEN2_MOE,
    QWEN3_MOE,
)

WITHOUT_ARCHITECTURE = {
    "MobileMoEForCausalLM": "MobileMoE",
    "MobileMoeForCausalLM": "MobileMoE",
}
"""Families that people ask for and that llama.cpp (as vendored by llama-cpp-python 0.3.36) has no graph for."""


def find_family(hparams: Hparams) -> Family:
    """The family of a checkpoint.

    Raises:
        ConversionError: it is of none, or llama.cpp has no architecture for it, or configures it differently.
    """
    names = hparams.need("architectures")
    name = str(names[0] if isinstance(names, list) and names else names)
    for family in FAMILIES:
        if name in family.architectures:
            family.check(hparams)
            return family
    if name in WITHOUT_ARCHITECTURE or str(hparams.get("model_type")).lower() == "mobilemoe":
        family_name = WITHOUT_ARCHITECTURE.get(name, "MobileMoE")
        raise ConversionError(
            f"cannot convert a {family_name} checkpoint: llama.cpp has no architecture for it among its "
            f"{len(gguf.MODEL_ARCH_NAMES)} (no graph in src/models/), so no GGUF of it can be run ({hparams.path}); "
            "wait for llama.cpp to gain one"
        )
    known = ", ".join(family.name for family in FAMILIES)
    raise ConversionError(
        f"cannot convert the checkpoint: its class is {name}, expected one of the families {known} ({hparams.path}); "
        "for others, use llama.cpp's convert_hf_to_gguf.py"
    )
