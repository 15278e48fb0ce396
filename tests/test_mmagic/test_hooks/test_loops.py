# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The loops, with MMagic's metrics and ours, in one process and in two."""

import json
import os

import forked
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmagic")

from mmengine.config import Config
from mmengine.runner import Runner

from mmagic_tome import ToMeError, apply_cache, apply_tome, get_handle
from mmagic_tome.lab.metrics import paired, set_metric
from mmagic_tome.lab.metrics.sets import frechet_distance
from mmagic_tome.lab.request import Request
from mmagic_tome.lab.runners import runner_of
from mmagic_tome.lab.runners.media import to_tensor
from mmagic_tome.mmagic.hooks.loops import sheet
from mmagic_tome.mmagic.hooks.prompts import ToMePromptDataset

PROMPTS = ["a cat", "a dog", "cat", "dog"]
FRECHET = dict(type="ToMeMetric", metric="frechet_efficientnet_lite0", fewest=2)


class Inception(torch.nn.Module):
    """What MMagic takes of a TorchScript Inception, in a layer of random weights."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=4)

    def forward(self, x: torch.Tensor, return_features: bool = True, no_output_bias: bool = False):
        return self.conv(x.float() / 255.0).mean(dim=[2, 3])


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.manual_seed(0)
    torch.jit.script(Inception().eval().requires_grad_(False)).save(str(path))
    return str(path)


def generated(model, **given):
    """The images and latents of the prompts, by a runner."""
    request = Request(PROMPTS, **{**dict(steps=3, guidance=3.0, size=(64, 64), seed=11), **given})
    with torch.no_grad():
        output = runner_of(model, request).run(range(4))
    return to_tensor(output.images), output.latents


def test_metrics_of_both_in_one_evaluator(make_runner, tmp_path, inception, real_images):
    metrics = [
        dict(type="PSNR", gt_key="baseline_img"),
        dict(type="PSNR", prefix="to_real"),
        dict(
            type="FID",
            fake_nums=4,
            real_nums=4,
            inception_style="StyleGAN",
            inception_path=inception,
            inception_pkl=str(tmp_path / "real.pkl"),
        ),
        *(dict(type="ToMeMetric", metric=name) for name in ("psnr", "ssim", "latent_error")),
        dict(FRECHET, against="real", prefix="real"),
        FRECHET,
        dict(type="ToMeSeconds"),
    ]
    loop = dict(seed=11, steps=3)
    runner = make_runner("test", tmp_path, images=True, metrics=metrics, loop=loop)
    found = runner.test()

    # The same by hand.
    model = runner.model
    merged, latents = generated(model)
    get_handle(model).remove()
    baseline, expected = generated(model)
    real = to_tensor([Image.open(f"{real_images}/{i}.png") for i in range(4)])
    psnr, ssim, network = paired("psnr"), paired("ssim"), torch.jit.load(inception)
    frechet = set_metric("frechet_efficientnet_lite0", fewest=2)
    features = {id(x): frechet.features_of(x) for x in (merged, baseline, real)}

    def distance(one, other):
        (value,) = frechet.compute(features[id(one)], features[id(other)]).values()
        return value

    error = torch.linalg.vector_norm((latents - expected).flatten(1), dim=1)
    error /= torch.linalg.vector_norm(expected.flatten(1), dim=1)
    by_hand = {
        "merging/psnr": psnr.mean(psnr(baseline, merged)),
        "merging/PSNR": float(psnr(baseline, merged).mean()),
        "merging/ssim": float(ssim(baseline, merged).mean()),
        "merging/latent_error": float(error.mean()),
        f"merging/{frechet.name}": distance(baseline, merged),
    }
    for name, images in (("merging", merged), ("baseline", baseline)):
        x, y = (network(one).double() for one in (images, real))
        by_hand[f"{name}/to_real/PSNR"] = float(psnr(real, images).mean())
        by_hand[f"{name}/fid"] = frechet_distance(x, y)
        by_hand[f"{name}/real/{frechet.name}"] = distance(real, images)
        assert found[f"{name}/seconds"] > 0
    assert {key: found[key] for key in by_hand} == pytest.approx(by_hand, rel=1e-2)
    relative = {key for key in found if key.startswith("baseline/")}
    assert not relative & {f"baseline/{name}" for name in ("psnr", "PSNR", "ssim", frechet.name)}


def test_several_methods(make_runner, tmp_path):
    metrics = [dict(type="ToMeMetric", metric="psnr"), dict(type="ToMeSeconds")]
    methods = [
        dict(name="merged", tome_cfg=dict(ratio=0.5)),
        dict(name="cached", cache_cfg=dict(region="network")),
        dict(name="short", steps=3),
    ]
    options = dict(metrics=metrics, loop=dict(methods=methods, steps=6))
    runner = make_runner("test", tmp_path, tome_cfg=None, **options)
    found = runner.test()
    assert set(found) == {"baseline/seconds"} | {
        f"{name}/{key}" for name in ("merged", "cached", "short") for key in ("psnr", "seconds")
    }
    model, psnr = runner.model, paired("psnr")
    assert get_handle(model, "tome") is None and get_handle(model, "cache") is None
    baseline, _ = generated(model, steps=6, seed=0)
    short, _ = generated(model, steps=3, seed=0)
    with apply_tome(model, ratio=0.5):
        merged, _ = generated(model, steps=6, seed=0)
    with apply_cache(model, region="network"):
        cached, _ = generated(model, steps=6, seed=0)
    for name, images in (("merged", merged), ("cached", cached), ("short", short)):
        expected = psnr.mean(psnr(baseline, images))
        assert found[f"{name}/psnr"] == pytest.approx(expected, rel=1e-3), name
    log = next(tmp_path.rglob("*.log")).read_text()
    assert "merged: token merging in UNet2D" in log and "cached: step caching in UNet2D" in log
    files = sorted(tmp_path.rglob("vis_image/test_*.png"))
    assert len(files) == 4
    drawn = np.asarray(Image.open(files[0]).convert("RGB")).astype(int)
    images = dict(baseline=baseline, merged=merged, cached=cached, short=short)
    expected = sheet(PROMPTS[0], {name: one[0] for name, one in images.items()})
    assert np.abs(drawn - expected).mean() < 1


def test_what_a_metric_or_a_loop_needs(make_runner, tmp_path):
    methods = [dict(name="merged", tome_cfg=dict(ratio=0.5))]
    for options, message in (
        (dict(metrics=[dict(type="PSNR")]), "gt_key='baseline_img'"),
        (dict(metrics=[dict(FRECHET, against="real")]), "ToMePromptDataset\\(images=FOLDER\\)"),
        (dict(metrics=[dict(FRECHET, against="nothing")]), "write 'baseline' or 'real'"),
        (dict(metrics=[dict(type="ToMeMetric", metric="psnrr")]), "unknown metric 'psnrr'"),
        (dict(loop=dict(methods=methods)), "write all of them into methods, or none"),
        (dict(loop=dict(step=3)), "step"),
        (dict(infer_cfg=dict(guidance=-1)), "guidance"),
    ):
        runner = make_runner("test", tmp_path, **options)
        with pytest.raises(ToMeError, match=message):
            runner.test()


def test_data_of_prompts(real_images, tmp_path):
    data = ToMePromptDataset(PROMPTS, images=real_images)
    assert len(data) == 4
    sample = data[1]["data_samples"]
    assert sample.prompt == "a dog" and sample.gt_img.shape == (3, 64, 64)
    first = Image.open(f"{real_images}/1.png").getpixel((0, 0))
    assert tuple(sample.gt_img[:, 0, 0].tolist()) == first[::-1], "BGR"
    (tmp_path / "prompts.txt").write_text("# two\ncat\ndog\n")
    assert ToMePromptDataset(str(tmp_path / "prompts.txt")).prompts == ["cat", "dog"]
    (tmp_path / "1.png").write_text("no image")
    for arguments, message in (
        ((["cat"], real_images), "4 images for 1 prompts"),
        ((["cat"], tmp_path / "none"), "is not a folder"),
        (("cat",), "no .txt, .json or .csv file"),
        (([],), "at least one"),
    ):
        with pytest.raises(ToMeError, match=message):
            ToMePromptDataset(*arguments)
    with pytest.raises(ToMeError, match="cannot read image"):
        ToMePromptDataset(["cat"], images=tmp_path)[0]


# --- several processes ----------------------------------------------------------------------------


def rank(number, port, config, found):
    """What a process does that torchrun started."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
    torch.cuda.set_device = lambda device: None  # mmengine takes the rank's GPU; there is none
    runner = Runner.from_cfg(Config.fromfile(config))
    assert type(runner.model).__name__ == "MMDistributedDataParallel" and runner.world_size == 2
    values = runner.test()
    if runner.rank == 0:
        found.write_text(json.dumps(values, default=float))


