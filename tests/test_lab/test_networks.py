# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Networks by name."""

import pytest
import torch
from tiny import tiny_unet_config

from mmagic_tome.lab.methods import Method
from mmagic_tome.lab.networks import NETWORKS, Network, work_on

# Of the published models, in millions.
PARAMETERS = {"sd15": 859.52, "sdxl": 2567.46, "sd3": 2028.33, "flux": 11901.41}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_those_of_the_published_models(name):
    with torch.device("meta"):
        network = NETWORKS[name].make()
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert count == pytest.approx(PARAMETERS[name], abs=0.006)


TINY = Network(tiny_unet_config(), factor=4, text=5, size=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_give_finite_outputs_that_are_the_same_every_time(dtype):
    found = []
    for _ in range(2):
        work = work_on(TINY, TINY.build("cpu", dtype), (64, 64), 1, 1)
        with torch.inference_mode():
            found.append(work(work.network))
    assert found[0].dtype == dtype and found[0].isfinite().all() and found[0].std() > 0
    assert torch.equal(*found)


_HEADS = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1)
_TEXT = dict(joint_attention_dim=16, pooled_projection_dim=16)
_SD3 = dict(_HEADS, **_TEXT, caption_projection_dim=16, sample_size=16, pos_embed_max_size=16)
_FLUX = dict(_HEADS, **_TEXT, num_single_layers=1, axes_dims_rope=(2, 2, 4), in_channels=16)
TRANSFORMERS = {
    "sd3": Network(_SD3, "SD3Transformer2DModel", text=5, size=64),
    "flux": Network(
        dict(_FLUX, guidance_embeds=True), "FluxTransformer2DModel", factor=16, text=5, size=64
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_run_and_merge(name):
    entry = TRANSFORMERS[name]
    assert entry.unit == {"sd3": 16, "flux": 16}[name] and entry.name == NETWORKS[name].name
    work = work_on(entry, entry.build("cpu", torch.float32), (64, 64), 2, 3)
    assert len(work.calls) == 3 and len(work.scheduler.timesteps) == 3
    with torch.inference_mode():
        baseline = work(work.network)
        assert baseline.isfinite().all() and baseline.std() > 0
        with Method.from_dict(dict(name="ours", tome_cfg={"ratio": 0.5})).on(work.network) as found:
            assert not torch.equal(work(work.network), baseline)
            assert all(row["kept"] < row["tokens"] for row in found.tome.stats())


def test_steps_fall_and_keep_their_inputs():
    work = work_on(TINY, TINY.build("cpu", torch.float32), (64, 64), 2, 4)
    assert [int(args[1]) for args, _ in work.calls] == [999, 749, 499, 249]
    assert work.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert len({id(args[0]) for args, _ in work.calls}) == 1
    with torch.inference_mode():
        outputs = [work.network(*args, **kwargs).sample for args, kwargs in work.calls]
        torch.testing.assert_close(work(work.network), torch.stack(outputs).mean(0))
