# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Nothing of one image ever reaches another, however the calls of runs follow each other."""

import random
import threading

import pytest
import torch
from edge_pipelines import SETTINGS, generate, relative, sd15_pipeline, skips
from tiny import tiny_unet
from tiny_pipelines import PIPELINES, random_image

from mmagic_tome import apply_cache, apply_tome

KEPT = [
    dict(cache="quality"),
    dict(cache="balanced"),
    dict(cache="fast"),
    dict(ratio=0.5, plan_interval=4),
    dict(ratio=0.5, plan_interval=4, residual=True),
]
IDS = ["quality", "balanced", "fast", "plan_interval", "residual"]


def apply(network, options):
    if "cache" in options:
        return apply_cache(network, options["cache"])
    return apply_tome(network, **options)


class Image:
    """A denoising run that is stepped by hand (DDIM, guidance in one batch)."""

    def __init__(self, network, seed, steps=12, start=0, guided=True):
        from diffusers import DDIMScheduler

        generator = torch.Generator().manual_seed(seed)
        self.network = network
        self.scheduler = DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        )
        self.scheduler.set_timesteps(steps)
        self.times = list(self.scheduler.timesteps[start:])
        self.latents = torch.randn(1, 4, 16, 16, generator=generator)
        self.text = torch.randn(2, 7, 16, generator=generator)
        self.guided = guided
        self.outputs = []

    @property
    def done(self):
        return len(self.outputs) == len(self.times)

    @torch.no_grad()
    def step(self):
        time = self.times[len(self.outputs)]
        copies = 2 if self.guided else 1
        batch = torch.cat([self.latents] * copies)
        output = self.network(batch, time, encoder_hidden_states=self.text[-copies:]).sample
        self.outputs.append(output.clone())
        empty, text = output.chunk(2) if self.guided else (output, output)
        guess = empty + 3 * (text - empty)
        self.latents = self.scheduler.step(guess, time, self.latents).prev_sample

    def finish(self):
        while not self.done:
            self.step()
        return self.outputs


def alone(options, seed, **how):
    """What an image's calls return when nothing else runs."""
    network = tiny_unet()
    apply(network, options)
    return Image(network, seed, **how).finish()


def at_most_as_wrong(outputs, options, seed, **how):
    """Whether every output is that of the image alone, or that of the unmerged, uncached network
    (for caching: a step that was computed since the run was not recognised)."""
    expected = alone(options, seed, **how)
    baseline = Image(tiny_unet(), seed, **how).finish()
    spread = max(relative(a, b) for a, b in zip(expected, baseline))
    return max(relative(a, b) for a, b in zip(outputs, baseline)) <= 2 * spread + 1e-6


@pytest.mark.parametrize("options", KEPT, ids=IDS)
def test_a_stopped_run_then_image_to_image(options):
    network = tiny_unet()
    apply(network, options)
    first = Image(network, seed=1)
    for _ in range(7):
        first.step()
    second = Image(network, seed=2, start=8)
    assert all(torch.equal(a, b) for a, b in zip(second.finish(), alone(options, seed=2, start=8)))


@pytest.mark.parametrize("count", [3])
@pytest.mark.parametrize("options", KEPT, ids=IDS)
def test_views_that_take_turns(options, count):
    network = tiny_unet()
    handle = apply(network, options)
    views = [Image(network, seed) for seed in range(count)]
    for _ in views[0].times:
        for view in views:
            view.step()
    for seed, view in enumerate(views):
        for a, b in zip(view.outputs, alone(options, seed)):
            assert torch.equal(a, b)
    if "cache" in options:  # and skipping goes on
        assert sum(skips(handle).values()) % count == 0
        assert sum(skips(handle).values()) >= 3 * count


