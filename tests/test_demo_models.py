# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The demo models: how data is joined, that training resumes, what is exported and shipped."""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

import mmagic_tome
from mmagic_tome.lab.infer import infer
from mmagic_tome.lab.methods import Method
from mmagic_tome.lab.request import make_request
from mmagic_tome.lab.runners import open_source

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "examples" / "demo_model"
ASSETS = ROOT / "mmagic_tome" / "assets" / "demo_model"


@pytest.fixture(scope="module")
def tools():
    """The tools import each other by bare names; keep those names out of the other tests' way."""
    names = [path.stem for path in TOOLS.glob("*.py")]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            del sys.modules[name]


# --- data -----------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "package" / "assets"
    folder.mkdir(parents=True)
    stems = {
        "1f680": (255, 0, 0, 255),  # rocket
        "1f98a": (0, 0, 0, 0),  # fox, fully transparent
        "2764-fe0f": (0, 255, 0, 255),  # red heart
        "1f44d-1f3fb": (0, 0, 255, 255),  # thumbs up, light skin tone
        "1f1e9-1f1ea": (0, 0, 255, 255),  # a flag
        "not-a-code-point": (0, 0, 255, 255),
    }
    for stem, colour in stems.items():
        Image.new("RGBA", (256, 256), colour).save(folder / f"{stem}.webp", lossless=True)
    return folder


def test_pictures_are_joined_with_captions_by_code_point(tools, pictures, tmp_path):
    pytest.importorskip("emoji")
    prepare_data = tools["prepare_data"]
    found = prepare_data.collect(pictures)
    assert sorted(dict(found)) == ["fox", "red heart", "rocket"]
    with pytest.raises(tools["common"].ToolError, match="no such emoji"):
        prepare_data.store(found, {"no such emoji"}, tmp_path)
    prepare_data.store(found, {"fox"}, tmp_path / "data")
    entries = json.loads((tmp_path / "data" / "captions.json").read_text())
    (fox,) = (i for i, entry in enumerate(entries) if entry["concept"])
    assert entries[fox]["caption"] == "fox"
    for size in (256, 128, 64):
        images = np.load(tmp_path / "data" / f"images_{size}.npy")
        assert images.shape == (3, size, size, 3)
        assert (images[fox] == 255).all(), "pictures lie on white"


def test_captions_train_or_are_held_out(tools):
    read = tools["prepare_data"].read_concepts
    shipped, mixed, held_out = (
        read(TOOLS / name) for name in ("concepts.txt", "concepts_mixed.txt", "held_out.txt")
    )
    assert not mixed & held_out
    assert shipped < mixed
    assert (len(mixed), len(held_out)) == (360, 1247)


# --- training -------------------------------------------------------------------------------------


