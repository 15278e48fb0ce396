"""The demo model: how its data is joined, that training resumes, and what is shipped."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

TOOLS = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
ASSETS = Path(__file__).resolve().parents[1] / "mmagic_tome" / "assets" / "demo_model"


@pytest.fixture(scope="module")
def tools():
    """The tools import each other by bare names; keep those names out of the other tests' way."""
    names = (
        "features", "common", "models", "tokenizer", "images", "stages", "trainer", "prepare_data",
        "train_vae", "train_unet", "train", "evaluate", "export",
    )  # fmt: skip
    before = {n: sys.modules.pop(n, None) for n in names}
    sys.path.insert(0, str(TOOLS))
    try:
        loaded = {}
        for name in names:
            spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            loaded[name] = module
        yield loaded
    finally:
        sys.path.remove(str(TOOLS))
        for name in names:
            sys.modules.pop(name, None)
            if before[name] is not None:
                sys.modules[name] = before[name]


# ------------------------------------------------------------------------------------------ data


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "package" / "assets"
    folder.mkdir(parents=True)
    stems = {
        "1f680": (255, 0, 0, 255),  # rocket
        "1f98a": (0, 0, 0, 0),  # fox, fully transparent
        "2764-fe0f": (0, 255, 0, 255),  # red heart
        "1f44d-1f3fb": (0, 0, 255, 255),  # thumbs up, light skin tone
        "1f1e9-1f1ea": (0, 0, 255, 255),  # a flag
        "not-a-code-point": (0, 0, 255, 255),
    }
    for stem, colour in stems.items():
        Image.new("RGBA", (256, 256), colour).save(folder / f"{stem}.webp", lossless=True)
    return folder


def test_captions_join_by_code_point(tools, pictures):
    pytest.importorskip("emoji")
    pairs = dict(tools["prepare_data"].collect(pictures))
    assert sorted(pairs) == ["fox", "red heart", "rocket"]


def test_pictures_lie_on_white(tools, pictures):
    picture = np.asarray(tools["prepare_data"].load_picture(pictures / "1f98a.webp"))
    assert picture.shape == (256, 256, 3)
    assert (picture == 255).all()


def test_store_writes_all_sizes(tools, pictures, tmp_path):
    pytest.importorskip("emoji")
    prepare_data = tools["prepare_data"]
    prepare_data.store(prepare_data.collect(pictures), {"fox"}, tmp_path / "data")
    entries = json.loads((tmp_path / "data" / "captions.json").read_text())
    assert [e["caption"] for e in entries if e["concept"]] == ["fox"]
    for size in (256, 128, 64):
        assert np.load(tmp_path / "data" / f"images_{size}.npy").shape == (3, size, size, 3)


def test_captions_train_or_are_held_out(tools):
    read = tools["prepare_data"].read_concepts
    shipped, mixed, held_out = (
        read(TOOLS / name) for name in ("concepts.txt", "concepts_mixed.txt", "held_out.txt")
    )
    assert not mixed & held_out
    assert shipped < mixed
    assert (len(mixed), len(held_out)) == (360, 1247)


def test_unknown_concept_is_named(tools, pictures, tmp_path):
    pytest.importorskip("emoji")
    prepare_data, error = tools["prepare_data"], tools["common"].ToolError
    with pytest.raises(error, match="no such emoji"):
        prepare_data.store(prepare_data.collect(pictures), {"no such emoji"}, tmp_path / "data")


def test_missing_package_file_is_named(tools, tmp_path):
    with pytest.raises(tools["common"].ToolError, match=r"nothing\.tgz"):
        tools["prepare_data"].unpack(tmp_path / "nothing.tgz", tmp_path)


# -------------------------------------------------------------------------------------- training


def tiny_trainer(tools, folder, **kwargs):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 4)

    def loss_fn(generator, step, part, parts):
        x = torch.randn(8, 4, generator=generator)
        return (module(x) - x.flip(1)).square().mean()

    stage = tools["stages"].Stage("tiny", steps=8, batch=8, lr=1e-2, warmup=2, **kwargs)
    return tools["trainer"].Trainer(stage, {"module": module}, loss_fn, folder, "cpu"), module


