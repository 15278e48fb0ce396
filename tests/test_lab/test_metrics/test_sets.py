# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics of sets, on features of random numbers or of networks with random weights."""

from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from torch.nn.functional import adaptive_avg_pool2d

from mmagic_tome import ToMeError
from mmagic_tome.lab.metrics import set_features, set_metric, sets
from mmagic_tome.lab.metrics.base import Extractor


def random_images(count=6, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def features(count, width, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    x = torch.randn(count, width, generator=generator) @ mix + shift
    return {"2048": x, "logits_unbiased": 3 * x}


class Pixels(torch.nn.Module):
    """Stands in for Inception-v3 in torchmetrics and here: 12 numbers of an image."""

    num_features = 12

    def forward(self, images):
        return adaptive_avg_pool2d(images.double(), 2).flatten(1) / 50

    def extract(self, image):
        return {"2048": self(image), "logits_unbiased": self(image)}


@pytest.fixture
def pixels(monkeypatch):
    network = Pixels()
    monkeypatch.setattr(sets, "inception", lambda weights: Extractor("pixels", network.extract))
    return network


@pytest.mark.parametrize("count", [200, 12])  # 12 of 24 features: singular covariances
def test_frechet_distance_is_that_of_a_general_matrix_root(count):
    x, y = features(count, 24)["2048"], features(count + 5, 24, seed=1, shift=0.3)["2048"]
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


def test_inception_score_is_its_formula_over_ten_splits(pixels):
    metric = set_metric("inception_score", fewest=2)
    assert not metric.needs_base
    logits = features(60, 12)["logits_unbiased"].double().numpy()
    logits = logits[np.lexsort(logits.T)][np.random.RandomState(2020).permutation(60)]
    scores = []
    for part in np.split(scipy.special.softmax(logits, axis=1), 10):
        divergence = (part * np.log(part / part.mean(0))).sum(1)
        scores.append(np.exp(divergence.mean()))
    found = metric.compute(None, features(60, 12))
    assert found["inception_score"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert found["inception_score_std"] == pytest.approx(np.std(scores), rel=1e-5)


def test_kid_has_a_real_spread_or_none(pixels):
    kid = set_metric("kid")
    few = kid.compute(features(99, 16), features(120, 16, seed=1, shift=0.5))
    assert [*few] == ["kid"]
    found = {}
    for count in (100, 400):
        sets_ = features(count, 16), features(count + 7, 16, seed=1, shift=0.5)
        found[count] = kid.compute(*sets_)
        whole = set_metric("kid").function
        assert found[count]["kid_std"] > 0.01 * found[count]["kid"] > 0
        assert whole(*reversed(sets_))["kid"] == pytest.approx(found[count]["kid"], rel=0.05)
    assert found[100]["kid_std"] > found[400]["kid_std"], "larger subsets scatter less"


@pytest.mark.parametrize("name", ["fid", "kid", "inception_score"])
def test_the_order_of_images_is_irrelevant(name, pixels):
    metric = set_metric(name, fewest=2)
    base, other = features(120, 8), features(120, 8, seed=1, shift=0.2)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(5))
    shuffled = [{key: x[order] for key, x in s.items()} for s in (base, other)]
    expected = metric.compute(base, other)
    assert metric.compute(*shuffled) == {k: pytest.approx(v, rel=1e-9) for k, v in expected.items()}


def test_too_few_images_and_no_base_are_errors(pixels):
    fid = set_metric("fid", fewest=20)
    few, enough = features(19, 4), features(20, 4)
    for pair in ((few, enough), (enough, few)):
        with pytest.raises(ToMeError, match="FID needs at least 20 images of each set, not 19"):
            fid.compute(*pair)
    with pytest.raises(ToMeError, match="got none"):
        fid.compute(None, enough)


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


def test_inception_runs_once_per_image_for_all_its_metrics(inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    names = ("fid", "kid", "inception_score")
    metrics = [set_metric(name, weights=inception, fewest=2) for name in names]
    assert len({metric.feature_key for metric in metrics}) == 1
    images = random_images(3)
    with mock.patch.object(Network, "forward", autospec=True, side_effect=Network.forward) as call:
        found = set_features(metrics, images)[metrics[0].feature_key]
    assert call.call_count == 3
    assert found["2048"].shape == (3, 2048) and found["logits_unbiased"].shape == (3, 1008)
    alone = metrics[0].features_of(images[1:2])
    assert torch.equal(alone["2048"][0], found["2048"][1]), "no batch makes a difference"
    assert not torch.equal(found["2048"][0], found["2048"][1])


def test_efficientnet_frechet_tells_sets_apart_without_a_download():
    metric = set_metric("frechet_efficientnet_lite0", fewest=2)
    assert "FID" not in metric.label
    real, images = (
        metric.features_of(s) for s in (random_images(8), random_images(8, seed=1) // 2)
    )
    assert real["pooled"].shape == (8, 1280)
    assert metric.compute(real, images)[metric.name] > 1
    assert metric.compute(real, real)[metric.name] < 1e-6
