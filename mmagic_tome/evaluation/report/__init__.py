# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a reader gets: ``results.json``, ``results.csv``, ``pictures.csv``, ``table.md`` and
``report.html``.

==============  =====================================================================
table.py        the table in the layout of the tomesd paper, as Markdown and as CSV
plots.py        error against time, cost per step and per layer, as SVG
html.py         the page that holds it all, with pictures
==============  =====================================================================
"""

from __future__ import annotations

from ..results import picture_rows
from .html import page
from .table import csv_text, markdown_table, result_rows

__all__ = ["markdown_table", "page", "write_report"]


def write_report(folder, results, measurer, generator) -> str:
    """Write all files of a report into a run's folder.

    Args:
        folder: The ``RunFolder``.
        results: Of ``results_of``.
        measurer: The ``Measurer`` that they came from.
        generator: For the size of the pictures.

    Returns:
        The Markdown table.
    """
    table = markdown_table(results)
    pictures = picture_rows(measurer.contenders, measurer)
    folder.save_text("results.csv", csv_text(result_rows(results)))
    folder.save_text("pictures.csv", csv_text(pictures))
    folder.save_text("table.md", table + "\n")
    folder.save_text("report.html", page(results, folder, measurer, generator.size))
    # Last: who finds it finds all the others.
    folder.save_json("results.json", results)
    return table
