# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The package in other environments than this one, each in a process of its own."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# As if some top-level modules were not installed.
BLOCKER = """
import importlib.machinery, sys
class Without:
    find_distributions = staticmethod(importlib.machinery.PathFinder.find_distributions)
    def __init__(self, names, finders): self.names, self.finders = names, finders
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] not in self.names:
            specs = (finder.find_spec(name, path, target) for finder in self.finders)
            return next((spec for spec in specs if spec is not None), None)
sys.meta_path[:] = [Without(%r, list(sys.meta_path))]
"""


def run(code, blocked=(), path=()):
    """Run code in a fresh interpreter; what it passes to ``answer`` comes back.

    Args:
        code (str): Ends in a call of ``answer(value)``, a JSON value.
        blocked (tuple): Top-level modules that are not to be found.
        path (tuple): Folders to put first on ``sys.path``.
    """
    source = "import json, sys, warnings\nwarnings.simplefilter('ignore')\n"
    source += "def answer(value): print('ANSWER' + json.dumps(value))\n"
    source += BLOCKER % (set(blocked),) if blocked else ""
    source += textwrap.dedent(code)
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([*map(str, path), str(ROOT)]),
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="2",
    )
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("ANSWER")[2])


def test_importing_the_package_imports_neither_mmagic_nor_diffusers():
    heavy = run("""
        import mmagic_tome
        names = ('mmagic', 'mmcv', 'mmengine', 'diffusers', 'transformers', 'torchvision')
        answer([name for name in names if name in sys.modules])
    """)
    assert heavy == []


def test_only_torch_and_diffusers():
    """No OpenMMLab package at all, no torchvision, no transformers."""
    openmmlab = ("mmagic", "mmcv", "mmengine")
    others = ("transformers", "torchvision", "controlnet_aux", "mediapipe", "albumentations", "cv2")
    others += ("peft",)  # which needs transformers
    setuptools = ("pkg_resources", "setuptools")
    result = run(
        """
        import mmagic_tome
        from mmagic_tome import build_tome
        sys.path.insert(0, 'tests')
        import tiny
        unet = tiny.tiny_unet()
        mmagic_tome.apply_cache(unet, 'balanced')
        with mmagic_tome.apply_tome(unet, ratio=0.5) as handle:
            unet(**tiny.tiny_inputs())
            calls = handle.stats()[0]['calls']
        try:
            build_tome(dict(type='StableDiffusion'), tome_cfg=dict(ratio=0.5))
        except ImportError as error:
            message = str(error)
        report = mmagic_tome.mmagic.compat.report()
        answer([calls, message, sorted({entry.status for entry in report})])
        """.replace("'tests'", repr(str(ROOT / "tests"))),
        blocked=openmmlab + others + setuptools,
    )
    calls, message, statuses = result
    assert calls == 1
    assert "pip install mmagic" in message
    assert statuses == ["not installed"]


def test_full_mmcv_matching_torchvision_old_numpy(tmp_path):
    """Faithful fakes of what nothing is wrong with: nothing is touched."""
    files = {
        # Full mmcv has the compiled module; every ops module checks its functions.
        "mmcv/__init__.py": "__version__ = '2.1.0'",
        "mmcv/_ext.py": "nms = 'compiled'",
        "mmcv/ops/__init__.py": "import importlib; ext = importlib.import_module('mmcv._ext')",
        # A torchvision whose compiled operators load.
        "torchvision/__init__.py": """
            import torch
            library = torch.library.Library('torchvision', 'FRAGMENT')
            library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        """,
    }
    for name, source in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(source))
    result = run(
        """
        import numpy
        numpy.bool8 = numpy.bool_
        import torch
        library = torch.library.Library('torchvision', 'DEF')
        library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        before = {name: dict(vars(sys.modules[name])) for name in ('numpy', 'torch')}
        import mmagic_tome
        # The fake defines nms a second time; that is torch's to refuse.
        try: import torchvision
        except RuntimeError: pass
        import mmcv.ops
        from mmagic_tome.mmagic.compat.patches import libraries
        assert next(libraries.numpy_bool8(), None) is None
        assert mmcv.ops.ext.nms == 'compiled' and sys.modules['mmcv._ext'] is mmcv.ops.ext
        changed = [f'{module}.{key}' for module, attributes in before.items()
                   for key, value in attributes.items()
                   if vars(sys.modules[module]).get(key) is not value]
        report = mmagic_tome.mmagic.compat.report(probe=False)
        status = {entry.name: entry.status for entry in report}
        answer([changed, status['torchvision_operators'], status['mmcv_compiled_operators']])
        """,
        path=[tmp_path],
    )
    assert result == [[], "not needed", "not needed"]


MMAGIC = pytest.mark.skipif(
    not __import__("importlib").util.find_spec("mmagic"), reason="needs MMagic"
)


@MMAGIC
@pytest.mark.slow
def test_after_a_plain_pip_install_mmagic(tmp_path):
    """mediapipe 1.2 is there, without ``solutions``; MMagic's inferencers import."""
    (tmp_path / "mediapipe").mkdir()
    (tmp_path / "mediapipe" / "__init__.py").write_text("tasks = 'new'\n__version__ = '1.2.2'\n")
    result = run(
        """
        import mmagic_tome
        early = {entry.status for entry in mmagic_tome.mmagic.compat.report(probe=False)}
        import mmagic.apis
        import mediapipe, controlnet_aux
        report = mmagic_tome.mmagic.compat.report()
        status = {entry.name: entry.status for entry in report}
        usable = hasattr(controlnet_aux, 'HEDdetector')
        answer([list(early), mediapipe.tasks, usable, status, str(report)])
        """,
        path=[tmp_path],
    )
    early, tasks, usable, status, table = result
    assert early == ["waiting"]  # nothing happens before it is needed
    assert tasks == "new"  # the real one again, for everyone else
    assert usable
    assert status["mediapipe_solutions"] == "applied"
    assert status["controlnet_aux_missing"] == "not needed"
    assert set(status.values()) <= {"applied", "not needed"}
    assert len(table.splitlines()) == len(status)
    assert all(name in table for name in status)


@MMAGIC
@pytest.mark.slow
def test_a_lean_mmagic():
    """MMagic without the optional half of its requirements, and no setuptools."""
    result = run(
        """
        import mmagic_tome
        from mmengine import Config
        from mmengine.config.config import Config
        import tempfile, os
        file = os.path.join(tempfile.mkdtemp(), 'config.py')
        base = 'mmagic::stable_diffusion/stable-diffusion_ddim_denoisingunet.py'
        with open(file, 'w') as stream: stream.write(f'_base_ = {base!r}')
        config = Config.fromfile(file)
        import mmagic.apis, mmagic.evaluation
        from mmagic.apis.inferencers import controlnet_animation_inferencer as animation
        try: animation.HEDdetector.from_pretrained('x')
        except ImportError as error: message = str(error)
        status = {entry.name: entry.status for entry in mmagic_tome.mmagic.compat.report()}
        names = ('controlnet_aux', 'albumentations', 'mmcv._ext')
        left_behind = [name for name in names if name in sys.modules]
        answer([config.model.type, message, status, left_behind])
        """,
        blocked=("controlnet_aux", "albumentations", "pkg_resources", "setuptools", "mediapipe"),
    )
    kind, message, status, left_behind = result
    assert kind == "StableDiffusion"
    assert "pip install controlnet_aux" in message
    assert status["mmengine_pkg_resources"] == "applied"
    assert status["controlnet_aux_missing"] == "applied"
    assert status["albumentations_missing"] == "applied"
    assert left_behind == []
