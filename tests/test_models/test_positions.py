# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What follows the tokens of a transformer: rotary embeddings, masks and text."""

import pytest
import torch
from model_runs import difference, run
from test_transformers import every_target_of_every_family
from tiny_transformers import TEXT, TRANSFORMERS, image_ids

from mmagic_tome import ToMeError, apply_tome
from mmagic_tome.merging import MergePlan
from mmagic_tome.models import transformer
from mmagic_tome.models.flux import grid_of_ids
from mmagic_tome.tome.block import BlockPreHook

FLUX = TRANSFORMERS["Flux.1"]


def in_another_order(self, context, metric, *_):
    """In place of :meth:`BlockPreHook.compute`: nothing merges, the tokens change places."""
    batch, tokens = metric.shape[:2]
    generator = torch.Generator().manual_seed(tokens)
    order = [torch.randperm(tokens, generator=generator) for _ in range(batch)]
    return MergePlan(torch.stack(order), tokens)


@every_target_of_every_family
def test_another_order_of_the_tokens_changes_nothing(family, targets, monkeypatch):
    """Of the image's, in every entry of the batch another: positions and masks go with them."""
    network, inputs = family.build(), family.inputs((5, 5 if family.square else 6), batch=3)
    baseline = run(network, inputs)
    monkeypatch.setattr(BlockPreHook, "compute", in_another_order)
    apply_tome(network, ratio=0.5, targets=targets)
    torch.testing.assert_close(run(network, inputs), baseline, rtol=1e-3, atol=1e-4)
    # Where positions are not part of the tokens, leaving the table as it is shows.
    asked = []

    def left_as_it_is(part, plan):
        asked.append(part)
        return part

    monkeypatch.setattr(transformer, "_merged_rows", left_as_it_is)
    wrong = run(network, inputs)
    assert bool(asked) == (family.rotary and targets != ["mlp"])
    if asked:
        assert difference(wrong, baseline) > 1e-3


@pytest.mark.parametrize("batch", [1, 2])
def test_kept_tokens_keep_their_places(batch):
    """Attention receives the rows of the text, and 32 of the image's: none is an average."""
    network = FLUX.build()
    apply_tome(network, ratio=0.5, targets=["attn"])
    given = []

    def note(module, args, kwargs, output):
        given.append(kwargs.get("image_rotary_emb", output))

    for blocks in (network.transformer_blocks, network.single_transformer_blocks):
        blocks[0].attn.register_forward_hook(note, with_kwargs=True)
    network.pos_embed.register_forward_hook(note, with_kwargs=True)
    run(network, FLUX.inputs(batch=batch))
    table, *given = given
    table = torch.cat(table, dim=1)
    assert len(given) == 2
    for merged in given:
        for entry in range(batch):
            rows = torch.cat([rows_of(part, entry) for part in merged], dim=1)
            assert rows.shape[0] == TEXT + 32
            assert torch.equal(rows[:TEXT], table[:TEXT])
            same = (rows[TEXT:, None] == table[None, TEXT:]).all(dim=-1)
            assert (same.sum(dim=1) == 1).all() and same.any(dim=0).sum() == 32


def rows_of(table, entry):
    """Rows for one entry of the batch, read as attention does."""
    if isinstance(table, torch.Tensor):
        return table
    assert torch.equal(table[None, :, None, :], table.unsqueeze(1))
    with pytest.raises(ToMeError, match="indexes its rotary table by 0"):
        table[0]
    return table[None, :, None, :][entry, :, 0]


def test_the_grid_of_img_ids():
    for grid in ((8, 8), (3, 20), (1, 7), (7, 1), (600, 2)):
        ids = image_ids(*grid)
        assert grid_of_ids(ids) == grid_of_ids(ids.bfloat16()[None]) == grid
    with torch.inference_mode():
        assert grid_of_ids(image_ids(2, 3)) == (2, 3)
    ids = image_ids(4, 4)
    assert grid_of_ids(ids) == (4, 4)
    ids.copy_(image_ids(2, 8))
    assert grid_of_ids(ids) == (2, 8)  # cached by content, not by object alone
    image, other, crooked = (image_ids(4, 4) for _ in range(3))
    other[:, 0] += 1
    crooked[5, 2] += 1
    for wrong in (torch.cat([image, other]), torch.cat([image, image]), crooked, image[:-1]):
        with pytest.raises(ToMeError, match="not one image row by row"):
            grid_of_ids(wrong)
