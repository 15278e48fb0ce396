# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import copy
import pickle
import sys
import threading

import pytest
import torch
import vits

pytest.importorskip("transformers")
pytest.importorskip("timm")

from vits import FAMILIES, LAYERS, build, forget_positions, inputs, result

from mmagic_tome import ToMeError, apply_tome, get_handle, remove_tome
from mmagic_tome.vit import ViTHandle, apply_tome_vit, get_vit_handle, remove_tome_vit
from mmagic_tome.vit.families import find_vit

NAMES = sorted(FAMILIES)
#: One of every way to give a bias to the attention.
BIASES = [name for name in ("vit", "timm", "videomae", "mmpretrain") if name in FAMILIES]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tokens_of_blocks(model, arguments):
    """What goes in and out of every block, counted from outside, after all other hooks."""
    seen, hooks = [], []

    def note(module, args, output):
        seen.append((args[0].shape[1], output.shape[1]))

    for block in find_vit(model).blocks:
        hooks.append(block.module.register_forward_hook(note))
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


@pytest.mark.parametrize("name", NAMES)
def test_bit_exact_at_zero_and_after_removal(name):
    model, arguments = build(name), inputs(name)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    dense = result(model, arguments)
    handle = apply_tome_vit(model, r=0)
    assert torch.equal(result(model, arguments), dense)
    handle.r = 4
    assert not torch.equal(result(model, arguments), dense)
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
    twin = copy.deepcopy(model)
    merged = result(model, arguments)
    assert remove_tome_vit(model) and not remove_tome_vit(model)
    assert torch.equal(result(model, arguments), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # The copy is merged still, and on its own.
    assert torch.equal(result(twin, arguments), merged)
    get_vit_handle(twin).r = 0
    assert torch.equal(result(twin, arguments), dense)
    get_vit_handle(twin).remove()
    assert torch.equal(result(twin, arguments), dense)


@pytest.mark.parametrize("name", NAMES)
def test_little_merging_changes_little(name):
    model, arguments = build(name), inputs(name, redundant=True)
    noise = inputs(name, seed=2)
    for key, value in arguments.items():
        if value.is_floating_point():
            arguments[key] = value + 0.02 * noise[key]
    forget_positions(model)
    dense = result(model, arguments)
    apply_tome_vit(model, r=3)
    error = (result(model, arguments) - dense).norm() / dense.norm()
    assert 0 < error < 0.1
    other = inputs(name, seed=3)
    assert (result(model, other) - dense).norm() / dense.norm() > 3 * error


@pytest.mark.parametrize("metric", ["keys", "queries", "values", "features", "attention"])
@pytest.mark.parametrize("name", ["vit", "timm-options", "videomae"])
def test_metrics_measure_what_they_say(name, metric):
    """The matching of the first block, made again from what a block computes densely."""
    from mmagic_tome.merging.sequence import match_tokens

    model, arguments = build(name), inputs(name)
    vit, seen = find_vit(model), {}
    block = vit.blocks[0]
    hooks = [
        block.norm.register_forward_pre_hook(lambda m, a: seen.update(features=a[0])),
        block.output.register_forward_hook(
            lambda m, a, y: seen.update(attention=y if torch.is_tensor(y) else y[0], x=a[0])
        ),
    ]
    model(**arguments)
    for hook in hooks:
        hook.remove()
    x, attention = seen["x"], block.attention
    if name == "vit":
        names = {"keys": "k_proj", "queries": "q_proj", "values": "v_proj"}
        heads = {k: getattr(attention, v)(x) for k, v in names.items()}
    elif name == "videomae":
        names = {"keys": "key", "queries": "query", "values": "value"}
        heads = {k: getattr(attention, v)(x) for k, v in names.items()}
    else:
        q, k, v = attention.qkv(x).chunk(3, -1)
        q, k = (
            norm(part.unflatten(-1, (2, 16))).flatten(2)
            for norm, part in ((attention.q_norm, q), (attention.k_norm, k))
        )
        heads = {"keys": k, "queries": q, "values": v}
    seen.update({k: (v[..., :16] + v[..., 16:]) / 2 for k, v in heads.items()})
    expected = match_tokens(seen[metric], 6, vit.prefix).plan.slot
    handle = apply_tome_vit(model, r=[6], metric=metric, trace_source=True)
    model(**arguments)
    assert torch.equal(handle.source, expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(distance="dot"),
        dict(distance="euclidean"),
        dict(distance="softmax"),
        dict(combination="mean"),
        dict(combination="max"),
        dict(combination="drop"),
        dict(partition="sequential"),
        dict(partition="random"),
        dict(prop_attn=False),
    ],
)
def test_every_option_has_an_effect_and_sizes_add_up(options):
    model, arguments = build("vit"), inputs("vit")
    apply_tome_vit(model, r=6)
    default = result(model, arguments)
    handle = apply_tome_vit(model, r=6, **options)
    state = torch.get_rng_state()
    changed = result(model, arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(changed, default, rtol=1e-4, atol=1e-5)
    assert handle.size.sum(1).tolist() == [37, 37]
    assert torch.equal(result(model, arguments), changed)


@pytest.mark.parametrize("combination", ["weighted", "mean", "max", "drop"])
@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_is_the_block_of_the_paper(name, combination):
    """One merged block against the same computed with merging in the middle of it."""
    from mmagic_tome.merging.sequence import match_tokens

    model, arguments = build(name), inputs(name)
    vit, seen = find_vit(model), {}
    block = vit.blocks[0]
    hook = block.norm.register_forward_pre_hook(lambda m, a: seen.update(features=a[0]))
    model(**arguments)
    hook.remove()
    handle = apply_tome_vit(model, r=[6], metric="features", combination=combination, unmerge=False)
    out = {}
    hook = block.module.register_forward_hook(lambda m, a, y: out.update(y=y))
    if name == "vit":
        result(model, arguments)
    else:
        model.encoder(arguments["input_features"])
    hook.remove()
    handle.remove()
    match = match_tokens(seen["features"], 6, vit.prefix)
    x = match.combine(seen["features"], None, combination)
    if name == "vit":
        expected = x + block.module.mlp(block.norm(x))
    else:
        layer = block.module
        expected = x + layer.fc2(layer.activation_fn(layer.fc1(block.norm(x))))
    torch.testing.assert_close(out["y"], expected, rtol=1e-4, atol=1e-5)


def test_output_has_its_dense_shape_when_unmerged():
    model, arguments = build("vit").vit, inputs("vit")
    handle = apply_tome_vit(model, r=6, trace_source=True)
    merged = model(**arguments).last_hidden_state
    assert merged.shape[1] == 37 - 4 * 6
    copied = handle.unmerge(merged)
    apply_tome_vit(model, r=6, unmerge=True)
    torch.testing.assert_close(model(**arguments).last_hidden_state, copied)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("mmpretrain")])
