# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import itertools

import numpy as np
import pytest
from PIL import Image

_COUNT = itertools.count()
PROMPTS = ["a cat", "a dog", "cat", "dog"]


@pytest.fixture(scope="session")
def real_images(tmp_path_factory):
    """A folder of four images of noise, 64x64."""
    folder = tmp_path_factory.mktemp("real")
    for number in range(len(PROMPTS)):
        noise = np.random.RandomState(number).randint(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return str(folder)


@pytest.fixture(scope="session")
def make_runner(sd_folder, real_images):
    """Builds a runner of a tiny Stable Diffusion; see ``make``."""
    pytest.importorskip("mmagic")
    import tiny
    from mmengine.config import Config
    from mmengine.runner import Runner

    def make(mode, work_dir, images=None, metrics=None, loop=None, validate=False, **changes):
        """A runner for ``'test'``, ``'val'`` or ``'train'`` (4 iterations, 1 image each).

        Args:
            images (bool, optional): Whether there are real images. Default: in training.
            metrics (list, optional): Of the evaluator. Default: PSNR to the baseline.
            loop (dict, optional): Arguments of the loop.
            validate (bool): Whether training validates after every 2nd iteration.
            **changes: Keys of the config; None removes one.
        """
        dataset = dict(type="ToMePromptDataset", prompts=list(PROMPTS))
        if mode == "train" if images is None else images:
            dataset["images"] = real_images
        loader = dict(
            batch_size=2, num_workers=0, dataset=dataset,
            sampler=dict(type="DefaultSampler", shuffle=False),
        )  # fmt: skip
        config = dict(
            default_scope="mmagic",
            work_dir=str(work_dir),
            # mmengine keeps scopes and loggers by this name and the second of the start.
            experiment_name=f"hooks_{next(_COUNT)}",
            custom_imports=dict(imports=["mmagic_tome"], allow_failed_imports=False),
            tome_cfg=dict(ratio=0.5),
            infer_cfg=dict(steps=2, guidance=3.0, size=(64, 64)),
            model=tiny.tiny_config(folder=sd_folder),
        )
        if mode == "train":
            # MMagic's StableDiffusion cannot be trained by mmengine's loops: its train_step
            # does not take their arguments. DreamBooth is the same with one that does.
            scheduler = dict(type="DDIMScheduler", clip_sample=False)
            config["model"] = tiny.tiny_config(
                "DreamBooth", folder=sd_folder, scheduler=scheduler, test_scheduler=scheduler
            )
            config["train_dataloader"] = dict(loader, batch_size=1)
            config["train_cfg"] = dict(by_epoch=False, max_iters=4, val_interval=2)
            config["optim_wrapper"] = dict(optimizer=dict(type="SGD", lr=1e-4))
        evaluated = {"train": "val"}.get(mode, mode)
        if mode != "train" or validate:
            config[f"{evaluated}_dataloader"] = loader
            config[f"{evaluated}_evaluator"] = metrics or [dict(type="ToMeMetric", metric="psnr")]
            kind = f"ToMe{evaluated.capitalize()}Loop"
            config[f"{evaluated}_cfg"] = dict(type=kind, **(loop or {}))
        config.update(changes)
        config = {key: value for key, value in config.items() if value is not None}
        return Runner.from_cfg(Config(config))

    return make
