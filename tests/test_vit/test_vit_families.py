# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What merging does in every family of vision transformers."""

import copy
import pickle

import pytest
import torch
from vits import FAMILIES, LAYERS, NAMES, build, forget_positions, inputs, result

from mmagic_tome.vit import apply_tome_vit, find_vit, get_vit_handle


def tokens_of_blocks(model, arguments):
    """What goes in and out of every block, counted from outside, after all other hooks."""
    seen = []

    def note(module, args, output):
        seen.append((args[0].shape[1], output.shape[1]))

    hooks = [block.module.register_forward_hook(note) for block in find_vit(model).blocks]
    model(**arguments)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_tokens_per_block_are_those_of_the_schedule(name):
    _, prefix, unmerges = FAMILIES[name]
    model, arguments = build(name), inputs(name)
    tokens = tokens_of_blocks(model, arguments)[0][0]
    handle = apply_tome_vit(model, r=[5, 0, 3], trace_source=True)
    left = [tokens - 5, tokens - 5, tokens - 8, tokens - 8]
    expected = list(zip([tokens, *left], left))
    seen = tokens_of_blocks(model, arguments)
    if unmerges:
        assert seen.pop() == (left[-1], tokens) and expected.pop() == (left[-1], left[-1])
    assert seen == expected
    assert handle.tokens == list(zip([tokens, *left], left))
    # Sizes: all patches, and the protected alone and in front.
    size, source = handle.size, handle.source
    assert size.shape == (2, left[-1]) and size.sum(1).tolist() == [tokens] * 2
    assert torch.equal(size[:, :prefix], torch.ones(2, prefix))
    # Every patch is in one token; tokens hold as many patches as their size says.
    assert source.shape == (2, tokens)
    assert torch.equal(torch.stack([row.bincount() for row in source]).float(), size)
    assert source[:, :prefix].tolist() == [list(range(prefix))] * 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_merging_duplicates_changes_nothing(name, attention):
    """Tokens that are the same and stand for several are what those several were: exactly what
    proportional attention and size-weighted pooling are for."""
    model, arguments = build(name, attention).double(), inputs(name, redundant=True)
    arguments = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    forget_positions(model)
    dense = result(model, arguments)
    handle = apply_tome_vit(model, r=5)
    merged = result(model, arguments)
    before, after = handle.tokens[0][0], handle.tokens[-1][1]
    assert after <= before - 16
    torch.testing.assert_close(merged, dense, rtol=1e-4, atol=1e-5)
    if FAMILIES[name][1]:  # without a class token all tokens are the same, and so is attention
        apply_tome_vit(model, r=5, prop_attn=False)
        assert (result(model, arguments) - dense).abs().max() > 1e-3 * dense.abs().max()


@pytest.mark.parametrize("metric", ["keys", "attention"])
@pytest.mark.parametrize("name", NAMES)
def test_bit_exact_at_zero_and_after_removal_also_of_copies(name, metric):
    model, arguments = build(name), inputs(name)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    dense = result(model, arguments)
    handle = apply_tome_vit(model, r=0, metric=metric)
    assert torch.equal(result(model, arguments), dense)
    handle.r = 4
    merged = result(model, arguments)
    assert not torch.equal(merged, dense)
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    handle.remove()
    assert torch.equal(result(model, arguments), dense)
    assert [type(m) for m in model.modules()] == classes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # A copy is merged still, and on its own.
    for one in copies:
        assert torch.equal(result(one, arguments), merged)
        get_vit_handle(one).r = 0
        assert torch.equal(result(one, arguments), dense)
        get_vit_handle(one).remove()
        assert torch.equal(result(one, arguments), dense)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("mmpretrain")])
def test_gradients_and_checkpointing(name):
    model, arguments = build(name), inputs(name)
    handle = apply_tome_vit(model, r=6)
    with torch.enable_grad():
        result(model, arguments).square().sum().backward()
        plain = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        assert len(plain) > 8 * LAYERS
        model.zero_grad()
        if name.startswith("timm"):
            model.set_grad_checkpointing()
        else:
            model.gradient_checkpointing_enable()
        model.train()
        # A forward between the forward and its backward leaves other sizes behind.
        loss = result(model, arguments).square().sum()
        handle.r = 2
        result(model, inputs(name, seed=4))
        tokens = handle.tokens
        loss.backward()
        assert handle.tokens == tokens  # what runs again is no new forward
    for key, parameter in model.named_parameters():
        if key in plain:
            torch.testing.assert_close(parameter.grad, plain[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "dinov2", "videomae", "ast", "whisper"])
def test_hidden_states_and_attentions_on_request(name):
    """They are those of merged tokens, whether or not they were asked for before merging began."""

    def ask(model):
        root = model.encoder if name == "whisper" else find_vit(model).network
        key = "input_features" if name == "whisper" else next(iter(arguments))
        return root(**{key: arguments[key]}, output_hidden_states=True, output_attentions=True)

    arguments, seen = inputs(name), []
    for asked_before in (False, True):
        model = build(name, "eager")
        if asked_before:
            dense = ask(model)
        handle = apply_tome_vit(model, r=[4, 4, 0, 4])
        seen.append(ask(model))
    tokens, counts = dense.hidden_states[0].shape[1], [before for before, _ in handle.tokens]
    for output in seen:
        last = tokens if FAMILIES[name][2] else tokens - 12
        assert [h.shape[1] for h in output.hidden_states] == [*counts, last]
        assert [a.shape[-2:] for a in output.attentions] == [(n, n) for n in counts]
        # A row of attention sums to one with the bias in it too.
        for attention in output.attentions:
            torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    handle.remove()
    for pair in ((s.hidden_states for s in seen), (ask(model).hidden_states, dense.hidden_states)):
        assert all(torch.equal(first, second) for first, second in zip(*pair))
