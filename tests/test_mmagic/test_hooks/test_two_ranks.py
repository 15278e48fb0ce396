# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The loop and its metrics in two processes that share the prompts, as in one."""

import json
import os

import forked
import pytest
import torch

pytest.importorskip("mmagic")

from mmengine.config import Config
from mmengine.runner import Runner

PROMPTS = ["a cat", "a dog", "cat", "dog", "a red cat"]  # an odd number: the last round repeats
METRICS = [
    *(dict(type="ToMeMetric", metric=name) for name in ("psnr", "ssim", "latent_error")),
    dict(type="PSNR", gt_key="baseline_img"),  # MMagic's
    dict(type="ToMeMetric", metric="frechet_efficientnet_lite0", fewest=2),
]


def rank(number, port, config, found):
    """What a process does that torchrun started."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
    torch.cuda.set_device = lambda device: None  # mmengine takes the rank's GPU; there is none
    runner = Runner.from_cfg(Config.fromfile(config))
    assert type(runner.model).__name__ == "MMDistributedDataParallel" and runner.world_size == 2
    values = runner.test()
    if runner.rank == 0:
        found.write_text(json.dumps(values, default=float))


def test_two_ranks_find_what_one_process_finds(make_runner, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    loader = dict(
        batch_size=1,  # of other batches the lowest bits of images differ
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=False),
        dataset=dict(type="ToMePromptDataset", prompts=PROMPTS),
    )
    alone = make_runner("test", tmp_path / "one", metrics=METRICS, test_dataloader=loader)
    expected = alone.test()
    config = alone.cfg.copy()
    config.update(
        launcher="pytorch",
        work_dir=str(tmp_path / "two"),
        experiment_name="two_ranks",
        env_cfg=dict(dist_cfg=dict(backend="gloo")),
        model_wrapper_cfg=dict(type="MMDistributedDataParallel", device_ids=None),
        custom_hooks=[dict(type="ToMeHook")],
    )
    config.dump(str(tmp_path / "config.py"))
    found, port = tmp_path / "found.json", forked.free_port()
    outputs = [tmp_path / f"output{number}.txt" for number in (0, 1)]
    ranks = [
        forked.start(lambda n=n: rank(n, port, tmp_path / "config.py", found), outputs[n])
        for n in (0, 1)
    ]
    for child, output in zip(ranks, outputs):
        assert forked.status(child, output) == 0, output.read_text()[-3000:]
    assert json.loads(found.read_text()) == pytest.approx(expected, rel=1e-6)
    # The first process: its log, and the sheets of its part of five prompts.
    assert "token merging in" in next((tmp_path / "two").rglob("*.log")).read_text()
    assert len(list((tmp_path / "two").rglob("vis_image/test_00*.png"))) == 3
