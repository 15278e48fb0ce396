# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Where the package's own data and configs are, in a checkout and in a wheel."""

from pathlib import Path

from ..errors import ToMeError

PACKAGE_ROOT = Path(__file__).resolve().parents[1]


def asset_path(name: str) -> str:
    """Return the absolute path of a file or folder of package data.

    Configs call it to name the demo model's folder, which is in the checkout
    for a developer and in ``site-packages`` for everybody else.

    Args:
        name: Path below ``mmagic_tome/assets``, with forward slashes, such as
            ``'demo_model'``.

    Returns:
        The absolute path.

    Raises:
        ToMeError: If there is no such asset; the message lists those there are.
    """
    assets = PACKAGE_ROOT / "assets"
    path = (assets / name).resolve()
    if assets not in path.parents or not path.exists():
        present = sorted(p.name for p in assets.glob("*") if not p.name.startswith(("_", ".")))
        raise ToMeError(f"no asset {name!r} in this installation; there are: {present or 'none'}")
    return str(path)
