# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic's ``tools/test.py`` and ``tools/train.py``, with this package imported before MMagic.

MMagic's scripts import MMagic before they read a config, so ``custom_imports`` comes too late for
the patches in ``compat/``: with current libraries the import itself fails. The functions here
import this package first and then run the scripts of the installed MMagic, with its options::

    python -m mmagic_tome test CONFIG [CHECKPOINT] [--work-dir ...] [--out ...] [--cfg-options ...]
    python -m mmagic_tome train CONFIG [--work-dir ...] [--resume] [--amp] [--auto-scale-lr] ...

A script is loaded as a module and its ``main()`` called, so that its parser can be corrected
(``docs/reference/hooks.md``): CHECKPOINT may be left out, CONFIG may be a path in a package, and
what is missing is an error before anything is built. ``--cfg-options`` keeps the spaces of texts,
``--amp`` works for an ``optim_wrapper`` with one optimizer and no ``type``, where MMagic raises,
and ``--auto-scale-lr`` takes effect, where MMagic ignores it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ..errors import ToMeError
from ..lab.options import KeyValues

# What a config must have, by script, and what to write where it has not.
_NEEDED = {
    "test": (
        ("test_dataloader", "test_cfg", "test_evaluator"),
        "inherit from configs/_base_/tome_eval.py, as configs/demo/sd-emoji_eval.py does",
    ),
    "train": (
        ("train_dataloader", "train_cfg", "optim_wrapper"),
        "inherit from a training config, such as configs/dreambooth/dreambooth_tome-5e-1.py",
    ),
}


def run(name: str, argv: Sequence[str], prog: str) -> None:
    """Run MMagic's ``tools/test.py`` or ``tools/train.py``.

    Args:
        name: 'test' or 'train'.
        argv: Arguments of the script.
        prog: Name shown in help and errors.

    Raises:
        ToMeError: MMagic is not installed; arguments that cannot be, before anything is built.
    """

    class Parser(argparse.ArgumentParser):
        """The script's parser, corrected."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "prog": prog})

        def add_argument(self, *names: str, **options: Any) -> argparse.Action:
            if names == ("checkpoint",):
                options = {**options, "nargs": "?", "help": "checkpoint file; default: load_from"}
            elif names == ("--cfg-options",):
                options = {**options, "action": KeyValues, "help": "changes of the config"}
            return super().add_argument(*names, **options)

        def parse_args(self) -> argparse.Namespace:
            return _completed(name, super().parse_intermixed_args(argv))

    script = _load(name)
    script.argparse = SimpleNamespace(ArgumentParser=Parser)
    script.main()


def _load(name: str) -> ModuleType:
    """The script of the installed MMagic as a module."""
    package = importlib.util.find_spec("mmagic")
    if package is None:
        raise ToMeError("MMagic is not installed: pip install --no-deps mmagic==1.2.0")
    folder = Path(package.submodule_search_locations[0])
    file = folder / ".mim" / "tools" / f"{name}.py"
    if not file.is_file():  # MMagic's checkout on PYTHONPATH
        file = folder.parent / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"mmagic_tools_{name}", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def _completed(name: str, args: argparse.Namespace) -> argparse.Namespace:
    """Checked arguments, in the form in which the script handles them."""
    from ..lab.runners.mmagic_source import load_config

    config = load_config(args.config)
    args.config = config.filename
    options = args.cfg_options or {}
    config.merge_from_dict(options)
    keys, remedy = _NEEDED[name]
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ToMeError(f"{args.config} has no {', '.join(missing)}; {remedy}")
    checkpoint = getattr(args, "checkpoint", None) or config.get("load_from")
    if checkpoint and "://" not in checkpoint and not os.path.isfile(checkpoint):
        raise ToMeError(f"there is no checkpoint {checkpoint}")
    if name == "test":
        if args.out and not args.out.endswith((".json", ".yaml", ".yml", ".pkl", ".pickle")):
            raise ToMeError(
                f"--out {args.out} is no kind of file that is known; write metrics.json"
            )
        args.checkpoint = checkpoint
        return args
    if args.amp and "optimizer" in config.optim_wrapper:
        options["optim_wrapper.type"] = "AmpOptimWrapper"
        options.setdefault("optim_wrapper.loss_scale", "dynamic")
        args.amp = False
    if args.auto_scale_lr:
        options["auto_scale_lr.enable"] = True
    args.cfg_options = options or None
    return args
