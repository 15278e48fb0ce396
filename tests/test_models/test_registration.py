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
def test_order_of_imports_and_pickles(tmp_path):
    pickled = tmp_path / "model.pkl"
    lines = run(f"""
        import mmagic_tome, sys
        assert 'mmagic' not in sys.modules
        # Nothing of MMagic's or ours is imported by hand, and the root registry, which a
        # Runner uses, finds the same as MMagic's.
        from mmengine.registry import MODELS as ROOT, init_default_scope
        init_default_scope('mmagic')
        with ROOT.switch_scope_and_registry(None) as registry:
            tell(registry.get('ToMe').__module__, registry.get('sd').__module__)

        import mmagic.apis, pickle, tiny
        from mmengine.runner import Runner
        from mmagic.registry import MODELS
        folder = tiny.tiny_sd_folder({str(tmp_path)!r})
        model = tiny.tiny_model('native', folder, tome_cfg=dict(ratio=0.5))
        with open({str(pickled)!r}, 'wb') as stream: pickle.dump(model, stream)

        # As by custom_imports, where MMagic works by itself and was imported before: undo
        # everything but the repairs, which this environment may need.
        for name, registered in list(MODELS.module_dict.items()):
            if registered.__module__ == 'mmagic_tome.models.family':
                MODELS.register_module(name=name, module=registered.__mro__[2], force=True)
        MODELS.module_dict.pop('ToMe')
        Runner.build_model = Runner.build_model.__wrapped__
        for name in [name for name in sys.modules if name.startswith('mmagic_tome')]:
            del sys.modules[name]
        theirs = MODELS.get('sd')
        import mmagic_tome
        tell(theirs.__module__, MODELS.get('sd').__module__, issubclass(MODELS.get('sd'), theirs))
        tell('ToMe' in MODELS.module_dict, hasattr(Runner.build_model, '__wrapped__'))
    """)
    ours = "mmagic_tome.models.family"
    assert lines[0] == ["mmagic_tome.models.builder", ours]
    theirs = "mmagic.models.editors.stable_diffusion.stable_diffusion"
    assert lines[1] == [theirs, ours, "True"]
    assert lines[2] == ["True", "True"]

    lines = run(f"""
        # Unpickling imports the classes before anything imports MMagic.
        import mmagic_tome, pickle, sys
        assert 'mmagic' not in sys.modules
        with open({str(pickled)!r}, 'rb') as stream: model = pickle.load(stream)
        tell(type(model).__module__, model.tome_handle.ratio)
        from mmagic.registry import MODELS
        tell(type(model) is MODELS.get('StableDiffusion'))
    """)
    assert lines == [[ours, "0.5"], ["True"]]
