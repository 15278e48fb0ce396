# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics of sets, on features of random numbers or of networks with random weights."""

from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.nn.functional import adaptive_avg_pool2d

from mmagic_tome import ToMeError
from mmagic_tome.lab.metrics import set_metric, sets


def random_images(count=6, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def features(count, width, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    x = torch.randn(count, width, generator=generator) @ mix + shift
    return x


class Pixels(torch.nn.Module):
    """Stands in for Inception-v3 in torchmetrics and here: 12 numbers of an image."""

    num_features = 12

    def forward(self, images):
        return adaptive_avg_pool2d(images.double(), 2).flatten(1) / 50


@pytest.fixture
def pixels(monkeypatch):
    network = Pixels()
    monkeypatch.setattr(sets, "inception", lambda weights: network)
    return network


@pytest.mark.parametrize("count", [200, 12])  # 12 of 24 features: singular covariances
def test_frechet_distance_is_that_of_a_general_matrix_root(count):
    x, y = features(count, 24), features(count + 5, 24, seed=1, shift=0.3)
    covariances = [np.cov(s.double().numpy(), rowvar=False) for s in (x, y)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = float((x.double().mean(0) - y.double().mean(0)).square().sum())
    expected += np.trace(covariances[0] + covariances[1] - 2 * root).real
    assert sets.frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)
    assert sets.frechet_distance(y, x) == pytest.approx(expected, rel=1e-4)
    assert sets.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_fid_and_kid_are_those_of_torchmetrics(pixels):
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    real, images = random_images(60), random_images(60, seed=1) // 2 + 40
    theirs = {
        "fid": FrechetInceptionDistance(feature=pixels).set_dtype(torch.float64),
        "kid": KernelInceptionDistance(feature=pixels, subsets=1, subset_size=60),
    }
    for name, metric in theirs.items():
        metric.update(real, real=True)
        metric.update(images, real=False)
        expected = metric.compute()
        ours = set_metric(name, fewest=2)
        found = ours.compute(ours.features_of(real), ours.features_of(images))
        expected = float(expected[0] if name == "kid" else expected)
        assert found == {name: pytest.approx(expected, rel=1e-4)}


def test_kid_of_sets_of_several_sizes_is_about_the_same(pixels):
    kid = set_metric("kid")
    found = {}
    for count in (200, 400):
        sets_ = features(count, 16), features(count + 7, 16, seed=1, shift=0.5)
        found[count] = kid.compute(*sets_)["kid"]
        assert kid.compute(*sets_)["kid"] == found[count]
    assert found[200] == pytest.approx(found[400], rel=0.2) and found[400] > 0


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_the_order_of_images_is_irrelevant(name, pixels):
    metric = set_metric(name, fewest=2)
    base, other = features(120, 8), features(120, 8, seed=1, shift=0.2)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(5))
    shuffled = [x[order] for x in (base, other)]
    expected = metric.compute(base, other)
    assert metric.compute(*shuffled) == {k: pytest.approx(v, rel=1e-9) for k, v in expected.items()}


def test_too_few_images_are_an_error(pixels):
    fid = set_metric("fid", fewest=20)
    few, enough = features(19, 4), features(20, 4)
    for pair in ((few, enough), (enough, few)):
        with pytest.raises(ToMeError, match="FID needs at least 20 images of each set, not 19"):
            fid.compute(*pair)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of torch-fidelity's Inception-v3, with random weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    path = tmp_path_factory.mktemp("inception") / "random-inception.pth"
    extractor = module.FeatureExtractorInceptionV3
    with mock.patch.object(extractor, "load_state_dict"), mock.patch.object(torch, "load"):
        network = extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path="-")
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            fan = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan) ** 0.5)
    torch.save(network.state_dict(), path)
    return str(path)


def test_inception_is_loaded_once_and_sees_images_alone(inception):
    fid, kid = (set_metric(name, weights=inception, fewest=2) for name in ("fid", "kid"))
    assert fid.extract is kid.extract
    images = random_images(3)
    found = fid.features_of(images)
    assert found.shape == (3, 2048)
    assert torch.equal(fid.features_of(images[1:2])[0], found[1]), "no batch makes a difference"
    assert not torch.equal(found[0], found[1])


def test_efficientnet_frechet_tells_sets_apart_without_a_download():
    metric = set_metric("frechet_efficientnet_lite0", fewest=2)
    assert "FID" not in metric.label
    real, images = (
        metric.features_of(s) for s in (random_images(8), random_images(8, seed=1) // 2)
    )
    assert real.shape == (8, 1280)
    assert metric.compute(real, images)[metric.name] > 1
    assert metric.compute(real, real)[metric.name] < 1e-6
