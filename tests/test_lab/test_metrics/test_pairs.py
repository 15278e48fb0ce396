# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from mmagic_tome import ToMeError
from mmagic_tome.lab.metrics import NAMES, PAIRED, available, paired, pairs


def random_images(count=3, size=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def noisy(images, amplitude=20):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(-amplitude, amplitude + 1, images.shape, generator=generator)
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def hub(tmp_path_factory):
    """torch hub's cache, with an AlexNet of random weights in torchvision's layout."""
    from torchvision import models

    folder = tmp_path_factory.mktemp("hub")
    (folder / "checkpoints").mkdir()
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        state = models.alexnet().state_dict()
    for key, value in state.items():
        if key.startswith("features") and value.ndim == 4:
            weight = torch.randn(value.shape, generator=generator)
            state[key] = weight * (2 / value[0].numel()) ** 0.5
        else:  # one number in the file, however large
            state[key] = torch.zeros(1).expand(value.shape)
    torch.save(state, folder / "checkpoints/alexnet-owt-7be5be79.pth")
    before = torch.hub.get_dir()
    torch.hub.set_dir(folder)
    yield folder
    torch.hub.set_dir(before)


def test_psnr_is_its_formula_and_its_mean_that_of_squared_errors():
    psnr, base = paired("psnr"), random_images()
    other = noisy(base)
    other[0] = base[0]
    squared = ((base.double() - other.double()) ** 2).mean((1, 2, 3)).numpy()
    values = psnr(base, other)
    assert values.tolist()[1:] == pytest.approx(10 * np.log10(255**2 / squared[1:]))
    assert values[0] == math.inf and psnr.text(math.inf) == "identical"
    assert psnr.mean(values) == pytest.approx(10 * math.log10(255**2 / squared.mean()))
    assert psnr.mean(values[:1]) == math.inf
    assert math.isnan(psnr.mean(torch.tensor([30, math.nan])))
    assert psnr.text(31.2) == "31.20 dB"


def test_ssim_is_that_of_scikit_image():
    from skimage.metrics import structural_similarity

    base = random_images(2)
    other = noisy(base)
    options = {"channel_axis": 0, "data_range": 255, "gaussian_weights": True, "sigma": 1.5}
    expected = [
        structural_similarity(a, b, use_sample_covariance=False, **options)
        for a, b in zip(base.numpy(), other.numpy())
    ]
    assert paired("ssim")(base, other).tolist() == pytest.approx(expected, abs=2e-3)


def test_lpips_is_that_of_its_authors_on_the_same_weights(hub):
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    state = torch.load(hub / "checkpoints/alexnet-owt-7be5be79.pth")
    for key, value in network.net.state_dict().items():
        value.copy_(state[f"features.{key.split('.', 1)[1]}"])
    base = random_images(1)
    expected = network(base / 127.5 - 1, noisy(base) / 127.5 - 1).item()
    assert expected > 0
    assert paired("lpips")(base, noisy(base)).item() == pytest.approx(expected, rel=1e-5)


def test_latent_error_is_relative_whatever_the_type_and_shape():
    base = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    other = torch.stack([base[0], base[1] * 1.25])
    metric = paired("latent_error")
    assert metric(base, other).tolist() == pytest.approx([0, 0.25])
    assert metric(base.half(), other.half())[1] == pytest.approx(0.25, rel=1e-2)
    assert metric.mean(metric(base, other)) == pytest.approx(0.125)
    assert metric.text(0.125) == "0.1250"


@pytest.mark.parametrize("name", PAIRED)
def test_noise_makes_it_worse_and_the_batch_makes_no_difference(name):
    metric = paired(name)
    base = random_images(2, 176 if name == "ms_ssim" else 48)
    same, little, much = (metric(base, other) for other in (base, noisy(base, 8), noisy(base, 90)))
    assert same.dtype == torch.float64 and same.shape == (2,)
    if metric.higher_is_better:
        assert (same > little).all() and (little > much).all()
    else:
        assert same.tolist() == pytest.approx([0, 0], abs=1e-6)
        assert (same < little).all() and (little < much).all()
    assert torch.equal(metric(base[1:], noisy(base, 8)[1:]), little[1:]) or name == "latent_error"


def test_images_that_cannot_be_compared_are_errors():
    psnr, base = paired("psnr"), random_images()
    for other in (base[:2], base[:, :1], base[..., :40], base.float()):
        with pytest.raises(ToMeError):
            psnr(base, other)
    with pytest.raises(ToMeError, match=r"must be .* uint8"):
        psnr(base / 255, base / 255)
    with pytest.raises(ToMeError, match="MS-SSIM needs at least 176 pixels a side, not 48x48"):
        paired("ms_ssim")(base, base)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: paired("psn"), "did you mean 'psnr'"),
        (lambda: paired("ssim", window=7), "ssim has no option 'window'"),
        (lambda: paired("lpips", net="squeeze2"), "but got squeeze2"),
        (lambda: available(["psnr", "fidd"]), "unknown metric 'fidd'"),
        (lambda: available(["psnr", "psnr"]), "'psnr' is named twice"),
        (lambda: available([{"name": "lpips", "nett": "vgg"}]), "no option 'nett'"),
    ],
)
def test_unknown_names_and_options_are_errors(build, message):
    with pytest.raises(ToMeError, match=message):
        build()


def test_what_cannot_work_is_left_out_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metrics, missing = available(NAMES, size=(64, 64), count=60)
    assert [*metrics] == ["psnr", "ssim", "latent_error", *(n for n in NAMES if "efficient" in n)]
    assert {*metrics, *missing} == {*NAMES}
    assert all("\n" not in reason for reason in missing.values())
    assert "176 pixels" in missing["ms_ssim"]
    for name, file in (("lpips", "alexnet-owt-7be5be79"), ("fid", "inception")):
        assert file in missing[name] and f"at {tmp_path}/checkpoints" in missing[name]
    (reason,) = available(["frechet_efficientnet_lite0"], count=49)[1].values()
    assert "needs at least 50 images" in reason


def test_a_file_that_is_no_weights_and_a_missing_library_are_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/alexnet-owt-7be5be79.pth").write_text("not weights")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    pairs.efficientnet.cache_clear()
    lpips, distance = available(("lpips", "efficientnet_lite0_distance"))[1].values()
    assert "lpips cannot be loaded" in lpips
    assert "pip install efficientnet_lite_pytorch" in distance


def test_libraries_wait_until_a_metric_is_built():
    code = """
import sys
import mmagic_tome.lab.metrics
print(sorted({"torchmetrics", "torch_fidelity", "transformers", "torchvision"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
