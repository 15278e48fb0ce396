# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""tools/test.py and tools/train.py: MMagic's scripts, with this package imported first."""

import json
from pathlib import Path

import pytest

pytest.importorskip("mmagic")

import forked
import tiny
import torch
from PIL import Image

from mmagic_tome.__main__ import main
from mmagic_tome.mmagic import entry

ROOT = Path(__file__).resolve().parents[2]
EVAL = str(ROOT / "configs" / "demo" / "sd-emoji_eval.py")


def printed_by(work, tmp_path):
    """What a process of its own prints, which must succeed."""
    output = tmp_path / "printed.txt"
    child = forked.start(work, output)
    assert forked.status(child, output) == 0, output.read_text()[-3000:]
    return output.read_text()


def test_the_demo_config_in_a_process_of_its_own(tmp_path, monkeypatch):
    from mmagic.apis import init_model
    from mmengine.config import Config

    demo = Config.fromfile(str(ROOT / "configs" / "demo" / "sd-emoji.py"))
    model = init_model(demo, device="cpu").eval()
    with torch.no_grad():  # a checkpoint that is not the config's own weights
        model.vae.model.decoder.conv_out.weight.mul_(0.7)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "demo.pth")
    monkeypatch.chdir(tmp_path)
    options = ["infer_cfg.steps=4", "test_dataloader.dataset.prompts=[sailboat]"]
    words = ["test", EVAL, "demo.pth", "--work-dir=w", "--out=metrics.json", "--cfg-options"]
    printed = printed_by(lambda: main([*words, *options]), tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    names = ("psnr", "ssim", "latent_error", "seconds")
    of_methods = {f"{method}/{name}" for method in ("merged", "cached") for name in names}
    assert set(found) == {"baseline/seconds", *of_methods}
    assert all(f"{name}: " in printed for name in found)
    (folder,) = (path for path in (tmp_path / "w").iterdir() if path.is_dir())
    assert [path.name for path in folder.glob("vis_data/vis_image/*")] == ["test_000_0.png"]
    times = {
        (row["module"], row["method"]): row
        for row in json.loads((folder / "profile.json").read_text())
    }
    assert {method for _, method in times} == {"baseline", "merged", "cached"}
    assert times["network", "merged"]["calls"] == 4
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert times["network", "merged"]["ms"] > times[f"{block} (block)", "merged"]["ms"] > 0
    assert times[f"{block} (block)", "merged"]["ms"] > times[f"{block}.attn", "merged"]["ms"] > 0
    assert "profile: median milliseconds of a call" in printed
    assert 0 < found["merged/psnr"] < 60


@pytest.mark.slow
def test_training_resumes_in_another_process(sd_folder, tmp_path):
    scheduler = dict(type="DDIMScheduler", clip_sample=False)
    options = dict(folder=sd_folder, scheduler=scheduler, test_scheduler=scheduler)
    sampler = dict(type="InfiniteSampler", shuffle=True)
    (tmp_path / "real").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "real" / "0.png")
    dataset = dict(type="ToMePromptDataset", prompts=["a cat"], images=str(tmp_path / "real"))
    config = tiny.write_config(
        tmp_path / "train.py",
        tiny.tiny_config("DreamBooth", **options),
        tome_cfg=dict(ratio=0.5),
        custom_hooks=[dict(type="ToMeHook")],
        train_dataloader=dict(batch_size=1, num_workers=0, dataset=dataset, sampler=sampler),
        train_cfg=dict(by_epoch=False, max_iters=2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        auto_scale_lr=dict(base_batch_size=4),
        default_hooks=dict(
            checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1),
            logger=dict(type="LoggerHook", interval=1),
        ),
        log_processor=dict(by_epoch=False),
    )

    def printed_by_training(*arguments):
        command = [config, "--work-dir", str(tmp_path / "w"), *arguments]
        return printed_by(lambda: main(["train", *command]), tmp_path)

    printed = printed_by_training("--auto-scale-lr")
    assert "token merging in UNet2DConditionModel" in printed
    assert "lr: 2.5000e-02" in printed, "a quarter of the rate, for a quarter of the batch"
    assert (tmp_path / "w" / "iter_2.pth").is_file()
    printed = printed_by_training("--resume", "--cfg-options", "train_cfg.max_iters=3")
    assert "resumed epoch: 0, iter: 2" in printed
    assert (tmp_path / "w" / "iter_3.pth").is_file()


# --- what can be known without a model ------------------------------------------------------------


@pytest.fixture
def completed(monkeypatch):
    """(script, arguments) -> what MMagic's ``main`` is given by its ``parse_args``."""

    def completed(name, *arguments):
        loaded, found = entry._load(name), []
        monkeypatch.setattr(loaded, "main", lambda: found.append(loaded.parse_args()))
        monkeypatch.setattr(entry, "_load", lambda name: loaded)
        assert main([name, *map(str, arguments)]) == 0
        return found[0]

    return completed


def test_arguments_in_any_order_and_with_spaces(completed, tmp_path):
    (tmp_path / "x.pth").touch()
    args = completed("test", EVAL, "--work-dir", tmp_path, tmp_path / "x.pth", "--launcher", "none")
    assert (args.config, args.checkpoint) == (EVAL, str(tmp_path / "x.pth"))
    assert completed("test", EVAL).checkpoint is None
    load = f"load_from={tmp_path / 'x.pth'}"
    assert completed("test", EVAL, "--cfg-options", load).checkpoint == str(tmp_path / "x.pth")
    assert completed("test", "mmagic_tome::demo/sd-emoji_eval.py").config.endswith("_eval.py")
    prompts = "test_dataloader.dataset.prompts=['red apple', 'sailboat']"
    args = completed("test", EVAL, "--cfg-options", prompts, "a.b=1,2")
    expected = {"test_dataloader.dataset.prompts": ["red apple", "sailboat"], "a.b": (1, 2)}
    assert args.cfg_options == expected


def test_mixed_precision_of_one_optimizer(completed):
    for name in ("dreambooth", "textual_inversion", "vico"):
        (config,) = (ROOT / "configs" / name).glob(f"{name}_tome-5e-1.py")
        args = completed("train", config, "--amp")
        assert args.cfg_options["optim_wrapper.type"] == "AmpOptimWrapper" and not args.amp


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("test", ["nowhere.py"], "config nowhere.py does not exist"),
        ("test", [EVAL, "nowhere.pth"], "there is no checkpoint nowhere.pth"),
        ("test", [EVAL, "--cfg-options", "load_from=no.pth"], "there is no checkpoint no.pth"),
        ("test", [EVAL, "--out", "metrics.txt"], "write metrics.json"),
        ("test", [EVAL.replace("_eval", "")], "inherit from configs/_base_/tome_eval.py"),
        ("train", [EVAL], "has no train_dataloader, train_cfg, optim_wrapper"),
    ],
)
def test_input_that_cannot_be(name, arguments, message, capsys, monkeypatch):
    def build(*_):
        raise AssertionError("built")

    monkeypatch.setattr("mmengine.runner.Runner.from_cfg", build)
    assert main([name, *arguments], f"{name}.py") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"{name}.py: error: ") and message in error
