# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
import torch
from denoise import STEPS, denoising, inputs_at, outputs_at
from tiny import error, tiny_inputs

from mmagic_tome import ToMeError, apply_tome

INPUTS = tiny_inputs()
each = pytest.mark.parametrize("target", ["attn", "attn_kv", "crossattn", "mlp", "block", "stack"])


@each
def test_steps_that_compute_a_plan_are_the_baseline_to_the_bit(unet, target):
    with apply_tome(unet, targets=[target], plan_interval=2, residual=True) as handle:
        steps = list(denoising(unet, INPUTS, STEPS[:4]))
        row = handle.stats()[0]
        assert (row["calls"], row["unmerged_calls"], row["kept"]) == (4, 2, 128)
    for number, (step, expected) in enumerate(zip(steps, outputs_at(unet, INPUTS, steps))):
        if number % 2 == 0:
            assert torch.equal(step.output, expected)
        else:
            assert 1e-5 < error(step.output, expected) < 0.5


@each
def test_where_nothing_changes_nothing_is_lost(unet, target):
    """The same input at the next timestep: what the residual restores is all of it.

    The timestep itself changes what the convolutions pass to the blocks, so it is held there.
    """
    options = dict(targets=[target], max_downsample=4, ratio=0.75, use_rand=False)

    @torch.no_grad()
    def outputs():
        return [unet(**inputs_at(INPUTS, time)).sample for time in (900, 800)]

    unet.time_embedding.register_forward_hook(lambda m, a, out: torch.ones_like(out))
    baseline = outputs()
    with apply_tome(unet, plan_interval=2, residual=True, **options) as handle:
        restored = outputs()
        assert handle.stats()[0]["unmerged_calls"] == 1
    with apply_tome(unet, **options):
        plain = outputs()
    torch.testing.assert_close(restored[1], baseline[1], rtol=1e-4, atol=1e-5)
    assert error(plain[1], baseline[1]) > 1e-3


def test_targets_that_cannot_run_unmerged_at_some_steps_are_refused():
    from tiny_unets import kandinsky_unet

    with pytest.raises(ToMeError, match="write residual=False"):
        apply_tome(kandinsky_unet(), plan_interval=2, residual=True)
