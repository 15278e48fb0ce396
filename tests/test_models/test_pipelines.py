# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""diffusers' own pipelines, and what users switch on in them."""

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.utils import recurse_remove_peft_layers
from model_runs import Seen, counts, difference
from tiny_pipelines import PIPELINES
from tiny_transformers import TRANSFORMERS

from mmagic_tome import ToMeError, apply_cache, apply_tome
from mmagic_tome.models import find_controlnets

SD = PIPELINES["Stable Diffusion 1.x"]


# Around attention as a whole transformers call their blocks as test_transformers.py does.
WHOLE = [case for case in PIPELINES.values() if case.title not in TRANSFORMERS]


@pytest.mark.parametrize(
    ("case", "default"),
    [
        *(pytest.param(case, True, id=f"{case.title}-default") for case in PIPELINES.values()),
        *(pytest.param(case, False, id=f"{case.title}-whole") for case in WHOLE),
    ],
)
def test_every_pipeline(case, default):
    """What diffusers' own pipelines call the networks with, over all steps."""
    pipeline, family = case.pipeline(), TRANSFORMERS.get(case.title)
    baseline = case.run(pipeline)
    assert baseline.std() > 0.05
    # The x4 upscaler's first attention reads the text, so only its queries can merge.
    layer = "to_k" if default and case.title != "upscaler x4" else "to_q"
    targets = "auto" if default else ["attn"]
    with apply_tome(pipeline, ratio=0.5, plan_interval=2, targets=targets) as handle:
        assert handle.network is (pipeline.transformer if family else pipeline.unet)
        paths = [row["block"] for row in handle.stats()]
        seen = Seen(
            handle.network, *(f"{p}.{name}{layer}" for p in paths for name in ("", "attn1."))
        )
        merged = case.run(pipeline)
        if not family:  # what the layers inside really receive
            assert list(seen.lengths().values()) == [case.tokens // 2] * len(paths)
        # Plans are reused for two steps only if the adapter reads the timestep.
        rows = {(row["calls"], row["plans"]) for row in handle.stats()}
        assert rows == {(case.calls, -(-case.calls // 2))}
        assert counts(handle) == {(case.tokens, case.tokens // 2)}
        assert 1e-4 < difference(merged, baseline) < 0.8
        assert torch.equal(case.run(pipeline), merged)
        handle.ratio = 0
        assert torch.equal(case.run(pipeline), baseline)
    assert torch.equal(case.run(pipeline), baseline)


CACHED = [case for case in PIPELINES.values() if case.title not in TRANSFORMERS and case.calls > 1]


@pytest.mark.parametrize("case", CACHED, ids=lambda case: case.title)
def test_step_caching_in_every_pipeline(case):
    pipeline = case.pipeline()
    steps = 12 if case.title == "SDXL refiner" else 5  # which runs the last 40 per cent of them

    def run():
        return case.run(pipeline, num_inference_steps=steps)

    baseline, controlnets = run(), len(find_controlnets(pipeline))
    # A ControlNet has no inner region.
    for region, networks in (("network", 1 + controlnets), ("inner", 1)):
        with apply_cache(pipeline, region=region, order=0, timestep_range=(0, 1)) as handle:
            assert handle.network is pipeline.unet and len(handle.stats()) == networks
            cached = run()
            assert 0 < difference(cached, baseline) < 1.5
            # Every second step, but never the last.
            assert {(row["computed"], row["skipped"]) for row in handle.stats()} == {(3, 2)}
            assert torch.equal(run(), cached)
        assert torch.equal(run(), baseline)


def test_ip_adapter_also_where_cross_attention_is_merged():
    case = PIPELINES["IP-Adapter"]
    pipeline = case.pipeline()
    pipeline.set_ip_adapter_scale(0.7)
    baseline = case.run(pipeline)
    apply_tome(pipeline, ratio=0.5, targets=["attn", "crossattn", "mlp"])
    assert 1e-3 < difference(case.run(pipeline), baseline) < 0.8
    masks = dict(ip_adapter_masks=[torch.ones(1, 1, 64, 64)])
    with pytest.raises(ToMeError, match=r"ip_adapter_masks.*self-attention only"):
        case.run(pipeline, cross_attention_kwargs=masks)
    apply_tome(pipeline, ratio=0.5)
    masked = case.run(pipeline, cross_attention_kwargs=masks)
    torch.testing.assert_close(masked, case.run(pipeline))  # a mask of ones


APPLY = {
    "merging": lambda model: apply_tome(model, ratio=0.5, targets=["attn", "mlp"]),
    "caching": lambda model: apply_cache(model, order=0, timestep_range=(0, 1)),
}


@pytest.mark.parametrize("apply", APPLY.values(), ids=APPLY)
def test_lora_may_come_go_and_be_fused_while_something_is_applied(apply):
    case = PIPELINES["LoRA"]

    def run(pipeline):
        return case.run(pipeline, num_inference_steps=6)

    ready = case.pipeline()
    apply(ready)
    expected = run(ready)

    pipeline = SD.pipeline()
    handle = apply(pipeline)
    plain, stats = run(pipeline), handle.stats()
    case.prepare(pipeline)
    assert torch.equal(run(pipeline), expected) and not torch.equal(plain, expected)
    pipeline.fuse_lora(components=["unet"])
    torch.testing.assert_close(run(pipeline), expected, rtol=1e-3, atol=1e-4)
    pipeline.unfuse_lora(components=["unet"])
    pipeline.unet.delete_adapters("default")
    handle.reset_stats()
    torch.testing.assert_close(run(pipeline), plain, rtol=1e-3, atol=1e-4)
    assert handle.active and handle.stats() == stats


@pytest.mark.parametrize(
    ("title", "names", "targets"),
    [("Flux.1", ["proj_mlp"], ["attn", "mlp"]), ("Kandinsky 2.2", ["to_q", "to_k"], ["attn"])],
)
def test_lora_on_a_linear_that_is_itself_a_target(title, names, targets):
    peft, case = pytest.importorskip("peft"), PIPELINES[title]
    pipeline = case.pipeline()
    baseline = case.run(pipeline)
    handle = apply_tome(pipeline, ratio=0.5, targets=targets)
    network, merged = handle.network, case.run(pipeline)
    torch.manual_seed(7)
    network.add_adapter(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    with_lora = case.run(pipeline)
    assert difference(with_lora, merged) > 1e-4
    assert counts(handle) == {(case.tokens, case.tokens // 2)}
    # Loaded before applying it is the same.
    handle.remove()
    handle = apply_tome(pipeline, ratio=0.5, targets=targets)
    assert torch.equal(case.run(pipeline), with_lora)
    recurse_remove_peft_layers(network)  # what unload_lora_weights() does
    assert torch.equal(case.run(pipeline), merged)
    handle.remove()
    assert torch.equal(case.run(pipeline), baseline)


# --- attention processors -------------------------------------------------------------------------


PROCESSORS = {"sliced": lambda p: p.enable_attention_slicing("max")}
PROCESSORS["fused projections"] = lambda p: p.unet.fuse_qkv_projections()
for kind in ("AttnProcessor2_0", "AttnProcessor"):
    processor = getattr(attention_processor, kind)
    PROCESSORS[kind] = lambda p, processor=processor: p.unet.set_attn_processor(processor())


@pytest.mark.parametrize("switch_on", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("first", ["merging", "processor"])
@pytest.mark.parametrize("targets", ["auto", ["attn", "crossattn"]], ids=str)
def test_attention_processors(switch_on, first, targets):
    pipeline, options = SD.pipeline(), dict(ratio=0.5, targets=targets)
    baseline = SD.run(pipeline)
    handle = apply_tome(pipeline, **options)
    expected = SD.run(pipeline)
    if first == "processor":
        handle.remove()
    switch_on(pipeline)
    if first == "processor":
        handle = apply_tome(pipeline, **options)
    torch.testing.assert_close(SD.run(pipeline), expected, rtol=1e-3, atol=1e-4)
    handle.remove()
    torch.testing.assert_close(SD.run(pipeline), baseline, rtol=1e-3, atol=1e-4)
