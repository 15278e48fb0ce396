# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which networks are found in pipelines, models and wrappers."""

from types import SimpleNamespace

import pytest
from tiny import tiny_unet
from tiny_transformers import TRANSFORMERS
from tiny_unets import tiny_controlnet
from torch import nn

from mmagic_tome import ToMeError, apply_cache, apply_tome, get_handle, remove_tome
from mmagic_tome.models import find_adapter, find_controlnets, find_denoisers
from mmagic_tome.models.one_stream import Wan

WAN = TRANSFORMERS["Wan 2.1, 2.2 (video)"]


def fake(name):
    """A module whose class has that name."""
    return type(name, (nn.Module,), {})()


def named(found):
    return {one.name: one.network for one in found}


pytestmark = pytest.mark.filterwarnings("error")


def test_both_experts_of_wan():
    first, second = WAN.build(), WAN.build(seed=1)
    pipeline = SimpleNamespace(transformer=first, transformer_2=second)
    assert named(find_denoisers(pipeline)) == {"transformer": first, "transformer_2": second}
    assert all(type(one.adapter) is Wan for one in find_denoisers(pipeline))
    assert find_adapter(pipeline)[1] is first
    for alone in (dict(transformer=first, transformer_2=None), dict(transformer_2=first)):
        assert named(find_denoisers(SimpleNamespace(**alone))) == {"": first}
        assert find_adapter(SimpleNamespace(**alone))[1] is first
    pipeline.transformer_2 = first  # one network under two names
    assert named(find_denoisers(pipeline)) == {"": first}


def test_a_denoiser_without_an_adapter_is_unchanged_with_a_warning():
    unet = tiny_unet()
    pipeline = SimpleNamespace(unet=unet, prior_prior=fake("Other"), vae=nn.Linear(1, 1))
    with pytest.warns(UserWarning, match="'prior_prior' .* stays as it is. Other: no adapter is"):
        found = find_denoisers(pipeline)
    assert named(found) == named(find_denoisers(pipeline, warn=False)) == {"": unet}
    assert find_adapter(pipeline)[1] is unet


def test_only_some():
    first, second = WAN.build(), WAN.build(seed=1)
    pipeline = SimpleNamespace(transformer=first, transformer_2=second, prior=fake("Other"))
    assert named(find_denoisers(pipeline, only="transformer")) == {"": first}
    both = find_denoisers(pipeline, only=["transformer_2", "transformer"])
    assert [one.name for one in both] == ["transformer", "transformer_2"]
    assert named(find_denoisers(SimpleNamespace(unet=first), only=["unet"])) == {"": first}
    for model, only, message in (
        (pipeline, ["transformer", "unet"], "'unet' selects no .*It has: transformer, transf"),
        (pipeline, [], "an empty list selects no denoiser"),
        (pipeline, ["prior"], r"'prior' cannot be selected\. Other: no adapter"),
        (first, ["transformer"], "a single network without a name"),
    ):
        with pytest.raises(ToMeError, match=message):
            find_denoisers(model, only=only)


def test_nothing_is_found():
    cascade = fake("StableCascadeUNet")  # its levels are lists, which are never called as modules
    for name in ("down_blocks", "up_blocks"):
        setattr(cascade, name, nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)])]))
    for model, tried in (
        (nn.Linear(1, 1), "Linear"),
        (None, r"\)\. Supported"),
        (SimpleNamespace(transformer=fake("PriorTransformer")), "PriorTransformer.*no adapter"),
        (SimpleNamespace(prior_prior=cascade), "SimpleNamespace, StableCascadeUNet"),
        (fake("SanaTransformer2DModel"), "Sana.*no adapter is written for this transformer"),
        (fake("FluxControlNetModel"), "FluxC.*merges the network that it controls"),
        (fake("MultiControlNetModel"), "Multi.*call apply_tome with each of its .nets.*up_blocks"),
    ):
        for find in (find_adapter, find_denoisers, apply_tome, apply_cache):
            with pytest.raises(ToMeError, match=f"found no supported network in a.*{tried}") as e:
                find(model)
            assert "FluxTransformer2DModel" in str(e.value)
            assert "docs/howto/add_a_model.md" in str(e.value)
        assert get_handle(model) is None and not remove_tome(model)


def test_controlnets_are_no_denoisers():
    from diffusers.models.controlnets import MultiControlNetModel

    unet, one, two = tiny_unet(), tiny_controlnet(), tiny_controlnet()
    for model in (unet, SimpleNamespace(unet=unet), SimpleNamespace(unet=unet, controlnet=None)):
        assert find_controlnets(model) == []
    pipeline = SimpleNamespace(unet=unet, controlnet=one)
    assert named(find_controlnets(pipeline)) == {"controlnet": one}
    assert named(find_denoisers(pipeline)) == {"": unet}
    assert named(find_denoisers(one)) == {"": one}
    wrapped = nn.DataParallel(nn.Module())
    wrapped.module.controlnet = one
    assert named(find_controlnets(wrapped)) == {"controlnet": one}
    pipeline.controlnet = MultiControlNetModel([one, two])
    names = {"controlnet.nets.0": one, "controlnet.nets.1": two}
    assert named(find_controlnets(pipeline)) == names
    assert named(find_denoisers(pipeline)) == {"": unet}


def test_a_controlnet_without_an_adapter_is_an_error():
    pipeline = SimpleNamespace(unet=tiny_unet(), controlnet=fake("FluxControlNetModel"))
    with pytest.raises(ToMeError, match="merges the network that it controls"):
        find_controlnets(pipeline)
    assert find_controlnets(pipeline, known=True) == []
    assert len(find_denoisers(pipeline)) == 1