def test_resume_gives_the_same_state(tools, tmp_path):
    whole, module = tiny_trainer(tools, tmp_path / "whole")
    whole.run()

    first, _ = tiny_trainer(tools, tmp_path / "pieces")
    assert not first.resume()
    first.run(max_steps=3)
    assert not first.finished
    second, resumed = tiny_trainer(tools, tmp_path / "pieces")
    assert second.resume()
    assert second.state.step == 3
    second.run()

    assert second.finished
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for a, b in zip(whole.ema.shadow_params, second.ema.shadow_params):
        assert torch.equal(a, b)


def test_checkpoints_leave_no_halves(tools, tmp_path):
    def interrupted(path):
        path.write_text("half")
        raise KeyboardInterrupt

    target = tmp_path / "checkpoint.pt"
    target.write_text("whole")
    with pytest.raises(KeyboardInterrupt):
        tools["common"].write_atomically(target, interrupted)
    assert target.read_text() == "whole"


def test_two_workers_see_every_part(tools, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork after OpenMP has started its threads would hang
    try:
        alone, module = tiny_trainer(tools, tmp_path / "alone", micro=2)
        alone.run(max_steps=3)
        torch.manual_seed(0)
        shared = torch.nn.Linear(4, 4)

        def loss_fn(generator, step, part, parts):
            x = torch.randn(8, 4, generator=generator)
            return (shared(x) - x.flip(1)).square().mean()

        trainer = tools["trainer"].Trainer(
            alone.stage, {"module": shared}, loss_fn, tmp_path / "two", "cpu", workers=2
        )
        trainer.run(max_steps=3)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(module.parameters(), shared.parameters()):
        torch.testing.assert_close(a, b)


def test_learning_rate_reaches_its_end(tools):
    stage = tools["stages"].Stage("s", steps=100, lr=1.0, lr_end=0.25, warmup=10)
    assert stage.learning_rate(0, 0) == pytest.approx(0.1)
    assert stage.learning_rate(100, 0) == pytest.approx(0.25)
    by_time = tools["stages"].Stage("s", minutes=1, lr=1.0)
    assert by_time.progress(10**6, 30) == 0.5


def test_unknown_stage_is_named(tools, tmp_path):
    train = tools["train"]
    args = train.parse_args(["--only", "unet_999", "--work-dir", str(tmp_path)])
    with pytest.raises(tools["common"].ToolError, match="unet_999"):
        train.check_stages(args)


def test_sigterm_writes_a_checkpoint(tools, tmp_path):
    trainer, _ = tiny_trainer(tools, tmp_path)
    loss_fn, before = trainer.loss_fn, signal.getsignal(signal.SIGTERM)

    def terminated_in_the_third_step(generator, step, part, parts):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_fn(generator, step, part, parts)

    trainer.loss_fn = terminated_in_the_third_step
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGTERM) == before
    resumed, _ = tiny_trainer(tools, tmp_path)
    assert resumed.resume()
    assert resumed.state.step == 3


# ----------------------------------------------------------------------------------- mixed sizes


def test_steps_draw_sizes_by_weight(tools):
    stage = tools["stages"].Stage(
        "s", size=256, sizes=(128, 256), size_weights=(1, 2), merge=0.5, merge_share=0.75
    )
    drawn = [stage.draw(step) for step in range(1200)]
    assert drawn == [stage.draw(step) for step in range(1200)]
    assert {merge for size, merge in drawn if size == 128} == {0.0}
    merges = [merge for size, merge in drawn if size == 256]
    assert len(merges) == pytest.approx(800, abs=60)
    assert merges.count(0.5) == pytest.approx(0.75 * len(merges), abs=50)
    assert merges.count(0.5) + merges.count(0.0) == len(merges)


def test_sizes_as_options(tools):
    train = tools["train"]
    args = train.parse_args(["--sizes", "64", "128", "--size-weights", "1", "3"])
    stage = train.with_options(tools["stages"].MIXED, args)
    assert (stage.size, tuple(stage.sizes), tuple(stage.size_weights)) == (128, (64, 128), (1, 3))
    vae = tools["stages"].RECIPES["cpu"][0]
    assert train.with_options(vae, args) == vae


