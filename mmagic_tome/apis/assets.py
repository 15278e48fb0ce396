# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Where the package's own data and configs are, in a checkout and in a wheel."""

import contextlib
import sys
from pathlib import Path

from ..errors import ToMeError
from ..mmagic.compat import around_import

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


def register_config_package() -> None:
    """Let mmengine resolve ``mmagic_tome::...`` in ``_base_`` and ``get_config``.

    mmengine keeps a closed table of the packages it takes configs from. The
    table is meant to map a module to a distribution, whose recorded location
    is then joined with the module's name; for an editable installation that
    is a folder that does not exist. Naming a module of the package that is no
    distribution makes mmengine ask Python's import system instead, which is
    right in every kind of installation.

    Done at once if mmengine is imported already, else when it is.
    """

    @contextlib.contextmanager
    def after_import():
        yield
        sys.modules[table].MODULE2PACKAGE.setdefault("mmagic_tome", "mmagic_tome.version")

    table = "mmengine.config.utils"
    if table in sys.modules:
        with after_import():
            pass
    else:
        around_import(table, after_import)
