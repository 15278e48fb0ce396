# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""diffusers pipelines from folders: what they generate, and what is refused before they load."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_folders
import torch
from PIL import Image

import mmagic_tome
from mmagic_tome import ToMeError
from mmagic_tome.lab.request import Request
from mmagic_tome.lab.runners.calls import PipelineCall
from mmagic_tome.lab.runners.pipelines import PipelineRunner, PipelineSource

PROMPTS = ("a cat", "dog")
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
WIDE = IMAGE.resize((96, 64))
INPUTS = {
    "img2img": dict(images=[IMAGE], extra=dict(strength=1.0)),
    "inpaint": dict(images=[IMAGE], masks=[IMAGE]),
    "controlnet": dict(controls=[IMAGE]),
    "wan": dict(frames=5),
    "wan22": dict(frames=5),
}


@pytest.fixture
def described(pipeline_folder, tmp_path):
    """name -> a folder with the JSON files of a pipeline alone."""

    def get(name):
        folder = tmp_path / name
        shutil.copytree(
            pipeline_folder(name), folder, ignore=shutil.ignore_patterns("*.safetensors")
        )
        return folder

    return get


def request_of(name, **changes):
    given = dict(prompts=PROMPTS, steps=2, size=(64, 64), seed=3, batch_size=2)
    return Request(**{**given, **INPUTS.get(name, {}), **changes})


def pixels(image):
    return np.stack([np.asarray(one) for one in (image if isinstance(image, list) else [image])])


@pytest.mark.parametrize("name", tiny_folders.NAMES)
def test_images_are_those_of_a_call_of_the_pipeline_itself(pipeline_folder, name):
    source = PipelineSource(pipeline_folder(name))
    request = request_of(name)
    source.check(request)
    runner = source.load(request)
    ended = []
    output = runner.run([0, 1], on_step=lambda: ended.append(1))
    assert len(ended) == 2
    assert 0 < output.network_seconds < output.seconds

    inputs = {"image": [IMAGE] * 2} if {"images", "controls"} & set(INPUTS.get(name, ())) else {}
    if name == "inpaint":
        inputs["mask_image"] = [IMAGE] * 2
    size = {} if name == "img2img" else dict(height=64, width=64)
    clip = dict(num_frames=5) if runner.video else {}
    result = runner.model(
        prompt=list(PROMPTS),
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(3 + i) for i in range(2)],
        output_type="pil",
        **inputs,
        **size,
        **clip,
        **request.extra,
    )
    assert runner.video == hasattr(result, "frames")
    for ours, theirs in zip(output.images, result.frames if runner.video else result.images):
        assert np.array_equal(pixels(ours), pixels(theirs))

    alone = runner.run([1])
    torch.testing.assert_close(alone.latents[0], output.latents[1], rtol=1e-3, atol=1e-2)
    assert (output.latents[0] - output.latents[1]).abs().max() > 0.1


def test_latents_are_what_the_vae_decoded(pipeline_folder):
    request = request_of("sd")
    runner = PipelineSource(pipeline_folder("sd")).load(request)
    output = runner.run([0, 1])
    assert output.latents.dtype == torch.float32
    with torch.no_grad():
        decoded = runner.model.vae.decode(output.latents).sample
    again = runner.model.image_processor.postprocess(decoded, output_type="pil")
    assert all(np.array_equal(pixels(x), pixels(y)) for x, y in zip(output.images, again))


def test_a_clip_that_is_decoded_frame_by_frame_is_one_row_of_latents(pipeline_folder):
    import diffusers
    from tiny_unets import FRAMES, motion_unet

    parts = PipelineSource(pipeline_folder("sd")).load(request_of("sd")).model.components
    shared = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    pipeline = diffusers.AnimateDiffPipeline(**shared, unet=motion_unet(), motion_adapter=None)
    request = request_of("", frames=FRAMES, extra=dict(decode_chunk_size=2))
    output = PipelineRunner(pipeline, request).run([0, 1])
    assert output.latents.shape == (2, FRAMES, 4, 8, 8)
    assert [len(clip) for clip in output.images] == [FRAMES, FRAMES]


def test_a_run_leaves_the_pipeline_as_it_was_even_if_it_fails(pipeline_folder, monkeypatch):
    runner = PipelineSource(pipeline_folder("sd")).load(request_of("sd"))
    pipeline = runner.model
    pipeline.set_progress_bar_config(desc="mine")
    runner.run([0])
    assert "decode" not in vars(pipeline.vae)
    assert pipeline._progress_bar_config == {"desc": "mine"}

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipeline.vae, "decode", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.run([0])
    assert vars(pipeline.vae)["decode"] is fails
    assert pipeline._progress_bar_config == {"desc": "mine"}
    assert not pipeline.unet._forward_hooks and not pipeline.unet._forward_pre_hooks


def test_img2img_takes_the_size_of_its_image_or_resizes_it(pipeline_folder):
    source = PipelineSource(pipeline_folder("img2img"))
    image = IMAGE.resize((60, 44))  # width, height
    runner = source.load(request_of("img2img", images=[image], size=None))
    assert runner.size == (40, 56)
    assert runner.run([0]).images[0].size == (56, 40)
    runner = PipelineRunner(runner.model, request_of("img2img", images=[image], size=(32, 48)))
    assert runner.run([0]).images[0].size == (48, 32)


