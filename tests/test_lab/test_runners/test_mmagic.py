# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``lab.runners.mmagic``: all classes of MMagic's family, with tiny random models."""

import mmagic_hub
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

pytest.importorskip("mmagic")

from mmengine import Config

from mmagic_tome import ToMeError, remove_tome
from mmagic_tome.lab.devices import DTYPES, check_device
from mmagic_tome.lab.request import Request
from mmagic_tome.lab.runners import open_source
from mmagic_tome.lab.runners.mmagic_source import CLASSES, MMagicSource, load_config

ONE = mmagic_hub.an_image()
TWO = ONE.rotate(90)
MASK = Image.fromarray((np.eye(64) * 255).astype(np.uint8))
DDIM = dict(type="DDIMScheduler", clip_sample=False)
SEED = 7  # of the second image

# Class -> what a request for two images has beside two prompts, and what `infer` is given for the
# second alone.
INPUTS = {
    "TextualInversion": (dict(prompts=["a dog", "a <x>"]), dict(prompt="a <x>")),
    "StableDiffusionInpaint": (
        dict(images=[ONE, TWO], masks=[MASK]),
        dict(image=TWO, mask_image=MASK),
    ),
    "ControlStableDiffusion": (dict(controls=[ONE, TWO]), dict(control=TWO)),
    "ControlStableDiffusionImg2Img": (
        dict(controls=[ONE], images=[ONE, TWO]),
        dict(control=ONE, latent_image=TWO),
    ),
    "AnimateDiff": (dict(frames=3), dict(video_length=3)),
    "ViCo": (
        dict(prompts=["a dog S*", "a S*"], references=[ONE]),
        dict(prompt=["a S*"], image_reference=ONE, seed=SEED),
    ),
    "FastComposer": (
        dict(prompts=["a dog img", "a cat img"], references=[ONE, TWO]),
        dict(prompt="a cat img", reference_subject_images=[TWO]),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With CLIP's own number of words, on which ViCo insists."""
    return tiny.tiny_sd_folder(tmp_path_factory.mktemp("clip_sd"), vocabulary=49408)


def source_of(kind="StableDiffusion", folder="somebody/nowhere", checkpoint=None, **entries):
    """A source; its weights are only found in a folder that is given."""
    model = dict(entries.pop("model", {}))
    if kind == "ControlStableDiffusionImg2Img":
        # With a scheduler of its own, MMagic cannot add noise to images.
        model.update(type=kind, scheduler=DDIM, test_scheduler=dict(DDIM))
        kind = "ControlStableDiffusion"
    model = tiny.tiny_config(kind, folder, **model)
    return MMagicSource(Config(dict(model=model, **entries)), checkpoint)


def request_of(kind="StableDiffusion", **changes):
    usual = dict(prompts=["a dog", "a cat"], steps=2, size=(64, 64), seed=SEED - 1, batch_size=2)
    return Request(**{**usual, **INPUTS.get(kind, [{}])[0], **changes})


def pixels(image):
    return np.asarray([np.asarray(one) for one in image] if isinstance(image, list) else image)


@pytest.mark.parametrize("kind", [*CLASSES, "native"])
def test_every_class_makes_the_same_image_alone_and_in_a_batch(kind, folder):
    source = source_of(kind, folder, tome_cfg=dict(ratio=0.5))
    runner = source.load(request_of(kind))
    assert source.setting.tome.ratio == 0.5 and runner.source is source
    tiny.randomise(runner.model)
    merged = runner.run([0, 1])
    assert all(row["calls"] for row in runner.model.tome_handle.stats())
    remove_tome(runner.model)

    ended = []
    both = runner.run([0, 1], on_step=lambda: ended.append(1))
    frames = (3,) if runner.video else ()
    assert runner.video == source.video == (kind == "AnimateDiff")
    assert len(both.images) == 2 and both.latents.shape == (2, 4, *frames, 8, 8)
    assert pixels(both.images[0]).shape == (*frames, 64, 64, 3)
    assert both.latents.isfinite().all() and not torch.equal(both.latents, merged.latents)
    scheduler = getattr(runner.model, runner.call.scheduler)
    assert len(ended) == len(scheduler.timesteps) == 2
    assert 0 < both.network_seconds < both.seconds

    alone = runner.run([1])
    torch.testing.assert_close(alone.latents, both.latents[1:], rtol=0, atol=1e-3)
    np.testing.assert_allclose(
        pixels(alone.images[0]).astype(int), pixels(both.images[1]), rtol=0, atol=1
    )
    # The same by hand.
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(1, 4, *frames, 8, 8, generator=generator)
    given = dict(prompt="a cat", height=64, width=64, num_inference_steps=2)
    given.update(latents=latents, generator=generator, **INPUTS.get(kind, [0, {}])[1])
    image = runner.model.infer(**given)["samples"][0]
    if runner.video:
        image = (np.asarray(image).transpose(1, 2, 3, 0) * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(pixels(alone.images[0]), image)


def test_files_and_sizes_of_inputs(folder, tmp_path):
    TWO.resize((80, 48)).convert("L").save(tmp_path / "two.png")
    ONE.save(tmp_path / "one.png")
    names = [tmp_path / "two.png"], [str(tmp_path / "one.png")]
    kind = "ControlStableDiffusionImg2Img"
    request = request_of(kind, images=names[0], controls=names[1], size=(48, 72))
    output = source_of(kind, folder).load(request).run([0, 1])
    assert [image.size for image in output.images] == [(72, 48), (72, 48)]


def test_noise_of_a_whole_batch_is_never_drawn(folder):
    """With a reference, and with MMagic's scheduler and noise in each step."""
    kind = "ControlStableDiffusionImg2Img"
    source = source_of(kind, folder, model=dict(attention_injection=True))
    request = request_of(kind, references=[ONE], steps=4, extra=dict(strength=0.5))
    for runner in (
        source.load(request),
        source_of(folder=folder).load(request_of(extra=dict(eta=1.0))),
    ):
        ended = []
        both = runner.run([0, 1], on_step=lambda ended=ended: ended.append(1))
        assert torch.equal(runner.run([1]).latents, both.latents[1:])
        assert len(ended) == 2


def test_a_text_that_is_cut_is_no_obstacle_to_a_batch(folder):
    runner = source_of(folder=folder).load(request_of(prompts=["a cat", "a dog " * 20]))
    assert torch.equal(runner.run([1]).latents, runner.run([0, 1]).latents[1:])


def test_two_subjects_in_one_prompt(folder):
    request = request_of(
        "FastComposer", prompts=["a cat img and a dog img"], references=[[ONE, TWO]]
    )
    runner = source_of("FastComposer", folder).load(request)
    given = dict(height=64, width=64, num_inference_steps=2, reference_subject_images=[ONE, TWO])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(SEED - 1))
    image = runner.model.infer(request.prompts[0], latents=noise, **given)["samples"][0]
    np.testing.assert_array_equal(pixels(runner.run([0]).images[0]), pixels(image))


def test_nothing_is_printed_and_the_model_is_as_it_was(folder, capfd):
    runner = source_of("AnimateDiff", folder).load(request_of("AnimateDiff", size=(16, 16)))
    before = set(vars(runner.model))
    capfd.readouterr()
    runner.run([0])
    assert capfd.readouterr() == ("", "")
    assert set(vars(runner.model)) == before


@pytest.mark.parametrize("kind", ["native", "ViCo"])
def test_dtype_casts_the_whole_model(kind, folder, recwarn):
    runner = source_of(kind, folder).load(request_of(kind), dtype=DTYPES["bf16"])
    assert any("has random weights" in str(one.message) for one in recwarn) == (kind == "native")
    assert runner.dtype == torch.bfloat16
    assert runner.run([0]).latents.dtype == torch.float32


# --- before anything is loaded --------------------------------------------------------------------

WRONG = {
    r"needs masks \(--mask\), its 'mask_image'": ("StableDiffusionInpaint", dict(masks=[])),
    r"takes no masks \(--mask\); leave them out .it takes: text only": (None, dict(masks=[MASK])),
    "image no.png does not exist": ("ControlStableDiffusion", dict(controls=["no.png"])),
    "not clips": (None, dict(frames=4)),
    "at most 32 frames": ("AnimateDiff", dict(frames=33)),
    "takes no 'strength'; it takes eta$": (None, dict(extra=dict(strength=1))),
    "takes no 'latents'": (None, dict(extra=dict(latents=1))),
    "needs guidance above 1": ("AnimateDiff", dict(guidance=1.0)),
    "multiples of 8; the nearest is 64x72": (None, dict(size=(64, 70))),
    "square images": ("ViCo", dict(size=(64, 72))),
    "'a dog' has 0, and 1 references": ("FastComposer", dict(prompts=["a dog", "a cat img"])),
    "attention_injection=True": ("ControlStableDiffusionImg2Img", dict(references=[ONE])),
    "force_zeros_for_empty_prompt=False": ("StableDiffusionXL", dict(negative_prompt="a dog")),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_shows_before_anything_is_loaded(message):
    kind, changes = WRONG[message]
    kind = kind or "StableDiffusion"
    source = source_of(kind)
    source.check(request_of(kind))  # without the change
    with pytest.raises(ToMeError, match=message):
        source.check(request_of(kind, **changes))


def test_weights_that_are_not_there():
    with pytest.raises(ToMeError, match=r"model\.unet\.from_pretrained .* not there: /nowhere"):
        source_of(folder="/nowhere").check(request_of())
    with pytest.raises(ToMeError, match=r"cannot build StableDiffusion.*somebody/nowhere"):
        source_of().load(request_of())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(model=dict(type="EDSRNet")), "EDSRNet is none of MMagic's Stable Diffusion"),
        (dict(model=dict(type="StableDifusion")), "MMagic has no model 'StableDifusion'"),
        (dict(), "no model=dict"),
        (dict(model=dict(type="StableDiffusion"), tome_cfg=dict(ratio=0.95)), "ratio=0.95"),
        (dict(model=dict(type="StableDiffusion", cache_cfg="fast"), cache_cfg="quality"), "twice"),
    ],
)
def test_configs_that_cannot_be_run(config, message):
    with pytest.raises(ToMeError, match=message):
        MMagicSource(Config(config)).check(request_of())


