# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The package in other environments and orders of imports, each in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(code, blocked=()):
    """Run code in a fresh interpreter; what it passes to ``answer`` comes back.

    Args:
        code (str): Ends in a call of ``answer(value)``, a JSON value.
        blocked (tuple): Top-level modules that are not to be found.
    """
    source = "import json, sys, warnings\nwarnings.simplefilter('ignore')\n"
    source += "def answer(*values): print('ANSWER' + json.dumps(values))\n"
    source += f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", source + textwrap.dedent(code)],
        env=dict(os.environ, PYTHONPATH=path, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("ANSWER")[2])


def test_only_torch_and_diffusers():
    """No OpenMMLab package at all, no torchvision, no transformers."""
    blocked = ("mmagic", "mmcv", "mmengine", "pkg_resources", "setuptools", "peft", "cv2")
    blocked += ("transformers", "torchvision", "controlnet_aux", "mediapipe", "albumentations")
    calls, message, report = run(
        """
        import mmagic_tome
        import tiny
        unet = tiny.tiny_unet()
        mmagic_tome.apply_cache(unet, 'balanced')
        with mmagic_tome.apply_tome(unet, ratio=0.5) as handle:
            unet(**tiny.tiny_inputs())
            calls = handle.stats()[0]['calls']
        try:
            mmagic_tome.build_tome(dict(type='StableDiffusion'), tome_cfg=dict(ratio=0.5))
        except ImportError as error:
            message = str(error)
        answer(calls, message, mmagic_tome.compat.report())
        """,
        blocked,
    )
    assert calls == 1 and "mmagic" in message
    assert all(line.startswith("not installed") for line in report.splitlines())


MMAGIC = pytest.mark.skipif(not importlib.util.find_spec("mmagic"), reason="needs MMagic")


@MMAGIC
@pytest.mark.slow
def test_a_lean_mmagic():
    """MMagic without the optional half of its requirements; what the patches leave behind."""
    messages, statuses, table, left_behind = run(
        """
        import mmagic_tome
        import mmagic.apis, mmagic.evaluation, numpy
        from mmagic.apis.inferencers import controlnet_animation_inferencer as animation
        from mmagic.datasets.transforms import albu_function
        from mmcv.ops.nms import ext_module
        messages = []
        for use in (
            lambda: animation.HEDdetector.from_pretrained('x'),
            lambda: albu_function.albu.Compose([]),
            lambda: ext_module.nms(1, 2),
        ):
            try: use()
            except ImportError as error: messages.append(str(error))
        table = mmagic_tome.compat.report()
        names = ('controlnet_aux', 'albumentations', 'mmcv._ext')
        names += ('diffusers.models.unet_2d_condition', 'diffusers.pipelines.paint_by_example')
        left_behind = [name for name in names if sys.modules.get(name)]
        left_behind += ['bool8'] if hasattr(numpy, 'bool8') else []
        answer(messages, mmagic_tome.compat._STATUS, table, left_behind)
        """,
        blocked=("controlnet_aux", "albumentations", "mediapipe"),
    )
    for message, package in zip(messages, ("controlnet_aux", "albumentations", "full mmcv")):
        assert package in message and "pip install" in message
    assert left_behind == []
    assert set(statuses.values()) <= {"applied", "not needed"}
    assert statuses["controlnet_aux_missing"] == statuses["albumentations_missing"] == "applied"
    assert all(name in line for name, line in zip(statuses, table.splitlines()))


@MMAGIC
@pytest.mark.slow
def test_imported_after_mmagic():
    """As by custom_imports, where MMagic works by itself: here, by the patches alone."""
    registered, takes_keys, wrappers = run(f"""
        import types
        package = types.ModuleType('mmagic_tome')
        package.__path__ = [{str(ROOT / "mmagic_tome")!r}]
        sys.modules['mmagic_tome'] = package
        import mmagic_tome.mmagic.compat
        mmagic_tome.mmagic.compat.apply()
        import mmagic.apis
        from mmagic.apis.inferencers.base_mmagic_inferencer import BaseMMagicInferencer
        from mmagic.models import StableDiffusion
        from mmengine.runner import Runner
        class Mine(StableDiffusion):
            def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs)
        for name in [name for name in sys.modules if name.partition('.')[0] == 'mmagic_tome']:
            del sys.modules[name]
        sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != '_ImportHook']
        import mmagic_tome
        def wrappers(function):
            count = 0
            while hasattr(function, '__wrapped__'):
                function, count = function.__wrapped__, count + 1
            return count
        functions = (
            StableDiffusion.__init__, Mine.__init__, Runner.build_model,
            BaseMMagicInferencer._init_model, mmagic.apis.init_model,
        )
        from mmagic.registry import MODELS
        registered = 'ToMe' in MODELS.module_dict
        answer(registered, hasattr(StableDiffusion, 'tome_handle'), [*map(wrappers, functions)])
    """)
    assert registered and takes_keys
    assert wrappers == [1] * 5, "each once"
