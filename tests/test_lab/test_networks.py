# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Networks by name, and the ideal on them."""

import pytest
import torch
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import ToMeError
from mmagic_tome.lab.methods import Method
from mmagic_tome.lab.networks import NETWORKS, NetworkWork, ideal, share_weights
from mmagic_tome.lab.networks.denoisers import denoiser
from mmagic_tome.lab.networks.vits import vit
from mmagic_tome.vit.families import find_vit

CPU = torch.device("cpu")
# Of the published models, in millions.
PARAMETERS = {
    "sd15": 859.52,
    "sdxl": 2567.46,
    "sd3": 2028.33,
    "flux": 11901.41,
    "vit-s16": 22.05,
    "vit-b16": 86.57,
    "vit-l16": 304.33,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_those_of_the_published_models(name):
    with torch.device("meta"):
        network = NETWORKS[name].make()
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert count == pytest.approx(PARAMETERS[name], abs=0.006)


def test_copies_share_weights_and_nothing_else():
    unet = tiny_unet()
    copy = share_weights(unet)
    assert all(a is b for a, b in zip(unet.parameters(), copy.parameters()))
    copy.register_forward_hook(lambda *_: None)
    assert not unet._forward_hooks and copy.conv_in is not unet.conv_in


SMALL = dict(num_layers=1, joint_attention_dim=16, pooled_projection_dim=16, num_attention_heads=2)
TINY = {
    "sd3": denoiser(
        dict(SMALL, attention_head_dim=8, caption_projection_dim=16),
        "SD3Transformer2DModel",
        size=64,
        text=5,
    ),
    "flux": denoiser(
        dict(
            SMALL,
            num_single_layers=1,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=True,
        ),
        "FluxTransformer2DModel",
        factor=16,
        size=64,
        batch=1,
        text=5,
    ),
    "vit": vit(32, 3, 2, patch=8, size=48),
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_give_finite_outputs_that_are_the_same_every_time(name, dtype):
    pytest.importorskip("timm")
    found = []
    for _ in range(2):
        entry = TINY[name]
        work = NetworkWork(name, entry, CPU, 1, None, [1])((entry.size,) * 2, 1, dtype)
        with torch.inference_mode():
            found.append(work(work.network))
    assert found[0].dtype == dtype and found[0].isfinite().all() and found[0].std() > 0
    assert torch.equal(*found)


def test_steps_fall_and_keep_their_inputs():
    entry = TINY["sd3"]
    work = NetworkWork("sd3", entry, CPU, 4, None, None)((64, 64), 2, None)
    assert [int(kwargs["timestep"][0]) for _, kwargs in work.calls] == [999, 749, 499, 249]
    assert work.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert len({id(kwargs["hidden_states"]) for _, kwargs in work.calls}) == 1
    with torch.inference_mode():
        outputs = [work.network(**kwargs)[0] for _, kwargs in work.calls]
        torch.testing.assert_close(work(work.network), torch.stack(outputs).mean(0))


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("sd15", dict(sizes=[(512, 512), (512, 500)]), "size 512x500 .*; the nearest is 512x512"),
        ("vit-s16", dict(steps=2), "vit-s16 has no denoising steps"),
    ],
)
def test_what_a_network_cannot_do_is_said_before_it_is_built(name, arguments, said):
    arguments = {"steps": 1, "sizes": None, "batches": None, **arguments}
    with pytest.raises(ToMeError, match=said):
        NetworkWork(name, NETWORKS[name], CPU, **arguments)


def tokens_of(unet):
    """Tokens that queries, keys of self-attention, and the feed-forward receive."""
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    found, hooks = [], []
    for layer in (block.attn1.to_q, block.attn1.to_k, block.ff.net[0].proj):
        hooks.append(layer.register_forward_pre_hook(lambda m, a: found.append(a[0].shape[1])))
    with torch.no_grad():
        output = unet(**tiny_inputs()).sample
    for hook in hooks:
        hook.remove()
    return tuple(found), output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), (128, 128, 256)),
        (dict(targets=["attn_kv"]), (256, 128, 256)),
        (dict(method="todo"), (256, 64, 256)),
        (dict(targets="block"), (128, 128, 128)),
        (dict(targets=["attn", "mlp"], ratio=0.25), (192, 192, 192)),
    ],
)
def test_the_ideal_works_on_as_many_tokens_as_ours(options, expected):
    unet = tiny_unet()
    before = tokens_of(unet)
    method = Method.from_dict(dict(name="ours", tome_cfg={"ratio": 0.5, **options}))
    with method.on(unet) as handles:
        ours = tokens_of(unet)
        stats = handles.tome.stats()
    with ideal(unet, stats):
        found = tokens_of(unet)
    assert ours[0] == found[0] == expected and before[0] == (256, 256, 256)
    assert not torch.equal(found[1], before[1]) and not torch.equal(found[1], ours[1])
    assert torch.equal(tokens_of(unet)[1], before[1])


def test_the_ideal_of_a_vision_transformer_drops_as_many_tokens():
    pytest.importorskip("timm")
    work = NetworkWork("vit", TINY["vit"], CPU, 1, None, None)((48, 48), 2, None)

    def tokens(network):
        found = []
        hooks = [
            block.norm.register_forward_hook(lambda m, a, y: found.append(y.shape[1]))
            for block in find_vit(network).blocks
        ]
        with torch.no_grad():
            output = work(network)
        for hook in hooks:
            hook.remove()
        return found, output

    full, baseline = tokens(work.network)
    ours = share_weights(work.network)
    with Method.from_dict(dict(name="ours", tome_cfg=dict(r=2))).on(ours) as handles:
        expected, _ = tokens(ours)
        stats = handles.tome.stats()
    with ideal(work.network, stats):
        found, output = tokens(work.network)
    assert found == expected == [full[0] - 2, full[0] - 4, full[0] - 6]
    assert output.shape == baseline.shape and not torch.equal(output, baseline)
    assert torch.equal(tokens(work.network)[1], baseline)
