# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is in a plot: a file of it looks like one whatever was drawn."""


def kept_figures(monkeypatch):
    """A list that every figure of matplotlib is added to when it is written to a file."""
    from matplotlib.figure import Figure

    found, save = [], Figure.savefig

    def kept(self, *args, **kwargs):
        found.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", kept)
    return found


def lines_of(axes):
    """Label of each line -> its points (x, y); of lines without a label only the last."""
    return {line.get_label(): [tuple(p) for p in line.get_xydata().tolist()] for line in axes.lines}


def bars_of(axes):
    """(x, width) of horizontal bars, or (y, height) of upright ones, as matplotlib has them."""
    return [(bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()) for bar in axes.patches]
