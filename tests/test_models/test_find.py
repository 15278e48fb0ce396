# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which networks are found in pipelines, models and wrappers."""

import ast
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_unet
from tiny_transformers import TRANSFORMERS
from torch import nn

import mmagic_tome.models
from mmagic_tome import ToMeError
from mmagic_tome.models import find_adapter, find_controlnets, find_denoisers
from mmagic_tome.models.diffusers_unet import DiffusersUNet
from mmagic_tome.models.find import DENOISERS
from mmagic_tome.models.wan import Wan

WAN = TRANSFORMERS["Wan 2.1, 2.2 (video)"]


def fake(name):
    """A module whose class has that name."""
    return type(name, (nn.Module,), {})()


def named(found):
    return {one.name: one.network for one in found}


@pytest.fixture(autouse=True)
def no_warnings():
    """Every warning of these tests is expected by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_both_experts_of_wan():
    first, second = WAN.build(), WAN.build(seed=1)
    pipeline = SimpleNamespace(transformer=first, transformer_2=second)
    found = find_denoisers(pipeline)
    assert named(found) == {"transformer": first, "transformer_2": second}
    assert all(type(one.adapter) is Wan for one in found)
    assert find_adapter(pipeline)[1] is first


@pytest.mark.parametrize("missing", ["transformer", "transformer_2"])
def test_an_expert_that_is_none(missing):
    network = WAN.build()
    pipeline = SimpleNamespace(transformer=network, transformer_2=network)
    setattr(pipeline, missing, None)
    assert named(find_denoisers(pipeline)) == {"": network}
    assert find_adapter(pipeline)[1] is network


def test_one_network_under_two_names_is_found_once():
    network = WAN.build()
    pipeline = SimpleNamespace(transformer=network, transformer_2=network)
    assert named(find_denoisers(pipeline)) == {"": network}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("PriorTransformer", "an embedding and a text"), ("Other", "no adapter is written")],
)
def test_a_denoiser_without_an_adapter_is_left_with_a_warning(name, reason):
    unet = tiny_unet()
    pipeline = SimpleNamespace(unet=unet, prior_prior=fake(name), vae=nn.Linear(1, 1))
    with pytest.warns(UserWarning, match=rf"'prior_prior' \({name}\).* stays as it is.*{reason}"):
        found = find_denoisers(pipeline)
    assert named(found) == {"": unet}
    assert named(find_denoisers(pipeline, warn=False)) == {"": unet}
    assert find_adapter(pipeline)[1] is unet


def test_only_some():
    first, second = WAN.build(), WAN.build(seed=1)
    pipeline = SimpleNamespace(transformer=first, transformer_2=second, prior=fake("Other"))
    assert named(find_denoisers(pipeline, only=["transformer_2"])) == {"": second}
    assert named(find_denoisers(pipeline, only="transformer")) == {"": first}
    both = find_denoisers(pipeline, only=["transformer_2", "transformer"])
    assert [one.name for one in both] == ["transformer", "transformer_2"]
    with pytest.raises(ToMeError, match=r"'unet' selects no .*It has: transformer, transformer_2"):
        find_denoisers(pipeline, only=["transformer", "unet"])
    with pytest.raises(ToMeError, match="an empty list selects no denoiser"):
        find_denoisers(pipeline, only=[])
    with pytest.raises(ToMeError, match=r"'prior' cannot be selected\. Other: no adapter"):
        find_denoisers(pipeline, only=["prior"])
    with pytest.raises(ToMeError, match="a single network without a name"):
        find_denoisers(first, only=["transformer"])
    assert named(find_denoisers(SimpleNamespace(unet=first), only=["unet"])) == {"": first}


def test_wrappers():
    unet = tiny_unet()
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module.unet = nn.Module()
    wrapped.module.unet.model = unet
    assert named(find_denoisers(wrapped)) == {"": unet}
    assert named(find_denoisers(unet)) == {"": unet}


def test_nothing_is_found():
    for model in (nn.Linear(1, 1), None, SimpleNamespace(transformer=fake("PriorTransformer"))):
        for find in (find_adapter, find_denoisers):
            with pytest.raises(ToMeError, match="found no supported network in a"):
                find(model)
    with pytest.raises(ToMeError, match=r"tried: SimpleNamespace, PriorTransformer.*embedding"):
        find_denoisers(model)


def test_lists_of_levels_are_no_unet():
    """Stable Cascade's levels are lists, which are never called as modules."""
    network = fake("StableCascadeUNet")
    network.down_blocks = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)])])
    network.up_blocks = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)])])
    with pytest.raises(ToMeError, match="StableCascadeUNet: its blocks are not diffusers'"):
        find_denoisers(SimpleNamespace(prior_prior=network, decoder=network))


def test_names_are_those_of_diffusers_pipelines():
    import diffusers

    folder = Path(diffusers.__file__).parent / "pipelines"
    code = "".join(file.read_text(encoding="utf-8") for file in folder.rglob("pipeline_*.py"))
    for name in set(DENOISERS) - {"unet_2"}:
        assert f"{name}={name}," in code, name


# --- ControlNets ----------------------------------------------------------------------------------


def controlnet(unet):
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))


def test_controlnets_are_no_denoisers():
    from diffusers.models.controlnets import MultiControlNetModel

    unet = tiny_unet()
    one, two = controlnet(unet), controlnet(unet)
    assert find_controlnets(SimpleNamespace(unet=unet)) == []
    assert find_controlnets(SimpleNamespace(unet=unet, controlnet=None)) == []
    assert find_controlnets(unet) == []
    pipeline = SimpleNamespace(unet=unet, controlnet=one)
    assert named(find_controlnets(pipeline)) == {"controlnet": one}
    assert named(find_denoisers(pipeline)) == {"": unet}
    assert named(find_denoisers(one)) == {"": one}
    pipeline.controlnet = MultiControlNetModel([one, two])
    found = find_controlnets(pipeline)
    assert named(found) == {"controlnet.nets.0": one, "controlnet.nets.1": two}
    assert all(type(item.adapter) is DiffusersUNet for item in found)
    assert named(find_denoisers(pipeline)) == {"": unet}
    outer = nn.Module()
    outer.module = nn.Module()
    outer.module.controlnet = one
    assert named(find_controlnets(outer)) == {"controlnet": one}


def test_a_controlnet_without_an_adapter_is_an_error():
    pipeline = SimpleNamespace(unet=tiny_unet(), controlnet=fake("FluxControlNetModel"))
    with pytest.raises(ToMeError, match="merges the network that it controls"):
        find_controlnets(pipeline)
    assert len(find_denoisers(pipeline)) == 1


# --- size of adapters -----------------------------------------------------------------------------


def test_adapters_stay_small():
    for file in Path(mmagic_tome.models.__file__).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, file.name
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name not in ("Block", "ModelAdapter"):
                assert node.end_lineno - node.lineno < 60, node.name
