# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A merged vision transformer is an ordinary module: freed, copied, pickled, hooked by others."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

pytest.importorskip("transformers")
pytest.importorskip("timm")

from vits import FAMILIES, build, inputs, result

import mmagic_tome
from mmagic_tome import ToMeError
from mmagic_tome.vit import ViTConfig, apply_options, apply_tome_vit, find_vit, get_vit_handle
from mmagic_tome.vit.interface import BiasedAttention, ConfigProxy

NAMES = sorted(FAMILIES)
#: One of every way to give a bias to the attention.
BIASES = [name for name in ("vit", "timm", "videomae", "mmpretrain") if name in FAMILIES]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def _no_gc():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_gc")
@pytest.mark.parametrize("then", ["keep", "remove", "replace", "leave"])
@pytest.mark.parametrize("name", NAMES)
def test_freed_with_the_last_reference(name, then):
    build(name)  # a library's first model may stay alive in frames of its imports
    gc.freeze()  # a collection takes a second of all that was imported
    model, arguments = build(name), inputs(name)
    handle = apply_tome_vit(model, r=4, trace_source=True)
    result(model, arguments)
    if then == "remove":
        handle.remove()
    elif then == "replace":
        handle = apply_tome_vit(model, r=2)
    elif then == "leave":
        with apply_tome_vit(model, r=2), handle.disabled():
            result(model, arguments)
        handle.remove()
    freed = [weakref.ref(model)]
    cyclic = name.startswith("mmpretrain")  # its transformers are, without merging, too
    if not cyclic:
        freed.append(weakref.ref(find_vit(model).blocks[0].attention))
    del model  # the handle does not keep it alive
    assert all(ref() is None for ref in freed)
    if cyclic:
        gc.collect()
    assert handle.network is None and not handle.active
    handle.remove()
    assert "removed" in handle.summary() and "gone" in repr(handle)


class ModulePickler(pickle.Pickler):
    """Collects the modules in a pickle."""

    def __init__(self):
        super().__init__(io.BytesIO())
        self.modules = set()

    def persistent_id(self, item):
        if isinstance(item, nn.Module):
            self.modules.add(item)
        return None


@pytest.mark.parametrize("metric", ["keys", "attention"])
@pytest.mark.parametrize("name", NAMES)
def test_a_block_is_copied_and_pickled_alone(name, metric):
    model, arguments = build(name), inputs(name)
    handle = apply_tome_vit(model, r=[3, 4], metric=metric)
    result(model, arguments)
    merged = handle.tokens
    block = find_vit(model).blocks[1].module
    pickler = ModulePickler()
    pickler.dump(block)
    assert pickler.modules == set(block.modules())
    lone = copy.deepcopy(block)
    # What was merged is merged in the copy, and removed from the copy alone.
    own = get_vit_handle(lone)
    assert own.network is lone and own.active and own._patch is not handle._patch
    own.remove()
    assert not own.active and handle.active and get_vit_handle(lone) is None
    left = [m for m in lone.modules() if m._forward_hooks or m._forward_pre_hooks]
    stand_ins = [
        value
        for module in lone.modules()
        for value in vars(module).values()
        if isinstance(value, (ConfigProxy, BiasedAttention))
    ]
    assert left == stand_ins == []
    result(model, arguments)
    assert handle.tokens == merged


def test_hooks_after_loading_do_not_replace_those_in_the_pickle(monkeypatch):
    """In a new process torch numbers hooks from 0 again."""
    model, arguments = build("vit"), inputs("vit")
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    apply_tome_vit(model, r=4)
    used = RemovableHandle.next_id
    merged, data = result(model, arguments), pickle.dumps(model)
    RemovableHandle.next_id = 0
    loaded = pickle.loads(data)
    start = RemovableHandle.next_id
    for module in loaded.modules():
        RemovableHandle.next_id = start
        for _ in range(used):
            module.register_forward_hook(lambda module, args, output: None)
            module.register_forward_pre_hook(lambda module, args: None)
    assert torch.equal(result(loaded, arguments), merged)


