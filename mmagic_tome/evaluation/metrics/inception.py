# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""FID, KID, precision / recall and Inception Score (torch-fidelity's Inception-v3)."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ToMeError
from .base import SetMetric, library
from .distances import frechet_distance_of_sets
from .weights import find_weights, load_state

# The TensorFlow network of the FID paper, converted by torch-fidelity.
URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
WIDTH = 2048  # of the features


class _InceptionMetric(SetMetric):
    """A metric over a layer of Inception-v3.

    Args:
        weights: file of torch-fidelity's Inception weights. Default: torch hub's copy, or a
            download to there.
        device, min_samples: see :class:`SetMetric`.

    Raises:
        ToMeError: torch-fidelity or the weights are not there.
    """

    layer = "2048"

    def __init__(
        self,
        weights: str | os.PathLike | None = None,
        device: str | torch.device = "cpu",
        min_samples: int | None = None,
    ) -> None:
        super().__init__(device, min_samples)
        module = library(
            "torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", self.label
        )
        path = find_weights(weights, URL, "weights", self.label)
        self.network = _network(module, str(path.resolve()), self.layer, self.device)

    def one(self, image: Tensor, prompt: str | None) -> Tensor:
        return self.network(image)[0].flatten()


# FID, KID and precision / recall look at the same layer and share one network.
@lru_cache(maxsize=4)
def _network(module, path, layer, device):
    # torch-fidelity reads the file as a pickle of anything; this one reads only tensors.
    load_state(Path(path), "Inception-v3")
    try:
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", [layer], feature_extractor_weights_path=path
        )
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ToMeError(
            f"{path} holds no Inception-v3 of torch-fidelity ({first[:120]}). Wanted is {URL}"
        ) from error
    return network.to(device)


class FID(_InceptionMetric):
    """Fréchet inception distance to the reference set; 0 is best.

    It depends on the number of pictures (fewer give a larger distance): compare only values of
    equally many. Below 2048 pictures the covariance is singular, which warns; papers use 50 000.

    Source: Heusel et al., 2017; the network and its resizing are torch-fidelity's, bit-exact to
    the original.
    """

    name = "fid"
    label = "FID"
    higher_is_better = False
    min_samples = 1000

    def value(self, features: Tensor, reference: Tensor) -> dict[str, float]:
        warn_few(self.label, len(features), len(reference), features.shape[1])
        return {"fid": frechet_distance_of_sets(features, reference)}


class KID(_InceptionMetric):
    """Kernel inception distance to the reference set (torch-fidelity); 0 is best.

    Mean over 100 subsets of 1000 pictures, or of all where there are fewer: unlike FID it is
    unbiased, so that it serves small sets too, and may be slightly below 0. The spread over the
    subsets comes with it, unless both sets are in every subset as a whole: then it has none.

    Source: Binkowski et al., "Demystifying MMD GANs", 2018.
    """

    name = "kid"
    label = "KID"
    higher_is_better = False
    min_samples = 100
    subsets = 100
    subset_size = 1000

    def value(self, features: Tensor, reference: Tensor) -> dict[str, float]:
        kid = library("torch_fidelity.metric_kid", "torch-fidelity", self.label)
        size = min(self.subset_size, len(features), len(reference))
        whole = len(features) == len(reference) == size
        found = kid.kid_features_to_metric(
            features,
            reference,
            kid_subsets=1 if whole else self.subsets,
            kid_subset_size=size,
            kid_kernel="poly",
            rng_seed=2020,
            verbose=False,
        )
        values = {"kid": found[kid.KEY_METRIC_KID_MEAN]}
        return values if whole else {**values, "kid_std": found[kid.KEY_METRIC_KID_STD]}


class PrecisionRecall(_InceptionMetric):
    """Share of pictures within the reference set's manifold, and the other way (torch-fidelity).

    Manifolds of balls that reach to the third nearest neighbour. Both depend on the number of
    pictures: compare only values of equally many.

    Source: Kynkäänniemi et al., "Improved precision and recall metric", 2019; over Inception's
    features here, where the paper takes VGG-16's.
    """

    name = "precision_recall"
    label = "precision / recall (Inception)"
    higher_is_better = True
    min_samples = 100
    neighbours = 3

    def value(self, features: Tensor, reference: Tensor) -> dict[str, float]:
        prc = library("torch_fidelity.metric_prc", "torch-fidelity", self.label)
        found = prc.prc_features_to_metric(
            features,
            reference,
            prc_neighborhood=self.neighbours,
            prc_batch_size=10000,
            save_cpu_ram=True,
            verbose=False,
        )
        return {
            "precision": found[prc.KEY_METRIC_PRECISION],
            "recall": found[prc.KEY_METRIC_RECALL],
        }


class InceptionScore(_InceptionMetric):
    """Inception Score over 10 splits (torch-fidelity); 1 is worst. Knows no reference set.

    Source: Salimans et al., "Improved techniques for training GANs", 2016.
    """

    name = "inception_score"
    label = "Inception Score"
    higher_is_better = True
    needs_real = False
    min_samples = 1000
    layer = "logits_unbiased"

    def value(self, features: Tensor, reference: Tensor | None) -> dict[str, float]:
        isc = library("torch_fidelity.metric_isc", "torch-fidelity", self.label)
        splits = min(10, len(features))
        found = isc.isc_features_to_metric(features, splits, shuffle=True, rng_seed=2020)
        return {
            "inception_score": found[isc.KEY_METRIC_ISC_MEAN],
            "inception_score_std": found[isc.KEY_METRIC_ISC_STD],
        }


def warn_few(label: str, pictures: int, reference: int, width: int) -> None:
    """Warn where a covariance of ``width`` features is singular for want of pictures."""
    few = min(pictures, reference)
    if few <= width:
        warnings.warn(
            f"{label} of {few} pictures: with no more pictures than features ({width}) it is "
            "strongly biased; compare it only with values of equally many pictures",
            stacklevel=4,
        )
