# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Training with token merging: gradients, LoRA, averages, checkpoints, two processes."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import run, tiny_inputs, tiny_unet
from tiny_transformers import TRANSFORMERS

from mmagic_tome import ToMeError, apply_tome, get_handle, remove_tome
from mmagic_tome.patch import find_patch
from mmagic_tome.tome.state import TomePatch

EVERYTHING = dict(ratio=0.5, max_downsample=8, targets=["attn", "crossattn", "mlp"])
PIXART = TRANSFORMERS["PixArt-alpha, PixArt-sigma"]
TARGET = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def unet():
    return tiny_unet(levels=1)


@pytest.fixture
def deep():
    return tiny_unet(levels=3)


def double(inputs):
    """Inputs in float64."""
    floating = {k for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
    return {k: v.double() if k in floating else v for k, v in inputs.items()}


def train(network, steps, rate=1e-2):
    """Losses of learning one image with what wants gradients; new noise levels at every step."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=rate)
    losses = []
    for step in range(steps):
        inputs = {**tiny_inputs(), "timestep": torch.tensor(500 + step)}
        loss = (network(**inputs).sample - TARGET).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("targets", [["attn", "crossattn", "mlp"], "block", "stack"], ids=str)
def test_gradcheck_of_the_whole_unet_in_float64(targets):
    """Numeric gradients along random directions, of the sample and of a weight in a block."""
    network = tiny_unet(levels=1).double()
    apply_tome(network, ratio=0.5, targets=targets)
    inputs = double(tiny_inputs(size=4))
    sample = inputs.pop("sample")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    weight = network.get_parameter(name)

    def forward(sample, weight):
        return torch.func.functional_call(network, {name: weight}, (sample,), inputs).sample

    assert torch.autograd.gradcheck(
        forward, (sample.requires_grad_(), weight.detach().clone().requires_grad_()), fast_mode=True
    )
    assert {row["kept"] for row in get_handle(network).stats()} == {8}


def test_gradcheck_of_a_transformer_in_float64():
    network = PIXART.build().double()
    apply_tome(network, ratio=0.5, targets=["attn", "mlp"])
    inputs = double(PIXART.inputs((3, 4), batch=1))
    latent = inputs.pop("hidden_states").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: network(x, **inputs, return_dict=False)[0], (latent,), fast_mode=True
    )


def test_lora_learns(unet):
    from peft import LoraConfig

    apply_tome(unet, **EVERYTHING)
    names = ["to_q", "to_v", "ff.net.2"]
    unet.add_adapter(LoraConfig(r=4, target_modules=names, init_lora_weights="gaussian"))
    before = {n: p.clone() for n, p in unet.named_parameters()}
    losses = train(unet.train(), 12)
    assert losses[-1] < 0.8 * losses[0], losses
    trained = {n for n, p in unet.named_parameters() if not torch.equal(p, before[n])}
    assert trained == {n for n in before if "lora_" in n} and len(trained) > 10
    # What was learned is there without merging too.
    remove_tome(unet)
    unet.disable_adapters()
    plain = run(unet.eval())
    unet.enable_adapters()
    assert not torch.allclose(run(unet), plain, atol=1e-2)


def test_all_weights_learn_and_the_dense_network_has_learned_as_well(unet):
    baseline = copy.deepcopy(unet)
    apply_tome(unet, **EVERYTHING)
    merged, without = train(unet.train(), 12), train(baseline.train(), 12)
    assert merged[-1] < 0.6 * merged[0]
    assert merged[-1] == pytest.approx(without[-1], rel=0.3)
    remove_tome(unet)
    assert (run(unet.eval()) - TARGET).square().mean() < 0.8 * merged[0]


def test_averages_of_weights(unet):
    """torch's is a copy of the network with merging of its own, diffusers' are bare tensors."""
    from diffusers.training_utils import EMAModel
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    apply_tome(unet, **EVERYTHING)
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    others = EMAModel(unet.parameters(), decay=0.5, min_decay=0.5)
    average.update_parameters(unet)  # for both the first is a copy
    others.step(unet.parameters())
    first = [p.clone() for p in unet.parameters()]
    train(unet.train(), 1)
    unet.eval()
    average.update_parameters(unet)
    others.step(unet.parameters())
    expected = [torch.lerp(a, b, 0.5) for a, b in zip(first, unet.parameters())]
    torch.testing.assert_close(list(average.module.parameters()), expected)
    torch.testing.assert_close(others.shadow_params, expected)

    merged = run(average.module.eval())
    assert get_handle(average).ratio == 0.5 and get_handle(average).network is average.module
    others.store(unet.parameters())
    others.copy_to(unet.parameters())
    torch.testing.assert_close(run(unet), merged)
    others.restore(unet.parameters())
    remove_tome(average)
    assert get_handle(unet).active and not torch.equal(run(average.module), merged)


def test_checkpoints_of_mmengine_know_nothing_of_merging(unet, tmp_path):
    runner = pytest.importorskip("mmengine.runner")
    baseline = run(unet)
    apply_tome(unet, **EVERYTHING)
    merged = run(unet)
    file = str(tmp_path / "merged.pth")
    runner.save_checkpoint(dict(state_dict=runner.get_state_dict(unet), meta={}), file)

    plain = tiny_unet(levels=1, seed=1)
    runner.load_checkpoint(plain, file, strict=True)
    assert torch.equal(run(plain), baseline)
    other = tiny_unet(levels=1, seed=1)
    apply_tome(other, **EVERYTHING)
    runner.load_checkpoint(other, file, strict=True)
    assert torch.equal(run(other), merged)
    unet.save_pretrained(tmp_path / "folder")
    assert torch.equal(run(type(unet).from_pretrained(tmp_path / "folder")), baseline)


# --- gradients and checkpointing ------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients_to_every_parameter(deep):
    """Also where the network has gone on to another step and size when its blocks run again."""
    apply_tome(deep, **EVERYTHING)
    deep.train()
    calls = [
        dict(timestep=torch.tensor(900)),
        dict(timestep=torch.tensor(100)),
        tiny_inputs(size=8),
    ]

    def gradients(calls):
        deep.zero_grad()
        losses = [deep(**{**tiny_inputs(), **call}).sample.square().mean() for call in calls]
        run(deep)  # a validation in between
        sum(losses).backward()
        return [p.grad.clone() for p in deep.parameters()]

    expected = [gradients(calls[:1]), gradients(calls)]
    assert all(gradient.any() for gradient in expected[0])
    deep.enable_gradient_checkpointing()
    torch.testing.assert_close([gradients(calls[:1]), gradients(calls)], expected)


def test_reentrant_checkpointing_is_refused(deep):
    from torch.utils.checkpoint import checkpoint

    apply_tome(deep, ratio=0.5)
    deep.train()
    deep.enable_gradient_checkpointing()
    for module in deep.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)
    with pytest.raises(ToMeError, match="use_reentrant=False"):
        deep(**tiny_inputs()).sample.square().mean().backward()


def test_saved_plans_live_as_long_as_the_graph(deep):
    apply_tome(deep, ratio=0.5)
    blocks = find_patch(deep, TomePatch).blocks
    run(deep)
    assert not any(len(block.saved) for block in blocks)
    out = deep(**tiny_inputs()).sample
    assert all(len(block.saved) == 1 for block in blocks)
    del out
    assert not any(len(block.saved) for block in blocks)


# --- two processes --------------------------------------------------------------------------------

_WORKER = """
import sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
import mmagic_tome
from mmagic_tome import apply_tome, get_handle
from test_training import steps
from tiny import tiny_unet
from torch.nn.parallel import DistributedDataParallel
for order in ("before", "after"):
    network = tiny_unet(levels=1).train()
    if rank:  # DDP sends the weights of the first to all
        with torch.no_grad():
            network.conv_in.weight.zero_()
    if order == "before":
        apply_tome(network, ratio=0.5, targets=["attn", "mlp"])
    ddp = DistributedDataParallel(network)
    if order == "after":
        apply_tome(ddp, ratio=0.5, targets=["attn", "mlp"])
    steps(ddp, [rank])
    rows = {(row["kept"], row["calls"]) for row in get_handle(ddp).stats()}
    torch.save((rows, ddp.module.state_dict()), f"{folder}/{order}{rank}.pt")
dist.destroy_process_group()
"""


def steps(network, ranks):
    """Two steps of training with the data of some ranks."""
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-2)
    for step in range(2):
        optimiser.zero_grad()
        for rank in ranks:
            inputs = {**tiny_inputs(seed=10 * step + rank), "timestep": torch.tensor(500 - rank)}
            (network(**inputs).sample.square().mean() / len(ranks)).backward()
        optimiser.step()


@pytest.mark.slow
def test_distributed_data_parallel_on_two_processes(tmp_path):
    """Two processes with half of the data each take the steps that one takes with all of it."""
    root = Path(__file__).parents[1]
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(root), str(root / "tests")]),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
    )
    said = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    commands = [[sys.executable, "-c", _WORKER, str(rank), str(tmp_path)] for rank in range(2)]
    workers = [subprocess.Popen(command, env=environment, **said) for command in commands]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=300)
            assert worker.returncode == 0, output[-3000:]
    finally:
        for worker in workers:
            worker.kill()

    alone = tiny_unet(levels=1).train()
    apply_tome(alone, ratio=0.5, targets=["attn", "mlp"])
    steps(alone, [0, 1])
    for name in ("before0", "before1", "after0", "after1"):
        rows, weights = torch.load(tmp_path / f"{name}.pt")
        assert rows == {(128, 2)}
        torch.testing.assert_close(weights, dict(alone.state_dict()), rtol=1e-4, atol=1e-5)
