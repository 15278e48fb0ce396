# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import torch
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_tome
from mmagic_tome.models import ADAPTERS, find_adapter
from mmagic_tome.models.diffusers_unet import AnimateDiffUNet, DiffusersUNet, MMagicUNet, SpatioTemporalUNet



def levels(network):
    adapter, found = find_adapter(network)
    assert found is network
    return {block.name: block.downsample for block in adapter.blocks(network)}


def grids(network, size):
    """Downsample of every grid module, from the sizes of its inputs."""
    seen = {}

    def note(name):
        def hook(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            seen[name] = size // x.shape[-1]

        return hook

    adapter, _ = find_adapter(network)
    for block in adapter.blocks(network):
        block.grid_module.register_forward_pre_hook(note(block.name), with_kwargs=True)
    with torch.no_grad():
        network(**tiny_inputs(size=size))
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        dict(levels=3),
        dict(levels=4),
        dict(
            levels=4,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        ),
        dict(levels=2, transformer_layers_per_block=(1, 3)),
    ],
    ids=["three levels", "four levels", "like Stable Diffusion", "several blocks a stack"],
)
def test_downsample_is_that_of_the_running_network(changes):
    network = tiny_unet(**changes)
    assert levels(network) == grids(network, 32)
    assert all(network.get_submodule(name) for name in levels(network))


def test_targets_of_a_block():
    network = tiny_unet()
    block = DiffusersUNet().blocks(network)[0]
    inner = block.module
    assert block.targets == {"attn": inner.attn1, "crossattn": inner.attn2, "mlp": inner.ff}


def test_native_unet_comes_first():
    # They also match DiffusersUNet, which must therefore come last.
    first = [MMagicUNet, AnimateDiffUNet, SpatioTemporalUNet, DiffusersUNet]
    assert [type(adapter) for adapter in ADAPTERS[:4]] == first
    assert not MMagicUNet().matches(tiny_unet())


@pytest.mark.parametrize("kind", ["positional", "keyword"])
def test_timestep_of_both_families(kind):
    t = torch.tensor(5)
    args, kwargs = ((None, t), {}) if kind == "positional" else ((None,), dict(timestep=t, t=t))
    for adapter in ADAPTERS[:4]:
        assert adapter.timestep(args, kwargs) is t
        assert adapter.timestep((None,), {}) is None


