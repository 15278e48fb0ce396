# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Proportional attention: keys weigh as much as the tokens that they represent."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from model_runs import AttentionCalls
from tiny import error, run, tiny_inputs, tiny_unet
from tiny_transformers import TRANSFORMERS
from tiny_unets import NETWORKS

from mmagic_tome import ToMeError, apply_tome
from mmagic_tome.merging import proportional
from mmagic_tome.patch import find_patch
from mmagic_tome.tome.state import TomePatch

TARGETS = pytest.mark.parametrize("target", ["attn", "attn_kv"])


@pytest.fixture
def unet():
    return tiny_unet(levels=2)


@TARGETS
def test_by_hand(unet, target):
    """softmax(Q K^T / sqrt(d) + log s) V, entry by entry and head by head."""
    apply_tome(unet, prop_attn=True, targets=[target])
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    context, seen = find_patch(unet, TomePatch).context, []
    plain = attn.forward

    def forward(hidden_states, **kwargs):
        out = plain(hidden_states, **kwargs)
        seen.append((hidden_states, kwargs, list(context.plans.values()), out))
        return out

    attn.forward = forward
    run(unet)
    ((x, kwargs, (plan,), out),) = seen
    assert plan.size.max() > plan.size.min()
    keys = x if target == "attn" else kwargs["encoder_hidden_states"]
    assert keys.shape[1] == plan.num_slots < 256
    q, k, v = (
        linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for linear, x in ((attn.to_q, x), (attn.to_k, keys), (attn.to_v, keys))
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + plan.size.log()[:, None, None]
    by_hand = attn.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, by_hand, rtol=1e-4, atol=1e-5)


def test_tokens_that_represent_as_many_need_no_weights(unet):
    """Of ToDo every key represents four: a constant that softmax does not see."""
    outputs = {}
    for method in ("tome", "todo"):
        for prop_attn in (False, True):
            with apply_tome(unet, method=method, targets=["attn"], prop_attn=prop_attn):
                outputs[method, prop_attn] = run(unet)
    assert error(outputs["todo", True], outputs["todo", False]) < 1e-5
    assert error(outputs["tome", True], outputs["tome", False]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(unet, dtype):
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_inputs().items()}
    apply_tome(unet.to(dtype), prop_attn=True)
    out = run(unet, **inputs)
    assert out.dtype == dtype and out.isfinite().all()


@pytest.fixture
def channels(monkeypatch):
    """Further channels in place of a mask, as on a GPU."""
    monkeypatch.setattr(proportional, "prefers_channels", lambda query: True)