def test_inputs_of_several_sizes_are_brought_to_the_one_that_is_stated(pipeline_folder):
    source = PipelineSource(pipeline_folder("inpaint"))
    both, alone = (
        source.load(request_of("inpaint", images=images, masks=[WIDE]))
        for images in ([WIDE, IMAGE], [WIDE.resize((64, 64)), IMAGE])
    )
    assert np.array_equal(*(pixels(one.run([0, 1]).images) for one in (both, alone)))
    # Without a size they are brought to that of the first image.
    first = source.load(request_of("inpaint", images=[WIDE, IMAGE], masks=[WIDE], size=None))
    assert [image.size for image in first.run([0, 1]).images] == [(96, 64)] * 2


def test_an_upscaler_enlarges_its_image_at_every_run(pipeline_folder):
    from diffusers import StableDiffusionUpscalePipeline
    from tiny_pipelines import upscaler_parts

    parts = PipelineSource(pipeline_folder("sd")).load(request_of("sd")).model.components
    text = {name: parts[name] for name in ("text_encoder", "tokenizer")}
    pipeline = StableDiffusionUpscalePipeline(**{**upscaler_parts(), **text})
    request = request_of("", size=None, images=[IMAGE.resize((24, 16))], extra=dict(noise_level=9))
    runner = PipelineRunner(pipeline, request)
    first, second = runner.run([0]), runner.run([0])
    assert runner.size == first.images[0].size[::-1] == (64, 96)
    assert torch.equal(first.latents, second.latents)


def test_weights_that_are_there_in_half_precision_only(pipeline_folder, tmp_path):
    request = request_of("sd")
    pipeline = PipelineSource(pipeline_folder("sd")).load(request, dtype=torch.float16).model
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    source = PipelineSource(tmp_path, options=dict(torch_dtype="bf16", variant="fp16"))
    assert source.load(request).dtype == torch.bfloat16


# --- before weights are loaded --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "sd",
            dict(images=[IMAGE]),
            r"takes no images \(--img\); leave them out .it takes: text",
        ),
        ("sd", dict(frames=4), "takes no frames"),
        ("sd", dict(size=(60, 64)), "multiples of 8; the nearest is 64x64"),
        ("sd3", dict(size=(72, 64)), "multiples of 16"),
        ("flux", dict(size=(64, 72)), "multiples of 16"),
        ("wan", dict(size=(64, 72)), "multiples of 16"),
        ("img2img", dict(images=[]), "needs images"),
        ("inpaint", dict(masks=[]), "needs masks"),
        ("controlnet", dict(controls=["nowhere.png"]), "nowhere.png does not exist"),
        ("sd", dict(extra=dict(guidance_rescal=0.5)), "did you mean 'guidance_rescale'"),
        ("sd", dict(extra=dict(num_inference_steps=5)), "has no option 'num_inference_steps'"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_before_weights_are_loaded(
    described, name, changes, message
):
    source = PipelineSource(described(name))
    source.check(request_of(name))
    with pytest.raises(ToMeError, match=message):
        source.check(request_of(name, **changes))


def test_a_pipeline_without_a_known_network_is_refused_before_weights_are_loaded(described):
    from diffusers import SanaTransformer2DModel

    folder = described("pixart")
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"][1] = "SanaTransformer2DModel"
    (folder / "model_index.json").write_text(json.dumps(index))
    with torch.device("meta"):
        SanaTransformer2DModel(num_layers=1).save_config(folder / "transformer")
    with pytest.raises(ToMeError, match="SanaTransformer2DModel: no adapter is written"):
        PipelineSource(folder).check(request_of("pixart"))


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("nobody/nothing", None, "'nobody/nothing' is neither a folder nor"),
        ("/nowhere/sd", None, "/nowhere/sd is not there"),
        ("sd/unet", None, r"it has no model_index\.json"),
        ("sd", "StableDiffusionPipelin", "has no pipeline 'StableDiffusionPipelin'"),
        ("sd", None, "cannot load .*sd: "),
    ],
)
def test_what_is_not_there_is_said_in_one_line(described, path, kind, message):
    if path.startswith("sd"):
        path = described("sd").parent / path
    with pytest.raises(ToMeError, match=message) as caught:
        PipelineSource(path, type=kind).load(request_of("sd"))
    assert "\n" not in str(caught.value)


def test_parts_that_are_stored_in_another_precision_fit_together():
    """transformers loads half precision as it is, diffusers as float32."""
    folder = Path(mmagic_tome.__file__).parent / "assets" / "demo_model"
    request = Request(prompts=("red apple",), steps=2, size=(64, 64))
    runner = PipelineSource(folder).load(request)
    parts = (runner.model.unet, runner.model.vae, runner.model.text_encoder)
    assert {next(part.parameters()).dtype for part in parts} == {torch.float32}
    assert runner.run([0]).images[0].size == (64, 64)


def test_an_image_may_be_optional():
    from diffusers import FluxKontextPipeline

    call = PipelineCall(FluxKontextPipeline, {})
    assert call.arguments_of == dict(images="image") and not call.needed
