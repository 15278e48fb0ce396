# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from mmagic_tome import ToMeError
from mmagic_tome.evaluation.metrics import (
    PAIRED,
    build_paired,
    max_error_picture,
    relative_latent_error,
)


def pictures(count=3, size=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def noisy(images, amplitude=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-amplitude, amplitude + 1, images.shape, generator=generator)
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    """Files of AlexNet and VGG-16 in torchvision's layout, with random weights."""
    from torchvision import models

    folder = tmp_path_factory.mktemp("trunks")
    torch.manual_seed(0)
    with torch.device("meta"):
        networks = {"alex": models.alexnet(), "vgg": models.vgg16()}
    for name, network in networks.items():
        layers = {f"features.{key}": x for key, x in network.features.state_dict().items()}
        fan = {key: x[0].numel() for key, x in layers.items() if x.ndim == 4}
        state = {
            key: torch.randn(x.shape) * (2 / fan[key]) ** 0.5
            if key in fan
            else torch.zeros(x.shape)
            for key, x in layers.items()
        }
        torch.save(state, folder / f"{name}.pth")
    return folder


def build(name, trunks):
    file = {"lpips": "alex.pth", "dists": "vgg.pth"}.get(name)
    return build_paired(name, **({"weights": trunks / file} if file else {}))


def test_psnr_against_its_formula():
    dense = pictures()
    merged = noisy(dense)
    expected = [
        10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2))
        for a, b in zip(dense.numpy(), merged.numpy())
    ]
    assert build_paired("psnr")(dense, merged).tolist() == pytest.approx(expected, rel=1e-6)


def test_psnr_of_identical_pictures_and_its_mean():
    psnr = build_paired("psnr")
    dense = pictures(2)
    merged = torch.stack([dense[0], noisy(dense)[1]])
    values = psnr(dense, merged)
    assert values[0] == math.inf
    assert psnr.text(float(values[0])) == "identical"
    # Half of the squared error of one pair is 3 dB less, not infinite.
    assert psnr.mean(values) == pytest.approx(float(values[1]) + 10 * math.log10(2))
    assert psnr.mean(values[:1]) == math.inf


