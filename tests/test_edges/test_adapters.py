# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""T2I-Adapter, ControlNet, IP-Adapter and LoRA with named settings."""

import itertools

import pytest
import torch
from edge_pipelines import SETTINGS, SKIPS, generate, relative, sd15_pipeline, skips
from fixed_steps import FIXED
from tiny import tiny_unet
from tiny_pipelines import PIPELINES
from tiny_transformers import TRANSFORMERS

from mmagic_tome import apply_cache, apply_tome, get_handle, remove_tome


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("title", ["T2I-Adapter", "IP-Adapter", "inpainting, 9 channels"])
def test_two_images_with_an_adapter(title, setting):
    if title == "T2I-Adapter":
        case = PIPELINES[title]
        pipeline = case.pipeline()
        # As in every Stable Diffusion, the last level has no attention: a plain DownBlock2D.
        pipeline.unet = tiny_unet(
            levels=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    else:
        case, pipeline = sd15_pipeline(title, **({"in_channels": 9} if "9" in title else {}))
    baseline = generate(case, pipeline)
    handle = apply_cache(pipeline, FIXED[setting])
    first = generate(case, pipeline)
    assert skips(handle) == SKIPS[setting]
    assert 0 < relative(first, baseline) < 0.5
    assert torch.equal(generate(case, pipeline), first)
    handle.remove()
    assert torch.equal(generate(case, pipeline), baseline)


@pytest.mark.parametrize("title", ["ControlNet", "several ControlNets"])
def test_a_controlnet_is_skipped_with_the_network(title):
    case = PIPELINES[title]
    pipeline = case.pipeline()
    nets, ran = getattr(pipeline.controlnet, "nets", [pipeline.controlnet]), []
    for net in nets:
        net.conv_in.register_forward_hook(lambda *call: ran.append(1))
    baseline = generate(case, pipeline)
    for along, setting in itertools.product((True, False), (FIXED["most"], dict(tolerance=0.5))):
        with apply_cache(pipeline, setting, controlnet=along) as handle:
            ran.clear()
            image = generate(case, pipeline)
            steps = handle.steps or []
        skipped = steps.count("network") or 9
        assert skips(handle)["network"] == skipped >= 3
        assert len(ran) == len(nets) * (20 - skipped * along)
        assert sum("controlnet" in region for region in skips(handle)) == len(nets) * along
        assert relative(image, baseline) < 0.5


@pytest.mark.parametrize("title", ["Flux.1", "Kandinsky 2.2"])
def test_lora_on_a_hooked_linear(title):
    peft = pytest.importorskip("peft")
    from diffusers.utils import recurse_remove_peft_layers

    if title == "Flux.1":
        case, names, targets = TRANSFORMERS[title], ["proj_mlp"], ["attn", "mlp"]
        network = case.build()
        call = torch.no_grad()(lambda: network(**case.inputs()).sample)
    else:
        case, names, targets = PIPELINES[title], ["to_q", "to_k", "to_v"], ["attn"]
        pipeline = case.pipeline()
        network = pipeline.unet
        call = lambda: case.run(pipeline)  # noqa: E731
    baseline = call()
    handle = apply_tome(network, ratio=0.5, targets=targets)
    merged = call()
    torch.manual_seed(7)
    network.add_adapter(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    with_lora = call()
    assert relative(with_lora, merged) > 1e-4
    assert all(row["kept"] < row["tokens"] for row in handle.stats())
    # Loaded before applying it is the same.
    handle.remove()
    handle = apply_tome(network, ratio=0.5, targets=targets)
    assert torch.equal(call(), with_lora)
    recurse_remove_peft_layers(network)  # what unload_lora_weights() does
    assert torch.equal(call(), merged)
    assert remove_tome(network) and get_handle(network) is None
    assert torch.equal(call(), baseline)
