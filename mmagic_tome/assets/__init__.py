# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Files that come with the package, in a checkout and in a wheel alike."""

from pathlib import Path

from ..errors import ToMeError

_ASSETS = Path(__file__).resolve().parent


def asset_path(name: str) -> str:
    """Return the absolute path of a file or folder of package data.

    Configs call it for the demo model's folder, which is in the checkout for a developer and in
    ``site-packages`` for everybody else.

    Args:
        name: Path below ``mmagic_tome/assets``, with forward slashes, such as ``'demo_model'``.

    Raises:
        ToMeError: There is no such asset; the message lists those there are.
    """
    path = (_ASSETS / name).resolve()
    if _ASSETS not in path.parents or not path.exists():
        there = sorted(one.name for one in _ASSETS.glob("*") if not one.name.startswith(("_", ".")))
        raise ToMeError(f"no asset {name!r} in this installation; there are: {there or 'none'}")
    return str(path)
