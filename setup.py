# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Builds and installs mmagic_tome.

As in other OpenMMLab projects, ``configs/``, ``tools/`` and
``model-index.yml`` travel inside the package as ``mmagic_tome/.mim/``, where
``_base_ = 'mmagic_tome::...'``, ``mmengine.hub.get_config`` and ``mim run``
look for them: copied into a wheel, linked in an editable installation.

``PROJECT_URL=https://... make wheel`` states where the repository is published. Links of the README
that lead into the repository become absolute with it, and plain text without it.
"""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "mmagic_tome"
MIM_ITEMS = ("configs", "tools", "model-index.yml")


def read_version():
    """Return ``__version__`` of ``version.py`` without importing the package."""
    scope = {}
    exec((ROOT / PACKAGE / "version.py").read_text(encoding="utf-8"), scope)
    return scope["__version__"]


def read_requirements(name):
    """Return the requirement lines of ``requirements/<name>.txt``."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def read_readme(url):
    """Return the README for a page outside of the repository.

    Args:
        url: Of the repository, such as ``https://HOST/OWNER/mmagic_tome``. Empty: links into it
            become plain text, images of it are left out.
    """
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""

    def absolute(match):
        image, words, target = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        if not url:
            return "" if image else words
        if target.startswith("#"):
            return f"[{words}]({url}{target})"
        return f"{image}[{words}]({url}/{'raw' if image else 'blob'}/main/{target})"

    # Words in brackets may have brackets in them, as code does.
    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)", absolute, text)


def asset_files():
    """Return every file under ``assets/`` and every template, relative to the package."""
    package = ROOT / PACKAGE
    found = [*(package / "assets").rglob("*"), *package.rglob("templates/*")]
    files = (path for path in found if path.is_file())
    return sorted(
        path.relative_to(package).as_posix() for path in files if "__pycache__" not in path.parts
    )


class BuildPyWithMim(build_py):
    """``build_py`` that also puts ``configs/`` and ``tools/`` into ``.mim/``.

    The copies go to the build folder and never into the source tree, so that
    a wheel cannot contain what an earlier build left behind.
    """

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            self.link_mim(ROOT / PACKAGE / ".mim")
        else:
            self.copy_mim(Path(self.build_lib) / PACKAGE / ".mim")

    @staticmethod
    def link_mim(target):
        """Link the items relative to the checkout, so that it can be moved."""
        target.mkdir(exist_ok=True)
        for item in MIM_ITEMS:
            link = target / item
            if link.is_symlink() or link.is_file():
                link.unlink()
            elif link.is_dir():
                shutil.rmtree(link)
            link.symlink_to(os.path.relpath(ROOT / item, target))

    @staticmethod
    def copy_mim(target):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for item in MIM_ITEMS:
            source = ROOT / item
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(source, target / item, ignore=ignored)
            else:
                shutil.copy2(source, target / item)


EXTRAS = {name: read_requirements(name) for name in ("demo", "docs", "eval", "tests")}
EXTRAS["mmagic"] = read_requirements("mminstall")
EXTRAS["all"] = sorted({line for lines in EXTRAS.values() for line in lines})
URL = os.environ.get("PROJECT_URL", "").rstrip("/")

setup(
    name=PACKAGE,
    version=read_version(),
    description=(
        "Faster diffusion models without training: token merging and step caching, for diffusers "
        "and MMagic"
    ),
    long_description=read_readme(URL),
    long_description_content_type="text/markdown",
    url=URL or None,
    author="mmagic_tome authors",
    license="Apache-2.0",
    keywords="token merging, step caching, diffusion models, Stable Diffusion, OpenMMLab, MMagic",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={PACKAGE: asset_files()},
    include_package_data=False,
    python_requires=">=3.9",
    install_requires=read_requirements("runtime"),
    extras_require=EXTRAS,
    cmdclass={"build_py": BuildPyWithMim},
    zip_safe=False,
)
