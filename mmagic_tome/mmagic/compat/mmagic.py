# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Patches of the classes of MMagic 1.2.0, its last version."""

import inspect

from .base import patch_of, replace_method


@patch_of("mmagic.models.diffusion_schedulers", lasting=True)
def mmagic_scheduler_copies():
    """copies and EMA of a MMagic model: "RecursionError: maximum recursion depth exceeded".

    Its wrapper of diffusers' schedulers looks up every name it lacks in ``self.scheduler``,
    also that one, which a copy lacks at first. So no model with such a scheduler can be copied.
    """
    yield
    from mmagic.models.diffusion_schedulers import SchedulerWrapper

    @replace_method(SchedulerWrapper, "__getattr__")
    def __getattr__(look_up, self, name):
        if name == "scheduler":
            raise AttributeError(name)
        return look_up(self, name)


@patch_of("mmagic.models", lasting=True)
def mmagic_step_options():
    """test_scheduler unlike scheduler: "step() got an unexpected keyword argument 'eta'".

    MMagic takes the steps of images with ``test_scheduler`` and looks up in ``scheduler``, that of
    the training, which options a step takes. So ``model.test_scheduler.type`` alone could not be
    changed, from DDIM to Euler for one. Now a step gets what both take: FastComposer, which
    inherits this, takes its steps with ``scheduler`` after all.
    """
    yield
    from mmagic.models import AnimateDiff, StableDiffusion, StableDiffusionXL

    for root in (StableDiffusion, StableDiffusionXL, AnimateDiff):

        @replace_method(root, "prepare_extra_step_kwargs")
        def prepare_extra_step_kwargs(original, self, generator, eta):
            taken = inspect.signature(self.test_scheduler.step).parameters
            given = original(self, generator, eta)
            return {name: value for name, value in given.items() if name in taken}


@patch_of("mmagic.models.archs.attention_injection", lasting=True)
def mmagic_attention_injection():
    """attention_injection=True: "'AttentionInjection' object has no attribute 'in_channels'".

    ``ControlStableDiffusion`` asks its UNet for sizes and dtypes, and the wrapper that it puts
    around the UNet for attention injection has none. It passes on what it lacks, as MMagic's other
    wrappers do.
    """
    yield
    from mmagic.models.archs.attention_injection import AttentionInjection

    @replace_method(AttentionInjection, "__getattr__")
    def __getattr__(look_up, self, name):
        try:
            return look_up(self, name)
        except AttributeError:
            if name == "unet":  # not there yet: its own __init__, or a copy in the making
                raise
            return getattr(self.unet, name)


@patch_of("mmagic.apis.inferencers.base_mmagic_inferencer", lasting=True)
def mmagic_inferencer_without_test_data():
    """inferencers of DreamBooth and others: "argument of type 'NoneType' is not iterable".

    MMagic's own configs for models that are trained without a test say ``test_dataloader = None``,
    and its inferencers look for a pipeline in that.
    """
    yield
    from mmagic.apis.inferencers.base_mmagic_inferencer import BaseMMagicInferencer

    @replace_method(BaseMMagicInferencer, "_init_pipeline")
    def _init_pipeline(original, self, cfg):
        return None if cfg.get("test_dataloader") is None else original(self, cfg)


@patch_of("mmagic.models.archs.tokenizer", lasting=True)
def mmagic_placeholder_tokens():
    """transformers >= 5: a placeholder of several vectors is decoded as "name_0name_1".

    MMagic's tokenizer turns them back into the placeholder's name where spaces are between them,
    and transformers 5 puts none there.
    """
    yield
    from mmagic.models.archs.tokenizer import TokenizerWrapper

    @replace_method(TokenizerWrapper, "replace_text_with_placeholder_tokens")
    def replace_text_with_placeholder_tokens(original, self, text):
        text = original(self, text)
        if isinstance(text, str):  # of a list, each text was one of these calls
            for placeholder, tokens in self.token_map.items():
                text = text.replace("".join(tokens), placeholder)
        return text
