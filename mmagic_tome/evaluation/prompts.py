# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Prompts of an evaluation: read from a file or a built-in set, one seed per picture.

A seed belongs to its prompt's place in the list, not to a batch, a rank or the order in
which pictures happen to be made.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib.util
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from ..apis.assets import PACKAGE_ROOT
from ..errors import ToMeError

SETS = ("demo", "imagenet")
KEYS = ("prompt", "negative_prompt", "seed")
MAX_SEED = 2**32


@dataclass(frozen=True)
class Prompt:
    """One picture to make.

    Args:
        text: What it should show.
        negative: What it should not show; None for nothing.
        seed: Of its start noise, in [0, 2**32); None until :func:`assign_seeds`.
    """

    text: str
    negative: str | None = None
    seed: int | None = None


@dataclass
class PromptList:
    """The pictures of an evaluation and what a reader of its report should know of them.

    Args:
        prompts: One per picture, each with its seed.
        source: Where they come from, in words.
        notes: What was skipped or left out, one sentence each.
    """

    prompts: list[Prompt]
    source: str
    notes: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """Return a hash of all texts, negative prompts and seeds in order."""
        rows = [[p.text, p.negative, p.seed] for p in self.prompts]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def load_prompts(
    source,
    *,
    template: str | None = None,
    images_per_prompt: int = 1,
    limit: int | None = None,
    seed: int = 0,
    negative: str | None = None,
) -> PromptList:
    """Return the prompts of a file, a built-in set or a list, with a seed for every picture.

    Args:
        source: ``'demo'`` or ``'imagenet'`` (see :func:`built_in`), the path of a ``.txt``,
            ``.json`` or ``.csv`` file, or a list of texts and dicts with ``prompt`` and
            optionally ``negative_prompt`` and ``seed``.
        template: A text with ``{}`` where the prompt goes, or None.
        images_per_prompt: Pictures per prompt, with seeds of their own.
        limit: Take this many prompts, spread evenly over the list; None for all.
        seed: Seed of the first picture; picture i has ``seed + i`` unless its prompt states
            one, and that prompt's picture j has the stated one ``+ j``.
        negative: Negative prompt of those that state none.

    Raises:
        ToMeError: Nothing to read, no prompts, or a wrong entry, with its number.
    """
    notes: list[str] = []
    if isinstance(source, str) and source in SETS:
        prompts, name = built_in(source), f"built-in set {source!r}"
    elif isinstance(source, (str, Path)):
        prompts, name = read_file(source), Path(source).name
    else:
        prompts, name = _entries(list(source), "evaluation.prompts"), "the config"
    if not prompts:
        raise ToMeError(f"prompts of {name}: there are none; write at least one")
    # Classes of ImageNet are no duplicates of each other, whatever they are called.
    if source not in SETS:
        prompts, notes = _without_duplicates(prompts)
    if limit is not None and limit < len(prompts):
        notes.append(f"{limit} of {len(prompts)} prompts were taken, evenly spread (limit)")
        prompts = [prompts[i * len(prompts) // limit] for i in range(limit)]
    if template is not None:
        if "{}" not in template:
            raise ToMeError(f"prompt template {template!r} has no {{}} where the prompt goes")
        prompts = [Prompt(template.replace("{}", p.text), p.negative, p.seed) for p in prompts]
    return PromptList(assign_seeds(prompts, images_per_prompt, seed, negative), name, notes)


def assign_seeds(prompts, images_per_prompt=1, seed=0, negative=None) -> list[Prompt]:
    """Return one :class:`Prompt` per picture, each with a seed (see :func:`load_prompts`).

    Seeds wrap around: 0 comes after the largest of 32 bits.
    """
    pictures = []
    for prompt in prompts:
        for turn in range(images_per_prompt):
            own = seed + len(pictures) if prompt.seed is None else prompt.seed + turn
            text = prompt.negative if prompt.negative is not None else negative
            pictures.append(Prompt(prompt.text, text, own % MAX_SEED))
    return pictures


def read_file(path) -> list[Prompt]:
    """Return the prompts of a file.

    Args:
        path: ``.txt``: one prompt per line, empty lines and lines with # are skipped.
            ``.json``: a list of texts, or of objects with ``prompt`` and optionally
            ``negative_prompt`` and ``seed``. ``.csv``: a column ``prompt``, and optionally
            the other two. All UTF-8.

    Raises:
        ToMeError: The file cannot be read, holds no prompts, or an entry is wrong.
    """
    path = Path(path).expanduser()
    kinds = {".txt": _read_txt, ".json": _read_json, ".csv": _read_csv}
    if path.suffix.lower() not in kinds:
        raise ToMeError(
            f"prompt file {path}: expected a .txt, .json or .csv file, or one of the built-in "
            f"sets {', '.join(SETS)}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ToMeError(f"prompt file {path} is not UTF-8 text") from None
    except OSError as error:
        raise ToMeError(f"cannot read prompt file {path}: {error.strerror or error}") from None
    if not text.strip():
        raise ToMeError(f"prompt file {path} is empty; write at least one prompt into it")
    prompts = kinds[path.suffix.lower()](text, path)
    if not prompts:
        raise ToMeError(f"prompt file {path} holds no prompts")
    return prompts


def built_in(name: str) -> list[Prompt]:
    """Return a built-in set of prompts.

    ``'demo'``: the captions that the demo model was trained on, in an order that mixes
    their kinds. ``'imagenet'``: the names of the 1000 classes of ImageNet-1k in the order of
    the classes, as torchvision lists them.

    Raises:
        ToMeError: An unknown name, or what it is read from is not installed.
    """
    if name == "demo":
        captions = _read_txt(_demo_captions().read_text(encoding="utf-8"), "demo captions")
        # By alphabet, the first ten would all be animals and fruit in a, b and c.
        random.Random(0).shuffle(captions)
        return captions
    if name == "imagenet":
        return [Prompt(text) for text in _imagenet_names()]
    raise ToMeError(f"no prompt set {name!r}; there are {', '.join(SETS)}")


def _demo_captions() -> Path:
    """The captions file: in ``.mim`` of an installed wheel, in ``tools`` of a checkout."""
    for root in (PACKAGE_ROOT / ".mim", PACKAGE_ROOT.parent):
        path = root / "tools" / "demo_model" / "concepts.txt"
        if path.is_file():
            return path
    raise ToMeError("the demo model's captions are not in this installation; install the wheel")


def _imagenet_names() -> list[str]:
    """The list in torchvision's sources, read without importing torchvision.

    Its import fails where its compiled operators do not fit the installed torch, which has
    nothing to do with a list of names.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ToMeError("the ImageNet class names are torchvision's: pip install torchvision")
    path = Path(spec.origin).parent / "models" / "_meta.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        (names,) = (
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            and getattr(node.targets[0], "id", "") == "_IMAGENET_CATEGORIES"
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ToMeError(
            f"this torchvision does not list the ImageNet class names in {path.name} "
            f"({type(error).__name__}); pip install torchvision==0.28.0"
        ) from None
    if len(names) != 1000:
        raise ToMeError(f"torchvision lists {len(names)} ImageNet class names, not 1000")
    return list(names)


def _read_txt(text, path) -> list[Prompt]:
    lines = (line.strip() for line in text.splitlines())
    return [Prompt(line) for line in lines if line and not line.startswith("#")]


def _read_json(text, path) -> list[Prompt]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ToMeError(f"prompt file {path} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise ToMeError(f"prompt file {path}: expected a list, got {type(entries).__name__}")
    return _entries(entries, f"prompt file {path}")


def _read_csv(text, path) -> list[Prompt]:
    rows = csv.DictReader(text.splitlines())
    if "prompt" not in (rows.fieldnames or ()):
        raise ToMeError(
            f"prompt file {path} has no column 'prompt'; its first line names {rows.fieldnames}"
        )
    entries = [{key: row[key] for key in KEYS if row.get(key)} for row in rows]
    return _entries([entry for entry in entries if entry], f"prompt file {path}")


def _entries(entries, where) -> list[Prompt]:
    """Return the prompts of a list of texts and dicts."""
    prompts = []
    for number, entry in enumerate(entries, start=1):
        entry = {"prompt": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise ToMeError(f"{where}: entry {number} is {entry!r}; write a text or a dict")
        unknown = sorted(set(entry) - set(KEYS))
        if unknown:
            raise ToMeError(f"{where}: entry {number} has unknown keys {unknown}; it takes {KEYS}")
        text, negative = entry.get("prompt"), entry.get("negative_prompt")
        if not isinstance(text, str) or not text.strip():
            raise ToMeError(f"{where}: entry {number} has no prompt: {entry!r}")
        if negative is not None and not isinstance(negative, str):
            raise ToMeError(f"{where}: entry {number}: negative_prompt must be a text")
        prompts.append(Prompt(text.strip(), negative, _seed(entry.get("seed"), where, number)))
    return prompts


def _seed(value, where, number) -> int | None:
    if value is None:
        return None
    try:
        seed = int(str(value))
    except ValueError:
        seed = -1
    if not 0 <= seed < MAX_SEED:
        raise ToMeError(f"{where}: entry {number}: seed must be in [0, 2**32), got {value!r}")
    return seed


def _without_duplicates(prompts) -> tuple[list[Prompt], list[str]]:
    kept = list(dict.fromkeys(prompts))
    left_out = len(prompts) - len(kept)
    if not left_out:
        return kept, []
    first = next(p.text for i, p in enumerate(prompts) if p in prompts[:i])
    return kept, [
        f"{left_out} of {len(prompts)} prompts were duplicates and left out (such as {first!r}); "
        "for several pictures of a prompt use images_per_prompt, or give them seeds"
    ]
