# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Patches of MMagic's own classes."""

import functools
import inspect
import sys
import types

from .base import patch_of


@patch_of("mmagic.models.diffusion_schedulers", lasting=True)
def mmagic_scheduler_copies():
    """copies and EMA of a MMagic model: "RecursionError: maximum recursion depth exceeded".

    Its wrapper of diffusers' schedulers looks up every name it lacks in ``self.scheduler``,
    also that one, which a copy lacks at first. So no model with such a scheduler can be copied.
    """
    yield
    wrapper = sys.modules["mmagic.models.diffusion_schedulers"].SchedulerWrapper
    look_up = wrapper.__getattr__
    try:
        hasattr(wrapper.__new__(wrapper), "scheduler")
        return
    except RecursionError:
        pass

    @functools.wraps(look_up)
    def __getattr__(self, name):
        if name == "scheduler":
            raise AttributeError(name)
        return look_up(self, name)

    wrapper.__getattr__ = __getattr__


_EDITORS = "mmagic.models.editors."


@patch_of(_EDITORS + "stable_diffusion.stable_diffusion", lasting=True)
def mmagic_step_options():
    """test_scheduler unlike scheduler: "step() got an unexpected keyword argument 'eta'".

    MMagic takes the steps of images with ``test_scheduler`` and look up in ``scheduler``, that of
    the training, which options a step takes. So ``model.test_scheduler.type`` alone could not be
    changed, from DDIM to Euler for one.
    """
    yield
    _ask_the_test_scheduler(sys.modules[_EDITORS + "stable_diffusion.stable_diffusion"])


@patch_of(_EDITORS + "stable_diffusion_xl.stable_diffusion_xl", lasting=True)
def mmagic_step_options_xl():
    """test_scheduler unlike scheduler (SDXL): "step() got an unexpected keyword argument 'eta'"."""
    yield
    _ask_the_test_scheduler(sys.modules[_EDITORS + "stable_diffusion_xl.stable_diffusion_xl"])


@patch_of(_EDITORS + "animatediff.animatediff", lasting=True)
def mmagic_step_options_animatediff():
    """the same in AnimateDiff: "step() got an unexpected keyword argument 'eta'"."""
    yield
    _ask_the_test_scheduler(sys.modules[_EDITORS + "animatediff.animatediff"])


def _ask_the_test_scheduler(module):
    """Patch ``prepare_extra_step_kwargs`` of a module's classes: what both schedulers take.

    FastComposer, which inherits it, takes its steps with ``scheduler`` after all.
    """
    trained = types.SimpleNamespace(step=lambda sample, eta: sample)
    tested = types.SimpleNamespace(step=lambda sample: sample)
    model = types.SimpleNamespace(scheduler=trained, test_scheduler=tested)
    for owner in vars(module).values():
        if isinstance(owner, type) and owner.__module__ == module.__name__:
            asks = vars(owner).get("prepare_extra_step_kwargs")
            if asks is not None and asks(model, None, 0.0):
                owner.prepare_extra_step_kwargs = _what_both_take(asks)


def _what_both_take(asks):
    @functools.wraps(asks)
    def prepare_extra_step_kwargs(self, generator, eta):
        taken = inspect.signature(self.test_scheduler.step).parameters
        given = asks(self, generator, eta)
        return {name: value for name, value in given.items() if name in taken}

    return prepare_extra_step_kwargs


@patch_of("mmagic.models.archs.attention_injection", lasting=True)
def mmagic_attention_injection():
    """attention_injection=True: "'AttentionInjection' object has no attribute 'in_channels'".

    ``ControlStableDiffusion`` asks its UNet for sizes and dtypes, and the wrapper that it puts
    around the UNet for attention injection has none. It passes on what it lacks, as MMagic's other
    wrappers do.
    """
    yield
    wrapper = sys.modules["mmagic.models.archs.attention_injection"].AttentionInjection
    if "__getattr__" in vars(wrapper):
        return

    def __getattr__(self, name):
        try:
            return super(wrapper, self).__getattr__(name)
        except AttributeError:
            if name == "unet":  # not there yet: its own __init__, or a copy in the making
                raise
            return getattr(self.unet, name)

    wrapper.__getattr__ = __getattr__


@patch_of("mmagic.models.archs.attention_injection", lasting=True)
def mmagic_attention_bank():
    """attention_injection=True after a failed call: "Sizes of tensors must match", wrong images.

    Its blocks keep the reference's tokens from the first of two passes to the second. An exception
    in between (out of memory, a stop button) left them there, and the next image read them as
    well. They are forgotten when a call fails.
    """
    yield
    wrapper = sys.modules["mmagic.models.archs.attention_injection"].AttentionInjection
    forward = wrapper.forward
    if hasattr(forward, "forgets_the_reference"):
        return

    @functools.wraps(forward)
    def forgetting(self, *args, **kwargs):
        try:
            return forward(self, *args, **kwargs)
        except BaseException:
            for module in self.unet.modules():
                if "bank" in vars(module):
                    module.bank = []
            raise

    forgetting.forgets_the_reference = True
    wrapper.forward = forgetting


@patch_of("mmagic.apis.inferencers.base_mmagic_inferencer", lasting=True)
def mmagic_inferencer_without_test_data():
    """inferencers of DreamBooth and others: "argument of type 'NoneType' is not iterable".

    MMagic's own configs for models that are trained without a test say ``test_dataloader = None``,
    and its inferencers look for a pipeline in that.
    """
    yield
    from mmengine import Config

    module = sys.modules["mmagic.apis.inferencers.base_mmagic_inferencer"]
    inferencer = module.BaseMMagicInferencer
    init = inferencer._init_pipeline
    try:
        init(None, Config(dict(test_dataloader=None)))
        return
    except TypeError:
        pass

    @functools.wraps(init)
    def _init_pipeline(self, cfg):
        return None if cfg.get("test_dataloader") is None else init(self, cfg)

    inferencer._init_pipeline = _init_pipeline


@patch_of("mmagic.models.archs.tokenizer", lasting=True)
def mmagic_placeholder_tokens():
    """transformers >= 5: a placeholder of several vectors is decoded as "name_0name_1".

    MMagic's tokenizer turns them back into the placeholder's name where spaces are between them,
    and transformers 5 puts none there.
    """
    yield
    wrapper = sys.modules["mmagic.models.archs.tokenizer"].TokenizerWrapper
    replace = wrapper.replace_text_with_placeholder_tokens
    tokenizer = types.SimpleNamespace(token_map={"name": ["name_0", "name_1"]})
    if replace(tokenizer, "name_0name_1") == "name":
        return

    @functools.wraps(replace)
    def replace_text_with_placeholder_tokens(self, text):
        text = replace(self, text)
        if isinstance(text, str):  # of a list, each text was one of these calls
            for placeholder, tokens in self.token_map.items():
                text = text.replace("".join(tokens), placeholder)
        return text

    wrapper.replace_text_with_placeholder_tokens = replace_text_with_placeholder_tokens