def test_gradients_and_checkpointing(name):
    model, arguments = build(name), inputs(name)
    apply_tome_vit(model, r=6)
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
        result(model, inputs(name, seed=4))
        loss.backward()
    for key, parameter in model.named_parameters():
        if key in plain:
            torch.testing.assert_close(parameter.grad, plain[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["timm", "videomae"])
def test_gradients_are_those_of_differences(name):
    """gradcheck through a whole merged model: averages by size, proportional attention, copies."""
    model, arguments = build(name).double(), inputs(name, batch=1)
    handle = apply_tome_vit(model, r=3)
    ((key, x),) = arguments.items()
    with torch.enable_grad():
        x = x.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: result(model, {key: x}), x, fast_mode=True)
    assert handle.tokens[-1][0] > handle.tokens[-1][1]


@pytest.mark.parametrize("combination", ["weighted", "mean", "max", "drop"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BIASES)
def test_half_precision_and_autocast(name, dtype, combination):
    # Patches that are the same: another choice of what merges, which rounding may bring about,
    # changes nothing, and neither does merging.
    model, arguments = build(name), inputs(name, redundant=True)
    forget_positions(model)
    reference = result(model, arguments)
    handle = apply_tome_vit(model, r=6, combination=combination)
    result(model, arguments)
    sizes = handle.size.sum(1)
    with torch.autocast("cpu", dtype=dtype):
        assert (result(model, arguments).float() - reference).norm() < 0.05 * reference.norm()
    model.to(dtype)
    out = result(model, {k: v.to(dtype) for k, v in arguments.items()})
    assert out.dtype == dtype and torch.equal(handle.size.sum(1), sizes)
    assert handle.size.dtype == torch.float32 and handle.tokens[-1][0] > handle.tokens[-1][1]
    assert (out.float() - reference).norm() < 0.05 * reference.norm()


@pytest.mark.parametrize("name", ["vit", "timm", "videomae"])
def test_fused_attention_stays_and_gets_a_bias_per_token(name, monkeypatch):
    model, arguments = build(name, "sdpa"), inputs(name)
    handle, given = apply_tome_vit(model, r=[0, 5, 3, 0]), []
    fused = torch.nn.functional.scaled_dot_product_attention

    def note(query, key, value, attn_mask=None, **kwargs):
        given.append((key.shape[2], attn_mask))
        return fused(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    model(**arguments)
    tokens = [before for before, _ in handle.tokens]
    assert [count for count, _ in given] == tokens
    # Before anything is merged the kernel is that of the dense model, without a mask.
    assert [mask is None for _, mask in given] == [True, True, False, False]
    for (_, mask), count in zip(given[2:], tokens[2:]):
        assert mask.shape == (2, 1, 1, count)  # never one number for every pair of tokens
        # Each is the logarithm of a size, and the sizes are those of all patches.
        assert torch.equal(mask.exp().round().sum((1, 2, 3)), torch.full((2,), float(tokens[0])))


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "dinov2", "videomae", "ast", "whisper"])
def test_hidden_states_and_attentions_on_request(name):
    """They are those of merged tokens, whether or not they were asked for before merging began."""

    def ask(model):
        root = model.encoder if name == "whisper" else find_vit(model).network
        key = "input_features" if name == "whisper" else next(iter(arguments))
        return root(**{key: arguments[key]}, output_hidden_states=True, output_attentions=True)

    arguments, unmerges = inputs(name), FAMILIES[name][2]
    seen = []
    for asked_before in (False, True):
        model = build(name, "eager")
        if asked_before:
            dense = ask(model)
            tokens = dense.hidden_states[0].shape[1]
            assert {h.shape[1] for h in dense.hidden_states} == {tokens}
        handle = apply_tome_vit(model, r=[4, 4, 0, 4])
        seen.append(ask(model))
    counts = [before for before, _ in handle.tokens]
    for output in seen:
        last = tokens if unmerges else tokens - 12
        assert [h.shape[1] for h in output.hidden_states] == [*counts, last]
        assert [a.shape[-2:] for a in output.attentions] == [(n, n) for n in counts]
        # A row of attention sums to one with the bias in it too.
        for attention in output.attentions:
            torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    for first, second in zip(*(output.hidden_states for output in seen)):
        assert torch.equal(first, second)
    handle.remove()
    for first, second in zip(ask(model).hidden_states, dense.hidden_states):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["timm", "vit"])