VARIANTS = {
    "linear projection": dict(use_linear_projection=True),
    "only cross-attention": dict(only_cross_attention=True),
    "no middle block": dict(mid_block_type=None),
    "upcast": dict(upcast_attention=True),
    "class conditioning": dict(num_class_embeds=4),
    "nine channels (inpainting)": dict(in_channels=9),
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_the_diffusers_unet(changes):
    network = tiny_unet(**changes)
    inputs = tiny_inputs()
    if "num_class_embeds" in changes:
        inputs["class_labels"] = torch.tensor([0, 1])
    if "in_channels" in changes:
        inputs["sample"] = torch.randn(2, 9, 16, 16)
    with torch.no_grad():
        baseline = network(**inputs).sample
        with apply_tome(network, ratio=0.5, targets=["attn", "crossattn", "mlp"]) as handle:
            merged = network(**inputs).sample
        assert {row["kept"] for row in handle.stats()} == {128}
        assert not torch.equal(merged, baseline) and merged.isfinite().all()
        assert torch.equal(network(**inputs).sample, baseline)


@pytest.mark.parametrize(
    ("norm_type", "attention_type"),
    [
        ("layer_norm", "default"),
        ("layer_norm", "gated"),  # GLIGEN
        ("ada_norm", "default"),
        ("ada_norm_zero", "default"),
        ("ada_norm_single", "default"),  # PixArt
    ],
)
def test_variants_of_the_block(norm_type, attention_type):
    """Every norm of diffusers' BasicTransformerBlock that has an attn1, and GLIGEN's."""
    from diffusers.models.attention import BasicTransformerBlock
    from torch import nn

    from mmagic_tome.apply import get_handle

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            block = BasicTransformerBlock(
                16,
                2,
                8,
                cross_attention_dim=16,
                norm_type=norm_type,
                num_embeds_ada_norm=10,
                attention_type=attention_type,
            )
            self.transformer_blocks = nn.ModuleList([block])

        def forward(self, hidden_states, **kwargs):
            tokens = hidden_states.flatten(2).transpose(1, 2)
            return self.transformer_blocks[0](tokens, **kwargs)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            down = nn.Module()
            down.attentions = nn.ModuleList([Stack()])
            self.down_blocks = nn.ModuleList([down])
            self.up_blocks = nn.ModuleList()

        def forward(self, x, step, **kwargs):
            return self.down_blocks[0].attentions[0](x, **kwargs)

    torch.manual_seed(0)
    network = Network().eval()
    kwargs = dict(encoder_hidden_states=torch.randn(2, 7, 16))
    if norm_type == "ada_norm":
        kwargs["timestep"] = torch.tensor(3)
    if norm_type == "ada_norm_zero":
        kwargs.update(timestep=torch.tensor([3, 3]), class_labels=torch.tensor([1, 2]))
    if norm_type == "ada_norm_single":
        kwargs["timestep"] = torch.randn(2, 1, 6 * 16)
    if attention_type == "gated":
        kwargs["cross_attention_kwargs"] = dict(gligen=dict(objs=torch.randn(2, 3, 16)))
    x = torch.randn(2, 16, 12, 10)
    with torch.no_grad():
        baseline = network(x, 1, **kwargs)
        apply_tome(network, ratio=0.5, targets=["attn", "crossattn", "mlp"])
        merged = network(x, 1, **kwargs)
        assert {row["kept"] for row in get_handle(network).stats()} == {60}
        assert merged.shape == baseline.shape and not torch.allclose(merged, baseline, atol=1e-4)
        get_handle(network).ratio = 0
        assert torch.equal(network(x, 1, **kwargs), baseline)


def test_stacks_over_frames_are_left_alone():
    from diffusers import UNet3DConditionModel
    from tiny import randomise

    network = randomise(
        UNet3DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=16,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )
    )
    inputs = dict(timestep=torch.tensor(5), encoder_hidden_states=torch.randn(1, 7, 16))
    x = torch.randn(1, 4, 3, 8, 8)
    with torch.no_grad():
        baseline = network(x, **inputs).sample
        handle = apply_tome(network, ratio=0.5)
        merged = network(x, **inputs).sample
    assert handle.stats() and not any("temp" in row["target"] for row in handle.stats())
    assert {(row["tokens"], row["kept"]) for row in handle.stats()} == {(64, 32)}
    assert not torch.equal(merged, baseline)


def test_a_wrapper_with_a_forward_of_its_own_is_the_network():
    """As MMagic's ViCo: the UNet's own forward never runs, only that of the wrapper."""

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("model"), name)

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

    unet = tiny_unet()
    wrapper = Wrapper(unet)
    assert find_adapter(wrapper)[1] is unet
    inner = type(unet).forward
    wrapper.forward = lambda *args, **kwargs: inner(unet, *args, **kwargs)
    assert find_adapter(wrapper)[1] is wrapper
    with torch.no_grad():
        baseline = wrapper(**tiny_inputs()).sample
        with apply_tome(wrapper, ratio=0.5) as handle:
            first = wrapper(**tiny_inputs()).sample
            other = wrapper(**{**tiny_inputs(), "timestep": torch.tensor(1)}).sample
            assert torch.equal(wrapper(**tiny_inputs()).sample, first)
        assert {row["kept"] for row in handle.stats()} == {128}
        assert not torch.equal(first, baseline) and not torch.equal(first, other)
        assert torch.equal(wrapper(**tiny_inputs()).sample, baseline)


def test_a_diffusers_pipeline(sd_folder):
    from tiny import tiny_pipeline

    pipeline = tiny_pipeline(sd_folder)

    def image():
        generator = torch.Generator().manual_seed(0)
        options = dict(num_inference_steps=2, height=64, width=64, output_type="np")
        return torch.from_numpy(pipeline("a cat", generator=generator, **options).images)

    baseline = image()
    with apply_tome(pipeline, ratio=0.5) as handle:
        merged = image()
        assert torch.equal(image(), merged)
        # Two runs of two steps; classifier-free guidance is a batch, not a second call.
        assert {row["calls"] for row in handle.stats()} == {4}
        assert {(row["tokens"], row["kept"]) for row in handle.stats()} == {(64, 32)}
    assert not torch.equal(merged, baseline)
    assert torch.equal(image(), baseline)
