# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics of sets of images, over the images of an evaluation."""

import numpy as np
import pytest
from PIL import Image
from toy_runner import FEWER, HALF, run

from mmagic_tome.errors import ToMeError
from mmagic_tome.lab import evaluate as module
from mmagic_tome.lab.real import RealImages
from mmagic_tome.lab.results import RunFolder


@pytest.fixture
def colours(monkeypatch):
    """Two metrics of sets that share features; a list of the images that these were made of."""
    from mmagic_tome.lab.metrics.base import SetMetric

    seen = []

    def extract(image):
        seen.append(image)
        return image.double().mean(dim=(2, 3))

    def distance(other, base):
        return {"distance": float((other.mean(0) - base.mean(0)).norm()), "n": len(other)}

    def spread(other, base):
        return {"spread": float(other.std(0).mean())}

    built = {
        "distance": SetMetric("distance", "distance", distance, extract=extract),
        "spread": SetMetric("spread", "spread", spread, extract=extract),
    }
    monkeypatch.setattr(module, "available", lambda names, *_: ({n: built[n] for n in names}, {}))
    return seen


def test_sets_share_features_made_once_per_image(colours, tmp_path):
    folder = RunFolder(tmp_path)
    found = run(folder, [HALF, FEWER], ["distance", "spread"]).set_index("method")
    # Three methods of five images, of which the baseline's are what is compared with.
    assert len(colours) == 15
    means = {}
    for row in folder.find(kind="image"):
        pixels = np.asarray(Image.open(folder.path / row["file"])).astype(float)
        means.setdefault(row["method"], []).append(pixels.mean(axis=(0, 1)))
    difference = np.mean(means["half"], axis=0) - np.mean(means["baseline"], axis=0)
    assert found.loc["half", "distance"] == pytest.approx(np.linalg.norm(difference), rel=1e-5)
    assert np.isnan(found.loc["baseline", "distance"]) and found.loc["half", "n"] == 5
    run(RunFolder(tmp_path), [HALF, FEWER], ["distance", "spread"])
    assert len(colours) == 15


def test_real_images_are_compared_with_all_methods(colours, tmp_path):
    for number, size in enumerate([(90, 60), (64, 64), (40, 100)]):
        pixels = np.zeros((*size, 3), np.uint8)
        pixels[:, size[1] // 2 :] = (10, 20, 30)  # half of any centred part
        path = tmp_path / "real" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    real = RealImages(tmp_path / "real")
    assert len(real) == 3
    folder = RunFolder(tmp_path / "run")
    found = run(folder, [HALF], ["distance"], real=real).set_index("method")
    mean = np.mean(
        [
            np.asarray(Image.open(folder.path / row["file"])).mean(axis=(0, 1))
            for row in folder.find(kind="image", method="baseline")
        ],
        axis=0,
    )
    distance = np.linalg.norm(mean - [5, 10, 15])
    assert found.loc["baseline", "distance"] == pytest.approx(distance, rel=0.01)
    assert folder.manifest["real"]["images"] == 3
    (tmp_path / "real" / "class1" / "1.png").unlink()
    with pytest.raises(ToMeError, match=r"real\.images: 3, now 2"):
        run(RunFolder(folder.path), [HALF], ["distance"], real=RealImages(tmp_path / "real"))