def test_other_sizes_odd_counts_and_one_picture(name):
    from vits import _timm

    torch.manual_seed(0)
    model = _timm(dynamic_img_size=True).eval() if name == "timm" else build(name)
    handle = apply_tome_vit(model, r=7)
    # 1 + 5 x 7 = 36 and 1 + 36 = 37 tokens, one more than there is to merge, and back.
    for height, width in ((24, 24), (20, 28), (24, 24), (4, 12), (4, 4)):
        x = torch.randn(1, 3, height, width)
        arguments = (
            {"x": x} if name == "timm" else dict(pixel_values=x, interpolate_pos_encoding=True)
        )
        out = result(model, arguments)
        count = 1 + height * width // 16
        expected = []
        for _ in range(LAYERS):
            left = count - min(7, (count - 1) // 2)
            expected.append((count, left))
            count = left
        assert handle.tokens == expected and out.isfinite().all()
        # The same as in a model that has seen no other size.
        twin = copy.deepcopy(model)
        assert torch.equal(result(twin, arguments), out)


def test_more_than_half_is_not_removed():
    model, arguments = build("vit"), inputs("vit", batch=1)
    handle = apply_tome_vit(model, r=1000)
    result(model, arguments)
    assert handle.tokens == [(37, 19), (19, 10), (10, 6), (6, 4)]
    assert handle.size[0, 0] == 1 and handle.size.sum() == 37


def test_threads_do_not_mix():
    from vits import _timm

    torch.manual_seed(0)
    model = _timm(dynamic_img_size=True).eval()
    apply_tome_vit(model, r=4)
    pictures = [torch.randn(1, 3, 24, 24), torch.randn(1, 3, 32, 32)]
    with torch.no_grad():
        expected = [model(x) for x in pictures]
    wrong = []

    def work(x, wanted):
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(x), wanted):
                    wrong.append(x.shape)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(pictures, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_finds_the_picture_half_of_clip():
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig
    from vits import _IMAGE, _SIZE

    text = CLIPTextConfig(**_SIZE, vocab_size=50, max_position_embeddings=8, eos_token_id=2)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=dict(_IMAGE), projection_dim=7)
    model = CLIPModel(config).eval()
    ids = torch.tensor([[1, 5, 6, 2]])
    arguments = {**inputs("clip", batch=1), "input_ids": ids}
    dense = model(**arguments)
    handle = apply_tome_vit(model, r=6)
    merged = model(**arguments)
    assert torch.equal(merged.text_embeds, dense.text_embeds)
    assert not torch.equal(merged.image_embeds, dense.image_embeds)
    assert handle.tokens[-1][1] == 37 - 24


