# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The demo page: a Gradio page with baseline and accelerated image under one slider.

Nothing is requested from outside: Gradio's telemetry is off and the fonts are the visitor's own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from typing import Any

from PIL import Image

from ..errors import ToMeError
from .demo import Choice, Comparison, Demo
from .runners.media import frame_strip

# Region that was skipped -> class of its cell, and what the legend says.
_CELLS = {
    "computed": ("full", "computed"),
    "innermost": ("innermost", "innermost levels skipped"),
    "inner": ("inner", "inner levels skipped"),
    "network": ("network", "network skipped"),
}
# Pixels of the slider's side.
_SIDE = 512
_CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#report .figures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; font-variant-numeric: tabular-nums; }
#report .figures div { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px; }
#report .figures b { display: block; font-size: 20px; line-height: 1.3; }
#report .figures span, #report .soft { color: var(--body-text-color-subdued); font-size: 13px; }
#report .steps { display: flex; gap: 2px; margin: 14px 0 6px; }
#report .steps i { flex: 1; height: 26px; border-radius: 3px; min-width: 3px; }
#report .legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 5px 0 0; }
#report .legend span { margin-right: 14px; white-space: nowrap; }
#report i.full { background: #00785a; }
#report i.innermost { background: #7cc4ad; }
#report i.inner { background: #f0c465; }
#report i.network { background: #dcd7cf; }
#report pre { white-space: pre; overflow-x: auto; font-size: 12.5px; margin: 6px 0 0; padding: 8px 10px;
  border-radius: 8px; background: var(--background-fill-secondary); }
#report .problem { border-left: 4px solid #c0392b; padding: 8px 12px; border-radius: 4px;
  background: var(--background-fill-secondary); }
#report .note { border-left: 4px solid #f0c465; padding: 8px 12px; margin: 0 0 10px; border-radius: 4px;
  background: var(--background-fill-secondary); }