# --- weights and configs --------------------------------------------------------------------------


def test_a_checkpoint_is_loaded(folder, tmp_path):
    request, file = request_of(), tmp_path / "model.pth"
    before = source_of(folder=folder).load(request)
    first = before.run([0]).latents
    tiny.randomise(before.model, seed=1)
    expected = before.run([0]).latents
    weights = before.model.state_dict()
    torch.save(dict(state_dict={f"module.{key}": weights[key] for key in weights}), file)
    for given in (dict(checkpoint=file), dict(load_from=str(file))):
        latents = source_of(folder=folder, **given).load(request).run([0]).latents
        assert torch.equal(latents, expected) and not torch.equal(latents, first)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dict(other=torch.ones(1)), "no weight of StableDiffusion: .*'other'"),
        ({"unet.model.conv_in.bias": torch.ones(1)}, "size mismatch"),
    ],
)
def test_a_checkpoint_of_something_else_is_an_error(content, message, folder, tmp_path):
    file = tmp_path / "model.pth"
    torch.save(content, file)
    with pytest.raises(ToMeError, match=message):
        source_of(folder=folder, checkpoint=file).load(request_of())


def test_configs_are_found_and_changed(tmp_path, monkeypatch):
    name = "mmagic_tome::demo/sd-emoji_tome-5e-1.py"
    source = open_source(name, cfg_options={"tome_cfg.ratio": 0.25, "evaluation.rounds": 3})
    assert source.setting.tome.ratio == 0.25 and source.setting.cache is None
    assert (source.name, source.class_name) == ("sd-emoji_tome-5e-1", "StableDiffusion")
    assert source.defaults["steps"] == 16 and source.evaluation == dict(rounds=3)
    assert source.path == name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("model = (")
    (tmp_path / "text.txt").write_text("a cat")
    for wrong, message in {
        "no.py": "no.py does not exist",
        "text.txt": "cannot read config text.txt",
        "mmagic_tome::demo/x.py": "does not exist",
        "nopackage::x.py": "no package 'nopackage'",
        "broken.py": "cannot read config broken.py: SyntaxError",
    }.items():
        with pytest.raises(ToMeError, match=message):
            load_config(wrong)


def test_devices():
    assert check_device("cpu") == torch.device("cpu")
    assert check_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("tpu", "cuda:99"):
        with pytest.raises(ToMeError, match=f"device '?{wrong}"):
            check_device(wrong)
