# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Recorded plans, and the visualizer backend that draws them."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_tome
from mmagic_tome.visualization.recorder import PlanRecorder


def run(unet, times=(900, 500), size=16):
    with torch.no_grad():
        for time in times:
            unet(**{**tiny_inputs(size=size), "timestep": torch.tensor(time)})


def test_plans_of_every_block_and_step():
    unet = tiny_unet()
    handle = apply_tome(unet, ratio=0.5)
    before = [len(m._forward_pre_hooks) for m in unet.modules()]
    with PlanRecorder(unet) as recorder:
        run(unet)
        blocks = list(dict.fromkeys(site["block"] for site in handle.stats()))
        assert [(r.step, r.block) for r in recorder.records] == [
            (step, block) for step in (0, 1) for block in blocks
        ]
        for record in recorder.records:
            assert record.grid == (16, 16) and record.slot.shape == (2, 256)
            assert record.kept == 128
        # Other steps, other destinations.
        first, again = recorder.records[0], recorder.records[len(blocks)]
        assert not np.array_equal(first.slot, again.slot)
    assert [len(m._forward_pre_hooks) for m in unet.modules()] == before


def test_a_new_run_drops_the_last_one():
    unet = tiny_unet()
    apply_tome(unet, ratio=0.5)
    with PlanRecorder(unet) as recorder:
        run(unet, (900, 500, 900), 8)
        assert {record.step for record in recorder.records} == {0}


def test_merging_that_comes_later_is_seen_and_what_is_dense_is_not():
    unet = tiny_unet()
    with PlanRecorder(unet) as recorder:
        run(unet)
        assert recorder.records == []
        handle = apply_tome(unet, ratio=0.5)
        run(unet, (900,))
        assert recorder.records
        handle.ratio = 0
        run(unet, (900,))
        assert recorder.records == []


def test_recording_changes_nothing():
    unet = tiny_unet()
    apply_tome(unet, ratio=0.5)
    with torch.no_grad():
        alone = unet(**tiny_inputs()).sample
        with PlanRecorder(unet):
            assert torch.equal(unet(**tiny_inputs()).sample, alone)


def test_backend_writes_a_sheet_for_a_picture(tmp_path):
    pytest.importorskip("mmengine")
    from mmengine.visualization import Visualizer

    unet = tiny_unet()
    apply_tome(unet, ratio=0.5)
    backends = [dict(type="ToMeVisBackend", columns=2)]
    visualizer = Visualizer(vis_backends=backends, save_dir=str(tmp_path))
    (backend,) = visualizer._vis_backends.values()
    backend.watch_model(unet)
    run(unet, (900, 500, 100))
    visualizer.add_image("a/b", np.zeros((64, 64, 3), np.uint8), 7)
    # A comparison of two pictures has no grid over it.
    visualizer.add_image("pair", np.zeros((64, 128, 3), np.uint8), 7)
    backend.close()
    (path,) = tmp_path.rglob("*.png")
    assert path.name == "a_b_7.png" and path.parent.name == "merge_maps"
    with Image.open(path) as sheet:
        assert sheet.info["name"] == "a/b" and sheet.width > 2 * 96


def test_runner_shows_its_model_to_the_backend(tmp_path):
    pytest.importorskip("mmengine")
    from mmengine.runner import Runner

    runner = Runner(
        model=tiny_unet(),
        work_dir=str(tmp_path),
        cfg=dict(tome_cfg=dict(ratio=0.5)),
        visualizer=dict(type="Visualizer", vis_backends=[dict(type="ToMeVisBackend", columns=1)]),
        experiment_name="shows_its_model",
    )
    run(runner.model, (500,))
    runner.visualizer.add_image("seen", np.zeros((32, 32, 3), np.uint8))
    assert [path.name for path in tmp_path.rglob("merge_maps/*")] == ["seen_0.png"]


def test_importing_the_package_brings_no_mmengine():
    import subprocess
    import sys

    code = (
        "import sys, mmagic_tome; "
        "print([m for m in ('mmengine', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
