# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""MMagic without half of its requirements, and imported before this package, in a process of its
own. test_packaging.py has an environment without MMagic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmagic")

ROOT = Path(__file__).resolve().parents[3]

# As by custom_imports, where MMagic works by itself: here, by the patches alone. Then what lean
# MMagic says, and the package is imported.
CODE = """
import json, sys, types, warnings
warnings.simplefilter("ignore")
sys.modules.update(dict.fromkeys(["controlnet_aux", "albumentations", "mediapipe"]))
package = types.ModuleType("mmagic_tome")
package.__path__ = [sys.argv[1]]
sys.modules["mmagic_tome"] = package
import mmagic_tome.mmagic.compat as compat
compat.apply()
import mmagic.apis, mmagic.evaluation, numpy
from mmagic.apis.inferencers import controlnet_animation_inferencer as animation
from mmagic.apis.inferencers.base_mmagic_inferencer import BaseMMagicInferencer
from mmagic.datasets.transforms import albu_function
from mmagic.models import StableDiffusion
from mmcv.ops.nms import ext_module
from mmengine.runner import Runner
messages = []
for use in (
    lambda: animation.HEDdetector.from_pretrained("x"),
    lambda: albu_function.albu.Compose([]),
    lambda: ext_module.nms(1, 2),
):
    try: use()
    except ImportError as error: messages.append(str(error))
table = compat.report()
names = ["controlnet_aux", "albumentations", "mmcv._ext"]
names += ["diffusers.models.unet_2d_condition", "diffusers.pipelines.paint_by_example"]
left_behind = [name for name in names if sys.modules.get(name)]
left_behind += ["bool8"] if hasattr(numpy, "bool8") else []

class Mine(StableDiffusion):
    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs)

for name in [name for name in sys.modules if name.partition(".")[0] == "mmagic_tome"]:
    del sys.modules[name]
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "_ImportHook"]
import mmagic_tome
from mmagic.registry import MODELS

def wrappers(function):
    count = 0
    while hasattr(function, "__wrapped__"):
        function, count = function.__wrapped__, count + 1
    return count

functions = (
    StableDiffusion.__init__, Mine.__init__, Runner.build_model,
    BaseMMagicInferencer._init_model, mmagic.apis.init_model,
)
print("ANSWER" + json.dumps(dict(
    messages=messages, statuses=compat._STATUS, table=table, left_behind=left_behind,
    registered="ToMe" in MODELS.module_dict, wrappers=[*map(wrappers, functions)],
    takes_keys=hasattr(StableDiffusion, "tome_handle"),
)))
"""


@pytest.mark.slow
def test_a_lean_mmagic_that_is_imported_before_the_package():
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(ROOT / "mmagic_tome")],
        env=dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("ANSWER")[2])
    for message, package in zip(
        found["messages"], ("controlnet_aux", "albumentations", "full mmcv"), strict=True
    ):
        assert package in message and "pip install" in message
    statuses = found["statuses"]
    assert found["left_behind"] == [] and set(statuses.values()) <= {"applied", "not needed"}
    assert statuses["controlnet_aux_missing"] == statuses["albumentations_missing"] == "applied"
    assert all(name in line for name, line in zip(statuses, found["table"].splitlines()))
    assert found["registered"] and found["takes_keys"]
    assert found["wrappers"] == [1] * 5, "each once"
