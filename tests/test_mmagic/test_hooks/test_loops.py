# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic's metrics and ours in one evaluator, on a Stable Diffusion of MMagic."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmagic")

from mmagic_tome import ToMeError, get_handle
from mmagic_tome.apis.text2image import Generator, Request
from mmagic_tome.evaluation.generate import LatentWatch
from mmagic_tome.evaluation.metrics import (
    PAIRED,
    SETS,
    build_paired,
    build_set,
    relative_latent_error,
)

PROMPTS = ["a cat", "a dog", "cat", "dog"]


class Inception(torch.nn.Module):
    """What MMagic takes of a TorchScript Inception, in two layers of random weights."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=4)
        self.fc = torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        y = self.conv(x.float() / 255.0).mean(dim=[2, 3])
        return y if return_features else torch.softmax(20 * self.fc(y), 1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.manual_seed(0)
    torch.jit.script(Inception().eval().requires_grad_(False)).save(str(path))
    return str(path)


def of_mmagic(name, inception, folder, **options):
    options.update(fake_nums=4, inception_style="StyleGAN", inception_path=inception)
    if name == "FID":
        options.update(real_nums=4, inception_pkl=str(folder / "real.pkl"))
    return dict(type=name, **options)


def tensor(images):
    arrays = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(arrays.copy()).permute(0, 3, 1, 2)


def test_metrics_of_both_in_one_evaluator(make_runner, tmp_path, inception, real_pictures):
    metrics = [
        dict(type="PSNR", gt_key="dense_img"),
        dict(type="SSIM", gt_key="dense_img"),
        dict(type="PSNR", prefix="to_real"),
        of_mmagic("FID", inception, tmp_path),
        of_mmagic("IS", inception, tmp_path, splits=2),
        dict(type="ToMePSNR"),
        dict(type="ToMeSSIM"),
        dict(type="ToMeLatentError"),
        dict(type="ToMeMaxError"),
        dict(type="ToMeEfficientNetFrechet", min_samples=2),
        dict(type="ToMeEfficientNetFrechet", min_samples=2, against="dense"),
    ]
    runner = make_runner("test", tmp_path, metrics=metrics, loop=dict(seed=11, steps=3))
    found = runner.test()

    # The same by hand.
    model = runner.model
    handle = get_handle(model)
    request = Request(PROMPTS, steps=3, guidance=3.0, size=(64, 64), seed=11)
    with LatentWatch(model) as watch:
        merged = tensor(Generator(model, request).run(range(4))[0])
        latents = watch.latents
        handle.ratio = 0
        dense = tensor(Generator(model, request).run(range(4))[0])
        error = relative_latent_error(watch.latents, latents)
    real = tensor([Image.open(f"{real_pictures}/{i}.png") for i in range(4)])

    psnr = build_paired("psnr")(dense, merged)
    assert found["PSNR"] == pytest.approx(float(psnr.mean()), rel=1e-4)
    assert found["tome/psnr"] == pytest.approx(build_paired("psnr").mean(psnr), rel=1e-4)
    assert found["tome/latent_error"] == pytest.approx(float(error.mean()), rel=1e-3)
    largest = int((dense.int() - merged.int()).abs().max())
    assert found["tome/max_error"] == pytest.approx(largest, abs=1)
    ssim = build_paired("ssim")(dense, merged)
    assert found["tome/ssim"] == pytest.approx(float(ssim.mean()), rel=1e-4)
    assert found["SSIM"] == pytest.approx(float(ssim.mean()), abs=0.02)
    to_real = build_paired("psnr")(real, merged).mean()
    assert found["to_real/PSNR"] == pytest.approx(float(to_real), rel=1e-4)

    network = torch.jit.load(inception)
    x, y = (network(images, return_features=True).double() for images in (merged, real))
    from mmagic_tome.evaluation.metrics.distances import frechet_distance_of_sets

    assert found["fid"] == pytest.approx(frechet_distance_of_sets(x, y), rel=1e-2)
    assert found["fid"] > 0
    assert 1 <= found["is"] <= 10

    frechet = build_set("frechet_efficientnet_lite0", min_samples=2)
    features = [frechet.features(images) for images in (merged, real, dense)]
    with pytest.warns(UserWarning, match="strongly biased"):
        for name, other in (("", features[1]), ("_to_dense", features[2])):
            expected = frechet.compute(features[0], other)[frechet.name]
            assert found[f"tome/{frechet.name}{name}"] == pytest.approx(expected, rel=1e-2)


def test_numbers_depend_neither_on_batches_nor_on_the_global_generator(make_runner, tmp_path):
    found = []
    for batch in (2, 3):
        runner = make_runner("val", tmp_path / str(batch), images=False)
        runner._val_dataloader["batch_size"] = batch
        torch.manual_seed(batch)
        found.append(runner.val()["tome/psnr"])
    # To what the arithmetic of another batch size changes.
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    runner = make_runner("val", tmp_path / "seed", images=False, loop=dict(seed=50))
    assert runner.val()["tome/psnr"] != pytest.approx(found[0], rel=1e-3)


def test_the_loop_leaves_the_ratio_as_it_was(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, images=False)
    runner.test()
    assert get_handle(runner.model).ratio == 0.5


def test_without_merging_there_are_no_pairs(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, images=False, tome_cfg=None)
    with pytest.raises(ToMeError, match="compares with the dense picture"):
        runner.test()


def test_no_real_pictures_for_a_metric_that_wants_them(make_runner, tmp_path):
    for metric, message in (
        (dict(type="PSNR"), "gt_key='dense_img'"),
        (dict(type="ToMeEfficientNetFrechet", min_samples=2), "against='dense'"),
    ):
        runner = make_runner("test", tmp_path, images=False, metrics=[metric])
        with pytest.raises(ToMeError, match=message):
            runner.test()


def test_more_pictures_wanted_than_prompts(make_runner, tmp_path, inception):
    for number, message in ((5, "wants fake_nums=5 pictures, and there are 4"), (-1, "write 4")):
        metric = dict(of_mmagic("IS", inception, tmp_path), fake_nums=number)
        runner = make_runner("test", tmp_path, images=False, metrics=[metric])
        with pytest.raises(ToMeError, match=message):
            runner.test()


def test_data_of_prompts(real_pictures, tmp_path):
    from mmagic_tome.mmagic.hooks.prompts import ToMePromptDataset

    data = ToMePromptDataset(PROMPTS, images=real_pictures, size=(32, 48))
    assert len(data) == 4
    sample = data[1]["data_samples"]
    assert sample.prompt == "a dog"
    assert sample.gt_img.shape == (3, 32, 48)
    whole = ToMePromptDataset(PROMPTS, images=real_pictures)[1]["data_samples"].gt_img
    first = Image.open(f"{real_pictures}/1.png").getpixel((0, 0))
    assert tuple(whole[:, 0, 0].tolist()) == first[::-1], "BGR"
    with pytest.raises(ToMeError, match="4 pictures for 1 prompts"):
        ToMePromptDataset(["cat"], images=real_pictures)
    with pytest.raises(ToMeError, match="no folder"):
        ToMePromptDataset(["cat"], images=tmp_path / "none")
    with pytest.raises(ToMeError, match="write a list"):
        ToMePromptDataset("cat")
    (tmp_path / "1.png").write_text("no picture")
    with pytest.raises(ToMeError, match="cannot be read"):
        ToMePromptDataset(["cat"], images=tmp_path)[0]


def test_every_metric_is_registered_in_both_registries():
    from mmagic.registry import METRICS as MMAGIC
    from mmengine.registry import METRICS

    names = {f"ToMe{cls.__name__}" for cls in (*PAIRED.values(), *SETS.values())}
    import mmagic.evaluation  # noqa: F401

    assert names <= set(METRICS.module_dict)
    assert names <= set(MMAGIC.module_dict)
    with pytest.raises(ToMeError, match="against='nothing'"):
        METRICS.build(dict(type="ToMeEfficientNetFrechet", against="nothing"))