@pytest.mark.parametrize("case", range(2))
@pytest.mark.parametrize("options", KEPT, ids=IDS)
def test_random_interleavings(options, case):
    """Runs of other lengths and starts, with and without guidance, some stopped in the middle."""
    draw = random.Random(case)
    network = tiny_unet()
    apply(network, options)
    how = [
        dict(
            steps=draw.choice([6, 9, 12]),
            start=draw.choice([0, 0, 2]),
            guided=draw.random() < 0.7,
        )
        for _ in range(4)
    ]
    images = [Image(network, seed, **one) for seed, one in enumerate(how)]
    waiting = list(range(len(images)))
    for _ in range(40):
        if not waiting:
            break
        number = draw.choice(waiting)
        for _ in range(draw.randint(1, 3)):
            if not images[number].done:
                images[number].step()
        if images[number].done or draw.random() < 0.05:
            waiting.remove(number)
    for seed, (image, one) in enumerate(zip(images, how)):
        if image.outputs:
            assert at_most_as_wrong(image.outputs, options, seed, **one)


@pytest.mark.parametrize("options", KEPT, ids=IDS)
def test_a_validation_loop_over_unrelated_images(options):
    network = tiny_unet()
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(2, 4, 16, 16, generator=generator), t) for t in range(900, 0, -100)]
    text = torch.randn(2, 7, 16, generator=generator)

    def losses():
        with torch.no_grad():
            return [network(x, torch.tensor(t), encoder_hidden_states=text).sample for x, t in data]

    if "cache" not in options:
        apply_tome(network, ratio=0.0 if options.get("residual") else 0.5)
    wanted = losses()
    handle = apply(network, options)
    for output, expected in zip(losses(), wanted):
        assert torch.equal(output, expected)
    if "cache" in options:
        assert sum(skips(handle).values()) == 0


@pytest.mark.parametrize("options", KEPT, ids=IDS)
def test_the_same_seed_with_another_prompt_after_a_stop(options):
    """The first inputs of both images are the same tensors."""
    network = tiny_unet()
    apply(network, options)
    first = Image(network, seed=1)
    first.step()
    second = Image(network, seed=1)
    second.text = second.text + 1
    outputs = second.finish()
    fresh = tiny_unet()
    apply(fresh, options)
    expected = Image(fresh, seed=1)
    expected.text = expected.text + 1
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected.finish()))


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("options", KEPT, ids=IDS)
def test_two_prompts_with_one_seed_take_turns(options, guided):
    """Their inputs begin as the same tensors, and stay near each other for some steps."""
    network = tiny_unet()
    handle = apply(network, options)
    images = [Image(network, seed=1, guided=guided) for _ in range(2)]
    images[1].text = images[1].text + 0.1
    for _ in images[0].times:
        for image in images:
            image.step()
    for number, image in enumerate(images):
        fresh = tiny_unet()
        apply(fresh, options)
        expected = Image(fresh, seed=1, guided=guided)
        expected.text = expected.text + 0.1 * number
        assert all(torch.equal(a, b) for a, b in zip(image.outputs, expected.finish()))
    if "cache" in options:
        assert sum(skips(handle).values()) >= 6


@pytest.mark.parametrize("setting", SETTINGS)
def test_skip_layer_guidance(setting):
    """A second call per step with another batch, as Stable Diffusion 3.5 makes it."""
    network = tiny_unet()
    handle = apply_cache(network, setting)
    image = Image(network, seed=0, steps=20)
    with torch.no_grad():
        while not image.done:
            time, text = image.times[len(image.outputs)], image.text
            before = image.latents
            image.step()
            network(before, time, encoder_hidden_states=text[:1])
    assert sum(skips(handle).values()) >= 2 * 6


def test_guidance_in_two_calls():
    network = tiny_unet()
    handle = apply_cache(network, "balanced")
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(20)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for time in scheduler.timesteps:
            empty, full = (
                network(latents, time, encoder_hidden_states=text[i : i + 1]).sample
                for i in range(2)
            )
            latents = scheduler.step(empty + 3 * (full - empty), time, latents).prev_sample
    assert skips(handle) == {"network": 12, "inner": 6}


