# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The demo diffusion transformer: how it is trained and exported, and what is shipped."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from test_demo_model_training import TOOLS, tools  # noqa: F401  (a fixture)

import mmagic_tome
from mmagic_tome.lab import runners
from mmagic_tome.lab.infer import infer

ROOT = TOOLS.parents[1]
ASSETS = ROOT / "mmagic_tome" / "assets" / "demo_dit"
CAPTIONS = ["red apple", "panda", "house"]
shipped = pytest.mark.skipif(not ASSETS.is_dir(), reason="the weights are not in this checkout")


@pytest.fixture
def tiny(tools, tmp_path):  # noqa: F811
    """(tokenizer, transformer, text encoders), random; no output is zero."""
    torch.manual_seed(0)
    tokenizer = tools["tokenizer"].train_tokenizer(CAPTIONS, tmp_path / "tokenizer", 600, 20)
    models = tools["models_dit"]
    encoders = models.build_text_encoders(len(tokenizer), tokenizer.eos_token_id, width=0.5)
    width = sum(encoder.config.hidden_size for encoder in encoders)
    transformer = models.build_transformer(width=64, layers=2, text_width=width, sample_size=16)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return tokenizer, transformer, encoders


def test_a_biased_key_is_as_many_tokens_of_zeros(tools, tiny):  # noqa: F811
    """Of the third text encoder that is not there: one token in training, 1 to 256 at inference."""
    tokenizer, transformer, encoders = tiny
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=20, return_tensors="pt").input_ids
    text, pooled = tools["models_dit"].encode_text(*encoders, ids)
    given = dict(pooled_projections=pooled, timestep=torch.tensor([1.0, 500.0, 999.0]))
    noisy = torch.randn(3, 4, 16, 16)

    def run(tokens, **kwargs):
        padded = torch.nn.functional.pad(text, (0, 0, 0, tokens))
        with torch.no_grad():
            return transformer(noisy, padded, **given, **kwargs).sample

    expected = run(40)
    bias = torch.zeros(1, 1, 1, 64 + 20 + 1)
    bias[..., -1] = np.log(40)
    processor = tools["models_dit"].TrainingAttention()
    transformer.set_attn_processor(processor)
    for processor.ONE_MATRIX in (0, 600):
        torch.testing.assert_close(run(40), expected)
        found = run(1, joint_attention_kwargs={"key_bias": bias})
        torch.testing.assert_close(found, expected)


def test_times_are_in_order_and_shifted_towards_noise(tools):  # noqa: F811
    u = torch.linspace(0, 1, 101)
    even, shifted = (tools["train_dit"].flow_times(u, shift) for shift in (1.0, 3.0))
    assert ((even > 0) & (even < 1) & (even.diff(prepend=even[:1] - 1) >= 0)).all()
    assert even[50] == pytest.approx(0.5) and shifted[50] == pytest.approx(0.75)


def test_sizes_have_batches_of_their_own(tools):  # noqa: F811
    options = dict(sizes=(64, 128), size_batches=(8, 2))
    stage = tools["stages"].Stage("s", size=128, **options)
    assert [stage.batch_at(size) for size in (64, 128)] == [8, 2]
    assert tools["stages"].Stage("s", batch=5, sizes=(64, 128)).batch_at(64) == 5
    with pytest.raises(tools["common"].ToolError, match="size batches"):
        tools["stages"].Stage("s", sizes=(64, 128), size_batches=(8,))


def test_it_is_trained_and_exported_as_a_pipeline(tools, tiny, tmp_path):  # noqa: F811
    tokenizer, transformer, encoders = tiny
    options = dict(steps=6, warmup=1, lr=1e-2, sizes=(32, 64), size_batches=(4, 2))
    stage = tools["stages"].Stage("dit", size=64, **options)
    latents = {size: torch.randn(3, 4, size // 4, size // 4) for size in (32, 64)}
    prompts = tools["train_unet"].Prompts(CAPTIONS, tokenizer)
    arguments = (transformer, encoders, latents, prompts, stage, "cpu")
    loss_fn = tools["train_dit"].flow_loss(*arguments)
    modules = dict(zip(("transformer", "text_encoder", "text_encoder_2"), (transformer, *encoders)))
    trainer = tools["trainer"].Trainer(stage, modules, loss_fn, tmp_path, "cpu")
    before = transformer.proj_out.weight.clone()
    trainer.run()
    assert not torch.equal(transformer.proj_out.weight, before)
    lines = (tmp_path / "logs" / "dit.jsonl").read_text().splitlines()
    assert {json.loads(line)["size"] for line in lines} == {32, 64}

    models = tools["models_dit"]
    vae = models.for_flow(tools["models"].build_vae(width=0.5))
    parts = dict(modules, vae=vae, scheduler=models.build_flow_scheduler())
    folder = tmp_path / "exported"
    arguments = (folder, "StableDiffusion3Pipeline", tools["export_dit"].INDEX, 20)
    written = tools["export"].export(parts, tmp_path / "tokenizer", *arguments)
    assert 0 < written < tools["export"].LIMIT
    # A third text encoder that is not there must be named, as for Stable Diffusion 3 itself.
    entry = dict(from_pretrained=str(folder), text_encoder_3=None, tokenizer_3=None)
    source = runners.open_source(Config(dict(pipeline=entry), cfg_text=" ", filename="dit.py"))
    request = runners.make_request(source, prompts=["red apple"], steps=2, size=64)
    runner = source.load(request)
    assert runner.model.tokenizer_max_length == 20
    assert runner.run([0]).images[0].size == (64, 64)
    mmagic_tome.apply_tome(runner.model, ratio=0.5)
    mmagic_tome.apply_cache(runner.model, tolerance=0.02)
    assert runner.run([0]).images[0].size == (64, 64)


# --- what is shipped ------------------------------------------------------------------------------


@shipped
def test_shipped_files_are_small_and_name_no_machine():
    weights = sum(path.stat().st_size for path in ASSETS.rglob("*.safetensors"))
    assert 10e6 < weights <= 24e6
    for path in [*ASSETS.rglob("*config.json"), ASSETS / "model_index.json"]:
        text = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in text and '"/' not in text, path
    assert (ASSETS / "README.md").is_file()


@shipped
def test_the_demo_runs_and_draws_on_white(tmp_path):
    """What `make demo-dit` does, for one prompt."""
    source = runners.open_source(str(ROOT / "configs" / "demo" / "sd3-emoji_cache-balanced.py"))
    request = runners.make_request(source, prompts=["red apple"])
    result = infer(source, request, compare=True, rounds=1, folder=tmp_path, progress=False)
    assert (tmp_path / result["compare"]).is_file()
    (entry,) = result["images"]
    assert entry["psnr"] is None or entry["psnr"] > 25
    image = np.asarray(Image.open(tmp_path / entry["baseline_file"]).convert("RGB"), float)
    assert image[[2, 2, -3, -3], [2, -3, 2, -3]].min() > 200
    middle = len(image) // 2
    red, green, _ = image[middle - 6 : middle + 6, middle - 6 : middle + 6].mean((0, 1))
    assert red > green + 40
