# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Every config of ours, on top of one of MMagic's for every class of its Stable Diffusion family.

The layout of the networks is the real one, the widths are tiny and the weights random.
"""

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmagic")

import mmagic_hub
import tiny
import torch
from mmagic.registry import MODELS
from mmagic_hub import INFERENCER
from mmengine import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image

from mmagic_tome import ToMeConfig, ToMeError, apply_cache, apply_tome, get_handle, remove_cache
from mmagic_tome.patch import interceptors_of

OURS = Path(__file__).resolve().parents[2] / "configs"
LISTED = sorted(
    str(file.relative_to(OURS)) for name in mmagic_hub.FOLDERS for file in OURS.glob(f"{name}/*.py")
)
CONFIGS = [name for name in LISTED if not name.endswith("_eval.py") and "_cache-" not in name]
# The same without merging are read in test_index.py.
CACHED = [name for name in LISTED if "_tome-" in name and "_cache-" in name]
EVALUATIONS = [name for name in LISTED if name.endswith("_eval.py")]
ANIMATION = "controlnet/controlnet-animation_tome-5e-1.py"


def ours(name, hub):
    """One of this project's configs; its networks of MMagic's own get tiny, too."""
    config = Config.fromfile(str(OURS / name))
    if config.model.unet.type == "DenoisingUnet":
        config.model.unet = dict(
            tiny.NATIVE_UNET,
            channels_cfg=[1, 2, 2, 2],
            layers_per_block=2,
            down_block_types=list(config.model.unet.down_block_types),
            up_block_types=list(config.model.unet.up_block_types),
        )
        config.model.vae = dict(tiny.NATIVE_VAE)
    return mmagic_hub.shrink(config, hub)


# Kind of target -> a layer there that is given the tokens.
LAYERS = {
    "attn": "attn1.to_q",
    "attn_kv": "attn1.to_k",
    "crossattn": "attn2.to_q",
    "mlp": "ff",
    "block": "attn1.to_q",
}


def layers_at_targets(handle):
    """(target, a layer that is given the tokens there) of all targets."""
    for row in handle.stats():
        along = row["block"].startswith("controlnet.")
        network = handle.networks["controlnet"] if along else handle.network
        block = network.get_submodule(row["block"].removeprefix("controlnet."))
        yield row["target"], block.get_submodule(LAYERS[row["kind"]])


def check(model, image):
    """Fewer tokens are in the blocks, and ratio 0 and removal are exact.

    Args:
        model (nn.Module): With token merging.
        image (callable): Generates by it, without arguments.

    Returns:
        set[float]: Shares of tokens that were removed.
    """
    handle = model.tome_handle
    seen, hooks = {}, []
    for target, layer in layers_at_targets(handle):
        note = seen.setdefault(target, set()).add
        # Behind the layer: in front of it other hooks see the unmerged tokens.
        hook = layer.register_forward_hook(lambda m, args, y, note=note: note(args[0].shape[1]))
        hooks.append(hook)
    merged = image()
    for hook in hooks:
        hook.remove()
    rows = handle.stats()
    assert seen == {row["target"]: {row["kept"]} for row in rows}
    assert len(rows) >= 5 and all(row["calls"] > 0 for row in rows)
    handle.ratio = 0
    baseline = image()
    assert np.isfinite(merged).all() and np.abs(merged - baseline).max() > 1e-3
    handle.remove()
    assert model.tome_handle is None
    networks = [model.unet, getattr(model, "controlnet", model.unet)]
    for module in (module for network in networks for module in network.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not interceptors_of(module)
    np.testing.assert_array_equal(image(), baseline)
    return {1 - row["kept"] / row["tokens"] for row in rows}


@pytest.mark.parametrize("name", CONFIGS)
def test_our_configs(name, hub, build):
    """With step caching, which is removed first; then alone."""
    config = ours(name, hub)
    expected = ToMeConfig.coerce(config.tome_cfg)
    config.cache_cfg = [dict(timestep_range=(0, 0.5)), dict(region="inner")]
    model, given = build(config), mmagic_hub.arguments(config.model)
    assert type(model) is MODELS.get(config.model.type)
    both = mmagic_hub.infer(model, **{**given, "num_inference_steps": 6})
    skipped = {row["region"]: row["skipped"] for row in model.cache_handle.stats()}
    assert skipped["network"] > 0 and skipped["inner"] > 0
    assert skipped.get("controlnet.network", skipped["network"]) == skipped["network"]
    assert remove_cache(model) and model.cache_handle is None
    assert np.isfinite(both).all()
    model.tome_handle.reset_stats()
    shares = {expected.ratio, (expected.controlnet_config or expected).ratio}
    assert check(model, lambda: mmagic_hub.infer(model, **given)) == shares


@pytest.mark.parametrize("name", CACHED)
def test_our_configs_with_step_caching(name, hub, build):
    config = ours(name, hub)
    model, given = build(config), mmagic_hub.arguments(config.model)
    given["num_inference_steps"] = 8
    assert model.cache_handle.description == "tolerance 0.02"
    cached = mmagic_hub.infer(model, **given)
    assert np.isfinite(cached).all() and len(model.cache_handle.steps) == 8
    assert remove_cache(model)
    assert all(row["kept"] < row["tokens"] for row in model.tome_handle.stats())


def test_attention_injection_joins_the_keys_of_a_reference(hub, build):
    config = ours(ANIMATION, hub)
    model, given = build(config), mmagic_hub.arguments(config.model)
    apply_tome(model, ratio=0.5, targets=["attn_kv"])
    with pytest.raises(ToMeError, match=r"attention_injection.*write targets="):
        mmagic_hub.infer(model, **given)
    apply_tome(model, ratio=0.5)
    with pytest.warns(UserWarning, match="which do not merge; to merge queries write"):
        assert np.isfinite(mmagic_hub.infer(model, **given)).all()


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations(name, hub, tmp_path):
    config = mmagic_hub.shrink(Config.fromfile(str(OURS / name)), hub)
    image = str(tmp_path / "image.png")
    mmagic_hub.an_image().save(image)
    given = config.get("infer_cfg") or {}
    inputs = {key: [image] for key in given if key in ("controls", "references")}
    config.infer_cfg = dict(given, steps=2, size=(64, 64), **inputs)
    if config.model.type == "AnimateDiff":
        config.infer_cfg.frames = 2
    config.test_dataloader.dataset.prompts = config.test_dataloader.dataset.prompts[:2]
    config.work_dir = str(tmp_path / "work")
    config.experiment_name = Path(name).stem
    runner = Runner.from_cfg(config)
    tiny.randomise(runner.model)
    found = runner.test()
    relative = ("psnr", "ssim", "latent_error")
    names = {f"merging/{key}" for key in (*relative, "seconds")}
    assert set(found) == {"baseline/seconds", *names}
    assert 0 < found["merging/psnr"] < 60 and 0 < found["merging/latent_error"] < 2
    assert all(math.isfinite(value) for value in found.values())
    log = next(tmp_path.rglob("*.log")).read_text()
    assert "token merging in" in log
    assert len(list(tmp_path.rglob("vis_image/test_*.png"))) == 2


def test_every_class_and_every_folder_has_a_config_of_ours():
    root = mmagic_hub.mmagic_folder()
    theirs = {Config.fromfile(str(root / name)).model.type for name in mmagic_hub.mmagic_configs()}
    assert {Config.fromfile(str(OURS / name)).model.type for name in CONFIGS} == theirs
    assert len(theirs) == 10
    evaluated = {name.partition("/")[0] for name in EVALUATIONS}
    assert evaluated == {*mmagic_hub.FOLDERS} - {"controlnet_animation"}


# --- MMagicInferencer -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", INFERENCER)
def test_mmagic_inferencer(name, hub, monkeypatch, tmp_path):
    from mmagic.apis import MMagicInferencer
    from mmagic.apis.inferencers.text2image_inferencer import Text2ImageInferencer

    given = dict(tiny.QUICK, seed=1)
    if name.startswith("animatediff"):
        given["video_length"] = 2
    # The inferencer hands these to ``infer``; it has no other way to ask for 2 steps.
    monkeypatch.setattr(Text2ImageInferencer, "extra_parameters", given)
    config = ours(name, hub)
    with pytest.warns(UserWarning, match="is overridden by"):
        editor = MMagicInferencer(model_name=INFERENCER[name], model_config=config, device="cpu")
    model = tiny.randomise(editor.inferencer.inferencer.model)
    call = dict(text="a cat")
    if INFERENCER[name] == "controlnet":
        call["control"] = str(tmp_path / "control.png")
        mmagic_hub.an_image().save(call["control"])

    def image():
        torch.manual_seed(0)
        return np.asarray(editor.infer(**call)[1][0], dtype=np.float32)

    with_controlnet = get_handle(getattr(model, "controlnet", None)) is not None
    assert with_controlnet == bool(config.tome_cfg.get("controlnet"))
    assert 0 not in check(model, image)


@pytest.mark.parametrize("folder", ["guided_diffusion", "disco_diffusion"])
def test_mmagics_other_diffusion_models_say_that_they_cannot_be_merged(folder):
    """Their ``DenoisingUnet`` has attention of its own kind on the image itself."""
    file = sorted((mmagic_hub.mmagic_folder() / folder).glob("*.py"))[0]
    unet = Config.fromfile(str(file)).model.unet
    unet.update(base_channels=32, use_fp16=False)
    unet.attention_cfg.update(num_head_channels=8)
    init_default_scope("mmagic")  # whoever ran before
    network = MODELS.build(unet)
    with pytest.raises(ToMeError, match=r"DenoisingUnet has no transformer block.*'stable'"):
        apply_tome(network)
    apply_cache(network, region="network")  # which needs no transformer block
    assert remove_cache(network)


@pytest.mark.slow
def test_animation_inferencer(hub, monkeypatch, tmp_path):
    """The one that needs a GPU and a detector of edges, with both taken away."""
    from mmagic.apis.inferencers import controlnet_animation_inferencer as module

    class Detector:
        @classmethod
        def from_pretrained(cls, name):
            return cls()

        def __call__(self, image, **kwargs):
            return image

    monkeypatch.setattr(module, "HEDdetector", Detector)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self, *args: self)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *args: self)
    config = ours(ANIMATION, hub)
    monkeypatch.setattr(module.Config, "fromfile", lambda file: config)
    init_default_scope("mmagic")
    inferencer = module.ControlnetAnimationInferencer("the config")
    model = tiny.randomise(inferencer.pipe)
    (tmp_path / "video").mkdir()
    mmagic_hub.an_image().save(tmp_path / "video" / "0.png")
    options = dict(prompt="a cat", video=str(tmp_path / "video"), num_inference_steps=2)
    options.update(image_width=64, image_height=64, strength=1.0)

    def frame(name):
        inferencer(**options, save_path=str(tmp_path / name))
        with Image.open(tmp_path / name / "0.png") as image:
            return np.asarray(image, dtype=np.float32)

    merged = frame("merged")
    assert all(row["kept"] < row["tokens"] for row in model.tome_handle.stats())
    model.tome_handle.remove()
    assert np.abs(frame("baseline") - merged).max() >= 1
