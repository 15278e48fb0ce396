# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The demo page: what its runs are, what it shows, and that a browser can work with it."""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from browser import Browser

from mmagic_tome import ToMeError, get_handle
from mmagic_tome.lab import demo_page
from mmagic_tome.lab.demo import Choice, Comparison, Demo, demo_source
from mmagic_tome.lab.runners import Output, open_source
from mmagic_tome.lab.runners.pipelines import PipelineRunner


@pytest.fixture
def demo(pipeline_folder):
    source = open_source(pipeline=pipeline_folder("sd"))
    return Demo(source, prompts=["cat", "dog"], steps=8, size=64, seed=3, guidance=2.0)


@pytest.fixture
def runs(monkeypatch):
    """What ran: 'baseline', or the techniques that were applied."""
    found, run = [], PipelineRunner.run

    def counted(self, *args, **kwargs):
        handles = [get_handle(self.model, name) for name in ("tome", "cache")]
        found.append(tuple(one.technique for one in handles if one) or "baseline")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(PipelineRunner, "run", counted)
    return found


# --- runs -----------------------------------------------------------------------------------------


def test_a_page_begins_with_what_was_asked_for(demo):
    assert demo.prompts == ["cat", "dog"]
    assert demo.first == Choice("cat", "", 3, 8, 2.0, demo.schedulers[0], "64x64")
    assert {"DDIM", "Euler", "DPM-Solver++ 2M"} <= {*demo.schedulers}
    assert not any("Flow" in name for name in demo.schedulers)


def test_only_what_changed_runs_again(demo, runs):
    caching, merging = ("step caching",), ("token merging",)
    choice = replace(demo.first, tolerance=0.5)
    first = demo.compare(choice)
    assert runs == ["baseline", caching]
    assert "network" in first.steps and len(first.steps) == 8 and first.steps[-1] == "computed"
    assert first.predicted_error <= 0.5 and first.latent_error > 0
    assert first.code == "mmagic_tome.apply_cache(pipeline, tolerance=0.5)"

    again = demo.compare(choice)
    assert again.baseline is first.baseline, "a cached baseline runs once"
    assert np.array_equal(again.accelerated.images[0], first.accelerated.images[0])
    merged = demo.compare(replace(choice, tolerance=0.0, ratio=0.5))
    both = demo.compare(replace(choice, ratio=0.75, prop_attn=False))
    assert runs[2:] == [caching, merging, (*merging, *caching)]
    assert merged.steps == ["computed"] * 8 and merged.predicted_error is None
    merges = both.code.splitlines()[1]
    assert merges == "mmagic_tome.apply_tome(pipeline, ratio=0.75, prop_attn=False)"
    assert "token merging in" in both.summary and "step caching in" in both.summary

    # Whatever the baseline depends on asks for another one.
    changes = (dict(prompt="bat"), dict(seed=4), dict(steps=9), dict(guidance=4.0))
    changes += (dict(scheduler="Euler"), dict(size="64x32"), dict(negative_prompt="red"))
    for change in changes:
        del runs[:]
        found = demo.compare(replace(choice, **change))
        assert runs == ["baseline", caching], change
        assert found.baseline is not first.baseline
    del runs[:]
    assert demo.compare(choice).baseline is first.baseline and runs == [caching]
    assert get_handle(demo.model) is None


def test_steps_are_told_by_run(demo):
    told = []
    demo.compare(demo.first, told.append)
    assert told == ["baseline"] * 8 + ["accelerated"] * 8


def test_a_scheduler_is_that_of_a_run_alone(demo):
    own = demo.model.scheduler
    other = demo.compare(replace(demo.first, scheduler="DPM-Solver++ 2M"))
    assert type(demo.model.scheduler).__name__ == "DPMSolverMultistepScheduler"
    back = demo.compare(demo.first)
    assert demo.model.scheduler is own
    assert not np.array_equal(other.baseline.images[0], back.baseline.images[0])


