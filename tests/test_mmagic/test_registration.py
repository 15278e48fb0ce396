# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""When what is registered, in processes of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("mmagic")

ROOT = Path(__file__).resolve().parents[2]


def run(code):
    """Run code in a fresh interpreter; returns what it passed to ``tell``, as text."""
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="2",
        PYTHONWARNINGS="ignore",
    )
    tell = "def tell(*values): print('=', *values, sep='|')\n"
    command = [sys.executable, "-c", tell + textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return [line[2:].split("|") for line in done.stdout.splitlines() if line.startswith("=|")]


@pytest.mark.slow
def test_order_of_imports(tmp_path):
    pickled = tmp_path / "model.pkl"
    lines = run(f"""
        import mmagic_tome, sys
        assert 'mmagic' not in sys.modules
        # A dependency of MMagic's is missing at first, and then installed.
        sys.modules['mmagic.models.losses'] = None
        try: import mmagic.models
        except ImportError: del sys.modules['mmagic.models.losses']
        assert 'mmagic.models' not in sys.modules
        # Nothing of MMagic's or ours is imported by hand, and the root registry, which a
        # Runner uses, finds the same as MMagic's.
        from mmengine.registry import MODELS as ROOT, init_default_scope
        init_default_scope('mmagic')
        with ROOT.switch_scope_and_registry(None) as registry:
            tell(registry.get('ToMe').__module__, hasattr(registry.get('sd'), 'tome_handle'))

        import mmagic.apis, pickle, tiny
        folder = tiny.tiny_sd_folder({str(tmp_path)!r})
        model = tiny.tiny_model('native', folder, tome_cfg=dict(ratio=0.5))
        with open({str(pickled)!r}, 'wb') as stream: pickle.dump(model, stream)
    """)
    assert lines == [["mmagic_tome.mmagic.builder", "True"]]

    lines = run(f"""
        # As by custom_imports, where MMagic works by itself and was imported before; the
        # repairs, which this environment may need, come from a copy of their package.
        import sys
        sys.path.insert(0, {str(ROOT / "mmagic_tome" / "mmagic")!r})
        import compat; compat.apply()
        sys.path.pop(0)
        import mmagic.apis
        from mmagic.apis.inferencers.base_mmagic_inferencer import BaseMMagicInferencer
        from mmagic.models import StableDiffusion
        from mmengine.runner import FlexibleRunner, Runner
        class Mine(StableDiffusion):
            def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs)
        assert 'mmagic_tome' not in sys.modules
        # Unpickling imports this package.
        import pickle
        with open({str(pickled)!r}, 'rb') as stream: model = pickle.load(stream)
        tell(type(model) is StableDiffusion, model.tome_handle.ratio)
        def wrappers(function):
            count = 0
            while hasattr(function, '__wrapped__'):
                function, count = function.__wrapped__, count + 1
            return count
        for function in (
            StableDiffusion.__init__, Mine.__init__, Runner.build_model, FlexibleRunner.__init__,
            BaseMMagicInferencer._init_model, mmagic.apis.init_model,
        ):
            tell(wrappers(function))
        from mmagic.registry import MODELS
        tell('ToMe' in MODELS.module_dict)
    """)
    # Each once.
    assert lines == [["True", "0.5"], ["1"], ["1"], ["1"], ["1"], ["1"], ["1"], ["True"]]