def test_two_ranks_find_what_one_process_finds(make_runner, tmp_path):
    metrics = [dict(type="ToMeMetric", metric=name) for name in ("psnr", "latent_error")]
    metrics += [dict(type="PSNR", gt_key="baseline_img"), FRECHET]
    loader = dict(
        batch_size=1,  # of other batches the lowest bits of images differ
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=False),
        # An odd number: the last round repeats.
        dataset=dict(type="ToMePromptDataset", prompts=[*PROMPTS, "a red cat"]),
    )
    alone = make_runner("test", tmp_path / "one", metrics=metrics, test_dataloader=loader)
    expected = alone.test()
    config = alone.cfg.copy()
    config.update(
        launcher="pytorch",
        work_dir=str(tmp_path / "two"),
        experiment_name="two_ranks",
        env_cfg=dict(dist_cfg=dict(backend="gloo")),
        model_wrapper_cfg=dict(type="MMDistributedDataParallel", device_ids=None),
        custom_hooks=[dict(type="ToMeHook")],
    )
    config.dump(str(tmp_path / "config.py"))
    found, port = tmp_path / "found.json", forked.free_port()
    outputs = [tmp_path / f"output{number}.txt" for number in (0, 1)]
    ranks = [
        forked.start(lambda n=n: rank(n, port, tmp_path / "config.py", found), outputs[n])
        for n in (0, 1)
    ]
    for child, output in zip(ranks, outputs):
        assert forked.status(child, output) == 0, output.read_text()[-3000:]
    assert json.loads(found.read_text()) == pytest.approx(expected, rel=1e-6)
    # The first process: its log, and the sheets of its part of five prompts.
    assert "token merging in" in next((tmp_path / "two").rglob("*.log")).read_text()
    assert len(list((tmp_path / "two").rglob("vis_image/test_00*.png"))) == 3