@torch.no_grad()
@pytest.mark.parametrize("family", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_the_weights_are_those_of_the_image_in_every_transformer(family, monkeypatch):
    """Of all N + T tokens, text tokens have 1 / (N + T) of the weight each; and channels do what
    the mask does."""
    network, inputs = family.build(), family.inputs()
    for name, value in inputs.items():
        if "mask" in name:
            inputs[name] = torch.ones_like(value)
    text = "cap_feats" if "cap_feats" in inputs else "encoder_hidden_states"
    apply_tome(network, ratio=0.5, prop_attn=True)
    slots, firsts, outputs = family.tokens() // 2, [], []
    for change in (0, 1):
        if change and text in inputs:
            texts = inputs[text]
            inputs[text] = (
                [one + change for one in texts] if isinstance(texts, list) else texts + change
            )
        with AttentionCalls() as seen:
            outputs.append(as_tensor(network(**inputs, return_dict=False)[0]))
        # The blocks that a text passes before it meets the image have other keys.
        masked = ((key, mask) for _, key, _, mask in seen.calls if mask is not None)
        firsts.append(next(call for call in masked if call[0].shape[-2] >= slots))
    (key, mask), (other, _) = firsts
    of_text = (key != other).any(-1).any(1)
    counted = mask.float().softmax(-1)[:, 0, 0]
    tokens = key.shape[-2] + slots
    torch.testing.assert_close(
        counted[of_text], torch.full((int(of_text.sum()),), 1 / tokens), rtol=1e-5, atol=0
    )
    assert not of_text.all(1).any() and counted.max() > 1.5 / tokens
    monkeypatch.setattr(proportional, "prefers_channels", lambda query: True)
    with AttentionCalls() as seen:
        again = as_tensor(network(**inputs, return_dict=False)[0])
    torch.testing.assert_close(again, outputs[1], rtol=1e-4, atol=1e-4)
    masked = [mask for *_, mask in seen.calls if mask is not None]
    if not any("mask" in name for name in inputs):
        assert not masked and max(key.shape[-1] for _, key, *_ in seen.calls) == 16  # eight more


def as_tensor(output):
    return torch.stack(output) if isinstance(output, list) else output


# --- further channels -----------------------------------------------------------------------------


def attention(dtype, width=40, of_values=None, seed=0):
    """Queries, keys, values and sizes of keys."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, 3, n, d, generator=generator, dtype=torch.float64).to(dtype)
        for n, d in ((33, width), (17, width), (17, of_values or width))
    )
    return q, k, v, torch.randint(1, 60, (2, 17), generator=generator)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("width", "of_values"), [(40, 40), (64, 64), (7, 5), (22, 22), (64, 16)])
def test_channels_are_the_mask_with_gradients(width, of_values, scale):
    q, k, v, size = attention(torch.float64, width, of_values)
    log_size = proportional.log_sizes(size, q.dtype)
    found = []
    for channels in (True, False):
        inputs = [one.clone().requires_grad_() for one in (q, k, v)]
        if channels:
            out = proportional.attention_with_channels(*inputs, log_size, scale=scale)
        else:
            mask = log_size[:, None, None]
            out = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=scale)
        out.square().sum().backward()
        found.append([out, *(one.grad for one in inputs)])
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [40, 64, 80, 128])
def test_channels_lose_less_than_a_mask_in_half_precision(dtype, width):
    """The weights that attention gives to keys of equal scores: exactly their sizes."""
    _, k, v, size = attention(dtype, width)
    v = torch.eye(17, dtype=dtype).expand(2, 3, -1, -1)
    log_size = proportional.log_sizes(size, dtype)
    exact = (size / size.sum(1, keepdim=True))[:, None, None]
    q = torch.zeros_like(k)
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=log_size.to(dtype)[:, None, None])
    channels = proportional.attention_with_channels(q, k, v, log_size)
    worst = [((one / exact) - 1).abs().max().item() for one in (channels, masked)]
    assert worst[0] < torch.finfo(dtype).eps
    assert worst[0] < worst[1]


def test_a_gpu_in_half_precision_gets_channels(monkeypatch):
    def query(dtype=torch.bfloat16, width=64, device="cuda"):
        shape = torch.empty(1, 1, 1, width).shape
        return SimpleNamespace(
            device=torch.device(device), dtype=dtype, shape=shape, dim=lambda: len(shape)
        )

    for capability, expected in ((8, True), (9, True), (7, False)):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, c=capability: SimpleNamespace(major=c)
        )
        assert proportional.prefers_channels(query()) == expected
        assert not proportional.prefers_channels(query(torch.float32))
        assert not proportional.prefers_channels(query(width=256))
        assert not proportional.prefers_channels(query(device="cpu"))


def networks():
    """Name -> (network, inputs) of every way in which keys are weighed."""
    found = {"unet": (tiny_unet(levels=2), tiny_inputs())}
    for name in ("DiT", "Stable Diffusion 3", "Flux.1"):
        found[name] = TRANSFORMERS[name].build(), TRANSFORMERS[name].inputs()
    return found


WAYS = pytest.mark.parametrize("way", ["unet", "DiT", "Stable Diffusion 3", "Flux.1"])


@pytest.mark.slow
@WAYS
@torch.no_grad()
def test_compiles_as_one_graph_without_a_mask_and_leaves_nothing_behind(way, channels):
    torch._dynamo.reset()
    network, inputs = networks()[way]
    classes, before = [type(one) for one in network.modules()], network(**inputs)[0]
    handle = apply_tome(network, ratio=0.5, prop_attn=True)
    expected, masks = network(**inputs)[0], []
    assert not torch.equal(expected, before)

    def backend(graph, example_inputs):
        masks.extend(
            node.kwargs.get("attn_mask")
            for node in graph.graph.nodes
            if node.target is F.scaled_dot_product_attention
        )
        return graph.forward

    if way == "Flux.1":  # its grid cannot be read inside of a graph
        network.compile_repeated_blocks(fullgraph=True, backend=backend)
        model = network
    else:
        model = torch.compile(network, fullgraph=True, backend=backend)
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    assert masks and not any(masks)
    with handle.disabled():
        torch.testing.assert_close(network(**inputs)[0], before, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert [type(one) for one in network.modules()] == classes
    torch.testing.assert_close(network(**inputs)[0], before, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("processor", ["AttnProcessor", "SlicedAttnProcessor"])
def test_attention_that_is_written_out_adds_the_mask(unet, processor, channels):
    from diffusers.models import attention_processor

    apply_tome(unet, prop_attn=True)
    expected = run(unet)
    options = (2,) if processor.startswith("Sliced") else ()
    for module in unet.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(getattr(attention_processor, processor)(*options))
    torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-4)


def written_out(attn, hidden_states, encoder_hidden_states=None, **kwargs):
    """In place of a processor: attention that calls no function of torch's."""
    return hidden_states, encoder_hidden_states


def test_what_cannot_weigh_or_merge_keys_is_an_error():
    network, inputs = networks()["Stable Diffusion 3"]
    apply_tome(network, targets=["attn"], prop_attn=True)
    network.set_attn_processor(written_out)
    with pytest.raises(ToMeError, match=r"attn does not call .*cannot be weighed; use the model's"):
        network(**inputs)
    for options in (dict(prop_attn=True), dict(targets=["attn_kv"])):
        apply_tome(network, **options)
        with pytest.raises(ToMeError, match=r"attn_kv does not call .*write targets=\['attn'\]"):
            network(**inputs)
    with pytest.raises(ToMeError, match="no mask to weigh keys by; write prop_attn=False"):
        apply_tome(NETWORKS["Kandinsky 2.2: attention on the image itself"].build(), prop_attn=True)


def test_by_default_keys_and_values_are_merged_and_weighed_wherever_they_can_be(unet):
    with apply_tome(unet):
        default = run(unet)
    with apply_tome(unet, prop_attn=True, targets=["attn_kv"]):
        assert torch.equal(run(unet), default)
    with apply_tome(unet, prop_attn=False):
        unweighed = run(unet)
    with apply_tome(unet, prop_attn=False, targets=["attn"]):
        assert torch.equal(run(unet), unweighed)
    with apply_tome(unet, targets=["crossattn", "mlp"]) as handle:
        run(unet)
        assert "prop_attn" not in handle.description

    neither = NETWORKS["Kandinsky 2.2: attention on the image itself"]
    network, inputs = neither.build(), neither.inputs()
    with apply_tome(network, prop_attn=False, targets=["attn"]):
        plain = network(**inputs)[0]
    with apply_tome(network):
        assert torch.equal(network(**inputs)[0], plain)


@pytest.mark.parametrize(
    ("options", "said", "kept"),
    [
        (dict(targets=["attn"]), "keys are not weighed and merging loses more", 0.5),
        ({}, "keys and values stay unmerged; use the model's default attention", 1),
    ],
)
def test_attention_that_hides_its_keys_is_named_once(options, said, kept):
    network, inputs = networks()["Stable Diffusion 3"]
    handle = apply_tome(network, **options)
    network.set_attn_processor(written_out)
    with pytest.warns(UserWarning, match=said) as seen:
        network(**inputs)
        network(**inputs)
    assert len(seen) == 1
    assert {row["kept"] / row["tokens"] for row in handle.stats()} == {kept}


class Wrapper(torch.nn.Module):
    """In place of an attention, which it calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("targets", ["auto", ["attn"]], ids=str)
def test_attention_that_is_wrapped_later_merges_and_weighs_as_before(targets):
    network, inputs = networks()["Stable Diffusion 3"]
    baseline = network(**inputs)[0]
    handle = apply_tome(network, targets=targets)
    expected = network(**inputs)[0]
    for block in network.transformer_blocks:
        block.attn = Wrapper(block.attn)
    torch.testing.assert_close(network(**inputs)[0], expected)
    handle.remove()
    torch.testing.assert_close(network(**inputs)[0], baseline)


@torch.no_grad()
def test_others_may_wrap_the_function_of_attention(monkeypatch):
    network, inputs = networks()["Stable Diffusion 3"]
    apply_tome(network)
    expected, original = network(**inputs)[0], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **kwargs: original(*args, **kwargs)
    )
    torch.testing.assert_close(network(**inputs)[0], expected)


@torch.no_grad()
def test_attention_that_another_hook_skips_is_no_error():
    """As pyramid attention broadcast does."""
    network, inputs = networks()["Stable Diffusion 3"]
    handle = apply_tome(network, targets=["attn_kv"])
    network(**inputs)
    for block in network.transformer_blocks:
        block.attn.forward = written_out_of_block
    network(**inputs)
    assert {row["kept"] / row["tokens"] for row in handle.stats()} == {0.5}


def written_out_of_block(hidden_states, encoder_hidden_states=None, **kwargs):
    return hidden_states, encoder_hidden_states


@torch.no_grad()
@pytest.mark.parametrize("network", ["unet", "Stable Diffusion 3"])
def test_perturbed_attention_leaves_keys_alone(network):
    """Its processors run on a part of the batch."""
    from diffusers.models import attention_processor as processors

    network, inputs = networks()[network]
    if "sample" in inputs:
        processor = processors.PAGIdentitySelfAttnProcessor2_0()
        attentions = [one for one in network.attn_processors if "attn1" in one]
    else:
        processor = processors.PAGJointAttnProcessor2_0()
        attentions = list(network.attn_processors)
    network.set_attn_processor({**network.attn_processors, **dict.fromkeys(attentions, processor)})
    baseline = network(**inputs)[0]
    handle = apply_tome(network)
    with pytest.warns(UserWarning, match="part of the batch only .*do not merge; to merge queries"):
        assert torch.equal(network(**inputs)[0], baseline)
    assert {row["kept"] / row["tokens"] for row in handle.stats()} == {1}
    apply_tome(network, targets=["attn_kv"])
    with pytest.raises(ToMeError, match="the image's plan cannot merge"):
        network(**inputs)
    apply_tome(network, targets=["attn"])
    assert not torch.equal(network(**inputs)[0], baseline)
