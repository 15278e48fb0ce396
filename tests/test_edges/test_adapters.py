# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""T2I-Adapter, ControlNet, IP-Adapter and LoRA with every named setting."""

import pytest
import tiny_transformers
import torch
from edge_pipelines import SETTINGS, SKIPS, generate, relative, sd15_pipeline, skips
from tiny import tiny_unet
from tiny_pipelines import PIPELINES

from mmagic_tome import apply_cache, apply_tome, get_handle, remove_tome


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("title", ["T2I-Adapter", "IP-Adapter", "inpainting, 9 channels"])
def test_two_images_with_an_adapter(title, setting):
    case = PIPELINES[title]
    if title == "T2I-Adapter":
        pipeline = case.pipeline()
        # As in every Stable Diffusion, the last level has no attention: a plain DownBlock2D.
        pipeline.unet = tiny_unet(
            levels=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    else:
        channels = {"in_channels": 9} if "9 channels" in title else {}
        case, pipeline = sd15_pipeline(title, **channels)
    baseline = generate(case, pipeline)
    handle = apply_cache(pipeline, setting)
    first = generate(case, pipeline)
    assert skips(handle) == SKIPS[setting]
    assert torch.isfinite(first).all()
    assert 0 < relative(first, baseline) < 0.5
    assert torch.equal(generate(case, pipeline), first)
    handle.remove()
    assert torch.equal(generate(case, pipeline), baseline)


@pytest.mark.parametrize("setting", ["balanced", "fast"])
@pytest.mark.parametrize("title", ["ControlNet", "several ControlNets"])
def test_a_controlnet_is_skipped_with_the_network(title, setting):
    case = PIPELINES[title]
    pipeline = case.pipeline()
    ran = []
    nets = getattr(pipeline.controlnet, "nets", [pipeline.controlnet])
    for net in nets:
        net.conv_in.register_forward_hook(lambda *call: ran.append(1))
    baseline = generate(case, pipeline)
    ran.clear()
    handle = apply_cache(pipeline, setting)
    image = generate(case, pipeline)
    skipped = SKIPS[setting]["network"]
    assert len(ran) == len(nets) * (20 - skipped)
    assert skips(handle)["network"] == skipped
    assert sum("controlnet" in region for region in skips(handle)) == len(nets)
    assert relative(image, baseline) < 0.5
    ran.clear()
    handle.remove()
    handle = apply_cache(pipeline, setting, controlnet=False)
    generate(case, pipeline)
    assert len(ran) == len(nets) * 20
    assert not any("controlnet" in region for region in skips(handle))


@pytest.fixture
def lora(tmp_path):
    """A LoRA for the attention of the UNet, as a file in diffusers' layout."""
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    _, pipeline = sd15_pipeline()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(7)
    pipeline.unet.add_adapter(config)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    return tmp_path


@pytest.mark.parametrize("setting", SETTINGS)
def test_lora_after_applying(lora, setting):
    case, plain = sd15_pipeline()
    plain.load_lora_weights(lora)
    wanted = apply_cache(plain, setting) and generate(case, plain)

    case, pipeline = sd15_pipeline()
    baseline = generate(case, pipeline)
    handle = apply_cache(pipeline, setting)
    without = generate(case, pipeline)
    pipeline.load_lora_weights(lora)
    assert torch.equal(generate(case, pipeline), wanted)
    pipeline.fuse_lora()
    assert relative(generate(case, pipeline), wanted) < 1e-3
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    handle.reset_stats()
    assert relative(generate(case, pipeline), without) < 1e-3  # unfusing rounds
    assert skips(handle) == SKIPS[setting]
    handle.remove()
    assert relative(generate(case, pipeline), baseline) < 1e-3


@pytest.mark.parametrize("targets", [["mlp"], ["attn", "mlp"]])
@pytest.mark.parametrize("name", ["Flux.1", "Kandinsky"])
def test_lora_on_a_hooked_linear(name, targets):
    peft = pytest.importorskip("peft")
    from diffusers.utils import recurse_remove_peft_layers

    if name == "Kandinsky":
        case = PIPELINES["Kandinsky 2.2"]
        pipeline = case.pipeline()
        network, names, targets = pipeline.unet, ["to_q", "to_k", "to_v"], ["attn"]

        def call():
            return case.run(pipeline)

    else:
        case = tiny_transformers.TRANSFORMERS["Flux.1"]
        network, names = case.build(), ["proj_mlp"]

        def call():
            with torch.no_grad():
                return network(**case.inputs()).sample

    baseline = call()
    handle = apply_tome(network, ratio=0.5, targets=targets)
    merged = call()
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    torch.manual_seed(7)
    network.add_adapter(config)
    with_lora = call()
    assert relative(with_lora, merged) > 1e-4
    assert all(row["kept"] < row["tokens"] for row in handle.stats())
    with handle.disabled():
        unmerged = call()
    # Loaded before applying it is the same.
    handle.remove()
    assert torch.equal(call(), unmerged)
    handle = apply_tome(network, ratio=0.5, targets=targets)
    assert torch.equal(call(), with_lora)
    recurse_remove_peft_layers(network)  # what unload_lora_weights() does
    assert torch.equal(call(), merged)
    assert all(row["kept"] < row["tokens"] for row in handle.stats())
    assert remove_tome(network)
    assert get_handle(network) is None
    assert torch.equal(call(), baseline)
