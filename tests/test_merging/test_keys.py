# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Keys and values that merge in the call of attention."""

import pytest
import torch
import torch.nn.functional as F

from mmagic_tome.merging import MergePlan
from mmagic_tome.merging.keys import AttentionKeys, merge_heads
from mmagic_tome.merging.proportional import log_sizes

B, H, N, M, TEXT, WIDTH = 2, 3, 24, 10, 5, 8


@pytest.fixture
def plan():
    """Every slot is used, the others anywhere, in both entries differently."""
    generator = torch.Generator().manual_seed(0)
    rest = torch.randint(M, (B, N - M), generator=generator)
    return MergePlan(torch.cat([torch.arange(M).expand(B, -1), rest], dim=1), M)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    shape = 3, B, H, TEXT + N, WIDTH
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def by_hand(plan, query, key, value, image_first, mask=None):
    """Per image and head: averages of the image's keys and values, scores plus log of the sizes."""
    image = slice(0, N) if image_first else slice(TEXT, None)
    text = slice(N, None) if image_first else slice(0, TEXT)
    out = torch.empty_like(query)
    for b in range(B):
        groups = [plan.slot[b] == slot for slot in range(M)]
        sizes = torch.tensor([int(group.sum()) for group in groups], dtype=torch.float64)
        for h in range(H):
            keys, values = (
                torch.stack([x[b, h, image][group].mean(0) for group in groups])
                for x in (key, value)
            )
            scores = (
                torch.cat([query[b, h] @ keys.T, query[b, h] @ key[b, h, text].T], dim=1)
                / WIDTH**0.5
            )
            scores[:, :M] += sizes.log()
            if mask is not None:
                scores[:, M:] += mask[b]
            out[b, h] = scores.softmax(-1) @ torch.cat([values, value[b, h, text]])
    return out


def attention(plan, inputs, image_last, **options):
    keys = AttentionKeys(image_last)
    with keys:
        keys.plan, keys.log_size = plan, log_sizes(plan.size, torch.float64)
        first = F.scaled_dot_product_attention(*inputs, **options)
        assert keys.plan is None and keys.log_size is None
        # A second call, as of an image prompt's tokens, is as usual.
        assert torch.equal(
            F.scaled_dot_product_attention(*inputs),
            torch.ops.aten.scaled_dot_product_attention(*inputs),
        )
    return first


@pytest.mark.parametrize("image_last", [False, True])
def test_by_hand(plan, inputs, image_last):
    expected = by_hand(plan, *inputs, image_first=not image_last)
    torch.testing.assert_close(attention(plan, inputs, image_last), expected)


@pytest.mark.parametrize("shape", [(B, 1, 1, N + TEXT), (B, 1, N + TEXT, N + TEXT)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_the_text_stays_with_the_text(plan, inputs, shape, kind):
    seen = torch.ones(shape, dtype=torch.bool)
    seen[0, ..., N + 2 :] = False  # the first image's text is shorter
    added = torch.zeros(B, TEXT, dtype=torch.float64)
    added[0, 2:] = -torch.inf
    mask = seen if kind == "bool" else torch.where(seen, 0.0, -torch.inf).double()
    expected = by_hand(plan, *inputs, image_first=True, mask=added)
    torch.testing.assert_close(attention(plan, inputs, False, attn_mask=mask), expected)


def test_a_mask_without_a_batch_and_one_that_all_keys_share(plan, inputs):
    bias = torch.randn(N + TEXT, N + TEXT, dtype=torch.float64)
    expected = attention(plan, inputs, False, attn_mask=bias.expand(B, H, -1, -1))
    torch.testing.assert_close(attention(plan, inputs, False, attn_mask=bias), expected)
    same = torch.ones(B, 1, N + TEXT, 1, dtype=torch.bool)
    expected = attention(plan, inputs, False)
    torch.testing.assert_close(attention(plan, inputs, False, attn_mask=same), expected)


def test_fewer_heads_of_keys_than_of_queries(plan, inputs):
    query, key, value = inputs
    few = key[:, :1], value[:, :1]
    found = attention(plan, (query, *few), False, enable_gqa=True)
    torch.testing.assert_close(
        found, attention(plan, (query, *(x.expand(-1, H, -1, -1) for x in few)), False)
    )


def test_gradients(plan, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: attention(plan, x, True), inputs, fast_mode=True)


def test_heads_stay_apart(plan, inputs):
    key = inputs[1][:, :, :N]
    merged = merge_heads(plan, key)
    for head in range(H):
        torch.testing.assert_close(merged[:, head], plan.merge(key[:, head]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: [one[:1] for one in x], r"keys \(1, 3, 29, 8\)"),
        (
            lambda x: [one[:, :, : N - 1] for one in x],
            r"plan for 2 x 24 tokens.*targets=\['attn'\]",
        ),
        (lambda x: [one[:, 0] for one in x], r"keys \(2, 29, 8\)"),
    ],
)
def test_keys_that_do_not_fit(plan, inputs, change, said):
    with pytest.raises(ValueError, match=said):
        attention(plan, change(inputs), False)
    with pytest.raises(ValueError, match="causal attention"):
        attention(plan, inputs, False, is_causal=True)
