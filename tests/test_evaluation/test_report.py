# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Tables and the page: what is in them, and what a browser makes of it."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mmagic_tome import ToMeConfig, ToMeError
from mmagic_tome.evaluation.contenders import Contender
from mmagic_tome.evaluation.report import html, plots, table
from mmagic_tome.settings import Setting

BROWSERS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)


class Page(HTMLParser):
    """Collects the elements of a page, and the text of its data element."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.data, self.inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag == "script" and dict(attributes).get("id") == "data"

    def handle_data(self, text):
        if self.inside:
            self.data += text

    def handle_endtag(self, tag):
        self.inside = False


@pytest.fixture(scope="module")
def text(finished):
    return (finished.folder / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside(text):
    page = Page(text)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    for address in re.findall(r"https?://[^\s\"'<)]+", text):
        # Names of XML name spaces are no addresses that are fetched.
        assert re.match(r"https?://(www\.w3\.org|purl\.org|creativecommons\.org)/", address)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("svg") >= 5 and "link" not in tags and "{{" not in text
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    # Markers inside the plots repeat by their hash only if they are the same marker.
    own = [name for name in identifiers if not re.match(r"[mpC][0-9a-f]+$", name)]
    assert len(set(own)) == len(own)


def test_embedded_pictures_are_the_ones_that_were_made(text, finished):
    data = json.loads(Page(text).data)
    assert data["contenders"] == ["ratio 0.25", "ratio 0.5", "tomesd 0.5", "2 steps"]
    assert data["first"] == "ratio 0.5"
    prompts = [picture["prompt"] for picture in data["pictures"]]
    assert "<b> </script>" in prompts and len(prompts) == 5
    entry = data["pictures"][0]
    for uri, folder in (
        (entry["dense"], "dense"),
        (entry["others"]["ratio 0.5"]["picture"], "ratio-0.5"),
    ):
        file = finished.folder / "pictures" / folder / "000000.png"
        embedded = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert np.array_equal(np.asarray(embedded), np.asarray(Image.open(file)))
    assert entry["others"]["ratio 0.5"]["values"][0].startswith("PSNR ")


def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no headless browser here; looked for {', '.join(BROWSERS)}")
    return [found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]


def open_page(tmp_path, page, *options):
    command = [*browser(), f"--user-data-dir={tmp_path / 'profile'}", *options]
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", page.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    return done.stdout.decode(), done.stderr.decode()


def test_a_browser_runs_it(finished, tmp_path):
    shot = tmp_path / "shot.png"
    page = finished.folder / "report.html"
    size = "--window-size=1200,3200"
    document, errors = open_page(
        tmp_path, page, "--dump-dom", f"--screenshot={shot}", size, "--enable-logging=stderr"
    )
    assert 'data-ready="true"' in document
    assert "Uncaught" not in errors and "CONSOLE" not in errors
    # The script made a slider for every picture, and text stayed text.
    assert document.count('type="range"') == 5
    assert "&lt;b&gt; &lt;/script&gt;" in document
    if not shot.is_file():  # some versions do one thing at a time
        open_page(tmp_path, page, f"--screenshot={shot}", size)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (3200, 1200, 3)
    # The ground is light or dark; plots and pictures bring hundreds of other colours.
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    coloured = (pixels.max(2) - pixels.min(2) > 60).mean()
    assert coloured > 0.01


def test_the_markdown_table_has_the_layout_of_the_paper(finished):
    lines = (finished.folder / "table.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert rows[0][:4] == ["contender", "r (%)", "steps", "s/img ↓"]
    assert [row[0] for row in rows[1:]] == [c["name"] for c in finished.results["contenders"]]
    assert rows[3][1] == "50" and rows[1][4] == "1"
    assert len({len(row) for row in rows}) == 1
    assert "5 pictures of prompts.json, 64x64, 4 steps" in lines[0]


def test_caching_without_merging_is_not_read_as_dense():
    for options, said in ((None, "0"), ({"ratio": 0}, "0"), ({"cache": [{}]}, "0 + cache")):
        assert table._ratio({"ratio": 0, "kind": "tome", "options": options}) == said
    assert table._ratio({"ratio": None, "kind": "tome", "options": {}}) == table.NONE
    assert table._ratio({"ratio": 0, "kind": "deepcache", "options": {}}) == "0 + cache"


def test_every_kind_of_contender_has_a_mark_and_colours_in_both_themes():
    kinds = {
        one.kind
        for one in (
            Contender("a"),
            Contender("b", setting=Setting(ToMeConfig())),
            Contender("c", tomesd={"ratio": 0.5}),
            Contender("d", deepcache={"cache_interval": 2}),
            Contender("e", steps=3),
        )
    }
    css = html._asset("report.css")
    assert kinds == set(plots.SHAPES) == set(plots.LABELS)
    assert kinds == set(plots.ROLES) - {"text", "line"}
    for kind in kinds:
        assert css.count(f"--{kind}:") == 3, "light, dark by the system, dark by the button"
    assert len({stands_for for stands_for, _ in plots.ROLES.values()}) == len(plots.ROLES)


def test_csv_has_unrounded_figures(finished):
    rows = list(csv.DictReader((finished.folder / "results.csv").open()))
    merged = finished.results["contenders"][1]
    assert float(rows[1]["psnr"]) == merged["quality"]["psnr"]["value"]
    assert rows[0]["psnr"] == ""
    pictures = list(csv.DictReader((finished.folder / "pictures.csv").open()))
    assert len(pictures) == 5 * 5
    own = [float(r["ssim"]) for r in pictures if r["contender"] == "ratio 0.5"]
    found = finished.results["contenders"][2]["quality"]["ssim"]["value"]
    assert np.isclose(np.mean(own), found, rtol=0, atol=1e-12)


def test_the_table_is_put_between_its_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.replace_table(path, "| new |")
    table.replace_table(path, "| newer |")
    assert path.read_text() == f"before\n{table.BEGIN}\n| newer |\n{table.END}\nafter\n"
    path.write_text("no markers")
    with pytest.raises(ToMeError, match="needs the two lines"):
        table.replace_table(path, "| new |")
    with pytest.raises(ToMeError, match="cannot read"):
        table.replace_table(tmp_path / "nowhere.md", "| new |")


def test_what_is_uncertain_says_so():
    spread = {"median": 1.05, "p10": 0.9, "p90": 1.2}
    row = {"kind": "tome", "cost": {"speedup": spread, "certain": False}}
    assert table.speedup_text(row) == "~1.05 (0.90–1.20)"
    row["cost"]["certain"] = True
    assert table.speedup_text(row).startswith("1.05")


def test_names_in_a_plot_cover_neither_points_nor_each_other():
    """Fourteen contenders, most of them in one heap, as in the demo table."""
    heap = [(f"contender {i}", 1.5 + 0.02 * i, 31 + 0.4 * (i % 5)) for i in range(11)]
    points = [*heap, ("13 steps", 1.3, 45.0), ("8 steps", 0.8, 38.0), ("far", 2.6, 37.0)]
    figure, axes = plots._figure(5.2, 4.0)
    axes.plot([p[1] for p in points], [p[2] for p in points], "o")
    axes.margins(x=0.12, y=0.12)
    boxes = plots.place_labels(figure, axes, points)
    assert len(boxes) == len(points)
    shared = [plots._shared(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert max(shared) < 1
    room = axes.get_window_extent()
    assert all(room.x0 <= box.x0 and box.x1 <= room.x1 for box in boxes)
    spots = axes.transData.transform([p[1:] for p in points])
    covered = [b for b in boxes for x, y in spots if b.x0 < x < b.x1 and b.y0 < y < b.y1]
    assert not covered


def row_of(kind, name, speedup, psnr):
    quality = {"psnr": {"kind": "paired", "label": "PSNR", "higher_is_better": True}}
    if kind != "dense":
        quality["psnr"].update(value=psnr, text="identical" if psnr is None else f"{psnr:.2f} dB")
    cost = {"certain": True, "speedup": {"median": speedup}}
    return {"kind": kind, "name": name, "cost": cost, "quality": quality}


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((1.4, 40.0), "Fewer steps do better than that here: 13 steps, 1.40x, at PSNR 40.00 dB."),
        ((1.4, None), "at PSNR identical."),
        ((1.4, 20.0), "No number of fewer steps that was tried is as fast and as near to dense."),
        ((1.1, 40.0), "No number of fewer steps"),
    ],
)
def test_the_summary_says_when_fewer_steps_do_better(steps, said):
    rows = [row_of("dense", "dense", 1, None), row_of("tome", "half", 1.3, 31.0)]
    rows.append(row_of("steps", "13 steps", *steps))
    summary = html._summary({"cost_measured": {}, "contenders": rows})
    assert "<strong>half</strong>, <strong>1.30x</strong>, at PSNR 31.00 dB" in summary
    assert said in summary


def test_the_worst_picture_of_each_contender_is_shown(text, finished):
    data = json.loads(Page(text).data)
    assert [one["name"] for one in data["worst"]] == data["contenders"]
    assert data["worst_by"] == "PSNR"
    rows = list(csv.DictReader((finished.folder / "pictures.csv").open()))
    for one in data["worst"]:
        own = [row for row in rows if row["contender"] == one["name"]]
        worst = min(own, key=lambda row: float(row["psnr"]))
        assert (one["prompt"], one["seed"]) == (worst["prompt"], int(worst["seed"]))
        assert one["values"][0] == f"PSNR {float(worst['psnr']):.2f} dB"
    assert text.count('<div class="three">') == len(data["worst"])


@pytest.mark.parametrize("out", [["--out", "here"], ["--out=here"], []])
def test_the_table_does_not_tell_where_its_folder_was(out):
    assert table._without_out(["evaluate", "a.py", *out, "--seed", "1"]) == [
        "evaluate", "a.py", "--seed", "1",
    ]  # fmt: skip
