# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What each site costs, dense and merged, as bars."""

from __future__ import annotations

from typing import Any

_DENSE, _MERGED, _MATCHING = "#9a9a9a", "#1a7f4b", "#8fd0ae"


def cost_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the plot out of a report of ``mmagic.hooks.profile.Recorder``.

    Args:
        report: of a recorder that saw dense and merged steps.

    Returns:
        list: dicts of ``name``, ``tokens``, ``kept``, ``dense``, ``merged`` (milliseconds of a
        call; merging and unmerging are in the latter) and ``matching`` (what making the plan
        takes, on the block's first site; 0 on others). The matching is the time of the block
        less the dense one's, where that is not already gained or lost at the sites.
    """
    blocks = {site["site"]: site for site in report["sites"] if site["kind"] == "whole block"}
    sums: dict[str, dict[str, float]] = {}
    rows = []
    for site in report["sites"]:
        if site["kind"] == "whole block" or not (site["dense"] and site["merged"]):
            continue
        block = site["site"].rpartition(".")[0]
        row = dict(
            name=site["site"],
            tokens=site["tokens"],
            kept=site["kept"],
            dense=site["dense"]["ms"],
            merged=site["merged"]["ms"],
            matching=0.0,
        )
        rows.append(row)
        part = sums.setdefault(block, dict(dense=0.0, merged=0.0, row=row))
        part["dense"] += row["dense"]
        part["merged"] += row["merged"]
    for name, part in sums.items():
        block = blocks.get(name)
        if block and block["dense"] and block["merged"]:
            rest = block["merged"]["ms"] - part["merged"] - (block["dense"]["ms"] - part["dense"])
            part["row"]["matching"] = max(0.0, rest)
    return rows


def cost_plot(path, report: dict[str, Any], title: str) -> None:
    """Draw the time of each site, dense over merged, with its tokens before and after.

    Args:
        path: file to write, or an open one; PNG.
        report: see :func:`cost_rows`.
        title: over the plot.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = cost_rows(report)
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.62 * len(rows)), layout="constrained")
    bar = 0.36
    longest = max(max(row["dense"], row["merged"] + row["matching"]) for row in rows)
    for place, row in enumerate(rows):
        axis.barh(place - bar / 2, row["dense"], bar, color=_DENSE)
        axis.barh(place + bar / 2, row["merged"], bar, color=_MERGED)
        axis.barh(place + bar / 2, row["matching"], bar, row["merged"], color=_MATCHING)
        for offset, value, tokens in (
            (-bar / 2, row["dense"], row["tokens"]),
            (bar / 2, row["merged"] + row["matching"], row["kept"]),
        ):
            text = f"{value:.1f} ms, {tokens} tokens"
            axis.text(value + longest / 100, place + offset, text, va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [short_name(row["name"]) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, longest * 1.3)
    axis.set_xlabel("milliseconds of a call (median)")
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (_DENSE, _MERGED, _MATCHING)]
    labels = ["dense", "merged, with merging and unmerging", "rest of the block: matching"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def short_name(name: str) -> str:
    """``down_blocks.0.attentions.1.transformer_blocks.0.attn`` -> ``down 0.1.0 attn``."""
    words = name.replace("_blocks", "").replace("_block", "").split(".")
    numbers = ".".join(word for word in words if word.isdigit())
    kind = "" if words[-1].isdigit() else words[-1]
    return f"{words[0]} {numbers} {kind}".strip()