def test_pickled_models_are_merged():
    for name in [n for n in ("vit", "videomae", "mmpretrain") if n in FAMILIES]:
        model, arguments = build(name), inputs(name)
        apply_tome_vit(model, r=4)
        merged = result(model, arguments)
        assert torch.equal(result(pickle.loads(pickle.dumps(model)), arguments), merged)


def test_handle():
    model, arguments = build("vit"), inputs("vit")
    with apply_tome_vit(model, r=(4, -1.0)) as handle:
        assert "not run yet" in handle.summary() and handle.tokens is None
        result(model, arguments)
        assert [a - b for a, b in handle.tokens] == [8, 5, 3, 0]
        assert "vit.layers.1  29 -> 24" in handle.summary()
        # A forward on another size, and one that failed in the middle, leave nothing behind.
        with pytest.raises(RuntimeError):
            model.vit.layers[0].mlp.fc2.weight.data = torch.zeros(32, 47)
            result(model, arguments)
        model.vit.layers[0].mlp.fc2.weight.data = torch.zeros(32, 48)
        one = inputs("vit", batch=1)
        assert result(model, one).shape == (1, 5)
        again = apply_tome_vit(model, r=2)
        assert not handle.active and again.active and "removed" in handle.summary()
        with pytest.raises(ToMeError, match="removed or replaced"):
            handle.r = 1
        again.remove()
    assert get_vit_handle(model) is None


def test_what_was_before_comes_back():
    model, arguments = build("videomae"), inputs("videomae")
    dense = result(model, arguments)
    with apply_tome_vit(model, r=5) as outer:
        five = result(model, arguments)
        with apply_tome_vit(model, r=2) as inner:
            assert inner.active and not outer.active
            assert not torch.equal(result(model, arguments), five)
            with inner.disabled():
                assert inner.active and torch.equal(result(model, arguments), dense)
                assert inner.r == 2
            assert inner.r == 2
        assert outer.active and not inner.active
        assert torch.equal(result(model, arguments), five)
        assert get_vit_handle(model).config == outer.config
    assert get_vit_handle(model) is None and not outer.active
    assert torch.equal(result(model, arguments), dense)
    # One that was replaced for good does not come back.
    with apply_tome_vit(model, r=5):
        last = apply_tome_vit(model, r=2)
    assert last.active
    last.remove()
    assert torch.equal(result(model, arguments), dense)


def test_by_the_general_functions():
    model, arguments = build("vit"), inputs("vit")
    dense = result(model, arguments)
    assert get_handle(model) is None and not remove_tome(model)
    handle = apply_tome(model, r=6, distance="dot")
    assert isinstance(handle, ViTHandle) and get_handle(model).config == handle.config
    merged = result(model, arguments)
    apply_tome(model, dict(r=3, distance="dot"), r=6)
    assert torch.equal(result(model, arguments), merged) and not handle.active
    assert remove_tome(model) and torch.equal(result(model, arguments), dense)
    with pytest.raises(ToMeError, match=r"has no option 'ratio'.*write r=8"):
        apply_tome(model, r=6, ratio=0.5)


