# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``visualize``: files, and maps of what was merged."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_tome
from mmagic_tome.lab.maps import Recorder, enlarged, merge_map, merged_blocks
from mmagic_tome.lab.runners.media import evenly

QUICK = ["--size", "64", "--steps", "4", "--device", "cpu"]


def test_plans_of_every_block_and_step_are_recorded_and_nothing_changes():
    unet = tiny_unet()
    handle = apply_tome(unet, ratio=0.5)
    blocks = merged_blocks(handle)
    assert list(blocks) == list(dict.fromkeys(row["block"] for row in handle.stats()))
    hooks = [len(module._forward_pre_hooks) for module in unet.modules()]
    inputs = [{**tiny_inputs(), "timestep": torch.tensor(time)} for time in (900, 500)]
    with torch.no_grad():
        alone = [unet(**given).sample for given in inputs]
        with Recorder(blocks) as recorder:
            for given, expected in zip(inputs, alone):
                assert torch.equal(unet(**given).sample, expected)
                recorder.next_step()
    places = [(record.step, record.block) for record in recorder.records]
    assert places == [(step, block) for step in (0, 1) for block in blocks]
    for record in recorder.records:
        assert record.grid == (16, 16) and record.slot.shape == (256,) and record.kept == 128
    # Other steps, other destinations.
    first, again = recorder.records[0], recorder.records[len(blocks)]
    assert first.block == again.block and not np.array_equal(first.slot, again.slot)
    assert [len(module._forward_pre_hooks) for module in unet.modules()] == hooks


def test_groups_are_painted_in_their_mean_colour_with_borders_between_them():
    values = np.repeat(np.array([[0, 50], [90, 200]], np.uint8)[..., None], 3, axis=2)
    image = enlarged(Image.fromarray(values), (2, 2))
    assert image.size == (12, 12)
    # The first and the last of four tokens are one.
    painted = np.asarray(merge_map(np.array([0, 1, 2, 0]), (2, 2), image))[..., 0]
    assert painted[::6, ::6].tolist() == [[100, 50], [90, 100]]
    # Every token has two other neighbours at most, right and below.
    assert (painted[:5, 5] == 255).all() and (painted[5, :5] == 255).all()
    alone = np.asarray(merge_map(np.arange(4), (2, 2), image))
    assert np.array_equal(alone, np.asarray(image)), "without groups it is the image"


@pytest.mark.parametrize(("colour", "line"), [(0, 255), (255, 150)])
def test_borders_are_seen_on_dark_and_on_bright_colours(colour, line):
    image = Image.new("RGB", (17, 12), (colour,) * 3)  # which the grid does not divide
    painted = np.asarray(merge_map(np.array([0, 0, 1, 2]), (2, 2), image))
    assert (painted[5] == line).all() and (painted[4] == colour).all()


def test_numbers_are_evenly_spread():
    assert evenly(9, 4) == [0, 3, 5, 8] and evenly(3, 4) == [0, 1, 2] and evenly(3, 1) == [0]


def test_all_maps_of_a_mmagic_model(runs, configs):
    run, printed = runs("all", "visualize", configs["tome"], *QUICK, "--prompt", "a cat", "dog")
    sheets = sorted(run.path.glob("images/*/*_merge.png"))
    assert [sheet.name for sheet in sheets] == ["000000_merge.png", "000001_merge.png"]
    assert (run.path / "compare.png").is_file() and "PSNR " in printed
    sheet = Image.open(sheets[0])
    assert sheet.height > 3 * 256 and sheet.width > 4 * 256


def test_a_pipeline_with_caching_has_no_maps_of_skipped_steps(runs, pipeline_folder):
    run, _ = runs(
        *("out", "visualize", "--pipeline", pipeline_folder("sd"), "--prompt", "cat", *QUICK),
        *("--method", "both={'ratio': 0.5, 'cache': {'timestep_range': [0, 1]}}"),
    )
    sheet = Image.open(run.path / "images/both/000000_merge.png")
    assert 256 < sheet.width < 4 * 256
