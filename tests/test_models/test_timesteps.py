# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What adapters say of timesteps, and :func:`blocks_of`."""

import pytest
import torch
from torch import nn

from mmagic_tome.models import ADAPTERS, ModelAdapter, blocks_of, find_adapter
from mmagic_tome.models.diffusers_unet import SpatioTemporalUNet

# Adapters whose pipelines do not pass timesteps of 0 to 1000.
SCALES = {
    "SpatioTemporalUNet": None,
    "AuraFlow": 1.0,
    "Flux": 1.0,
    "Flux2": 1.0,
    "Chroma": 1.0,
    "LongCatImage": 1.0,
    "OvisImage": 1.0,
    "QwenImage": 1.0,
    "ZImage": 1.0,
    "Lumina2": 1.0,
}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)
def test_timestep_scale(adapter):
    assert adapter.timestep_scale == SCALES.get(type(adapter).__name__, 1000.0)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)
def test_a_timestep_per_token_is_that_of_the_last(adapter):
    steps = torch.zeros(2, 6)
    steps[:, 3:] = torch.tensor([[0.5], [0.25]])
    found = adapter.timestep((None,), {adapter.timestep_name: steps})
    inverted = type(adapter).__name__ in ("ZImage", "Lumina2")
    assert found.tolist() == ([0.5, 0.75] if inverted else [0.5, 0.25])


def test_stable_video_diffusion_has_an_adapter_of_its_own():
    from diffusers import UNetSpatioTemporalConditionModel

    network = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        num_attention_heads=(2, 2),
        cross_attention_dim=8,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    adapter, found = find_adapter(network)
    assert type(adapter) is SpatioTemporalUNet and found is network
    blocks = adapter.blocks(network)
    # One spatial stack each in the down block, the middle and two in the up block.
    assert len(blocks) == 4 and not any("temporal" in block.name for block in blocks)
    assert [block.downsample for block in blocks] == [1, 2, 1, 1]
    assert len(adapter.inner_modules(network, 1)) == 3


class Layer(nn.Module):
    def __init__(self, gated=True):
        super().__init__()
        self.attn, self.up, self.down = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
        self.cross = nn.Linear(1, 1) if gated else None


def test_blocks_of():
    network = nn.Module()
    network.inner = nn.Module()
    network.inner.layers = nn.ModuleList([Layer(), Layer(gated=False)])
    options = dict(crossattn="cross", mlp=("up", "down"), mlp_first=True)
    first, second = blocks_of(network, "inner.layers", **options, joint=("attn",))
    layer, other = network.inner.layers
    assert (first.name, second.name) == ("inner.layers.0", "inner.layers.1")
    assert first.module is layer and second.module is other
    assert first.grid_module is network and first.downsample == 1 and first.joint == ("attn",)
    assert list(first.targets) == ["mlp", "attn", "crossattn"]
    assert first.targets["mlp"] == [layer.up, layer.down]
    assert list(second.targets) == ["mlp", "attn"]
    (block, _) = blocks_of(network, "inner.layers", network.inner, mlp=None, downsample=2)
    assert block.grid_module is network.inner and block.downsample == 2
    assert block.targets == {"attn": layer.attn}
    assert list(blocks_of(network, "inner.layers", mlp="up")[0].targets) == ["attn", "mlp"]


def test_an_adapter_without_class_names_matches_nothing():
    assert not ModelAdapter().matches(nn.Linear(1, 1))