@pytest.mark.parametrize("first", ["empty", "text"])
def test_guidance_in_two_calls_that_ends_early(first):
    """From the middle of the run on only the call with the text is made."""
    network = tiny_unet()
    handle = apply_cache(network, "fast")
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(20)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(1))
    order = [0, 1] if first == "empty" else [1, 0]
    baseline, errors = tiny_unet(), []
    with torch.no_grad():
        for step, time in enumerate(scheduler.timesteps):
            outputs = {}
            for which in order if step < 10 else [1]:
                skipped = skips(handle)["network"]
                outputs[which] = network(latents, time, encoder_hidden_states=texts[which]).sample
                if skips(handle)["network"] > skipped:
                    exact = [
                        baseline(latents, time, encoder_hidden_states=text).sample for text in texts
                    ]
                    own, other = (relative(outputs[which], exact[i]) for i in (which, 1 - which))
                    errors.append(own < other)
            empty, text = outputs.get(0, outputs[1]), outputs[1]
            latents = scheduler.step(empty + 2 * (text - empty), time, latents).prev_sample
    assert len(errors) > 10
    assert all(errors)


def test_many_calls_per_step_on_one_latent():
    """As regional prompting by hand makes them: each has its own state."""
    network, baseline = tiny_unet(), tiny_unet()
    handle = apply_cache(network, "fast")
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(20)
    texts = torch.randn(6, 1, 7, 16, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    own = []
    with torch.no_grad():
        for time in scheduler.timesteps:
            outputs = [network(latents, time, encoder_hidden_states=text).sample for text in texts]
            exact = [baseline(latents, time, encoder_hidden_states=text).sample for text in texts]
            own += [
                min(range(6), key=lambda other: relative(output, exact[other])) == number
                for number, output in enumerate(outputs)
            ]
            latents = scheduler.step(sum(outputs) / 6, time, latents).prev_sample
    assert skips(handle)["network"] == 6 * 9
    assert sum(own) > 0.9 * len(own)


@pytest.mark.parametrize("setting", SETTINGS)
def test_pndm_keeps_one_run(setting):
    """The scheduler of Stable Diffusion 1.5's files evaluates its second timestep twice."""
    import warnings

    from diffusers import PNDMScheduler

    case, pipeline = sd15_pipeline()
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = apply_cache(pipeline, setting)
    patch = handle._parts[0].patch
    most = []

    def watch(pipeline, step, time, kwargs):
        tracker = patch.context.tracker
        most.append((len(tracker.runs), len(tracker.runs[0].branches)))
        return kwargs

    generate(case, pipeline, callback_on_step_end=watch)
    assert set(most) == {(1, 1)}
    assert sum(skips(handle).values()) >= 7


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_stopped_pipeline_then_image_to_image(setting):
    from diffusers import StableDiffusionImg2ImgPipeline

    class Stop(Exception):
        pass

    def stop(pipeline, step, time, kwargs):
        if step == 11:
            raise Stop
        return kwargs

    case, pipeline = sd15_pipeline()
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    second = PIPELINES["image to image"]

    def image_to_image():
        return second.run(
            other,
            num_inference_steps=20,
            strength=0.4,
            image=random_image(),
            generator=torch.Generator().manual_seed(5),
        )

    handle = apply_cache(pipeline, setting)
    expected = image_to_image()
    with pytest.raises(Stop):
        generate(case, pipeline, callback_on_step_end=stop)
    assert torch.equal(image_to_image(), expected)
    handle.remove()


@pytest.mark.parametrize("setting", ["balanced", "fast"])
def test_two_threads(setting):
    network = tiny_unet()
    handle = apply_cache(network, setting)
    expected = [alone(dict(cache=setting), seed) for seed in range(2)]
    images = [Image(network, seed) for seed in range(2)]
    threads = [threading.Thread(target=image.finish) for image in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for image, wanted in zip(images, expected):
        assert all(torch.equal(a, b) for a, b in zip(image.outputs, wanted))
    assert sum(skips(handle).values()) > 0


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_fresh_noise_at_every_step(name):
    """The next input hardly follows from the last: runs may begin anew, and nothing is wrong."""
    import diffusers

    case, pipeline = sd15_pipeline()
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    baseline = generate(case, pipeline)
    apply_cache(pipeline, "balanced")
    first = generate(case, pipeline)
    assert torch.equal(generate(case, pipeline), first)
    assert relative(first, baseline) < 0.5