@pytest.mark.parametrize("name", BIASES)
def test_disabled_is_of_one_thread(name):
    model, arguments = build(name), inputs(name)
    baseline = result(model, arguments)
    handle = apply_tome_vit(model, r=5)
    merged, tokens = result(model, arguments), handle.tokens
    outputs = {}

    def work(key):
        with torch.no_grad():
            outputs[key] = result(model, arguments)

    def run(key):
        thread = threading.Thread(target=work, args=(key,))
        thread.start()
        thread.join()

    def work_disabled():
        with torch.no_grad(), handle.disabled():
            ready.set()
            wait.wait(60)
            outputs["there"] = result(model, arguments)

    with handle.disabled():
        run("elsewhere")
        with handle.disabled():
            outputs["nested"] = result(model, arguments)
        outputs["here"] = result(model, arguments)
        assert handle.active and handle.tokens == tokens and handle.r == 5
    outputs["after"] = result(model, arguments)
    ready, wait = threading.Event(), threading.Event()
    thread = threading.Thread(target=work_disabled)
    thread.start()
    assert ready.wait(60)
    outputs["meanwhile"] = result(model, arguments)
    wait.set()
    thread.join()
    for key in ("elsewhere", "after", "meanwhile"):
        assert torch.equal(outputs[key], merged), key
    for key in ("nested", "here", "there"):
        assert torch.equal(outputs[key], baseline), key


def test_r_changes_the_next_forward():
    model, arguments = build("vit"), inputs("vit")
    handle = apply_tome_vit(model, r=2)
    hook = (
        find_vit(model)
        .blocks[1]
        .module.register_forward_pre_hook(lambda module, args: setattr(handle, "r", 6))
    )
    result(model, arguments)
    assert [a - b for a, b in handle.tokens] == [2] * 4 and handle.r == 6
    hook.remove()
    result(model, arguments)
    assert [a - b for a, b in handle.tokens] == [6, 6, 6, 6]


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_others_see_the_same_whoever_came_first(name):
    """Also in the first forward."""
    arguments, seen = inputs(name), []

    def shapes(value):
        if torch.is_tensor(value):
            return tuple(value.shape)
        return [shapes(item) for item in value] if isinstance(value, (tuple, list)) else None

    def watch(model, notes):
        for block in find_vit(model).blocks:
            for part in ("module", "first", "attention", "output", "norm", "last"):
                module = getattr(block, part)
                module.register_forward_pre_hook(
                    lambda m, args, part=part: notes.append((part, shapes(args)))
                )
                module.register_forward_hook(
                    lambda m, args, output, part=part: notes.append((part, shapes(output)))
                )

    for first in (True, False):
        model, notes = build(name), []
        if first:
            watch(model, notes)
        apply_tome_vit(model, r=5)
        if not first:
            watch(model, notes)
        result(model, arguments)
        seen.append(notes)
    assert seen[0] == seen[1] and len({str(note) for note in seen[0] if note[0] == "module"}) > 4


def test_tensors_are_released_after_a_forward_that_failed():
    model, arguments = build("vit"), inputs("vit")
    handle = apply_tome_vit(model, r=4)
    weight = model.vit.layers[2].mlp.fc2.weight
    model.vit.layers[2].mlp.fc2.weight = nn.Parameter(torch.zeros(32, 47))
    with pytest.raises(RuntimeError):
        result(model, arguments)
    context = handle._patch.context
    assert not context.running and context.size is context.match is context.metric is None
    model.vit.layers[2].mlp.fc2.weight = weight
    result(model, arguments)
    assert handle.tokens[-1][1] == 37 - 16
    handle.reset_stats()
    assert handle.tokens is handle.size is handle.source is None


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_checkpointing_across_disabled_and_with_reentrant(name):
    model, arguments = build(name).train(), inputs(name)
    handle = apply_tome_vit(model, r=6)
    enable = model.set_grad_checkpointing if name == "timm" else model.gradient_checkpointing_enable
    with torch.enable_grad():
        gradients = []
        for checkpoints in (False, True):
            if checkpoints:
                enable()
            model.zero_grad()
            with handle.disabled():
                loss = result(model, arguments).square().sum()
            # Blocks run again outside of disabled(), as what they were.
            loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for one, other in zip(*gradients):
            torch.testing.assert_close(one, other)
        # What runs again is no new forward.
        first = result(model, arguments).square().sum()
        handle.r = 2
        result(model, arguments)
        tokens = handle.tokens
        first.backward()
        assert handle.tokens == tokens
        if name == "vit":
            model.gradient_checkpointing_enable({"use_reentrant": True})
            loss = result(model, {"pixel_values": arguments["pixel_values"].requires_grad_()})
            with pytest.raises(ToMeError, match="use_reentrant=False"):
                loss.sum().backward()


