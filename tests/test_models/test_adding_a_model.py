# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The worked example of docs/adding_a_model.md, as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from mmagic_tome import ToMeError, apply_tome
from mmagic_tome.models import HOSTS, Host, register_host

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_model.md"
CODE = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(autouse=True)
def hosts():
    before = list(HOSTS)
    yield
    HOSTS[:] = before


def test_the_worked_example(capsys):
    model, host, use = CODE
    assert len(host.strip().splitlines()) < 40
    torch.manual_seed(0)
    names = {"__name__": "example"}
    exec(model, names)
    with pytest.raises(ToMeError, match="nothing to merge in a ToyTransformer"):
        apply_tome(names["ToyTransformer"]())
    exec(host, names)
    exec(use, names)
    assert capsys.readouterr().out.count("384   192") == 4
    network, handle = names["network"], names["handle"]
    given = []
    network.layers[1].attention.qkv.register_forward_pre_hook(
        lambda module, args: given.append(args[0].shape[1])
    )
    picture, inputs = torch.randn(3, 4, 18, 14), dict(names["inputs"], text=torch.randn(3, 7, 16))
    with torch.no_grad():
        merged = network(picture, **inputs)
        assert given == [7 + 32]
        handle.ratio = 0
        dense = network(picture, **inputs)
        handle.remove()
        assert torch.equal(network(picture, **inputs), dense)
        assert not torch.equal(merged, dense) and merged.shape == dense.shape
        for sites in ("block", "stack"):
            with apply_tome(network, ratio=0.5, sites=sites):
                given.clear()
                assert not torch.equal(network(picture, **inputs), dense)
                assert given == [7 + 32]


def test_registering_replaces_an_earlier_one_and_refuses_what_is_no_host():
    class Mine(Host):
        description = "mine"

    first, second = Mine(), Mine()
    assert register_host(first) is first and HOSTS[0] is first
    register_host(second)
    assert HOSTS[0] is second and first not in HOSTS
    for wrong in (Mine, None, Host()):
        with pytest.raises(ToMeError, match="a host is an instance of a subclass"):
            register_host(wrong)