def test_target_speedup_counts_operations():
    from mmagic_tome.vit.schedules import relative_cost

    model, arguments = build("vit"), inputs("vit")
    handle = apply_tome_vit(model, target_speedup=1.5)
    result(model, arguments)
    dense = relative_cost([(37, 37)] * LAYERS, 32, 48)
    r = handle.tokens[0][0] - handle.tokens[0][1]
    assert handle.r == r and f"target_speedup=1.5 of the multiply-adds, r={r}" in handle.summary()
    assert dense / relative_cost(handle.tokens, 32, 48) >= 1.5
    with apply_tome_vit(model, r=r - 1) as less:
        result(model, arguments)
        assert dense / relative_cost(less.tokens, 32, 48) < 1.5
    assert apply_tome_vit(model, target_speedup=50).r is None
    with pytest.raises(ToMeError, match="target_speedup=50 is out of reach with 37 tokens"):
        result(model, arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(r=-1), "r must be an integer >= 0"),
        (dict(r=2.5), "r must be an integer >= 0"),
        (dict(r=[1] * 5), "r has 5 entries but the model has 4 blocks"),
        (dict(r=(8, 1.5)), r"inflect in r=\(r, inflect\) must be in \[-1, 1\], got 1.5"),
        (dict(metric="gradients"), "metric='gradients' must be one of keys, .*; write"),
        (dict(distance="l1"), "distance='l1' must be one of"),
        (dict(combination="median"), "combination='median' must be one of"),
        (dict(partition="thirds"), "partition='thirds' must be one of"),
        (dict(prop_attn=1), "prop_attn=1 must be True or False; write prop_attn=True"),
        (dict(unmerge="last"), "unmerge='last' must be True or False"),
        (dict(seed=-1), "seed=-1 must be an integer at least 0; write seed=0"),
        (dict(target_speedup=0.5), "target_speedup=0.5 must be a number at least 1; write"),
        (dict(r=3, target_speedup=2), "r and target_speedup exclude each other"),
    ],
)
def test_wrong_options_change_nothing(options, message):
    model = build("vit")
    with pytest.raises(ToMeError, match=message):
        apply_tome_vit(model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_merged_is_said():
    with pytest.raises(
        ToMeError, match=r"no vision transformer to merge in a Linear.*timm.*write ratio in place"
    ):
        apply_tome_vit(torch.nn.Linear(2, 2), r=1)
    from timm.models.eva import Eva
    from timm.models.swin_transformer import SwinTransformer

    rotary = Eva(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1)
    with pytest.raises(ToMeError, match=r"merge in a Eva. Eva rotates queries and keys by pos"):
        apply_tome_vit(rotary, r=1)
    windows = SwinTransformer(img_size=8, patch_size=4, embed_dim=8, depths=(1,), num_heads=(1,))
    with pytest.raises(ToMeError, match=r"Sequential. SwinTransformer attends in windows"):
        apply_tome_vit(torch.nn.Sequential(windows), r=1)
    with pytest.raises(ToMeError, match=r"no option 'ratio': .* diffusion models; write r=8"):
        apply_tome(build("vit"), ratio=0.5)
    pair = torch.nn.ModuleList([build("vit"), build("clip")])
    with pytest.raises(
        ToMeError, match=r"2 vision transformers in a ModuleList: '0.vit', '1.vision_model'"
    ):
        apply_tome_vit(pair, r=1)
    from timm.models.vision_transformer import ParallelScalingBlock
    from vits import _timm

    with pytest.raises(ToMeError, match=r"blocks.0 is a ParallelScalingBlock"):
        apply_tome_vit(_timm(block_fn=ParallelScalingBlock), r=1)
    model, arguments = build("vit"), inputs("vit")
    handle = apply_tome_vit(model, r=2)
    mask = torch.ones(2, 37)
    mask[:, -5:] = 0
    with pytest.raises(ToMeError, match=r"vit.layers.0 was given an attention mask"):
        model.vit(**arguments, attention_mask=mask)
    model.vit.layers[0].attention.config._attn_implementation = "flex_attention"
    # The layer alone: transformers compiles a mask of it for the whole model.
    with pytest.raises(ToMeError, match=r"needs an additive mask.*'flex_attention'"):
        model.vit.layers[0](torch.randn(2, 37, 32))
    assert handle.active
    causal = build("timm")
    apply_tome_vit(causal, r=2)
    x = inputs("timm")["x"]
    with pytest.raises(ToMeError, match=r"blocks.0 was given an attention mask"):
        causal(x, attn_mask=torch.ones(37, 37, dtype=torch.bool))
    with pytest.raises(ToMeError, match=r"blocks.0 was given is_causal=True"):
        causal(x, is_causal=True)


def test_blocks_that_are_skipped_at_random_are_refused():
    model, arguments = build("whisper"), inputs("whisper")
    dense = result(model, arguments)
    handle = apply_tome_vit(model, r=3)
    model.encoder.layerdrop = 0.5
    result(model, arguments)  # none is skipped in eval mode
    model.train()
    with pytest.raises(ToMeError, match=r"skips blocks at random.*layerdrop=0.5.*r=0"):
        result(model, arguments)
    handle.r, model.encoder.layerdrop = 0, 0.0
    assert torch.equal(result(model, arguments), dense)


@pytest.fixture
def _compiler_anew(monkeypatch):
    """Two layers, since every one is traced, and Dynamo without memory: it gives up on a function
    that it has compiled eight times, for whatever model."""
    monkeypatch.setattr(vits, "LAYERS", 2)
    for sizes in (vits._SIZE, vits._IMAGE):
        monkeypatch.setitem(sizes, "num_hidden_layers", 2)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiler_anew")
@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name):
    model, arguments = build(name), inputs(name)
    dense = result(model, arguments)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    handle = apply_tome_vit(model, r=6, trace_source=True)
    merged = result(model, arguments)
    assert not torch.allclose(merged, dense, rtol=1e-3)
    size, source = handle.size.clone(), handle.source.clone()
    handle.size.zero_()
    handle.source.zero_()
    torch.testing.assert_close(result(compiled, arguments), merged, rtol=1e-4, atol=1e-4)
    assert torch.equal(handle.size, size) and torch.equal(handle.source, source)


