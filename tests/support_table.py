# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The tables of docs/reference/support.md, from the lists that the tests go through.

``python tests/support_table.py`` writes them; a test fails when one is out of date.
"""

import sys
from pathlib import Path

from tiny_pipelines import PIPELINES
from tiny_transformers import TRANSFORMERS
from tiny_unets import NETWORKS

from mmagic_tome import ToMeError, apply_cache, apply_tome
from mmagic_tome.cache.config import REGIONS

sys.path.append(str(Path(__file__).parent / "test_vit"))  # for its list of models

_ROOT = Path(__file__).parents[1]
CONFIGS = _ROOT / "configs"
PAGE = _ROOT / "docs" / "reference" / "support.md"
_NETWORKS = (*NETWORKS.values(), *TRANSFORMERS.values())
_TARGETS = ("attn", "attn_kv", "crossattn", "mlp", "block", "stack")


def networks():
    """The networks in Markdown: targets, regions that can be skipped, proportional attention and
    what compiles without a graph break."""
    head = ("model", "class", "merging around", "step caching", "`prop_attn`", "one graph of")
    rows = [
        (one.title, one.class_name, _targets(one), _regions(one), _weights(one), one.compiles)
        for one in _NETWORKS
    ]
    return _table(head, rows)


def mmagic():
    """MMagic's models in Markdown: this project's configs, and what else calls them."""
    from mmagic_hub import FOLDERS, INFERENCER
    from mmengine import Config

    rows = {}
    for file in sorted(file for name in FOLDERS for file in (CONFIGS / name).glob("*.py")):
        config, path = Config.fromfile(str(file)), f"{file.parent.name}/{file.name}"
        names, called = rows.setdefault(config.model.type, ([], set()))
        names.append(f"[{file.stem}](../../configs/{path})")
        called.update(filter(None, [INFERENCER.get(path)]))
        if "attention_injection" in config.model or "inference_method" in config:
            called.add("controlnet_animation")
    rows = [
        (f"`{name}`", ", ".join(names), _code(sorted(called)) or "nothing")
        for name, (names, called) in sorted(rows.items())
    ]
    head = ("class in MMagic", "configs", "called by `infer`, and in MMagicInferencer by")
    return _table(head, rows)


def vits():
    """Vision transformers in Markdown."""
    from vits import FAMILIES, build

    classes = dict.fromkeys(f"`{type(build(name)).__name__}`" for name in FAMILIES)
    return ", ".join(classes) + "\n"


def pipelines():
    """The pipelines in Markdown, by what users call the model."""
    grouped = {}
    for case in PIPELINES.values():
        grouped.setdefault(case.class_name, []).append(case.title)
    rows = [("; ".join(titles), f"`{name}`") for name, titles in grouped.items()]
    return _table(("model or option", "pipeline in diffusers"), rows)


# file -> {name of a table: what makes it}
TABLES = {
    PAGE: {"networks": networks, "mmagic": mmagic, "pipelines": pipelines, "vits": vits},
}


def updated(file):
    """The text of a file with its tables made anew."""
    text = file.read_text(encoding="utf-8")
    for name, make in TABLES[file].items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = before + begin + make() + end + after
    return text


def _targets(one):
    """Targets that apply_tome accepts for the network."""
    network = one.build()
    return _accepted(_TARGETS, lambda kind: apply_tome(network, ratio=0.5, targets=[kind]))


def _regions(one):
    """Regions that step caching can skip, with as many levels or blocks as it takes."""
    build = one.deeper(4).build if hasattr(one, "deeper") else one.layered or one.build
    network = build()
    return _accepted(REGIONS, lambda region: apply_cache(network, region=region))


def _accepted(values, apply):
    accepted = []
    for value in values:
        try:
            apply(value).remove()
        except ToMeError:
            continue
        accepted.append(value)
    return _code(accepted)


def _weights(one):
    """Whether the network accepts proportional attention."""
    try:
        apply_tome(one.build(), ratio=0.5, prop_attn=True).remove()
    except ToMeError:
        return "no"
    return "yes"


def _code(words):
    return ", ".join(f"`{word}`" for word in words)


def _table(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for file in TABLES:
        file.write_text(updated(file), encoding="utf-8")
