# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``visualize``: files, maps of what was merged, times of blocks; vision transformers."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config, tiny_inputs, tiny_unet, write_config

from mmagic_tome import apply_tome
from mmagic_tome.lab import vit_maps
from mmagic_tome.lab.maps import Recorder, enlarged, merge_map, merged_blocks, short_name, spread

QUICK = ["--size", "64", "--steps", "4", "--device", "cpu", "--rounds", "1"]


# --- recording ------------------------------------------------------------------------------------


def run(unet, recorder, times=(900, 500)):
    with torch.no_grad():
        for time in times:
            unet(**{**tiny_inputs(), "timestep": torch.tensor(time)})
            recorder.next_step()


def test_plans_and_times_of_every_block_and_step_are_recorded():
    unet = tiny_unet()
    handle = apply_tome(unet, ratio=0.5)
    blocks = merged_blocks(handle)
    assert list(blocks) == list(dict.fromkeys(row["block"] for row in handle.stats()))
    hooks = [len(module._forward_pre_hooks) for module in unet.modules()]
    with Recorder(blocks, torch.device("cpu")) as recorder:
        run(unet, recorder)
    places = [(record.step, record.block) for record in recorder.records]
    assert places == [(step, block) for step in (0, 1) for block in blocks]
    for record in recorder.records:
        assert record.grid == (16, 16) and record.slot.shape == (256,) and record.kept == 128
    # Other steps, other destinations.
    first, again = recorder.records[0], recorder.records[len(blocks)]
    assert first.block == again.block and not np.array_equal(first.slot, again.slot)
    for seconds in recorder.seconds(3).values():
        assert (seconds[:2] > 0).all() and seconds[2] == 0
    assert [len(module._forward_pre_hooks) for module in unet.modules()] == hooks


def test_recording_changes_nothing_and_times_alone_record_no_plans():
    unet = tiny_unet()
    handle = apply_tome(unet, ratio=0.5)
    with torch.no_grad():
        alone = unet(**tiny_inputs()).sample
        for plans in (True, False):
            with Recorder(merged_blocks(handle), torch.device("cpu"), plans) as recorder:
                assert torch.equal(unet(**tiny_inputs()).sample, alone)
            assert bool(recorder.records) == plans


# --- painting -------------------------------------------------------------------------------------


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


def test_names_are_short_and_numbers_evenly_spread():
    assert short_name("down_blocks.0.attentions.1.transformer_blocks.0") == "down 0.1.0"
    assert short_name("mid_block.attentions.0.transformer_blocks.0") == "mid 0.0"
    assert short_name("single_transformer_blocks.12") == "single_transformer 12"
    assert spread(9, 4) == [0, 3, 5, 8] and spread(3, 4) == [0, 1, 2] and spread(3, 1) == [0]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(sd_folder, tmp_path_factory):
    pytest.importorskip("mmagic")
    path = tmp_path_factory.mktemp("configs") / "tome.py"
    return write_config(path, tiny_config(folder=sd_folder), tome_cfg=dict(ratio=0.5))


def test_all_maps_of_a_mmagic_model(results, config):
    words = ["visualize", config, *QUICK, "--columns", "2"]
    folder, found = results("all", *words, "--prompt", "a cat", "dog")
    ends = (".png", "_baseline.png", "_merge.png", "_merge.gif", "_error.png")
    expected = {f"{stem}{end}" for stem in ("0000_a-cat", "0001_dog") for end in ends}
    names = {path.name for path in folder.iterdir()}
    assert names - {f"{name[:-4]}.mp4" for name in names} == expected | {"cost.png", "results.json"}
    with Image.open(folder / "0000_a-cat_merge.gif") as gif:
        assert gif.n_frames == 4
    assert [image["prompt"] for image in found["images"]] == ["a cat", "dog"]
    assert all(image["psnr"] > 0 for image in found["images"])
    base, merged = found["cost_seconds"].values()
    assert list(base) == list(merged) and all(len(one) == 4 for one in base.values())
    assert all(second > 0 for one in (*base.values(), *merged.values()) for second in one)
    # One level of the network is a smaller sheet.
    part, found = results("part", *words, "--prompt", "dog", "--block", "down_blocks.0")
    assert all(name.startswith("down_blocks.0") for name in found["cost_seconds"]["baseline"])
    sheets = [
        Image.open(one).height
        for one in (part / "0000_dog_merge.png", folder / "0001_dog_merge.png")
    ]
    assert sheets[0] < sheets[1]