def test_warnings_of_the_run_are_shown(demo):
    found = demo.compare(replace(demo.first, steps=3, tolerance=0.001))
    assert found.steps == ["computed"] * 3 and found.psnr is None
    assert len(found.notes) == 1 and "skipped nothing in a run of 3 steps" in found.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompt="  "), "write prompts="),
        (dict(size="63"), "the nearest is 64x64|divisible by"),
        (dict(steps=0), "write steps=1"),
        (dict(guidance=-1.0), "at least 0"),
        (dict(tolerance=0.0), "nothing to compare; raise one of them"),
        (dict(ratio=0.95), "write ratio=0.9375"),
        (dict(scheduler="Adam"), "no scheduler 'Adam'"),
        (dict(seed=-1), "seed"),
    ],
)
def test_a_wrong_choice_is_an_error_and_harms_nothing(demo, change, message):
    with pytest.raises(ToMeError, match=message):
        demo.compare(replace(demo.first, **change))
    assert demo.compare(demo.first).steps


def test_baselines_do_not_pile_up(demo, monkeypatch):
    monkeypatch.setattr("mmagic_tome.lab.demo._MOST_BASELINES", 2)
    for seed in range(4):
        demo.compare(replace(demo.first, seed=seed))
    assert [choice.seed for choice in demo._baselines] == [2, 3]


def test_a_config_states_where_the_page_begins(pipeline_folder, tmp_path):
    pytest.importorskip("mmengine")
    config = tmp_path / "mine.py"
    config.write_text(
        f"pipeline = dict(from_pretrained={pipeline_folder('sd')!r})\n"
        "tome_cfg = dict(ratio=0.25, use_rand=False)\n"
        "infer_cfg = dict(prompts=['owl'], steps=6, size=64, guidance=3.0)\n"
    )
    demo = Demo(demo_source(config=config))
    assert demo.first == Choice(
        "owl", "", 0, 6, 3.0, demo.schedulers[0], "64x64", 0.0, 0.25, prop_attn=True
    )
    found = demo.compare(demo.first)
    assert found.code == "mmagic_tome.apply_tome(pipeline, ratio=0.25, use_rand=False)"


def test_a_model_of_mmagic_has_its_own_scheduler_alone(sd_folder, tmp_path):
    pytest.importorskip("mmagic")
    from tiny import tiny_config, write_config

    config = write_config(tmp_path / "mmagic.py", tiny_config(folder=sd_folder))
    demo = Demo(demo_source(config=config), prompts=["owl"], steps=8, size=64)
    assert len(demo.schedulers) == 1
    assert demo.compare(replace(demo.first, tolerance=0.5)).steps.count("network") > 0


# --- what it shows --------------------------------------------------------------------------------


def comparison(**changes):
    image = np.zeros((8, 8, 3), np.uint8)
    output = SimpleNamespace(images=[image], seconds=2.0)
    fields = dict(
        baseline=output, accelerated=Output([image], None, 1.0, 0.9), psnr=41.26,
        latent_error=0.0123, predicted_error=0.02,
        steps=["computed", "network", "inner", "computed"],
        summary="a < b", code="call()", notes=[],
    )  # fmt: skip
    return Comparison(**{**fields, **changes})


def test_the_report_has_the_figures_of_the_runs():
    html = demo_page.report_of(comparison())
    for text in ("2.00 s", "1.00 s", "~2.00x", "41.3 dB", "0.0200", "0.0123", "a &lt; b"):
        assert text in html
    cells = re.findall(r'<i class="(\w+)" title="step (\d)', html)
    assert cells == [("full", "1"), ("network", "2"), ("inner", "3"), ("full", "4")]
    assert "2 computed" in html and "1 network skipped" in html and "innermost" not in html

    html = demo_page.report_of(
        comparison(psnr=None, predicted_error=None, latent_error=None, notes=["<noise>"])
    )
    assert "identical" in html and "predicted" not in html and "&lt;noise&gt;" in html


