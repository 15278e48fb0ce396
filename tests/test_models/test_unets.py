# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""UNets: their levels, kinds of blocks, frames, and attention on the image itself."""

import pytest
import torch
from denoise import denoising, outputs_at
from model_runs import counts, difference, grids_of, run
from tiny import error, randomise, tiny_config, tiny_inputs, tiny_unet
from tiny_unets import (
    FRAMES,
    NETWORKS,
    kandinsky_inputs,
    kandinsky_unet,
    motion_inputs,
    motion_unet,
    unet_of,
)

from mmagic_tome import ToMeError, apply_tome
from mmagic_tome.models import find_adapter


@pytest.mark.parametrize("kind", NETWORKS.values(), ids=NETWORKS)
def test_every_network(kind, monkeypatch):
    """Frames are merged one by one, or, those of a clip of AnimateDiff, across the clip."""
    network, inputs = kind.build(), kind.inputs()
    baseline, grids = run(network, inputs), grids_of(network, monkeypatch)
    for frames in (1, FRAMES) if kind.title.startswith("AnimateDiff") else (1,):
        with apply_tome(network, ratio=0.6, across_frames=frames > 1) as handle:
            assert 1e-3 < difference(run(network, inputs), baseline) < 0.8
            for grid in kind.grids:
                for batch in (1, 3):
                    assert run(network, kind.inputs(batch, grid)).isfinite().all()
                    assert grids[-1] == grid
                    tokens = frames * grid[0] * grid[1]
                    assert counts(handle) == {(tokens, tokens - int(0.6 * tokens))}
            blocks = [row["block"] for row in handle.stats()]
            assert not any("temporal" in name or "motion" in name for name in blocks)
            handle.ratio = 0
            assert torch.equal(run(network, inputs), baseline)
        assert torch.equal(run(network, inputs), baseline)


LAYOUTS = {
    "no middle block": dict(levels=3, mid_block_type=None),
    "like Stable Diffusion": dict(
        levels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ),
    "several blocks a stack": dict(levels=2, transformer_layers_per_block=(1, 3)),
}
OTHERS = ("ControlNet", "Stable Video Diffusion")


