# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Diffusers' own pipelines around UNets, and what users switch on in them."""

import importlib.util

import pytest
import torch
from tiny_pipelines import (
    FRAMES,
    NETWORKS,
    PIPELINES,
    controlnet_inputs,
    kandinsky_inputs,
    kandinsky_unet,
    motion_inputs,
    motion_unet,
    tiny_controlnet,
    video_inputs,
    video_unet,
)

from mmagic_tome import ToMeError, apply_cache, apply_tome, get_handle

SD = PIPELINES["Stable Diffusion 1.x"]


def difference(one, other):
    """Root mean square, in units of the spread of the second."""
    return float((one - other).pow(2).mean().sqrt() / other.std())


@pytest.mark.parametrize("case", PIPELINES.values(), ids=PIPELINES)
def test_every_pipeline(case):
    pipeline = case.pipeline()
    baseline = case.run(pipeline)
    assert baseline.std() > 0.05
    with apply_tome(pipeline, ratio=0.5, **case.options) as handle:
        assert handle.network is pipeline.unet
        hooks, given = [], []
        for row in handle.stats():  # what the layers inside are really given
            block = pipeline.unet.get_submodule(row["block"])
            layer = getattr(block, "attn1", block).to_q
            note = layer.register_forward_hook(lambda module, x, y: given.append(x[0].shape[1]))
            hooks.append(note)
        merged = case.run(pipeline)
        for hook in hooks:
            hook.remove()
        assert given == [case.tokens // 2] * len(hooks) * case.calls
        seen = {(row["tokens"], row["kept"], row["calls"]) for row in handle.stats()}
        assert seen == {(case.tokens, case.tokens // 2, case.calls)}
        assert 1e-3 < difference(merged, baseline) < 0.8
        assert torch.equal(case.run(pipeline), merged)
        handle.ratio = 0
        assert torch.equal(case.run(pipeline), baseline)
    assert torch.equal(case.run(pipeline), baseline)


@pytest.mark.parametrize(
    "case", [case for case in PIPELINES.values() if case.calls > 1], ids=lambda case: case.title
)
def test_step_caching_in_every_pipeline(case):
    """Both techniques, each alone and together, put on and taken off in either order."""
    pipeline, networks = case.pipeline(), 1
    steps = 12 if case.title == "SDXL refiner" else 5  # which runs the last 40 per cent of them
    baseline = case.run(pipeline, num_inference_steps=steps)
    branch = getattr(pipeline, "controlnet", None)
    networks += 0 if branch is None else len(getattr(branch, "nets", [branch]))
    with apply_cache(pipeline, order=0, timestep_range=(0, 1)) as handle:
        assert handle.network is pipeline.unet and len(handle.stats()) == networks
        cached = case.run(pipeline, num_inference_steps=steps)
        # Every second step, but never the last.
        assert {(row["computed"], row["skipped"]) for row in handle.stats()} == {(3, 2)}
        assert 1e-3 < difference(cached, baseline) < 1.5
        assert torch.equal(case.run(pipeline, num_inference_steps=steps), cached)
        with apply_tome(pipeline, ratio=0.5, **case.options) as merging:
            both = case.run(pipeline, num_inference_steps=steps)
            assert {row["calls"] for row in merging.stats()} == {3}
        assert torch.equal(case.run(pipeline, num_inference_steps=steps), cached)
        assert not torch.equal(both, cached)
        with handle.disabled():
            assert torch.equal(case.run(pipeline, num_inference_steps=steps), baseline)
    assert torch.equal(case.run(pipeline, num_inference_steps=steps), baseline)
    with (
        apply_tome(pipeline, ratio=0.5, **case.options),
        apply_cache(pipeline, order=0, timestep_range=(0, 1)),
    ):
        assert torch.equal(case.run(pipeline, num_inference_steps=steps), both)


@pytest.mark.parametrize("kind", NETWORKS.values(), ids=NETWORKS)
def test_every_network(kind):
    network, inputs = kind.build(), kind.inputs()

    @torch.no_grad()
    def run():
        out = network(**inputs, return_dict=False)[0]
        return out[-1] if isinstance(out, list) else out  # a ControlNet's levels

    baseline = run()
    with apply_tome(network, ratio=0.5) as handle:
        assert 1e-3 < difference(run(), baseline) < 0.8
        assert all(row["kept"] == row["tokens"] // 2 for row in handle.stats())
        handle.ratio = 0
        assert torch.equal(run(), baseline)
    assert torch.equal(run(), baseline)


def test_frames_of_stable_video_diffusion_are_merged_one_by_one():
    network = video_unet()
    handle = apply_tome(network, ratio=0.5, targets=["attn", "mlp"])
    for height, width in NETWORKS["Stable Video Diffusion"].grids:
        for batch in (1, 3):
            with torch.no_grad():
                out = network(**video_inputs(batch, (height, width))).sample
            assert out.isfinite().all() and out.shape == (batch, 3, 4, height, width)
            seen = {(row["tokens"], row["kept"]) for row in handle.stats()}
            assert seen == {(height * width, height * width // 2)}
    assert not any("temporal" in row["block"] for row in handle.stats())


@pytest.mark.parametrize("across", [False, True], ids=["frame by frame", "across frames"])
def test_clips_of_animatediff_on_odd_grids(across):
    network = motion_unet()
    handle = apply_tome(network, ratio=0.5, targets=["attn", "mlp"], across_frames=across)
    for height, width in NETWORKS["AnimateDiff, frame by frame or across frames"].grids:
        for clips in (1, 3):
            with torch.no_grad():
                out = network(**motion_inputs(clips, (height, width))).sample
            assert out.isfinite().all() and out.shape == (clips, 4, FRAMES, height, width)
            tokens = height * width * (FRAMES if across else 1)
            seen = {(row["tokens"], row["kept"]) for row in handle.stats()}
            assert seen == {(tokens, tokens // 2)}
    assert not any("motion" in row["block"] for row in handle.stats())


def test_base_and_refiner_are_merged_apart():
    base, refiner = PIPELINES["SDXL base"], PIPELINES["SDXL refiner"]
    first, second = base.pipeline(), refiner.pipeline()

    def run():
        latents = base.run(first, num_inference_steps=5, denoising_end=0.6)
        return refiner.run(second, image=latents)

    baseline = run()
    with apply_tome(first, ratio=0.25) as one, apply_tome(second, ratio=0.5) as two:
        merged = run()
        for handle, kept, calls in ((one, 48, 3), (two, 32, 2)):
            seen = {(row["kept"], row["calls"]) for row in handle.stats()}
            assert seen == {(kept, calls)}
    assert not torch.equal(merged, baseline) and torch.equal(run(), baseline)


# --- ControlNets ----------------------------------------------------------------------------------


def test_the_controlnet_has_a_switch_of_its_own():
    case = PIPELINES["ControlNet"]
    pipeline = case.pipeline()
    baseline = case.run(pipeline)
    with apply_tome(pipeline.controlnet, ratio=0.5, targets=["attn", "mlp"]) as handle:
        assert get_handle(pipeline) is None
        branch = case.run(pipeline)
        # Three stacks: two down, one in the middle; the finest level has one.
        assert {(row["tokens"], row["kept"]) for row in handle.stats()} == {(64, 32)}
        with apply_tome(pipeline, ratio=0.5):
            both = case.run(pipeline)
        assert torch.equal(case.run(pipeline), branch)
    assert torch.equal(case.run(pipeline), baseline)
    assert 1e-4 < difference(branch, baseline) < 0.8
    assert not torch.equal(both, branch) and not torch.equal(both, baseline)


def test_levels_of_a_controlnet():
    network = tiny_controlnet()
    handle = apply_tome(network, ratio=0.5, max_downsample=8)
    with torch.no_grad():
        network(**controlnet_inputs())
    seen = [(row["downsample"], row["tokens"], row["kept"]) for row in handle.stats()]
    assert seen == [(1, 64, 32), (2, 16, 8), (2, 16, 8)]


def test_several_controlnets_are_merged_one_by_one():
    case = PIPELINES["several ControlNets"]
    pipeline = case.pipeline()
    with pytest.raises(ToMeError, match=r"several ControlNets.*each of its \.nets"):
        apply_tome(pipeline.controlnet)
    baseline = case.run(pipeline)
    handles = [apply_tome(net, ratio=0.5) for net in pipeline.controlnet.nets]
    assert difference(case.run(pipeline), baseline) > 1e-4
    for handle in handles:
        assert {row["kept"] for row in handle.stats()} == {32}
        handle.remove()
    assert torch.equal(case.run(pipeline), baseline)


# --- adapters -------------------------------------------------------------------------------------


def test_ip_adapter_also_where_cross_attention_is_merged():
    case = PIPELINES["IP-Adapter"]
    pipeline = case.pipeline()
    pipeline.set_ip_adapter_scale(0.7)
    baseline = case.run(pipeline)
    apply_tome(pipeline, ratio=0.5, targets=["attn", "crossattn", "mlp"])
    assert 1e-3 < difference(case.run(pipeline), baseline) < 0.8
    masks = [torch.ones(1, 1, 64, 64)]
    with pytest.raises(ToMeError, match=r"ip_adapter_masks.*self-attention only"):
        case.run(pipeline, cross_attention_kwargs=dict(ip_adapter_masks=masks))
    apply_tome(pipeline, ratio=0.5)
    masked = case.run(pipeline, cross_attention_kwargs=dict(ip_adapter_masks=masks))
    torch.testing.assert_close(masked, case.run(pipeline))  # a mask of ones


def test_lora_may_come_go_and_be_fused_while_merging_is_on():
    case = PIPELINES["LoRA"]
    ready = case.pipeline()
    apply_tome(ready, ratio=0.5, targets=["attn", "mlp"])
    expected = case.run(ready)

    pipeline = SD.pipeline()
    handle = apply_tome(pipeline, ratio=0.5, targets=["attn", "mlp"])
    plain = case.run(pipeline)
    case.prepare(pipeline)
    assert torch.equal(case.run(pipeline), expected) and not torch.equal(plain, expected)
    pipeline.fuse_lora(components=["unet"])
    torch.testing.assert_close(case.run(pipeline), expected, rtol=1e-3, atol=1e-4)
    pipeline.unfuse_lora(components=["unet"])
    pipeline.unet.delete_adapters("default")
    torch.testing.assert_close(case.run(pipeline), plain, rtol=1e-3, atol=1e-4)
    assert handle.active and {row["kept"] for row in handle.stats()} == {32}


# --- attention on the image itself --------------------------------------------------------------


@pytest.fixture
def kandinsky():
    return kandinsky_unet()


def test_added_keys_are_not_merged_and_their_neighbours_are(kandinsky):
    handle = apply_tome(kandinsky, ratio=0.25)
    names = ("to_q", "to_k", "to_v", "add_k_proj", "to_out.0")
    seen = {name: [] for name in names}
    for path, module in kandinsky.named_modules():
        for name in names:
            if path.endswith(f".{name}"):
                module.register_forward_hook(lambda m, args, y, n=name: seen[n].append(args[0]))
    with torch.no_grad():
        kandinsky(**kandinsky_inputs())
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        assert [x.shape[1] for x in seen[name]] == [48] * 4, name
    for q, k, v in zip(seen["to_q"], seen["to_k"], seen["to_v"]):
        assert torch.equal(q, k) and torch.equal(q, v)
    assert {x.shape[1] for x in seen["add_k_proj"]} == {32}  # of the prompt's image
    assert [row["calls"] for row in handle.stats()] == [1] * 4


def test_merging_copies_on_the_image_itself_changes_nothing(kandinsky):
    """Four equal places for one, without added keys, weigh the same in attention."""
    from mmagic_tome.models import find_adapter

    adapter, _ = find_adapter(kandinsky)
    attention = adapter.blocks(kandinsky)[0].module
    handle = apply_tome(kandinsky, ratio=0.75, exact_matching=True)
    cells = torch.randn(2, 32, 4, 1, 4, 1).expand(-1, -1, -1, 2, -1, 2).reshape(2, 32, 8, 8)
    text = torch.zeros(2, 0, 16)
    images = []
    kandinsky.down_blocks[1].register_forward_pre_hook(
        lambda *_: images.append(attention(cells, encoder_hidden_states=text))
    )
    with torch.no_grad():
        kandinsky(**kandinsky_inputs())
        handle.remove()
        baseline = attention(cells, encoder_hidden_states=text)
    torch.testing.assert_close(images[0], baseline, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_attention_on_the_image_itself_on_odd_grids(kandinsky, batch):
    handle = apply_tome(kandinsky, ratio=0.6)
    with torch.no_grad():
        for height, width in NETWORKS["Kandinsky 2.2: attention on the image itself"].grids:
            inputs = kandinsky_inputs(batch, (2 * height, 2 * width))
            assert kandinsky(**inputs).sample.isfinite().all()
            tokens = height * width
            seen = {(row["tokens"], row["kept"]) for row in handle.stats()}
            assert seen == {(tokens, tokens - int(0.6 * tokens))}
    kandinsky(**kandinsky_inputs()).sample.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in kandinsky.parameters() if p.grad is not None)


def test_what_attention_on_the_image_itself_does_not_allow(kandinsky):
    for targets in ("block", "stack", ["attn_kv"]):
        with pytest.raises(ToMeError, match=r"cannot be merged at .*targets=\['attn'\]"):
            apply_tome(kandinsky, ratio=0.5, targets=targets)
    with pytest.raises(ToMeError, match="write residual=False"):
        apply_tome(kandinsky, ratio=0.5, plan_interval=2, residual=True)
    apply_tome(kandinsky, ratio=0.5, plan_interval=2)
    mask = torch.ones(2, 10)
    with torch.no_grad(), pytest.raises(ToMeError, match="received an attention_mask"):
        kandinsky(**kandinsky_inputs(), encoder_attention_mask=mask)


# --- attention processors -------------------------------------------------------------------------


class StandInForXformers:
    """What diffusers asks xformers for, computed by torch: xformers itself wants a GPU.

    It stands in for the arithmetic only. What is tested is diffusers' processor around it: the
    shapes and the mask that it is given when tokens are merged.
    """

    def __init__(self):
        self.calls = []
        self.ops = self

    def memory_efficient_attention(self, query, key, value, attn_bias=None, op=None, scale=None):
        self.calls.append((query.shape[1], key.shape[1]))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_bias, scale=scale
        )


def processors():
    from diffusers.models.attention_processor import (
        AttnProcessor,
        AttnProcessor2_0,
        XFormersAttnProcessor,
    )

    return [
        pytest.param(lambda p: p.unet.set_attn_processor(AttnProcessor2_0()), id="SDPA"),
        pytest.param(lambda p: p.unet.set_attn_processor(AttnProcessor()), id="written out"),
        pytest.param(lambda p: p.enable_attention_slicing("max"), id="sliced"),
        pytest.param(lambda p: p.unet.fuse_qkv_projections(), id="fused projections"),
        pytest.param(
            lambda p: p.unet.set_attn_processor(XFormersAttnProcessor()),
            id="xformers' processor with a stand-in for xformers",
        ),
    ]


@pytest.fixture
def stand_in(monkeypatch):
    from diffusers.models import attention_processor

    xformers = StandInForXformers()
    monkeypatch.setattr(attention_processor, "xformers", xformers)
    return xformers


@pytest.mark.parametrize("switch_on", processors())
@pytest.mark.parametrize("first", ["merging", "processor"])
def test_attention_processors(switch_on, first, stand_in):
    pipeline = SD.pipeline()
    baseline = SD.run(pipeline)
    apply_tome(pipeline, ratio=0.5, targets=["attn", "crossattn"])
    expected = SD.run(pipeline)
    if first == "processor":
        get_handle(pipeline).remove()
        switch_on(pipeline)
        apply_tome(pipeline, ratio=0.5, targets=["attn", "crossattn"])
    else:
        switch_on(pipeline)
    torch.testing.assert_close(SD.run(pipeline), expected, rtol=1e-3, atol=1e-4)
    if stand_in.calls:
        # Two steps of half the tokens at the finest level, with themselves and with the text.
        assert {(32, 32), (32, 7)} < set(stand_in.calls)
    get_handle(pipeline).remove()
    torch.testing.assert_close(SD.run(pipeline), baseline, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(
    importlib.util.find_spec("xformers") is None or not torch.cuda.is_available(),
    reason="xformers' attention wants a GPU, and diffusers asks for one before it switches it on",
)
def test_xformers_itself():
    pipeline = SD.pipeline().to("cuda")
    apply_tome(pipeline, ratio=0.5, targets=["attn", "crossattn"])
    expected = SD.run(pipeline)
    pipeline.enable_xformers_memory_efficient_attention()
    torch.testing.assert_close(SD.run(pipeline), expected, rtol=1e-2, atol=1e-2)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["merging", "offload"])
def test_model_cpu_offload(first):
    """To the same device, since there is no other: what accelerate wraps is the same."""
    expected = SD.pipeline()
    apply_tome(expected, ratio=0.5, targets=["attn", "mlp"])
    pipeline = SD.pipeline()
    if first == "offload":
        pipeline.enable_model_cpu_offload(device="cpu")
    handle = apply_tome(pipeline, ratio=0.5, targets=["attn", "mlp"])
    if first == "merging":
        pipeline.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipeline.unet, "_hf_hook")
    assert torch.equal(SD.run(pipeline), SD.run(expected))
    assert {(row["kept"], row["calls"]) for row in handle.stats()} == {(32, 2)}


def sequentially(pipeline):
    """What ``enable_sequential_cpu_offload`` does; itself it names the device "cpu:0", which
    accelerate takes for another one than "cpu", and fails on it with a baseline network as well."""
    from accelerate import cpu_offload

    for module in (pipeline.unet, pipeline.vae):
        cpu_offload(module, torch.device("cpu"))
    assert pipeline.unet.conv_in.weight.is_meta


def in_groups(kind):
    def switch_on(pipeline):
        cpu = torch.device("cpu")
        pipeline.unet.enable_group_offload(
            onload_device=cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=1
        )

    return switch_on


OFFLOADS = {
    "sequential": sequentially,
    "groups of blocks": in_groups("block_level"),
    "groups of layers": in_groups("leaf_level"),
}


@pytest.mark.parametrize("switch_on", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("first", ["merging", "offload"])
def test_offloading_of_layers(switch_on, first):
    """Weights that are there only while their layer runs."""
    pipeline = SD.pipeline()
    baseline = SD.run(pipeline)
    with apply_tome(pipeline, ratio=0.5, targets=["attn", "mlp"]):
        expected = SD.run(pipeline)
    if first == "offload":
        switch_on(pipeline)
    handle = apply_tome(pipeline, ratio=0.5, targets=["attn", "mlp"])
    if first == "merging":
        switch_on(pipeline)
    assert torch.equal(SD.run(pipeline), expected)
    assert {(row["kept"], row["calls"]) for row in handle.stats()} == {(32, 2)}
    handle.remove()
    assert torch.equal(SD.run(pipeline), baseline)


def test_vae_tiling_and_slicing_see_nothing_of_it(monkeypatch):
    pipeline = SD.pipeline()
    pipeline.vae.enable_tiling()
    pipeline.vae.enable_slicing()
    pipeline.vae.tile_latent_min_size, pipeline.vae.tile_sample_min_size = 4, 32
    tiled, decode = [], pipeline.vae.tiled_decode
    monkeypatch.setattr(
        pipeline.vae, "tiled_decode", lambda *args, **kw: tiled.append(1) or decode(*args, **kw)
    )
    apply_tome(pipeline, ratio=0.5)
    latents = SD.run(pipeline)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    images = SD.run(pipeline, output_type="pt")
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    assert len(tiled) == 2