def test_without_gradio_the_command_says_what_to_install(command, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        demo_page, "find_spec", lambda name: None if name == "gradio" else find(name)
    )
    code, _, err = command("demo")
    assert code == 2 and "pip install 'mmagic_tome[demo]'" in err


# --- in a browser ---------------------------------------------------------------------------------

# Refuses all connections of the process but those to this machine, and says so.
_SERVE = """
import socket, sys
connect = socket.socket.connect
def guarded(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
        print("OUTSIDE", address, flush=True)
        raise OSError("nothing outside")
    return connect(self, address)
socket.socket.connect = guarded
from mmagic_tome.__main__ import main
sys.exit(main(["demo", "--steps", "12", "--size", "64", "--device", "cpu"]))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the page on the demo model, and what the server prints."""
    pytest.importorskip("gradio") if os.environ.get("CI") != "true" else __import__("gradio")
    log = tmp_path_factory.mktemp("demo") / "log"
    with log.open("w") as file, contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVE],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        line = process.stdout.readline()
        assert "http" in line, log.read_text()
        yield re.search(r"http\S+", line)[0], process
    assert "OUTSIDE" not in process.stdout.read()


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "browser") as browser:
        yield browser


def look(browser):
    """Figures by name, classes of the steps, and addresses of the two images."""
    return browser.run("""(() => {
      const all = (selector) => [...document.querySelectorAll("#report " + selector)];
      const figures = all(".figures div").map((one) => [one.children[1].innerText,
        one.children[0].innerText]);
      return {
        figures: Object.fromEntries(figures), steps: all(".steps i").map((one) => one.className),
        code: all("pre")[0].innerText,
        images: [...document.querySelectorAll("#images img")].map((one) => one.currentSrc),
      };
    })()""")


@pytest.mark.slow
def test_a_visitor_moves_the_tolerance_merges_and_errs(browser, served, tmp_path):
    address, _ = served
    browser.open(address)
    browser.wait("document.querySelector('#report .figures') !== null")
    loaded = "[...document.querySelectorAll('#images img')].filter((one) => one.currentSrc)"
    browser.wait(f"{loaded}.length >= 2")
    first = look(browser)
    assert first["code"] == "mmagic_tome.apply_cache(pipeline, tolerance=0.02)"
    assert len(first["steps"]) == 12 and first["steps"][0] == first["steps"][-1] == "full"
    assert {"full"} < {*first["steps"]}, "something is skipped"
    assert len({*first["images"]}) == 2

    # A larger tolerance: the accelerated run alone is another one.
    browser.click("#tolerance input[type=range]", at=0.75)
    browser.wait("!document.querySelector('#report pre').innerText.includes('=0.02)')")
    second = look(browser)
    assert float(re.search(r"tolerance=([\d.]+)", second["code"])[1]) > 0.1
    assert second["figures"]["baseline"] == first["figures"]["baseline"]
    assert second["steps"].count("full") < first["steps"].count("full")
    assert float(second["figures"]["measured error"]) > float(first["figures"]["measured error"])

    browser.click("#ratio input[type=range]", at=0.66)
    browser.wait("document.querySelector('#report pre').innerText.includes('apply_tome')")

    # A wrong size is a message in the page, which goes on working.
    browser.click("#size input, #size textarea")
    browser.type("63")
    browser.press("Enter", 13, "\r")
    browser.wait("document.querySelector('#report [role=alert]') !== null")
    text = browser.run("document.querySelector('#report [role=alert]').innerText")
    assert "63x63 does not fit" in text and "the nearest is 64x64" in text
    browser.click("#size input, #size textarea")
    browser.type("64x64")
    browser.click("#generate")
    browser.wait("document.querySelector('#report .figures') !== null")

    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert browser.requests and all(one.startswith(address) for one in browser.requests)
