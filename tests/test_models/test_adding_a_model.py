# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The worked example of docs/howto/add_a_model.md, as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from mmagic_tome import ToMeError, apply_tome
from mmagic_tome.models import ADAPTERS, ModelAdapter, register_adapter

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "add_a_model.md"
CODE = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(autouse=True)
def adapters():
    before = list(ADAPTERS)
    yield
    ADAPTERS[:] = before


def test_the_worked_example(capsys):
    model, adapter, use = CODE
    torch.manual_seed(0)
    names = {"__name__": "example"}
    exec(model, names)
    with pytest.raises(ToMeError, match="found no supported network in a ToyTransformer"):
        apply_tome(names["ToyTransformer"]())
    exec(adapter, names)
    exec(use, names)
    assert capsys.readouterr().out.count("384   192") == 2
    network, handle = names["network"], names["handle"]
    given = []
    network.layers[1].attention.qkv.register_forward_pre_hook(
        lambda module, args: given.append(args[0].shape[1])
    )
    image, inputs = torch.randn(3, 4, 18, 14), dict(names["inputs"], text=torch.randn(3, 7, 16))
    with torch.no_grad():
        merged = network(image, **inputs)
        assert given == [7 + 63]  # keys and values merge later, inside of attention
        handle.ratio = 0
        baseline = network(image, **inputs)
        handle.remove()
        assert torch.equal(network(image, **inputs), baseline)
        assert not torch.equal(merged, baseline) and merged.shape == baseline.shape
        for targets in (["attn", "mlp"], "block", "stack"):
            with apply_tome(network, ratio=0.5, targets=targets):
                given.clear()
                assert not torch.equal(network(image, **inputs), baseline)
                assert given == [7 + 32]


def test_registering_replaces_an_earlier_one_and_refuses_other_objects():
    class Mine(ModelAdapter):
        description = "mine"

    for adapter in (Mine(), Mine()):
        assert register_adapter(adapter) is adapter is ADAPTERS[0]
    assert sum(isinstance(adapter, Mine) for adapter in ADAPTERS) == 1
    for wrong in (Mine, None, ModelAdapter()):
        with pytest.raises(ToMeError, match="a model adapter is an instance of a subclass"):
            register_adapter(wrong)
