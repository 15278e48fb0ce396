# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What cannot be merged in transformers, and what the error says to write instead."""

import pytest
import torch
from model_runs import difference, run
from tiny_transformers import TEXT, TRANSFORMERS
from torch import nn

from mmagic_tome import ToMeError, apply_tome, get_handle
from mmagic_tome.models import ADAPTERS

WAN, LTX = TRANSFORMERS["Wan 2.1, 2.2 (video)"], TRANSFORMERS["LTX-Video (video)"]
HUNYUAN_VIDEO, SKYREELS = TRANSFORMERS["HunyuanVideo (video)"], "SkyReels V2 (video)"
JOINT = [t for t, family in TRANSFORMERS.items() if t != "DiT" and "crossattn" not in family.kinds]


@pytest.mark.parametrize("title", JOINT)
def test_targets_that_joint_attention_does_not_allow(title):
    network = TRANSFORMERS[title].build()
    for targets, message in (
        ("stack", "at 'stack'.*targets='block'"),
        (["crossattn"], "no transformer block with a target crossattn"),
    ):
        with pytest.raises(ToMeError, match=message):
            apply_tome(network, ratio=0.5, targets=targets)
    assert get_handle(network) is None


def per_token(time=500.0):
    """As for a clip whose first frame is given: its tokens have timestep 0 at every step."""
    steps = torch.full((2, 128), time)
    steps[:, :64] = 0
    return dict(timestep=steps)


INSIDE = r"rite targets=\['attn', 'mlp'\]"
OPTIONS = "joint_attention_kwargs"
MASK = dict(attention_mask=torch.ones(2, 1, 1, TEXT + 64, dtype=torch.bool))
IMAGE_PROMPT = dict(ip_hidden_states=[torch.zeros(2, 3, 16)])
TWO_SIZES = dict(x=[torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 8)])
TWO_IMAGES = dict(img_shapes=[[(1, 8, 4), (1, 8, 4)]] * 2)
NO_SIZES = dict(num_frames=None, height=None, video_coords=torch.rand(2, 3, 128))
KEYS_AND_VALUES = dict(kv_cache_mode="extract", num_ref_tokens=8)
FIRST_FRAME = dict(image_condition_type="token_replace")

CAUSAL = dict(num_frame_per_block=2)

# Family, targets, what the error says, options of the network.
AT_ONCE = [
    ("CogView 4", ["attn", "mlp"], "on the image tokens and then on the text tokens", {}),
    (HUNYUAN_VIDEO.title, "block", f"first frame.*W{INSIDE}", FIRST_FRAME),
]
# The same of the call: arguments of the call, or, where it is causal, options of the network.
AT_THE_CALL = [
    (WAN.title, "block", f"blocks.0.block received one timestep.*w{INSIDE}", per_token()),
    (LTX.title, "block", f"block received one timestep.*w{INSIDE}", per_token()),
    (LTX.title, ["attn"], "without num_frames, height and width", NO_SIZES),
    ("Flux.1", ["attn"], "attn received an attention_mask", {OPTIONS: MASK}),
    ("Flux.1", ["attn"], "IP-Adapter write targets='attn_kv' or", {OPTIONS: IMAGE_PROMPT}),
    ("Flux.2", ["attn"], "kv_cache_mode.*call the model without it", KEYS_AND_VALUES),
    ("Flux.2", "auto", "kv_cache_mode.*call the model without it", KEYS_AND_VALUES),
    ("Qwen-Image", ["attn"], "2 images in one sequence.*without token", TWO_IMAGES),
    ("Z-Image", ["attn"], "2 sizes in one batch.*one size at a time", TWO_SIZES),
    ("Z-Image", ["attn"], "several images in one sequence", dict(x=[[], []])),
    (SKYREELS, "auto", r"causal mask.*write targets=\['crossattn', 'mlp'\]", CAUSAL),
    (SKYREELS, ["attn"], r"causal mask.*write targets=\['crossattn', 'mlp'\]", CAUSAL),
    (SKYREELS, "block", "blocks.0.block received a causal mask", CAUSAL),
]


@pytest.mark.parametrize(("title", "targets", "message", "options"), AT_ONCE)
def test_targets_that_a_network_does_not_allow(title, targets, message, options):
    network = TRANSFORMERS[title].changed(**options).build()
    with pytest.raises(ToMeError, match=message):
        apply_tome(network, ratio=0.5, targets=targets)


@pytest.mark.parametrize(("title", "targets", "message", "other"), AT_THE_CALL)
def test_calls_that_do_not_fit_merged_tokens(title, targets, message, other):
    options, changes = (other, {}) if other is CAUSAL else ({}, other)
    family = TRANSFORMERS[title].changed(**options)
    network, inputs = family.build(), family.inputs()
    apply_tome(network, ratio=0.5, targets=targets)
    with pytest.raises(ToMeError, match=message):
        run(network, inputs, **changes)
    if options:
        apply_tome(network, ratio=0.5, targets=["crossattn", "mlp"])
    assert run(network, inputs).isfinite().all()  # the next call is as usual


@pytest.mark.parametrize("family", [WAN, LTX, HUNYUAN_VIDEO], ids=lambda family: family.title)
def test_a_given_first_frame(family):
    """What is refused around blocks works inside them."""
    calls = [family.inputs(), family.inputs(time=400)]
    if family is HUNYUAN_VIDEO:
        family = family.changed(**FIRST_FRAME)
    else:
        calls = [{**call, **per_token(float(call["timestep"][0]))} for call in calls]
    network = family.build()
    baseline = run(network, calls[0])
    with apply_tome(network, ratio=0.5, plan_interval=2, targets=["attn", "mlp"]) as handle:
        assert 1e-4 < difference(run(network, calls[0]), baseline) < 0.8
        run(network, calls[1])
        assert {row["plans"] for row in handle.stats()} == {1}  # the second step of a run


def test_other_transformers_of_diffusers_are_not_taken_for_known_ones():
    from diffusers.models import transformers

    families = {family.class_name for family in TRANSFORMERS.values()}
    names = [name for name in dir(transformers) if name.endswith("Model")]
    assert families <= set(names) and len(names) > 20
    for name in names:
        network = type(name, (nn.Module,), {})()
        network.is_input_patches = True  # by which PixArt's older checkpoints are known
        assert any(one.matches(network) for one in ADAPTERS[4:]) == (name in families)
