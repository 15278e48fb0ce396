# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import numpy as np
import pytest
from PIL import Image

from mmagic_tome import ToMeError
from mmagic_tome.visualization.token_maps import (
    clip_maps,
    followed,
    followed_maps,
    picture_map,
    spectrogram_map,
)


def frames(count=2, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (count, 12, 12, 3), np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


def test_a_picture_has_groups_in_their_mean_colour():
    (picture,) = frames(1)
    painted = np.asarray(picture_map(np.array([0, 0, 2, 3]), (2, 2), picture))
    pixels = np.asarray(picture, np.float64)
    # Inside the group; its lower and right border is the edge.
    assert np.abs(painted[:5, :5] - pixels[:6].mean((0, 1))).max() <= 0.5
    assert np.array_equal(painted[7:, :5], np.asarray(picture)[7:, :5])


def test_a_group_has_one_colour_in_all_frames():
    clip = frames(2)
    # 2 x 1 x 2 tokens: the left halves of both frames are one, the right ones are alone.
    source = np.array([0, 1, 0, 3])
    painted = [np.asarray(frame) for frame in clip_maps(source, (2, 1, 2), clip)]
    mean = np.stack([np.asarray(f, np.float64)[:, :6] for f in clip]).mean((0, 1, 2))
    for own, frame in zip(clip, painted):
        assert np.abs(frame[:, :5] - mean).max() <= 0.5
        assert (frame[:, 5] == 255).all()  # the edge
        assert np.array_equal(frame[:, 6:], np.asarray(own)[:, 6:])
    # A token that holds two frames is the same in both.
    twice = clip_maps(np.array([0, 0]), (1, 1, 2), clip)
    assert np.array_equal(np.asarray(twice[0]), np.asarray(twice[1]))
    for grid, given in (((1, 1, 2), clip), ((2, 1, 2), frames(3)), ((2, 1, 2), [])):
        with pytest.raises(ToMeError, match="do not fit"):
            clip_maps(source, grid, given)


def test_what_lasts_longest_is_followed():
    # Three times of 1 x 4: group 0 lasts twice, 1 three times with four tokens, 2 with three.
    source = np.array([0, 1, 2, 3, 0, 1, 2, 1, 4, 1, 2, 5])
    assert followed(source, (3, 1, 4)) == [2, 1, 0]
    assert followed(source, (3, 1, 4), count=1) == [2]
    clip = frames(3)
    painted = followed_maps(source, (3, 1, 4), clip, [2])
    for own, frame in zip(clip, painted):
        frame, dark = np.asarray(frame), 0.45 * np.asarray(own, np.float64)
        assert np.abs(frame[:, :6] - dark[:, :6]).max() <= 0.5
        assert np.abs(frame[:, 6:9] - dark[:, 6:9]).max() > 20
        assert np.abs(frame[:, 9:] - dark[:, 9:]).max() <= 0.5


def test_a_spectrogram_has_mean_spectra_and_a_strip():
    spectrogram = np.arange(24.0).reshape(2, 12)  # 6 tokens of two frames
    dense = np.asarray(spectrogram_map(None, spectrogram, scale=4))
    assert dense.shape == (4 + 12, 24, 3) and (dense[4:] == 255).all()
    merged = np.asarray(spectrogram_map(np.array([0, 1, 2, 3, 0, 5]), spectrogram, scale=4))
    # Tokens 0 and 4 are one: the same columns but for edges on their right, one colour below.
    assert np.array_equal(merged[:, :3], merged[:, 16:19])
    assert not np.array_equal(merged[:4, :3], dense[:4, :3])
    assert not (merged[4:, :4] == 255).all() and (merged[4:, 4:16] == 255).all()
    assert (merged[:4, 3] == 255).all() and not (merged[:4, 7] == 255).all()
    with pytest.raises(ToMeError, match="5 tokens do not fit a spectrogram of 12 frames"):
        spectrogram_map(np.zeros(5, int), spectrogram)
