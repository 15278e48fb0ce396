# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The tables of docs/support.md and README.md, made from the lists that the tests go through.

``python tests/support_table.py`` writes them; a test fails when one is out of date.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "test_vit"))  # for its list of models

_ROOT = Path(__file__).parents[1]
CONFIGS = _ROOT / "configs"
PAGE, README = _ROOT / "docs" / "support.md", _ROOT / "README.md"
_KINDS = ("attn", "attn_kv", "crossattn", "mlp", "block", "stack")


def networks():
    """The networks in Markdown: targets, regions that can be skipped, grids and what compiles
    without a graph break."""
    rows = [
        (
            one.title,
            one.class_name,
            _code(_targets(one.build())),
            _code(regions_of(_layered(one))),
            _grids([*one.grids, *getattr(one, "large_grids", ())]),
            one.compiles,
        )
        for one in _all_networks()
    ]
    head = (
        "model",
        "class in diffusers",
        "targets",
        "regions of step caching",
        "grids tested, in tokens",
        "`torch.compile(fullgraph=True)` of",
    )
    return _table(head, rows)


def mmagic():
    """MMagic's models in Markdown: this project's configs, and what else calls them."""
    from mmagic_hub import FOLDERS, INFERENCER
    from mmengine import Config

    rows = {}
    for file in sorted(file for name in FOLDERS for file in (CONFIGS / name).glob("*.py")):
        config = Config.fromfile(str(file))
        names, called = rows.setdefault(config.model.type, ([], set()))
        names.append(f"[{file.stem}](../configs/{file.parent.name}/{file.name})")
        called.update(filter(None, [INFERENCER.get(f"{file.parent.name}/{file.name}")]))
        if "attention_injection" in config.model or "inference_method" in config:
            called.add("controlnet_animation")
    return _table(
        ("class in MMagic", "configs", "called by `infer`, and in MMagicInferencer by"),
        [
            (f"`{name}`", ", ".join(names), _code(sorted(called)) or "nothing")
            for name, (names, called) in sorted(rows.items())
        ],
    )


def vits():
    """Vision transformers in Markdown."""
    from vits import FAMILIES, build

    rows = [(name, f"`{type(build(name)).__name__}`") for name in FAMILIES]
    return _table(("tested as", "class"), rows)


def pipelines():
    """The pipelines in Markdown, by what users call the model."""
    from tiny_pipelines import PIPELINES
    from tiny_transformers import PIPELINES as TRANSFORMER_PIPELINES

    grouped = {}
    for case in PIPELINES.values():
        grouped.setdefault(case.class_name, []).append(case.title)
    for title, case in TRANSFORMER_PIPELINES.items():
        grouped[case.class_name] = [title]
    rows = [("; ".join(titles), f"`{name}`") for name, titles in grouped.items()]
    return _table(("model or option", "pipeline in diffusers"), rows)


def short():
    """The networks for the README: targets only."""
    rows = [(one.title, _code(_targets(one.build()))) for one in _all_networks()]
    return _table(("model", "targets"), rows)


# file -> {name of a table: what makes it}
TABLES = {
    PAGE: {"networks": networks, "mmagic": mmagic, "pipelines": pipelines, "vits": vits},
    README: {"support": short},
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


def _all_networks():
    from tiny_pipelines import NETWORKS
    from tiny_transformers import TRANSFORMERS

    import mmagic_tome  # noqa: F401  (before diffusers, which it may have to repair)

    return [*NETWORKS.values(), *TRANSFORMERS.values()]


def _targets(network):
    """Targets that apply_tome accepts for the network."""
    from mmagic_tome import ToMeError, apply_tome

    accepted = []
    for kind in _KINDS:
        try:
            apply_tome(network, ratio=0.5, targets=[kind]).remove()
        except ToMeError:
            continue
        accepted.append(kind)
    return accepted


def regions_of(network):
    """Regions of a network that step caching can skip."""
    from mmagic_tome import ToMeError, apply_cache
    from mmagic_tome.cache.config import REGIONS

    accepted = []
    for region in REGIONS:
        try:
            apply_cache(network, region=region).remove()
        except ToMeError:
            continue
        accepted.append(region)
    return accepted


def _layered(one):
    """The network with as many levels or blocks as it takes to have an inner part."""
    if hasattr(one, "deeper"):
        return one.deeper(4).build()
    return (one.layered or one.build)()


def _code(words):
    return ", ".join(f"`{word}`" for word in words)


def _grids(grids):
    return ", ".join(f"{height}x{width}" for height, width in grids)


def _table(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for file in TABLES:
        file.write_text(updated(file), encoding="utf-8")