#report details { margin-top: 10px; }
"""  # noqa: E501


def launch(demo: Demo, host: str, port: int | None) -> None:
    """Serve the page until an interrupt; without a ``port`` at the first free one from 7860 on.
    ToMeError: the port is taken."""
    gradio = _gradio()
    page = build_page(demo)
    fonts = ["system-ui", "Segoe UI", "Roboto", "sans-serif"]
    theme = gradio.themes.Default(
        primary_hue="emerald",
        neutral_hue="stone",
        font=fonts,
        font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"],
    )
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            theme=theme,
            css=_CSS,
            footer_links=[],
        )
    except OSError as error:
        raise ToMeError(f"cannot serve the page: {error}; write another --port") from None
    print(f"The demo page is at {address} (Ctrl+C ends it)", flush=True)
    threading.Event().wait()


def check_gradio() -> None:
    """Raise ToMeError unless Gradio is installed; nothing is imported."""
    if find_spec("gradio") is None:
        raise ToMeError("the demo page needs Gradio: pip install 'mmagic_tome[demo]'")


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    return gradio


def build_page(demo: Demo) -> Any:
    """The page as ``gradio.Blocks``, not yet served."""
    gradio = _gradio()
    first, source = demo.first, demo.source
    title = f"mmagic_tome: {source.name}"
    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(
            f"## mmagic_tome on {source.name}\n"
            "The baseline and an accelerated run of the same seed. Drag the line over the image; "
            "move a slider to run again."
        )
        with gradio.Row():
            with gradio.Column(scale=4, min_width=320):
                prompt = gradio.Textbox(first.prompt, label="Prompt", lines=2, elem_id="prompt")
                if len(demo.prompts) > 1:
                    gradio.Examples([[one] for one in demo.prompts[:8]], prompt, label="Examples")
                tolerance = gradio.Slider(
                    0, 0.2, first.tolerance, step=0.005, label="Tolerance of step caching",
                    info="expected relative error of the final latent; 0 skips nothing",
                    elem_id="tolerance",
                )  # fmt: skip
                ratio = gradio.Slider(
                    0, 0.9, first.ratio, step=0.05, label="Ratio of token merging",
                    info="fraction of the tokens to remove; pays off at large images",
                    elem_id="ratio",
                )  # fmt: skip
                prop_attn = gradio.Checkbox(first.prop_attn, label="Proportional attention")
                with gradio.Row():
                    scheduler = gradio.Dropdown(
                        demo.schedulers, value=first.scheduler, label="Scheduler", min_width=120
                    )
                    steps = gradio.Slider(1, 100, first.steps, step=1, label="Steps", min_width=120)
                with gradio.Row():
                    guidance = gradio.Number(first.guidance, label="Guidance", min_width=80)
                    seed = gradio.Number(first.seed, label="Seed", precision=0, min_width=80)
                    size = gradio.Textbox(
                        first.size, label="Size", placeholder="HxW", min_width=80, elem_id="size"
                    )
                negative = gradio.Textbox(first.negative_prompt, label="Negative prompt")
                button = gradio.Button("Generate", variant="primary", elem_id="generate")
            with gradio.Column(scale=6, min_width=360):
                images = gradio.ImageSlider(
                    label="baseline to the left, accelerated to the right",
                    type="pil", format="png", interactive=False, height=480, max_height=480,
                    buttons=["download", "fullscreen"], elem_id="images",
                )  # fmt: skip
                report = gradio.HTML(elem_id="report")
        inputs = [prompt, negative, seed, steps, guidance, scheduler, size, tolerance, ratio]
        inputs.append(prop_attn)
        progress = gradio.Progress()

        def run(*values: Any, progress: Any = progress) -> tuple[Any, str]:
            try:
                choice = _choice(values)
                done, total = [0], 2 * choice.steps

                def on_step(name: str) -> None:
                    done[0] += 1
                    progress((min(done[0], total), total), desc=name)

                found = demo.compare(choice, on_step)
            except ToMeError as error:
                return gradio.skip(), f'<p class="problem" role="alert">{escape(str(error))}</p>'
            pair = [shown(one.images[0]) for one in (found.baseline, found.accelerated)]
            return tuple(pair), report_of(found)

        # One model: one run at a time. Of several changes during a run the last one counts.
        one = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "always_last"}
        events = [page.load, button.click, prompt.submit, size.submit, negative.submit]
        events += [tolerance.release, ratio.release, steps.release]
        events += [prop_attn.input, scheduler.input]
        for event in events:
            event(run, inputs, [images, report], show_progress_on=[images], **one)
    return page


def _choice(values: Sequence[Any]) -> Choice:
    """What the controls hold; Gradio sends None for a number that is empty."""
    prompt, negative, seed, steps, guidance, scheduler, size, tolerance, ratio, prop_attn = values
    for name, value in (("seed", seed), ("guidance", guidance)):
        if value is None:
            raise ToMeError(f"{name} is empty; write a number")
    return Choice(
        prompt or "", negative or "", int(seed), int(steps), float(guidance), scheduler,
        size or "", float(tolerance), float(ratio), bool(prop_attn),
    )  # fmt: skip


def shown(image: Any) -> Any:
    """An image as the slider shows it: a clip as a strip of frames; a small one enlarged, which
    browsers do less well."""
    image = frame_strip(image)
    factor = _SIDE // max(image.size)
    if factor < 2:
        return image
    return image.resize([side * factor for side in image.size], Image.Resampling.LANCZOS)


def report_of(found: Comparison) -> str:
    """What was skipped and merged, how fast, how close: as HTML."""
    psnr = "identical" if found.psnr is None else f"{found.psnr:.1f} dB"
    figures = {
        "baseline": f"{found.baseline.seconds:.2f} s",
        "accelerated": f"{found.accelerated.seconds:.2f} s",
        "times as fast": f"~{found.speedup:.2f}x",
        "PSNR to the baseline": psnr,
    }
    if found.predicted_error is not None:
        figures["predicted error of caching"] = f"{found.predicted_error:.4f}"
    if found.latent_error is not None:
        figures["measured error"] = f"{found.latent_error:.4f}"
    cards = "".join(
        f"<div><b>{value}</b><span>{name}</span></div>" for name, value in figures.items()
    )
    cells = "".join(
        f'<i class="{_CELLS[step][0]}" title="step {number}: {_CELLS[step][1]}"></i>'
        for number, step in enumerate(found.steps, start=1)
    )
    legend = "".join(
        f'<span><i class="{kind}"></i>{found.steps.count(step)} {words}</span>'
        for step, (kind, words) in _CELLS.items()
        if step in found.steps
    )
    notes = "".join(f'<p class="note" role="status">{escape(note)}</p>' for note in found.notes)
    return (
        f'{notes}<div class="figures">{cards}</div>'
        f'<div class="steps" role="img" aria-label="steps of the run">{cells}</div>'
        f'<p class="legend soft">{legend}</p>'
        f"<pre>{escape(found.code)}</pre>"
        f'<details><summary class="soft">What the handles say</summary>'
        f"<pre>{escape(found.summary)}</pre></details>"
        '<p class="soft">Seconds are of one run each, so the speed-up is not certain (~): '
        "<code>python -m mmagic_tome infer --compare</code> repeats the runs. Errors are those of "
        "the final latent, relative.</p>"
    )
