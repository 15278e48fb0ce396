# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The repairs, one function each.

A repair is a generator around the import of one module, like a function for
:func:`contextlib.contextmanager`: what is before ``yield`` runs before the code of that module,
what is after it runs after. A repair that returns without ``yield`` found no symptom and touched
nothing. The first paragraph of its docstring is the symptom as
:func:`mmagic_tome.mmagic.compat.report` prints it.

=============  ==========================================================
libraries.py   of libraries that MMagic imports
mmagic.py      of MMagic's own classes
base.py        what a repair is, and what several of them need
=============  ==========================================================
"""

from .base import REPAIRS, is_installed, repairs
from .libraries import (
    albumentations_missing,
    controlnet_aux_missing,
    diffusers_broken_names,
    diffusers_paint_by_example,
    diffusers_unet_module,
    mediapipe_solutions,
    mmcv_compiled_operators,
    mmengine_pkg_resources,
    mmengine_resume,
    numpy_bool8,
    torchvision_operators,
    transformers_feature_extractor,
    transformers_text_model,
)
from .mmagic import (
    mmagic_attention_bank,
    mmagic_attention_injection,
    mmagic_inferencer_without_test_data,
    mmagic_placeholder_tokens,
    mmagic_scheduler_copies,
    mmagic_step_options,
    mmagic_step_options_animatediff,
    mmagic_step_options_xl,
)

__all__ = [
    "REPAIRS",
    "albumentations_missing",
    "controlnet_aux_missing",
    "diffusers_broken_names",
    "diffusers_paint_by_example",
    "diffusers_unet_module",
    "is_installed",
    "mediapipe_solutions",
    "mmagic_attention_bank",
    "mmagic_attention_injection",
    "mmagic_inferencer_without_test_data",
    "mmagic_placeholder_tokens",
    "mmagic_scheduler_copies",
    "mmagic_step_options",
    "mmagic_step_options_animatediff",
    "mmagic_step_options_xl",
    "mmcv_compiled_operators",
    "mmengine_pkg_resources",
    "mmengine_resume",
    "numpy_bool8",
    "repairs",
    "torchvision_operators",
    "transformers_feature_extractor",
    "transformers_text_model",
]