@pytest.mark.parametrize("layout", [*LAYOUTS, *OTHERS])
def test_downsample_is_that_of_the_running_network(layout):
    if layout in OTHERS:
        network, inputs = NETWORKS[layout].build(), NETWORKS[layout].inputs()
    else:
        network, inputs = tiny_unet(**LAYOUTS[layout]), tiny_inputs(size=32)
    adapter, found = find_adapter(network)
    assert found is network
    blocks = adapter.blocks(network)
    assert all(network.get_submodule(block.name) is block.module for block in blocks)
    sizes = {}
    for block in blocks:
        block.grid_module.register_forward_pre_hook(
            lambda module, args: sizes.update({module: args[0].shape[-1]})
        )
    run(network, inputs)
    whole = inputs["sample"].shape[-1]
    assert [b.downsample for b in blocks] == [whole // sizes[b.grid_module] for b in blocks]
    assert {b.downsample for b in blocks} > {1}


def test_stacks_over_frames_are_unchanged():
    network = unet_of(
        "UNet3DConditionModel",
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    inputs = {**tiny_inputs(batch=1), "sample": torch.randn(1, 4, FRAMES, 8, 8)}
    baseline = run(network, inputs)
    handle = apply_tome(network, ratio=0.5)
    assert not torch.equal(run(network, inputs), baseline)
    assert not any("temp" in row["target"] for row in handle.stats())
    assert counts(handle) == {(64, 32)}


def test_added_keys_are_not_merged_and_their_neighbours_are():
    network = kandinsky_unet()
    handle = apply_tome(network, ratio=0.25)
    seen = {name: [] for name in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj")}
    for path, module in network.named_modules():
        for name in seen:
            if path.endswith(f".{name}"):
                module.register_forward_hook(lambda m, args, y, n=name: seen[n].append(args[0]))
    network(**kandinsky_inputs()).sample.square().mean().backward()
    for name, given in seen.items():
        # 32 tokens of the prompt's image.
        assert [x.shape[1] for x in given] == [32 if name == "add_k_proj" else 48] * 4, name
    for q, k, v in zip(seen["to_q"], seen["to_k"], seen["to_v"]):
        assert torch.equal(q, k) and torch.equal(q, v)
    assert [row["calls"] for row in handle.stats()] == [1] * 4
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_what_attention_on_the_image_itself_does_not_allow():
    network = kandinsky_unet()
    for targets in ("block", "stack"):
        with pytest.raises(ToMeError, match=r"cannot be merged at .*targets=\['attn'\]"):
            apply_tome(network, ratio=0.5, targets=targets)
    with pytest.raises(ToMeError, match=r"no transformer block with a target attn_kv.* have attn"):
        apply_tome(network, ratio=0.5, targets=["attn_kv"])
    apply_tome(network, ratio=0.5, plan_interval=2)
    with pytest.raises(ToMeError, match="received an attention_mask"):
        run(network, kandinsky_inputs(), encoder_attention_mask=torch.ones(2, 10))


# --- across the frames of a clip ------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["attn"], ["crossattn", "mlp"], ["block"]], ids="+".join)
def test_clips_of_a_batch_do_not_mix_and_keep_their_own_text(targets):
    network, inputs = motion_unet(), motion_inputs()
    options = dict(ratio=0.5, targets=targets, across_frames=True)
    handle = apply_tome(network, **options)
    merged = run(network, inputs)
    assert counts(handle) == {(FRAMES * 64, FRAMES * 32)}
    assert "across_frames=True" in handle.summary()
    for clip in range(2):
        text = inputs["encoder_hidden_states"][clip * FRAMES : (clip + 1) * FRAMES]
        alone = dict(inputs, sample=inputs["sample"][clip : clip + 1], encoder_hidden_states=text)
        torch.testing.assert_close(run(network, alone)[0], merged[clip], rtol=1e-3, atol=1e-4)
    if targets == ["attn"]:  # what a key stands for is counted through the frames
        apply_tome(network, **options, prop_attn=False)
        plain = run(network, inputs)
        assert merged.isfinite().all() and (plain - merged).abs().max() > 1e-3


def test_plans_of_a_clip_are_reused():
    network, inputs = motion_unet(), motion_inputs()
    options = dict(ratio=0.5, targets=["mlp"], across_frames=True, plan_interval=2)
    with apply_tome(network, **options) as handle:
        steps = list(denoising(network, inputs, (500, 480)))
        assert {row["plans"] for row in handle.stats()} == {1}
    baseline = outputs_at(network, inputs, steps)
    for step, expected in zip(steps, baseline):
        assert 0 < error(step.output, expected) < 0.5


def test_networks_without_frames_are_refused():
    with pytest.raises(ToMeError, match="UNet2DConditionModel does not work frame by frame"):
        apply_tome(tiny_unet(), across_frames=True)


def test_attention_along_frames_inside_a_block_needs_all_positions(sd_folder):
    """An option of MMagic's UNet that its configs leave off."""
    models = pytest.importorskip("mmagic.registry").MODELS
    config = tiny_config("AnimateDiff", sd_folder)["unet"]
    network = randomise(models.build(dict(config, unet_use_temporal_attention=True)))
    for target in ("block", "stack"):
        with pytest.raises(ToMeError, match=r"along the frames of one position.*'attn', 'mlp'"):
            apply_tome(network, targets=[target])
    inputs = motion_inputs()
    text = inputs["encoder_hidden_states"][::FRAMES]  # MMagic repeats it
    baseline = run(network, inputs, encoder_hidden_states=text)
    handle = apply_tome(network, ratio=0.5, targets=["attn", "mlp"], across_frames=True)
    merged = run(network, inputs, encoder_hidden_states=text)
    assert (merged - baseline).abs().max() > 1e-3
    assert {row["kept"] for row in handle.stats()} == {FRAMES * 32}