def test_config_checks_like_the_function():
    assert ViTConfig().r == 8 and ViTConfig(target_speedup=1.5).r is None
    config = ViTConfig(r=3, metric="values")
    assert ViTConfig(**config.to_dict()) == config == ViTConfig.coerce(config.to_dict())
    assert hash(config) == hash(ViTConfig(metric="values", r=3))
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    # r and target_speedup replace each other.
    fast = config.replace(target_speedup=2)
    assert (fast.r, fast.target_speedup) == (None, 2) and fast.metric == "values"
    assert (fast.replace(r=5).r, fast.replace(r=5).target_speedup) == (5, None)
    assert ViTConfig(**fast.to_dict()) == fast
    with pytest.raises(AttributeError):
        config.r = 4
    for make in (
        lambda **options: ViTConfig(**options),
        lambda **options: config.replace(**options),
        lambda **options: ViTConfig.coerce(options),
        lambda **options: ViTConfig.coerce(config, **options),
        lambda **options: apply_options(build("vit"), options),
    ):
        with pytest.raises(ToMeError, match="no option 'metrics': did you mean 'metric'"):
            make(metrics="keys")
        with pytest.raises(ToMeError, match="r must be an integer"):
            make(r="8")
        with pytest.raises(ToMeError, match=r"metric='key' must be .*; write metric='keys'"):
            make(metric="key")
    with pytest.raises(ToMeError, match="must be a ViTConfig or a dict"):
        ViTConfig.coerce(3)


def test_stats_and_description():
    model, arguments = build("vit"), inputs("vit")
    handle = apply_options(model, ViTConfig(r=5), distance="dot")
    assert handle.stats()[0] == {"block": "vit.layers.0", "tokens": None, "kept": None}
    result(model, arguments)
    assert handle.stats()[1] == {"block": "vit.layers.1", "tokens": 32, "kept": 27}
    assert handle.description == "r=5, proportional attention, dot similarity of keys"
    assert handle.description in handle.summary()
    assert handle.network is model.vit and handle.config.distance == "dot"


def test_needs_torch_alone():
    """The subpackage on its own: the parent package loads more, which is not of interest here."""
    root = Path(mmagic_tome.__file__).parent
    code = f"""
import sys, types
for name in ("numpy", "timm", "transformers", "mmengine", "diffusers"):
    sys.modules[name] = None
package = types.ModuleType("mmagic_tome")
package.__path__ = [{str(root)!r}]
sys.modules["mmagic_tome"] = package
import mmagic_tome.vit, mmagic_tome.vit.registry
print(sorted(m for m in sys.modules if m.startswith("mmagic_tome.") and m.count(".") == 1))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    layers = {"errors", "graphs", "merging", "patch", "validate", "vit"}
    assert done.stdout.strip() == str(sorted(f"mmagic_tome.{name}" for name in layers))


def test_families_are_rows_of_names():
    """Every row's module exists in the installed transformers."""
    import importlib

    from mmagic_tome.vit.families.transformers import TRANSFORMERS

    for family in TRANSFORMERS:
        module = importlib.import_module(f"transformers.models.{family.module}")
        assert isinstance(module, types.ModuleType) and hasattr(module, family.network)