def test_ssim_against_scikit_image():
    from skimage.metrics import structural_similarity

    dense = pictures(2)
    merged = noisy(dense)
    expected = [
        structural_similarity(
            a, b, channel_axis=0, data_range=255, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(dense.numpy(), merged.numpy())
    ]  # fmt: skip
    assert build_paired("ssim")(dense, merged).tolist() == pytest.approx(expected, abs=2e-3)


def test_ms_ssim_orders_noise_and_says_its_smallest_size():
    dense = pictures(1, 176)
    metric = build_paired("ms_ssim")
    little, much = (float(metric(dense, noisy(dense, a))) for a in (5, 60))
    assert 0 < much < little < 1
    with pytest.raises(ToMeError, match=r"at least 176 .*175x175"):
        metric(dense[..., :175, :175], dense[..., :175, :175])


@pytest.mark.parametrize("name", sorted(set(PAIRED) - {"ms_ssim"}))
def test_a_value_is_of_its_picture_and_not_of_the_batch(name, trunks):
    metric = build(name, trunks)
    dense = pictures()
    merged = noisy(dense)
    whole = metric(dense, merged)
    assert whole.dtype == torch.float64
    assert whole.shape == (3,)
    parts = torch.cat([metric(dense[i : i + 1], merged[i : i + 1]) for i in range(3)])
    assert torch.equal(whole, parts)
    # Whole levels may well be the same by chance.
    assert len(set(whole.tolist())) == 3 or name == "max_error"


@pytest.mark.parametrize("name", sorted(set(PAIRED) - {"ms_ssim"}))
def test_more_noise_is_further_away_and_none_is_best(name, trunks):
    metric = build(name, trunks)
    dense = pictures(1)
    same, little, much = (
        float(metric(dense, other)) for other in (dense, noisy(dense, 8), noisy(dense, 90))
    )
    if metric.higher_is_better:
        assert same > little > much
    else:
        assert same == pytest.approx(0, abs=1e-6)
        assert same < little < much


def test_lpips_is_the_packages_on_the_same_weights(trunks):
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    state = torch.load(trunks / "alex.pth")
    for key, value in network.net.state_dict().items():
        value.copy_(state[f"features.{key.split('.', 1)[1]}"])
    dense = pictures(1)
    merged = noisy(dense)
    expected = network(dense / 127.5 - 1, merged / 127.5 - 1).item()
    assert expected > 0
    assert build("lpips", trunks)(dense, merged).item() == pytest.approx(expected, rel=1e-6)


def test_missing_weights_name_file_folder_and_option(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for options, file in (
        ({"name": "lpips"}, "alexnet-owt-7be5be79.pth"),
        ({"name": "lpips", "net": "vgg"}, "vgg16-397923af.pth"),
        ({"name": "dists"}, "vgg16-397923af.pth"),
    ):
        with pytest.raises(ToMeError) as caught:
            build_paired(**options)
        for part in (file, str(tmp_path), "option weights", "HF_HUB_OFFLINE"):
            assert part in str(caught.value)


def test_wrong_weights_files(trunks, tmp_path):
    with pytest.raises(ToMeError, match="belongs to another network"):
        build_paired("lpips", weights=trunks / "vgg.pth")
    with pytest.raises(ToMeError, match="is not a file"):
        build_paired("dists", weights=tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ToMeError, match="cannot be read"):
        build_paired("lpips", weights=tmp_path / "text.pth")


def test_bad_pictures():
    psnr, dense = build_paired("psnr"), pictures()
    for other in (dense[:2], dense[:, :1], dense[..., :40], dense.float()):
        with pytest.raises(ToMeError):
            psnr(dense, other)
    with pytest.raises(ToMeError, match="uint8"):
        psnr(dense.float() / 255, dense.float() / 255)
    with pytest.raises(ToMeError, match="no pictures"):
        psnr.mean(torch.tensor([]))
    with pytest.raises(ToMeError, match="1 of 2 are NaN"):
        psnr.mean(torch.tensor([30, math.nan]))


def test_unknown_names_and_options():
    with pytest.raises(ToMeError, match="did you mean 'psnr'"):
        build_paired("psn")
    with pytest.raises(ToMeError, match=r"does not take \['window'\]"):
        build_paired("ssim", window=7)
    with pytest.raises(ToMeError, match="net='squeeze'"):
        build_paired("lpips", net="squeeze")


def test_relative_latent_error():
    dense = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    merged = torch.stack([dense[0], dense[1] * 1.25])
    assert relative_latent_error(dense, merged).tolist() == pytest.approx([0, 0.25])
    assert relative_latent_error(dense.half(), merged.half())[1] == pytest.approx(0.25, rel=1e-2)
    merged[0, 0, 0, 0] = math.nan
    with pytest.raises(ToMeError, match=r"candidate latents of pictures \[0\] of 2"):
        relative_latent_error(dense, merged)
    with pytest.raises(ToMeError, match="shapes"):
        relative_latent_error(dense, dense[:1])
    with pytest.raises(ToMeError, match="zeros"):
        relative_latent_error(torch.zeros(1, 4), torch.ones(1, 4))


def test_max_error_picture_shows_and_marks_the_worst_place():
    dense = torch.full((1, 3, 40, 64), 100, dtype=torch.uint8)
    merged = dense.clone()
    merged[0, 1, 11, 50] = 130
    merged[0, 2, 30, 5] = 110
    picture, numbers = max_error_picture(dense, merged)
    assert numbers == {"max_error": 30, "x": 50, "y": 11, "scale": 30}
    assert picture.width == 64
    assert picture.height > 40  # the words
    assert picture.getpixel((50, 11)) == (255, 255, 255)
    assert picture.getpixel((5, 30)) == (85, 85, 85)  # a third
    assert picture.getpixel((20, 20)) == (0, 0, 0)
    reds = np.argwhere((np.asarray(picture)[:40] == (255, 0, 0)).all(-1))
    assert len(reds) > 0
    assert np.abs(reds.mean(0) - (11, 50)).max() < 1  # a ring around it
    assert max_error_picture(dense, merged, scale=60)[0].getpixel((50, 11)) == (128, 128, 128)


def test_max_error_picture_of_identical_pictures():
    dense = pictures(1)
    picture, numbers = max_error_picture(dense[0], dense[0])
    assert numbers["max_error"] == 0
    assert not np.asarray(picture)[:48].any()


def test_libraries_wait_until_a_metric_is_used():
    code = """
import sys
import mmagic_tome.evaluation.metrics, mmagic_tome.mmagic.hooks
heavy = {"torchmetrics", "torch_fidelity", "lpips", "transformers", "torchvision", "mmengine"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "[]"


def test_latent_error_is_a_metric_of_latents():
    metric = build_paired("latent_error")
    assert metric.of == "latents" and not metric.higher_is_better
    dense = torch.ones(2, 4, 2, 2)
    values = metric(dense, torch.stack([dense[0], dense[1] * 1.25]))
    assert values.tolist() == [0, 0.25] and metric.mean(values) == 0.125
    assert metric.text(0.125) == "0.1250"


def test_max_error_of_many_pictures_is_that_of_the_worst():
    dense = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    merged = dense.clone()
    merged[1, 2, 5, 7], merged[2, 0, 0, 0] = 200, 7
    metric = build_paired("max_error")
    values = metric(dense, merged)
    assert values.tolist() == [0, 200, 7]
    assert metric.mean(values) == 200 and metric.text(200) == "200 of 255"
    _, found = max_error_picture(dense[1], merged[1])
    assert (found["max_error"], found["x"], found["y"]) == (200, 7, 5)
    with pytest.raises(ToMeError, match="no pictures"):
        metric.mean(torch.empty(0))


@pytest.mark.parametrize("width", [64, 128, 256])
def test_words_under_the_max_error_picture_fit(width):
    dense = torch.zeros(3, 64, width, dtype=torch.uint8)
    merged = dense.clone()
    merged[:, 60, width - 3] = 255
    strip = np.asarray(max_error_picture(dense, merged)[0])[64:]
    assert strip.min() < 50, "there are words"
    assert (strip[:, -3:] == 255).all(), "which end before the edge"
