# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The report of a run: its table, its record, and what a browser makes of its page."""

import base64
import io
import json
import math
import re
from statistics import median

import numpy as np
import pandas as pd
import pytest
from browser import Browser
from PIL import Image

from mmagic_tome.lab.environment import environment
from mmagic_tome.lab.report import data_uri, markdown, save_record, write_report
from mmagic_tome.lab.results import RunFolder

# Name, kind, label, speed-up, PSNR.
METHODS = [
    ("baseline", "baseline", "baseline", 1.0, None),
    ("ToMe <0.5>", "ours", "merging", 1.02, 35.0),
    ("balanced", "ours", "caching", 1.6, 56.0),
    ("13 steps", "fewer steps", "13 steps", 1.5, math.inf),
]
PROMPT, IMAGES, ROUNDS = "an <i>apple</i> </script>", 3, 7


def fill(folder):
    """A run as ``evaluate`` leaves it, with the baseline's images red, all others' blue."""
    metric = {"label": "PSNR", "unit": "dB", "higher_is_better": True, "options": {}}
    manifest = {
        "model": "sd-emoji",
        "loaded": {"scheduler": "DDIMScheduler"},
        "request": {"images": IMAGES, "steps": 20, "size": [64, 64], "prompts": "0f3a"},
        "dtype": "float32",
        "environment": environment(),
        "metrics": {"psnr": metric},
        "methods": {n: {"name": n, "kind": k, "label": label} for n, k, label, _, _ in METHODS},
    }
    rng = np.random.default_rng(0)
    with folder.writing(manifest):
        for place, (name, _, _, speedup, psnr) in enumerate(METHODS):
            images = folder.path / "images" / str(place)
            images.mkdir(parents=True)
            for number in range(IMAGES):
                row = {"kind": "image", "method": name, "number": number, "seed": 7 + number}
                file = images / f"{number}.png"
                Image.new("RGB", (64, 64), "blue" if place else "red").save(file)
                row["file"] = file.relative_to(folder.path).as_posix()
                row["predicted_error"] = 0.25 if name == "balanced" else None
                folder.add({**row, "prompt": PROMPT, "finite": True})
                if psnr is not None:
                    row = {"kind": "metric", "method": name, "metric": "psnr", "number": number}
                    folder.add({**row, "value": psnr + number})
            for turn in reversed(range(ROUNDS)):
                seconds = 4 * (1 + 0.1 * rng.random()) / speedup
                row = {"kind": "round", "method": name, "turn": turn, "seconds": seconds}
                folder.add({**row, "network_seconds": seconds / 2, "images": 2})
        folder.add({"kind": "note", "text": "metric ms_ssim is left out: too small"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    fill(folder)
    write_report(folder)
    return folder


def test_files_hold_the_same_values_as_the_rows(folder):
    frame = pd.read_csv(folder.path / "results.csv")
    record = json.loads((folder.path / "results.json").read_text())
    table = (folder.path / "table.md").read_text()
    seconds = {
        name: [row["seconds"] / 2 for row in folder.find(kind="round", method=name)][::-1]
        for name, *_ in METHODS
    }
    for place, (name, *_, psnr) in enumerate(METHODS):
        row = record["rows"][place]
        assert row["method"] == frame["method"][place] == name
        assert row["round_seconds"] == pytest.approx(seconds[name], rel=1e-5)
        speedup = median(a / b for a, b in zip(seconds["baseline"], seconds[name]))
        assert row["speedup"] == pytest.approx(speedup, rel=1e-5)
        assert f"| {name} | " in table and f"{speedup:.2f}x" in table
        if psnr is not None:
            error = np.mean([10 ** (-(psnr + number) / 10) for number in range(IMAGES)])
            mean = -10 * math.log10(error) if error else math.inf  # of squared errors
            assert frame["psnr"][place] == pytest.approx(mean)
            assert (f"{mean:.2f} dB" if error else "identical") in table
    assert set(frame["model"]) == {"sd-emoji"} and frame["predicted_error"][2] == 0.25
    assert "~1.0" in table, "the speed-up of merging is not certain"
    assert [row["kind"] for row in record["rows"]][1:] == ["merging", "caching", "fewer steps"]
    assert record["settings"] == {
        "model": "sd-emoji", "images": 3, "steps": 20, "size": "64x64", "dtype": "float32",
        "scheduler": "DDIMScheduler",
    }  # fmt: skip
    assert record["environment"]["versions"]["torch"] and "ms_ssim is left out" in table


def test_the_page_needs_nothing_from_outside(folder):
    page = (folder.path / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "http" not in page
    assert page.count("</script>") == 1  # that of a prompt is escaped
    uri = data_uri(folder.path / "images/0/0.png", 512)
    assert uri in page.replace("\\u003d", "=")
    embedded = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert np.array_equal(embedded, Image.open(folder.path / "images/0/0.png"))


LOOK = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const caption = () => all("figcaption div")[0].innerText;
  const found = { heads: all("#results th").map((head) => head.innerText) };
  found.prompt = all("figcaption")[0].firstChild.data;
  found.captions = [caption()];
  const clip = () => getComputedStyle(all(".slider .method")[0]).clipPath;
  found.clips = [clip()];
  const range = all(".slider input")[0];
  range.value = 75;
  range.dispatchEvent(new Event("input"));
  found.clips.push(clip());
  const choice = all("select")[0];
  choice.value = "balanced";
  choice.onchange();
  found.captions.push(caption());
  found.shown = all("img").every((image) => image.complete && image.naturalWidth > 0);
  return found;
}"""


def test_a_browser_uncovers_images(folder, tmp_path):
    with Browser(tmp_path) as browser:
        browser.open((folder.path / "report.html").as_uri())
        # At first there may be no element yet.
        loaded = "document.documentElement?.dataset.ready !== undefined"
        browser.wait(f"{loaded} && document.readyState === 'complete'")
        found = browser.run(f"({LOOK})()")
        assert browser.errors == []
    assert found["heads"][:2] == ["method", "times as fast"] and "PSNR ↑" in found["heads"]
    assert found["heads"][-1] == "predicted latent error ↓"
    assert found["prompt"] == PROMPT
    predicted = "seed 7 · PSNR 56.00 dB · predicted latent error 0.2500"
    assert found["captions"] == ["seed 7 · PSNR 35.00 dB", predicted]
    assert found["clips"] == ["inset(0px 0px 0px 50%)", "inset(0px 0px 0px 75%)"]
    assert found["shown"]


def test_large_images_are_made_smaller_for_the_page(tmp_path):
    Image.new("RGB", (900, 600), "red").save(tmp_path / "a.png")
    assert data_uri(tmp_path / "a.png").startswith("data:image/png")
    uri = data_uri(tmp_path / "a.png", 512)
    assert uri.startswith("data:image/jpeg")
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (512, 341)


def test_a_benchmark_has_a_report_too(tmp_path):
    folder = RunFolder(tmp_path)
    methods = {n: {"name": n, "kind": k, "label": label} for n, k, label, _, _ in METHODS[:3]}
    request = {"size": [64, 32], "batch_size": 2, "steps": 1}
    manifest = {"model": "small", "request": request, "mode": "eager", "methods": methods}
    with folder.writing(manifest):
        for place, name in enumerate([*methods][:2]):
            row = {"kind": "memory", "method": name, "run_bytes": 2**20, "images": 1}
            folder.add({**row, "relative_error": 0.1})
            for turn in range(6):
                row = {"kind": "round", "method": name, "turn": turn, "images": 1}
                folder.add({**row, "seconds": 2.0 - place})
        folder.note("balanced: needs several steps")
    write_report(folder)
    record = json.loads((tmp_path / "results.json").read_text())
    settings = {"model": "small", "size": "64x32", "batch_size": 2, "steps": 1, "mode": "eager"}
    assert record["settings"] == settings
    rows = [(row["kind"], row["speedup"], row["round_seconds"]) for row in record["rows"]]
    assert rows == [("baseline", 1, [2.0] * 6), ("merging", 2, [1.0] * 6)]
    table = (tmp_path / "table.md").read_text()
    assert "| ToMe <0.5> | 2.00x (2.00-2.00) | 1 | 1.0 | 0.1 |" in table
    assert "- balanced: needs several steps\n" in table


def test_markdown_cells_with_a_bar_stay_one_cell():
    assert markdown(["", "x"], [["a|b", 1]]) == "|  | x |\n| --- | ---: |\n| a\\|b | 1 |"


def test_a_record_has_no_words_that_json_does_not_know(tmp_path):
    rows = [{"values": [float("inf"), float("nan"), 0.123456789], "count": 3}]
    save_record(tmp_path / "x.json", {"model": "m"}, rows)
    text = (tmp_path / "x.json").read_text()
    record = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert record["rows"] == [{"values": [None, None, 0.123457], "count": 3}]
    assert {"command", "date", "environment", "settings", "rows"} == set(record)