@pytest.mark.slow
@pytest.mark.usefixtures("_compiler_anew")
@pytest.mark.parametrize("name", ["timm", "clip", "mmpretrain"])
def test_a_compiled_model_follows_its_handle(name):
    """One model of each library: what switches merging is the same code in all of them."""
    model, arguments = build(name), inputs(name)
    dense = result(model, arguments)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(result(compiled, arguments), dense, rtol=1e-4, atol=1e-4)
    handle = apply_tome_vit(model, r=6)
    merged = result(compiled, arguments)
    assert not torch.allclose(merged, dense, rtol=1e-3)
    with handle.disabled():
        torch.testing.assert_close(result(compiled, arguments), dense, rtol=1e-4, atol=1e-4)
    handle.r = 2
    assert not torch.allclose(result(compiled, arguments), merged, rtol=1e-3)
    handle.remove()
    torch.testing.assert_close(result(compiled, arguments), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("_compiler_anew")
def test_one_compiled_model_for_sizes_gradients_and_a_target():
    from vits import _timm

    torch.manual_seed(0)
    model = _timm(dynamic_img_size=True).eval()
    handle = apply_tome_vit(model, target_speedup=1.5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for side in (24, 32, 40, 24):
        x = torch.randn(2, 3, side, side)
        expected = model(x)
        tokens = handle.tokens
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        assert handle.tokens == tokens
    handle.r = 5
    with torch.enable_grad():
        gradients = []
        for call in (model, compiled):
            model.zero_grad()
            call(x).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
    for eager, graph in zip(*gradients):
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-4)


def test_importing_it_imports_neither_library():
    import subprocess

    code = (
        "import sys, mmagic_tome.vit; "
        "print([m for m in ('timm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