def test_wrong_size_weights_are_named(tools):
    stage, error = tools["stages"].Stage, tools["common"].ToolError
    with pytest.raises(error, match="3 size weights for 2 sizes"):
        stage("s", sizes=(128, 256), size_weights=(1, 2, 3))
    with pytest.raises(error, match="size weights"):
        stage("s", sizes=(128, 256), size_weights=(1, -1))


def mixed_trainer(tools, tokenizer, folder):
    """A half-size UNet on random latents of two sizes, the larger one with token merging."""
    stage = tools["stages"].Stage(
        "mixed", steps=6, batch=2, warmup=1, size=64, sizes=(32, 64), merge=0.5
    )
    torch.manual_seed(0)
    models = tools["models"].build_models(width=0.5, vocab_size=600, sample_size=16)
    latents = {size: torch.randn(2, 4, size // 4, size // 4) for size in (32, 64)}
    prompts = tools["train_unet"].Prompts(["red apple", "panda"], tokenizer)
    unet, text_encoder = models["unet"], models["text_encoder"]
    loss_fn = tools["train_unet"].diffusion_loss(
        unet, text_encoder, latents, prompts, models["scheduler"], stage, "cpu"
    )
    modules = {"unet": unet, "text_encoder": text_encoder}
    return tools["trainer"].Trainer(stage, modules, loss_fn, folder, "cpu")


def test_mixed_sizes_resume_and_are_logged(tools, tmp_path):
    tokenizer = tools["tokenizer"].train_tokenizer(["red apple", "panda"], tmp_path / "bpe", 600)
    whole = mixed_trainer(tools, tokenizer, tmp_path / "whole")
    whole.run()
    first = mixed_trainer(tools, tokenizer, tmp_path / "pieces")
    first.run(max_steps=5)
    second = mixed_trainer(tools, tokenizer, tmp_path / "pieces")
    assert second.resume()
    second.run()
    for a, b in zip(whole.parameters, second.parameters):
        assert torch.equal(a, b)

    lines = (tmp_path / "whole" / "logs" / "mixed.jsonl").read_text().splitlines()
    log = {entry["size"]: entry for entry in map(json.loads, lines)}
    drawn = [whole.stage.draw(step)[0] for step in range(6)]
    assert {size: entry["steps"] for size, entry in log.items()} == {
        size: drawn.count(size) for size in set(drawn)
    }
    assert set(drawn) == {32, 64}
    assert (log[32]["merge"], log[64]["merge"]) == (0.0, 0.5)


def test_repeated_steps_are_logged_once(tools, tmp_path):
    log = tools["trainer"].LossLog(tmp_path / "log.jsonl")
    for step in (20, 40):
        log.add(128, 0.0, 0.1, 1.0)
        log.write(step=step)
    with log.path.open("a") as file:
        file.write('{"step": 20, "si')  # a line that an interruption cut off
    log.rewind(30)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [20]


def test_start_from_takes_vae_and_tokenizer(tools, tmp_path):
    adopt = tools["train_unet"].adopt
    with pytest.raises(tools["common"].ToolError, match="--start-from"):
        adopt(tmp_path, tmp_path / "work")
    model = tmp_path / "model"
    for name in ("vae", "tokenizer"):
        (model / name).mkdir(parents=True)
        (model / name / "config.json").write_text("{}")
    (model / "model_index.json").write_text("{}")
    (tmp_path / "work").mkdir()
    adopt(model, tmp_path / "work")
    assert (tmp_path / "work" / "vae" / "config.json").is_file()
    assert (tmp_path / "work" / "tokenizer" / "config.json").is_file()


def test_latents_of_other_captions_are_not_used(tools, tmp_path):
    images = {size: np.zeros((3, size, size, 3), np.uint8) for size in (64,)}
    data = SimpleNamespace(captions=["a", "b", "c"], concepts=[0, 1], images=images)
    tools["models"].build_vae(0.5).save_pretrained(tmp_path / "vae")
    make_latents = tools["train_unet"].make_latents
    first = make_latents(data, tmp_path, "cpu")
    assert first[64].shape == (2, 4, 16, 16)
    assert torch.equal(make_latents(data, tmp_path, "cpu")[64], first[64])
    data.concepts = [0, 1, 2]
    assert make_latents(data, tmp_path, "cpu")[64].shape == (3, 4, 16, 16)


# ---------------------------------------------------------------------------------------- models


def test_half_size_variant_builds(tools):
    models = tools["models"].build_models(width=0.5, vocab_size=600, sample_size=16)
    count = sum(p.numel() for p in models["unet"].parameters())
    assert count < 5e6
    with torch.no_grad():
        latents = torch.randn(2, 4, 16, 16)
        context = models["text_encoder"](torch.zeros(2, 8, dtype=torch.long))[0]
        out = models["unet"](latents, 10, encoder_hidden_states=context).sample
        assert out.shape == latents.shape
        assert models["vae"].decode(latents).sample.shape == (2, 3, 64, 64)


def test_rescaled_vae_reconstructs_the_same(tools):
    models = tools["models"]
    torch.manual_seed(0)
    vae = models.build_vae(0.5).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean
        before = vae.decode(z).sample
        models.standardise_latents(vae, z.mean((0, 2, 3)), z.std((0, 2, 3)))
        rescaled = vae.encode(x).latent_dist.mean
        after = vae.decode(rescaled).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    unit = rescaled * models.SCALING_FACTOR
    torch.testing.assert_close(unit.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(unit.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_tokenizer_round_trip(tools, tmp_path):
    tokenizer = tools["tokenizer"].train_tokenizer(["red apple", "panda"], tmp_path, 600)
    assert tokenizer.decode(tokenizer("Red apple").input_ids, skip_special_tokens=True).strip() == (
        "red apple"
    )
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_captions_to_measure(tools, tmp_path):
    data = SimpleNamespace(captions=["fox", "rocket", "panda"], concepts=[0])
    file = tmp_path / "captions.txt"
    file.write_text("# held out\npanda\nrocket\n")
    candidates = tools["evaluate"].candidates
    assert candidates(data, None) == [0]
    assert candidates(data, file) == [1, 2]
    file.write_text("unicorn\n")
    with pytest.raises(tools["common"].ToolError, match="unicorn"):
        candidates(data, file)


def test_ranks(tools):
    real = torch.eye(3)
    generated = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0.6, 0.5, 0.4]])
    assert tools["evaluate"].ranks(generated, real).tolist() == [0, 1, 2]


# ------------------------------------------------------------------------------- what is shipped

shipped = pytest.mark.skipif(
    not (ASSETS / "model_index.json").is_file(), reason="the demo weights are not in this checkout"
)


@pytest.fixture(scope="module")
def pipeline(tools):
    return tools["evaluate"].load_pipeline(ASSETS)


@shipped
def test_shipped_size():
    assert sum(p.stat().st_size for p in ASSETS.rglob("*.safetensors")) <= 24_000_000


@shipped
def test_shipped_files_name_no_machine():
    for path in [*ASSETS.rglob("*config.json"), ASSETS / "model_index.json"]:
        text = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in text, path
        assert '"/' not in text, path


@shipped
def test_shipped_model_fits_mmagic(pipeline):
    # MMagic divides the latents by this number whatever the config says.
    assert pipeline.vae.config.scaling_factor == 0.18215
    assert len(pipeline.vae.config.block_out_channels) == 3
    assert len(pipeline.unet.config.down_block_types) == 3
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size
    assert pipeline.tokenizer.model_max_length <= 32
    assert len(pipeline.tokenizer) == pipeline.text_encoder.config.vocab_size


@shipped
def test_captions_yield_their_emoji(tools, pipeline):
    """Not noise: white around, and the colours that the captions ask for."""
    size = pipeline.unet.config.sample_size * 4
    prompts = ["red heart", "blue heart", "yellow heart"]
    pictures = tools["evaluate"].generate(pipeline, prompts, size, 8, 3.0, 0, 3).astype(float)
    corners = pictures[:, [2, 2, -3, -3], [2, -3, 2, -3]]
    assert corners.min() > 215
    middle = pictures[:, size * 2 // 5 : size * 3 // 5, size * 2 // 5 : size * 3 // 5].mean((1, 2))
    red, blue, yellow = middle
    assert red[0] > red[1] + 40 and red[0] > red[2] + 40
    assert blue[2] > blue[0] + 40
    assert yellow[0] > yellow[2] + 40 and yellow[1] > yellow[2] + 40