def tiny_trainer(tools, folder, **kwargs):
    """(trainer of a linear layer, the layer); keywords are those of its stage."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 4)

    def loss_fn(generator, step, part, parts):
        x = torch.randn(8, 4, generator=generator)
        return (module(x) - x.flip(1)).square().mean()

    stage = tools["stages"].Stage("tiny", steps=8, batch=8, lr=1e-2, warmup=2, **kwargs)
    modules = {"module": module}
    trainer = tools["trainer"].Trainer(stage, modules, loss_fn, folder, "cpu")
    return trainer, module


def test_sigterm_writes_a_checkpoint_from_which_it_goes_on_as_if_nothing_was(tools, tmp_path):
    whole, module = tiny_trainer(tools, tmp_path / "whole")
    whole.run()

    first, _ = tiny_trainer(tools, tmp_path / "pieces")
    assert not first.resume()
    loss_fn, before = first.loss_fn, signal.getsignal(signal.SIGTERM)

    def terminated_in_the_third_step(generator, step, part, parts):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_fn(generator, step, part, parts)

    first.loss_fn = terminated_in_the_third_step
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert signal.getsignal(signal.SIGTERM) == before

    second, resumed = tiny_trainer(tools, tmp_path / "pieces")
    assert second.resume() and second.state.step == 3
    second.run()
    assert second.finished
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for a, b in zip(whole.ema.shadow_params, second.ema.shadow_params):
        assert torch.equal(a, b)


def test_steps_draw_sizes_by_weight(tools):
    options = dict(sizes=(128, 256), size_weights=(1, 2), merge=0.5, merge_share=0.75)
    stage = tools["stages"].Stage("s", size=256, **options)
    drawn = [stage.draw(step) for step in range(1200)]
    assert drawn == [stage.draw(step) for step in range(1200)]
    assert {merge for size, merge in drawn if size == 128} == {0.0}
    merges = [merge for size, merge in drawn if size == 256]
    assert len(merges) == pytest.approx(800, abs=60)
    assert merges.count(0.5) == pytest.approx(0.75 * len(merges), abs=50)
    assert merges.count(0.5) + merges.count(0.0) == len(merges)

    stage = tools["stages"].Stage("s", size=128, sizes=(64, 128), size_batches=(8, 2))
    assert [stage.batch_at(size) for size in (64, 128)] == [8, 2]
    assert tools["stages"].Stage("s", batch=5, sizes=(64, 128)).batch_at(64) == 5
    for wrong, said in (
        (dict(size_weights=(1, 2, 3)), "size weights"),
        (dict(size_weights=(1, -1)), "size weights"),
        (dict(size_batches=(8,)), "size batches"),
    ):
        with pytest.raises(tools["common"].ToolError, match=said):
            tools["stages"].Stage("s", sizes=(128, 256), **wrong)


def test_sizes_of_one_stage_are_trained_in_turn_and_logged_apart(tools, tmp_path):
    """A half-size UNet on random latents of two sizes, the larger one with token merging."""
    captions = ["red apple", "panda"]
    tokenizer = tools["tokenizer"].train_tokenizer(captions, tmp_path / "bpe", 600)
    ids = tokenizer("Red apple").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "red apple"

    options = dict(steps=6, batch=2, warmup=1, size=64, sizes=(32, 64), merge=0.5)
    stage = tools["stages"].Stage("mixed", **options)
    models = tools["models"].build_models(width=0.5, vocab_size=600, sample_size=16)
    modules = {name: models[name] for name in ("unet", "text_encoder")}
    latents = {size: torch.randn(2, 4, size // 4, size // 4) for size in (32, 64)}
    prompts = tools["train_unet"].Prompts(captions, tokenizer)
    arguments = (latents, prompts, models["scheduler"], stage, "cpu")
    loss_fn = tools["train_unet"].diffusion_loss(*modules.values(), *arguments)
    tools["trainer"].Trainer(stage, modules, loss_fn, tmp_path, "cpu").run()

    lines = (tmp_path / "logs" / "mixed.jsonl").read_text().splitlines()
    log = {entry["size"]: entry for entry in map(json.loads, lines)}
    drawn = [stage.draw(step)[0] for step in range(6)]
    assert {size: log[size]["steps"] for size in log} == {n: drawn.count(n) for n in (32, 64)}
    assert (log[32]["merge"], log[64]["merge"]) == (0.0, 0.5)


# --- the diffusion transformer --------------------------------------------------------------------


CAPTIONS = ["red apple", "panda", "house"]


@pytest.fixture
def tiny_dit(tools, tmp_path):
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


def test_a_biased_key_is_as_many_tokens_of_zeros(tools, tiny_dit):
    """Of the third text encoder that is not there: one token in training, 1 to 256 at inference."""
    tokenizer, transformer, encoders = tiny_dit
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


def test_it_is_trained_and_exported_as_a_pipeline(tools, tiny_dit, tmp_path):
    tokenizer, transformer, encoders = tiny_dit
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
    source = open_source(Config(dict(pipeline=entry), cfg_text=" ", filename="dit.py"))
    request = make_request(source, prompts=["red apple"], steps=2, size=64)
    runner = source.load(request)
    assert runner.model.tokenizer_max_length == 20
    assert runner.run([0]).images[0].size == (64, 64)
    mmagic_tome.apply_tome(runner.model, ratio=0.5)
    mmagic_tome.apply_cache(runner.model, tolerance=0.02)
    assert runner.run([0]).images[0].size == (64, 64)


# --- what is shipped ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo_model", "demo_dit"])
def test_shipped_files_are_small_and_name_no_machine(name):
    folder = ASSETS.parent / name
    assert 10e6 < sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 24e6
    for path in [*folder.rglob("*config.json"), folder / "model_index.json"]:
        text = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in text and '"/' not in text, path
    assert (folder / "README.md").is_file()


def test_shipped_model_fits_mmagic_and_knows_its_captions(tools):
    """Not noise: white around, and the colours that the captions ask for."""
    pipeline = tools["evaluate"].load_pipeline(ASSETS)
    # MMagic divides the latents by this number whatever the config says.
    assert pipeline.vae.config.scaling_factor == 0.18215
    assert len(pipeline.tokenizer) == pipeline.text_encoder.config.vocab_size
    size = pipeline.unet.config.sample_size * 4
    prompts = ["red heart", "blue heart", "yellow heart"]
    pictures = tools["evaluate"].generate(pipeline, prompts, size, 8, 3.0, 0, 3).astype(float)
    corners = pictures[:, [2, 2, -3, -3], [2, -3, 2, -3]]
    assert corners.min() > 215
    middle = pictures[:, size * 2 // 5 : size * 3 // 5, size * 2 // 5 : size * 3 // 5].mean((1, 2))
    red, blue, yellow = middle
    assert red[0] > red[1] + 40 and red[0] > red[2] + 40
    assert blue[2] > blue[0] + 40
    assert yellow[0] > yellow[2] + 40 and yellow[1] > yellow[2] + 40


def test_the_demo_runs_and_draws_on_white(tmp_path):
    """What `make demo-dit` does, for one prompt."""
    source = open_source(str(ROOT / "configs" / "demo" / "sd3-emoji_cache-balanced.py"))
    request = make_request(source, prompts=["red apple"])
    method = Method("applied", source.setting)
    frame = infer(source, request, method, compare=True, rounds=1, folder=tmp_path)
    assert (tmp_path / "compare.png").is_file() and frame["psnr"][1] > 25
    path = tmp_path / "images" / "baseline" / "000000.png"
    image = np.asarray(Image.open(path).convert("RGB"), float)
    assert image[[2, 2, -3, -3], [2, -3, 2, -3]].min() > 200
    middle = len(image) // 2
    red, green, _ = image[middle - 6 : middle + 6, middle - 6 : middle + 6].mean((0, 1))
    assert red > green + 40
