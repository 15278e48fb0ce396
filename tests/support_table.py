# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The table of docs/support.md, made from the networks that the tests go through.

``python tests/support_table.py`` writes it; a test fails when it is out of date.
"""

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
_KINDS = ("attn", "attn_kv", "crossattn", "mlp", "block", "stack")


def rows():
    """(model, class, sites, what compiles without a graph break) of every family."""
    from tiny import tiny_unet
    from tiny_transformers import TRANSFORMERS

    import mmagic_tome  # noqa: F401  (before diffusers, which it may have to repair)

    found = [
        (
            "Stable Diffusion 1, 2, XL and other UNets",
            "UNet2DConditionModel and alike",
            _sites(tiny_unet(levels=1)),
            "the whole network",
        )
    ]
    for family in TRANSFORMERS.values():
        found.append((family.title, family.class_name, _sites(family.build()), family.compiles))
    return found


def _sites(network):
    """Kinds of site that apply_tome accepts for the network."""
    from mmagic_tome import ToMeError, apply_tome

    accepted = []
    for kind in _KINDS:
        try:
            apply_tome(network, ratio=0.5, sites=[kind]).remove()
        except ToMeError:
            continue
        accepted.append(kind)
    return accepted


def table():
    """The table in Markdown."""
    lines = [
        "| model | class in diffusers | sites | `torch.compile(fullgraph=True)` of |",
        "|---|---|---|---|",
    ]
    for model, name, sites, compiles in rows():
        kinds = ", ".join(f"`{kind}`" for kind in sites)
        lines.append(f"| {model} | {name} | {kinds} | {compiles} |")
    return "\n".join(lines) + "\n"


def split(text):
    """The page before, in and after the table."""
    before, rest = text.split(BEGIN)
    inside, after = rest.split(END)
    return before, inside, after


if __name__ == "__main__":
    before, _, after = split(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
