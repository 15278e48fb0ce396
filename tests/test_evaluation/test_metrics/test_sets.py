# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics of sets, over networks of random weights: their values mean nothing outside tests."""

import math

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch

from mmagic_tome import ToMeError
from mmagic_tome.evaluation.metrics import build_set, frechet_distance
from mmagic_tome.evaluation.metrics.distances import frechet_distance_of_sets, gaussian_mmd


def pictures(count=6, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def features(count, width, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return torch.randn(count, width, generator=generator) @ mix + shift


# --- maths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, 12])  # 12 of 24 features: singular covariances
def test_frechet_distance_against_a_general_matrix_root(count):
    x, y = features(count, 24).double(), features(count, 24, seed=1, shift=0.3).double()
    cov1, cov2 = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(cov1 + cov2 - 2 * root).real
    assert frechet_distance_of_sets(x, y) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance_of_sets(y, x) == pytest.approx(expected, rel=1e-4)
    # Through the covariances, whatever the size of the sets.
    statistics = x.mean(0), torch.tensor(cov1), y.mean(0), torch.tensor(cov2)
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_known_gaussians():
    one, two = torch.eye(3), torch.diag(torch.tensor([4.0, 9.0, 1.0]))
    # Of diagonal covariances: the squared difference of the standard deviations.
    assert frechet_distance(torch.zeros(3), one, torch.ones(3), two) == pytest.approx(3 + 1 + 4)
    with pytest.raises(ToMeError, match="not finite"):
        frechet_distance(torch.zeros(3), one, torch.ones(3) * math.nan, two)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    x = features(40, 128)  # singular
    assert frechet_distance_of_sets(x, x) == pytest.approx(0, abs=1e-5)


def test_gaussian_mmd_against_all_pairs():
    x, y = features(5, 7).double(), features(8, 7, seed=1, shift=1).double()

    def mean(a, b):
        return np.mean([math.exp(-float((p - q).square().sum()) / 18) for p in a for q in b])

    expected = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert expected > 0.01
    for rows in (2, 1000):
        assert gaussian_mmd(x, y, sigma=3, rows=rows) == pytest.approx(expected, rel=1e-9)
    assert gaussian_mmd(x, x, sigma=3) == pytest.approx(0, abs=1e-12)


# --- Inception --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of torch-fidelity's Inception-v3, with random weights."""
    from unittest import mock

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
    return path


def inception_metric(name, inception, **options):
    return build_set(name, weights=inception, **options)


def test_inception_features_do_not_depend_on_the_batch(inception):
    images = pictures(3)
    for name, width in (("fid", 2048), ("inception_score", 1008)):
        metric = inception_metric(name, inception)
        whole = metric.features(images)
        assert whole.shape == (3, width)
        assert whole.dtype == torch.float32
        assert torch.equal(whole[1:2], metric.features(images[1:2]))
        assert not torch.equal(whole[0], whole[1])


def test_metrics_of_one_layer_share_the_network(inception):
    fid, kid, prc = (
        inception_metric(name, inception) for name in ("fid", "kid", "precision_recall")
    )
    assert fid.network is kid.network is prc.network
    assert inception_metric("inception_score", inception).network is not fid.network


def test_fid_of_features(inception):
    fid = inception_metric("fid", inception, min_samples=2)
    # Pairs on the axes: means and covariances are known.
    sides = torch.arange(1.0, 5.0)
    x, y = (torch.cat([torch.diag(s), -torch.diag(s)]) for s in (sides, 2 * sides))
    spreads = (2 * sides**2 / (len(x) - 1)).sqrt()
    expected = 4 * 0.5**2 + spreads.square().sum().item()
    assert fid.compute(x, y + 0.5) == {"fid": pytest.approx(expected, rel=1e-5)}
    x, y = features(50, 16), features(60, 16, seed=1, shift=0.5)
    with pytest.warns(UserWarning, match="strongly biased"):
        fid.compute(x[:10], y)


def test_kid_against_its_formula(inception):
    kid = inception_metric("kid", inception, min_samples=2)
    x, y = features(30, 16), features(30, 16, seed=1, shift=0.5)

    def kernel(a, b):
        return (float(a.double() @ b.double()) / 16 + 1) ** 3

    n = len(x)
    within = sum(
        kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j
    ) / (n * (n - 1))
    between = sum(kernel(a, b) for a in x for b in y) / n**2
    found = kid.compute(x, y)
    # All 30 are in every subset: no spread between them, rather than none at all.
    assert found == {"kid": pytest.approx(within - 2 * between, rel=1e-6)}


def test_kid_has_a_spread_where_subsets_differ(inception):
    kid = inception_metric("kid", inception, min_samples=2)
    x, y = features(30, 16), features(40, 16, seed=1, shift=0.5)
    found = kid.compute(x, y)
    assert 0 < found["kid_std"] < found["kid"]
    assert kid.compute(x, y) == found
    kid.subset_size = 10
    assert kid.compute(x, y)["kid_std"] > found["kid_std"]
    assert kid.compute(x, y)["kid"] == pytest.approx(found["kid"], rel=0.2)


def test_precision_and_recall_against_their_definition(inception):
    prc = inception_metric("precision_recall", inception, min_samples=4)
    real = features(40, 4)
    fake = torch.cat([features(30, 4, seed=1) * 0.3, torch.full((10, 4), 50.0) + torch.eye(4)[:1]])

    def covered(points, by):
        radii = torch.cdist(by.double(), by.double()).sort().values[:, 3]
        return (torch.cdist(points.double(), by.double()) <= radii).any(1).double().mean().item()

    found = prc.compute(fake, real)
    assert found == {
        "precision": pytest.approx(covered(fake, real)),
        "recall": pytest.approx(covered(real, fake)),
    }
    assert 0 < found["recall"] < found["precision"] < 1


def test_inception_score_against_its_formula(inception):
    score = inception_metric("inception_score", inception, min_samples=2)
    # One picture per split and class would score 1; equal splits of 4 sure classes score 4.
    logits = torch.full((40, 8), -50.0)
    logits[torch.arange(40), torch.arange(40) % 4] = 50.0
    order = np.random.RandomState(2020).permutation(40)
    found = score.compute(logits[np.argsort(order)])  # so that its shuffle sorts them
    assert found["inception_score"] == pytest.approx(4)
    assert found["inception_score_std"] == pytest.approx(0, abs=1e-9)
    assert score.compute(torch.zeros(40, 8))["inception_score"] == pytest.approx(1)


def test_fid_of_pictures_end_to_end(inception):
    fid = inception_metric("fid", inception, min_samples=2)
    x, y = (fid.features(pictures(3, seed=seed)) for seed in (0, 1))
    with pytest.warns(UserWarning, match="strongly biased"):
        found = fid.compute(x, y)["fid"]
    x, y = x.double().numpy(), y.double().numpy()
    means = np.square(x.mean(0) - y.mean(0)).sum()
    assert found > means > 0
    # With A and B, the pictures less their mean: the trace of (AᵀA BᵀB)^½ is that of (ABᵀBAᵀ)^½.
    a, b = ((z - z.mean(0)) / len(z[1:]) ** 0.5 for z in (x, y))
    root = np.sqrt(np.linalg.eigvalsh(a @ b.T @ b @ a.T).clip(0)).sum()
    assert found == pytest.approx(means + (a**2).sum() + (b**2).sum() - 2 * root, rel=1e-4)


def test_inception_weights_that_are_missing_or_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("fid", "kid", "precision_recall", "inception_score"):
        with pytest.raises(ToMeError, match=r"weights-inception-2015-12-05-6726825d.pth.*weights"):
            build_set(name)
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ToMeError, match="no Inception-v3 of torch-fidelity"):
        build_set("fid", weights=tmp_path / "other.pth")


# --- CLIP -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(sd_folder, tmp_path_factory):
    """A whole CLIP with random weights, in transformers' layout."""
    from transformers import CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip") / "random-clip"
    CLIPModel.from_pretrained(f"{sd_folder}/clip").save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    tiny._write_tokenizer(folder, 1024)
    return folder


def test_clip_score_against_the_models_own_cosine(clip):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    metric = build_set("clip_score", model=clip)
    assert metric.label == "CLIP score (random-clip)"
    model = CLIPModel.from_pretrained(clip)
    images, prompts = pictures(4), ["cat", "a dog", "cat dog", "c"]
    expected = []
    for image, prompt in zip(images, prompts):
        inputs = {
            **CLIPImageProcessor.from_pretrained(clip)(
                images=image.permute(1, 2, 0).numpy(), return_tensors="pt"
            ),
            **CLIPTokenizer.from_pretrained(clip)([prompt], return_tensors="pt"),
        }
        with torch.no_grad():
            out = model(**inputs)
        expected.append(
            100 * max(0.0, float(torch.cosine_similarity(out.image_embeds, out.text_embeds)))
        )
    found = metric.features(images, prompts)
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-3)
    assert max(expected) > 0
    assert metric.compute(found)["clip_score"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_clip_score_takes_any_length_and_wants_a_prompt_each(clip):
    metric = build_set("clip_score", model=clip)
    metric.features(pictures(1), ["cat " * 100])
    with pytest.raises(ToMeError, match="2 pictures came with 1 prompts"):
        metric.features(pictures(2), ["cat"])
    with pytest.raises(ToMeError, match="no prompts"):
        metric.features(pictures(2))


def test_cmmd(clip):
    metric = build_set("cmmd", model=clip, min_samples=2)
    assert metric.label == "CMMD (random-clip)"
    x, y = metric.features(pictures(3)), metric.features(pictures(4, seed=1))
    assert x.norm(dim=1).tolist() == pytest.approx([1] * 3, rel=1e-5)
    a, b = x.double(), y.double()
    kernel = [
        torch.exp(-torch.cdist(p, q).square() / (2 * 10**2)).mean().item()
        for p, q in ((a, a), (b, b), (a, b))
    ]
    expected = 1000 * (kernel[0] + kernel[1] - 2 * kernel[2])
    assert metric.compute(x, y)["cmmd"] == pytest.approx(expected, rel=1e-3)
    assert metric.compute(x, y)["cmmd"] > metric.compute(x, x)["cmmd"]


def test_clip_that_is_not_there(tmp_path):
    for name in ("clip_score", "cmmd"):
        with pytest.raises(ToMeError, match=r"preprocessor_config\.json"):
            build_set(name, model="nobody/no-such-clip")
        with pytest.raises(ToMeError, match="there is no folder"):
            build_set(name, model=tmp_path / "none")


# --- EfficientNet-lite0 -----------------------------------------------------------------------


def test_efficientnet_frechet_distance_of_pictures():
    metric = build_set("frechet_efficientnet_lite0", min_samples=2)
    assert "FID" not in metric.label
    x, y = metric.features(pictures(8)), metric.features(pictures(8, seed=1) // 2)
    assert x.shape == (8, 1280)
    with pytest.warns(UserWarning, match="strongly biased"):
        different, same = (metric.compute(x, other)[metric.name] for other in (y, x))
    assert different > 1
    assert same < 1e-3


# --- all --------------------------------------------------------------------------------------


def test_too_few_pictures_and_no_reference():
    metric = build_set("frechet_efficientnet_lite0")
    few, many = features(49, 1280), features(50, 1280)
    with pytest.raises(ToMeError, match="at least 50 pictures, found 49"):
        metric.compute(few, many)
    with pytest.raises(ToMeError, match="at least 50 reference pictures, found 49"):
        metric.compute(many, few)
    with pytest.raises(ToMeError, match="got none"):
        metric.compute(many)
    with pytest.raises(ToMeError, match="different networks"):
        metric.compute(many, many[:, :100])
    with pytest.raises(ToMeError, match="min_samples=1"):
        build_set("frechet_efficientnet_lite0", min_samples=1)
