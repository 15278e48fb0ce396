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
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="2",
        PYTHONWARNINGS="ignore",
    )
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_registry_alone_is_enough():
    """Neither ``mmagic.models`` nor anything of ours is imported by hand, and
    the root registry, which a Runner uses, finds the same."""
    lines = run("""
        import mmagic_tome, sys
        assert 'mmagic' not in sys.modules
        from mmengine.registry import MODELS, init_default_scope
        init_default_scope('mmagic')
        with MODELS.switch_scope_and_registry(None) as registry:
            print(registry.get('ToMe').__module__)
            print(registry.get('sd').__module__)
    """)
    assert lines[-2:] == ["mmagic_tome.models.builder", "mmagic_tome.models.family"]


@pytest.mark.slow
def test_imported_after_mmagic_and_unpickled(tmp_path):
    """As by ``custom_imports``, where MMagic was imported before and works by itself; and a
    model that is unpickled where no one imported this package."""
    lines = run(f"""
        import mmagic_tome, sys, pickle, tiny
        import mmagic.apis
        from mmengine.runner import Runner
        from mmagic.registry import MODELS
        folder = tiny.tiny_sd_folder({str(tmp_path)!r})
        model = tiny.tiny_model('native', folder, tome_cfg=dict(ratio=0.5))
        with open({str(tmp_path / "model.pkl")!r}, 'wb') as stream: pickle.dump(model, stream)
        # Undo everything but the repairs, which this environment may need.
        for name, registered in list(MODELS.module_dict.items()):
            if registered.__module__ == 'mmagic_tome.models.family':
                MODELS.register_module(name=name, module=registered.__mro__[2], force=True)
        MODELS.module_dict.pop('ToMe')
        Runner.build_model = Runner.build_model.__wrapped__
        for name in [name for name in sys.modules if name.startswith('mmagic_tome')]:
            del sys.modules[name]
        theirs = MODELS.get('sd')
        import mmagic_tome
        print(theirs.__module__, MODELS.get('sd').__module__, issubclass(MODELS.get('sd'), theirs))
        print('ToMe' in MODELS.module_dict, hasattr(Runner.build_model, '__wrapped__'))
    """)
    theirs, ours, derived = lines[-2].split()
    assert theirs.startswith("mmagic.") and ours == "mmagic_tome.models.family"
    assert derived == "True"
    assert lines[-1] == "True True"
    lines = run(f"""
        import torch, pickle, sys
        import mmagic_tome  # for the repairs
        assert 'mmagic' not in sys.modules
        with open({str(tmp_path / "model.pkl")!r}, 'rb') as stream: model = pickle.load(stream)
        print(type(model).__module__, model.tome_handle.ratio)
        from mmagic.registry import MODELS
        print(type(model) is MODELS.get('StableDiffusion'))
    """)
    assert lines[-2:] == ["mmagic_tome.models.family 0.5", "True"]