def test_a_pipeline_with_caching_has_fewer_maps_and_its_cost_is_zero_where_skipped(
    results, pipeline_folder
):
    folder, found = results(
        *("out", "visualize", "--pipeline", pipeline_folder("sd"), "--prompt", "cat", *QUICK),
        *("--method", "both={'ratio': 0.5, 'cache': {'timestep_range': [0, 1]}}"),
    )
    with Image.open(folder / "0000_cat_merge.gif") as gif:
        assert 1 < gif.n_frames < 4, "nothing is merged at a step that is skipped"
    for block, seconds in found["cost_seconds"]["both"].items():
        assert 0 in seconds and 0 not in found["cost_seconds"]["baseline"][block]


def test_no_such_block_is_said_and_leaves_nothing(command, config, tmp_path):
    words = ["--prompt", "a", "--block", "cellar", "--work-dir", tmp_path / "out", *QUICK]
    code, _, err = command("visualize", config, *words)
    assert code == 2 and "no merged block has cellar in its name; there are down" in err
    assert not (tmp_path / "out").exists()


# --- vision transformers --------------------------------------------------------------------------

HEAD = 'custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)\n'
MODEL = """
model = dict(type="ToMe", model=dict(type="TimmModel", name="vit_tiny_patch16_224", img_size=64,
             depth=3, embed_dim=24, num_classes=3), r={r})
vit_input = dict(kind="{kind}", size=64, patch=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""


@pytest.fixture
def vit(tmp_path, no_default_scope):
    """Folder with configs of a vision transformer, and an image."""
    pytest.importorskip("timm")
    configs = {"vit": (3, "image"), "plain": (0, "image"), "clips": (3, "video")}
    for name, (r, kind) in configs.items():
        (tmp_path / f"{name}.py").write_text(HEAD + MODEL.format(r=r, kind=kind))
    (tmp_path / "none.py").write_text(HEAD + 'model = dict(type="TimmModel", name="x")\n')
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path


@pytest.mark.parametrize(
    ("config", "r", "kept"), [("vit", [], [14, 11, 8]), ("plain", ["--r", "2"], [15, 13, 11])]
)
def test_patches_of_an_image_are_drawn_block_by_block(results, vit, config, r, kept):
    words = ["visualize", "--vit", vit / f"{config}.py", "--img", vit / "image.png", *r]
    folder, found = results("out", *words, "--device", "cpu", "--columns", "2")
    (drawn,) = found["images"]
    assert [row["kept"] for row in drawn["tokens"]] == kept
    assert np.asarray(Image.open(folder / drawn["sheet"])).std() > 10
    with Image.open(folder / drawn["gif"]) as gif:
        assert gif.n_frames == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--vit {0}/vit.py --img none.png", "none.png does not exist"),
        ("--vit {0}/vit.py --img {0}/vit.py", "cannot read image"),
        ("--vit {0}/vit.py", "--vit needs images"),
        ("--vit {0}/vit.py --img {0}/image.png --ratio 0.5", "ratio has no meaning with --vit"),
        ("--vit {0}/none.py --img {0}/image.png", "with model and vit_input"),
        ("--vit {0}/clips.py --img {0}/image.png --dry-run", "vit_input has kind='video'"),
        ("--vit {0}/plain.py --img {0}/image.png", "nothing was merged"),
    ],
)
def test_what_a_vision_transformer_cannot_draw_is_one_line(command, vit, words, said, monkeypatch):
    monkeypatch.chdir(vit)
    if "plain" not in words:
        monkeypatch.setattr(vit_maps, "_build", lambda *_: pytest.fail("the model was built"))
    code, _, err = command("visualize", *words.format(vit).split(), "--device", "cpu")
    assert code == 2 and said in err.strip().splitlines()[-1]
    assert not (vit / "work_dirs" / "vit").exists()
