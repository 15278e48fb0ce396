# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import copy
import io
import pickle
import threading

import pytest
import torch
from tiny import tiny_inputs, tiny_unet
from torch import nn

from mmagic_tome import ToMeConfig, ToMeError, apply_tome, get_handle, remove_tome
from mmagic_tome.apply import MergeState

EVERYTHING = dict(max_downsample=8, merge_attn=True, merge_crossattn=True, merge_mlp=True)


@pytest.fixture(scope="module")
def original():
    return tiny_unet(levels=3)


@pytest.fixture
def unet(original):
    return copy.deepcopy(original)


@torch.no_grad()
def run(unet, **changes):
    return unet(**{**tiny_inputs(), **changes}).sample


class Seen:
    """What the modules inside the blocks were really given."""

    def __init__(self, unet, suffix):
        self.tokens = []
        for name, module in unet.named_modules():
            if name.endswith(suffix):
                module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.tokens.append((args[0] if args else kwargs["hidden_states"]).shape[1])


def test_the_dense_unet_is_not_trivial(unet):
    # Everything below compares outputs; zeros would make all of it true.
    out = run(unet)
    assert out.std() > 0.1
    assert (run(unet, timestep=torch.tensor(1)) - out).abs().max() > 1e-3


def test_tokens_fall_and_the_output_changes_a_little(unet):
    dense = run(unet)
    with apply_tome(unet, ratio=0.5) as handle:
        seen = Seen(unet, "attn1.to_q")
        merged = run(unet)
        assert seen.tokens.count(128) == 3 and 256 not in seen.tokens
        assert {row["kept"] for row in handle.stats()} == {128}
    difference = (merged - dense).pow(2).mean().sqrt() / dense.std()
    assert 1e-3 < difference < 0.6


def test_each_kind_of_site_merges_what_it_says(unet):
    inner = {"attn": "attn1.to_q", "crossattn": "attn2.to_q", "mlp": "ff.net.0.proj"}
    flags = {"attn": "merge_attn", "crossattn": "merge_crossattn", "mlp": "merge_mlp"}
    for kind in inner:
        network = copy.deepcopy(unet)
        seen = {other: Seen(network, suffix) for other, suffix in inner.items()}
        options = dict.fromkeys(flags.values(), False)
        options[flags[kind]] = True
        apply_tome(network, ratio=0.25, max_downsample=4, **options)
        run(network)
        for other in inner:
            whole = {256, 64, 16}
            assert set(seen[other].tokens) == ({192, 48, 12} if other == kind else whole)


def test_equals_tomesd_on_the_same_layout(unet):
    import tomesd

    options = dict(use_rand=False, **EVERYTHING)
    inputs = tiny_inputs()
    with torch.no_grad(), apply_tome(unet, ratio=0.5, exact_matching=True, **options):
        ours = unet(**inputs).sample
    tomesd.apply_patch(unet, ratio=0.5, **options)
    with torch.no_grad():  # tomesd needs the sample as a positional argument
        theirs = unet(inputs.pop("sample"), **inputs).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_ratio_zero_and_removal_are_bit_exact(unet, options):
    dense = run(unet)
    handle = apply_tome(unet, ratio=0, **options)
    assert torch.equal(run(unet), dense)
    handle.ratio = 0.5
    assert not torch.equal(run(unet), dense)
    handle.ratio = 0
    assert torch.equal(run(unet), dense)
    handle.ratio = 0.5
    handle.remove()
    assert torch.equal(run(unet), dense)
    assert not handle.active and get_handle(unet) is None
    handle.remove()  # a second time is harmless


def hooks_of(module):
    return [
        hook
        for m in module.modules()
        for table in (m._forward_hooks, m._forward_pre_hooks)
        for hook in table.values()
    ]


def test_nothing_but_hooks_is_added_and_none_is_left(unet):
    keys, classes = list(unet.state_dict()), [type(m) for m in unet.modules()]
    attributes = [set(vars(m)) for m in unet.modules()]
    apply_tome(unet, **EVERYTHING)
    run(unet)
    assert list(unet.state_dict()) == keys
    assert [type(m) for m in unet.modules()] == classes
    assert [set(vars(m)) for m in unet.modules()] == attributes
    assert hooks_of(unet)
    assert remove_tome(unet) and not hooks_of(unet)
    assert not remove_tome(unet)
    for module in unet.modules():
        assert not module._forward_hooks_with_kwargs and not module._forward_pre_hooks_with_kwargs


def test_hooks_of_others_stay(unet):
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    apply_tome(unet).remove()
    run(unet)
    assert calls == [1]


def test_applying_twice_replaces(unet):
    first = apply_tome(unet, ratio=0.25)
    second = apply_tome(unet, ratio=0.5)
    assert not first.active and second.active
    run(unet)
    assert {row["kept"] for row in second.stats()} == {128}
    first.remove()  # must not touch the second
    assert get_handle(unet).ratio == 0.5


def test_a_failed_apply_leaves_what_was_there(unet):
    apply_tome(unet, ratio=0.25)
    for options in (dict(ratio=0.9), dict(ratio=0.5, foo=1)):
        with pytest.raises(ToMeError):
            apply_tome(unet, **options)
        assert get_handle(unet).ratio == 0.25


def test_same_seed_same_output_and_untouched_rng(unet):
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    state = torch.random.get_rng_state()
    first = run(unet)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(3)
    run(unet, timestep=torch.tensor(20))
    assert torch.equal(run(unet), first)
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    assert torch.equal(run(unet), first)
    apply_tome(unet, ratio=0.5, seed=1, **EVERYTHING)
    assert not torch.equal(run(unet), first)


def test_destinations_change_with_step_and_block(unet, monkeypatch):
    layouts = []
    layout = MergeState.layout

    def watched(self, height, width, block, device):
        out = layout(self, height, width, block, device)
        layouts.append((block.name, out[0].clone()))
        return out

    monkeypatch.setattr(MergeState, "layout", watched)
    apply_tome(unet, ratio=0.5)
    run(unet, timestep=torch.tensor(10))
    run(unet, timestep=torch.tensor(11))
    assert len(layouts) == 6
    for i, (_, a) in enumerate(layouts):
        for _, b in layouts[:i]:
            assert not torch.equal(a, b)


@pytest.mark.parametrize("batch", [2, 3])
def test_conditional_and_unconditional_halves_share_one_layout(unet, batch):
    # The same picture in every row: with one layout for the batch all rows stay equal,
    # in tomesd an odd batch has to fall back to regular destinations.
    inputs = tiny_inputs(batch=1)
    inputs["sample"] = inputs["sample"].repeat(batch, 1, 1, 1)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].repeat(batch, 1, 1)
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    out = run(unet, **inputs)
    for row in out[1:]:
        torch.testing.assert_close(row, out[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])]
)
def test_timestep_in_any_form(unet, timestep):
    apply_tome(unet, ratio=0.5)
    expected = run(unet, timestep=torch.tensor(7))
    torch.testing.assert_close(run(unet, timestep=timestep), expected)


def test_positional_keyword_and_tuple_calls(unet):
    apply_tome(unet, ratio=0.5)
    inputs = tiny_inputs()
    with torch.no_grad():
        expected = unet(**inputs).sample
        args = inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]
        assert torch.equal(unet(*args).sample, expected)
        assert torch.equal(unet(*args, return_dict=False)[0], expected)


@pytest.mark.parametrize("size", [(32, 32), (12, 20), (8, 40), (20, 12)])
def test_sizes_change_between_calls(unet, size):
    handle = apply_tome(unet, ratio=0.5, **EVERYTHING)
    for current in ((16, 16), size, (16, 16)):
        out = run(unet, **tiny_inputs(size=current))
        assert out.isfinite().all() and out.shape[-2:] == current
        tokens = {row["downsample"]: row["tokens"] for row in handle.stats()}
        assert tokens[1] == current[0] * current[1]


@pytest.mark.parametrize("size", [(17, 90), (33, 31), (7, 5)])
def test_odd_grids(size):
    # One level without down-sampling, since diffusers wants multiples of its factor.
    network = tiny_unet(levels=1)
    handle = apply_tome(network, ratio=0.5)
    inputs = tiny_inputs(size=size)
    assert run(network, **inputs).isfinite().all()
    tokens = size[0] * size[1]
    assert {row["kept"] for row in handle.stats()} == {tokens - tokens // 2}


def test_grid_without_a_complete_cell_stays_dense():
    network = tiny_unet(levels=1)
    inputs = tiny_inputs(size=(1, 9))
    dense = run(network, **inputs)
    handle = apply_tome(network, ratio=0.5)
    assert torch.equal(run(network, **inputs), dense)
    assert {(row["tokens"], row["kept"]) for row in handle.stats()} == {(9, 9)}


def test_deepcopy_is_independent(unet):
    handle = apply_tome(unet, ratio=0.5)
    expected = run(unet)
    clone = copy.deepcopy(unet)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(run(clone), expected)
    run(clone)
    assert get_handle(clone).stats()[0]["calls"] == handle.stats()[0]["calls"] + 2
    get_handle(clone).ratio = 0
    assert handle.ratio == 0.5 and torch.equal(run(unet), expected)
    assert remove_tome(clone) and not hooks_of(clone)
    assert handle.active and torch.equal(run(unet), expected)


def test_pickle_and_torch_save(unet):
    dense = run(unet)
    apply_tome(unet, ratio=0.5)
    expected = run(unet)
    buffer = io.BytesIO()
    torch.save(unet, buffer)
    buffer.seek(0)
    for copied in (
        pickle.loads(pickle.dumps(unet)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(run(copied), expected)
        assert get_handle(copied).ratio == 0.5
        assert remove_tome(copied) and torch.equal(run(copied), dense)


def test_state_dict_loads_into_a_patched_model(unet, original):
    apply_tome(unet, ratio=0.5)
    unet.load_state_dict(original.state_dict(), strict=True)
    assert run(unet).isfinite().all()


def test_wrappers_are_looked_through(unet):
    class Pipeline:
        def __init__(self, unet):
            self.unet = unet

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    for model in (Pipeline(unet), Wrapper(unet), Pipeline(Wrapper(unet))):
        handle = apply_tome(model, ratio=0.5)
        assert handle.network is unet
        assert get_handle(model).ratio == 0.5
        assert remove_tome(model)


def test_compiled_wrapper_is_looked_through(unet):
    assert apply_tome(torch.compile(unet, backend="eager")).network is unet


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "stable-diffusion", None, 3])
def test_unknown_models_get_an_error_that_names_them(model):
    with pytest.raises(ToMeError, match=f"found no supported network in a {type(model).__name__}"):
        apply_tome(model)
    assert get_handle(model) is None and remove_tome(model) is False


def test_max_downsample_auto_is_the_finest_level_with_blocks():
    network = tiny_unet(
        levels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # like SDXL: no attention at the finest level
    handle = apply_tome(network, ratio=0.5)
    assert {row["downsample"] for row in handle.stats()} == {2}
    run(network)
    assert {(row["tokens"], row["kept"]) for row in handle.stats()} == {(64, 32)}
    with pytest.raises(ToMeError) as error:
        apply_tome(network, max_downsample=1)
    for text in ("max_downsample=1", "2 (3 blocks)", "4 (", "Write max_downsample=2 or 'auto'"):
        assert text in str(error.value)


def test_no_site_of_the_wanted_kind():
    network = tiny_unet(
        levels=2, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    network.mid_block = None
    with pytest.raises(ToMeError, match="no transformer block") as error:
        apply_tome(network)
    for text in ("UNet2DConditionModel", "whatever has down_blocks", "docs/adding_a_model.md"):
        assert text in str(error.value)
    network = tiny_unet(levels=1)
    for block in network.modules():
        if hasattr(block, "attn2"):
            block.attn2 = None
    with pytest.raises(ToMeError, match=r"of kind crossattn, .* have attn, attn_kv, mlp"):
        apply_tome(network, sites=["crossattn"])


def test_exception_in_mid_forward_leaves_the_model_usable(unet):
    apply_tome(unet, ratio=0.5)
    expected = run(unet)
    block = unet.up_blocks[-1]

    def fail(*_):
        raise RuntimeError("out of memory, say")

    hook = block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(unet, **tiny_inputs(size=32))
    hook.remove()
    assert torch.equal(run(unet), expected)


def test_exception_inside_with_removes(unet):
    with pytest.raises(KeyError), apply_tome(unet):
        raise KeyError
    assert get_handle(unet) is None


def test_nested_with_puts_the_outer_one_back(unet):
    dense = run(unet)
    with apply_tome(unet, ratio=0.25) as outer:
        expected = run(unet)
        with apply_tome(unet, ratio=0.5) as middle:
            halved = run(unet)
            with pytest.raises(KeyError), apply_tome(unet, ratio=0.75) as inner:
                assert not outer.active and not middle.active
                raise KeyError
            assert middle.active and not inner.active
            assert get_handle(unet).ratio == 0.5 and torch.equal(run(unet), halved)
        assert outer.active and get_handle(unet).ratio == 0.25
        outer.reset()
        assert torch.equal(run(unet), expected)
        assert {(row["kept"], row["calls"]) for row in outer.stats()} == {(192, 1)}
    assert torch.equal(run(unet), dense) and not hooks_of(unet)


def test_with_puts_back_what_was_applied_for_good_also_in_a_copy(unet):
    apply_tome(unet, ratio=0.25)
    expected = run(unet)
    for network in (unet, pickle.loads(pickle.dumps(unet)), copy.deepcopy(unet)):
        count = len(hooks_of(network))
        with apply_tome(network, ratio=0.5):
            assert not torch.equal(run(network), expected)
        assert torch.equal(run(network), expected) and len(hooks_of(network)) == count
        remove_tome(network)
        assert not hooks_of(network)


def test_with_leaves_alone_what_replaced_it_inside(unet):
    with apply_tome(unet, ratio=0.25):
        with apply_tome(unet, ratio=0.5):
            last = apply_tome(unet, ratio=0.75)
        assert last.active and get_handle(unet).ratio == 0.75
    assert last.active
    with apply_tome(unet, ratio=0.5):
        remove_tome(unet)
    assert get_handle(unet) is None


def test_two_models_in_two_threads(unet):
    networks = [unet, copy.deepcopy(unet)]
    apply_tome(networks[0], ratio=0.25)
    apply_tome(networks[1], ratio=0.5)
    expected = [run(network) for network in networks]
    wrong = []

    def work(index):
        for _ in range(5):
            if not torch.equal(run(networks[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_chunked_feed_forward_with_merge_mlp_is_refused(unet):
    for block in unet.modules():
        if hasattr(block, "set_chunk_feed_forward"):
            block.set_chunk_feed_forward(16, dim=1)
    run(unet)
    apply_tome(unet, merge_mlp=True)
    with pytest.raises(ToMeError, match="merge_mlp=False"):
        run(unet)
    apply_tome(unet, merge_mlp=False)
    assert run(unet).isfinite().all()


def test_a_handle_that_was_replaced_changes_nothing_and_says_so(unet):
    old = apply_tome(unet, ratio=0.25)
    new = apply_tome(unet, ratio=0.5)
    with pytest.raises(ToMeError, match="removed or replaced"):
        old.ratio = 0.1
    new.ratio = 0.1
    assert get_handle(unet).ratio == 0.1


def test_attention_mask_over_image_tokens_is_refused(unet):
    apply_tome(unet)
    with pytest.raises(ToMeError, match="attention_mask"):
        run(unet, attention_mask=torch.ones(2, 256))


def test_stats_count_and_reset(unet):
    handle = apply_tome(unet, ratio=0.5, merge_mlp=True)
    assert all(row["tokens"] is None and row["calls"] == 0 for row in handle.stats())
    run(unet)
    run(unet)
    rows = handle.stats()
    assert [row["kind"] for row in rows] == ["attn", "mlp"] * 3
    # Two sites of a block share one plan.
    assert all(row["calls"] == 2 and row["plans"] == 2 for row in rows)
    assert all((row["tokens"], row["kept"]) == (256, 128) for row in rows)
    assert set(rows[0]) == {
        *("site", "block", "kind", "downsample", "tokens", "kept"),
        *("calls", "dense_calls", "plans"),
    }
    handle.reset()
    assert all(row["tokens"] is None and row["plans"] == 0 for row in handle.stats())


def test_summary_reads(unet):
    handle = apply_tome(unet, ratio=0.5)
    assert "not run yet" in handle.summary()
    run(unet)
    text = handle.summary()
    assert "ratio 0.5" in text and "256   128      50%" in text
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn" in text
    handle.remove()
    assert "(removed)" in handle.summary() and "removed" in repr(handle)


def test_config_object_and_bad_ratio_assignment(unet):
    handle = apply_tome(unet, ToMeConfig(ratio=0.25, seed=3), ratio=0.5)
    assert handle.config == ToMeConfig(ratio=0.5, seed=3)
    with pytest.raises(ToMeError, match="ceiling"):
        handle.ratio = 0.9
    assert handle.ratio == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(unet, dtype):
    unet.to(dtype)
    inputs = tiny_inputs()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    dense = run(unet, **inputs)
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    out = run(unet, **inputs)
    assert out.dtype == dtype and out.isfinite().all() and not torch.equal(out, dense)


def test_autocast(unet):
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(unet).isfinite().all()


def test_gradients_reach_every_parameter(unet):
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    unet(**tiny_inputs()).sample.square().mean().backward()
    missing = [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def assert_checkpointing_keeps_gradients(unet, loss):
    """Gradients of ``loss()`` with gradient checkpointing on equal those with it off."""
    unet.train()

    def gradients():
        unet.zero_grad()
        loss().backward()
        return [p.grad.clone() for p in unet.parameters()]

    expected = gradients()
    unet.enable_gradient_checkpointing()
    for a, b in zip(gradients(), expected):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing_gives_the_same_gradients(unet):
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    assert_checkpointing_keeps_gradients(unet, lambda: unet(**tiny_inputs()).sample.square().mean())


def test_checkpointing_with_several_forwards_before_the_backward(unet):
    # The blocks are called again when the network has gone on to another step and size.
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    calls = [
        dict(timestep=torch.tensor(900)),
        dict(timestep=torch.tensor(100)),
        tiny_inputs(size=8),
    ]

    def loss():
        losses = [unet(**{**tiny_inputs(), **call}).sample.square().mean() for call in calls]
        run(unet)  # a validation in between
        return sum(losses)

    assert_checkpointing_keeps_gradients(unet, loss)


def test_reentrant_checkpointing_is_refused(unet):
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    apply_tome(unet, ratio=0.5)
    unet.train()
    unet.enable_gradient_checkpointing()
    for module in unet.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)
    with pytest.raises(ToMeError, match="use_reentrant=False"):
        unet(**tiny_inputs()).sample.square().mean().backward()


def test_saved_plans_live_as_long_as_the_graph(unet):
    apply_tome(unet, ratio=0.5)
    blocks = get_handle(unet)._state.blocks
    run(unet)
    assert not any(len(block.saved) for block in blocks)
    out = unet(**tiny_inputs()).sample
    assert all(len(block.saved) == 1 for block in blocks)
    del out
    assert not any(len(block.saved) for block in blocks)


def test_nothing_of_a_forward_is_kept(unet):
    apply_tome(unet, ratio=0.5)
    run(unet)
    forward = get_handle(unet)._state.forward
    assert not forward.running and forward.step is None
    assert forward.plan is None and forward.grid is None and not forward.layouts


def test_one_network_in_two_threads(unet):
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    calls = [tiny_inputs(size=16), {**tiny_inputs(size=24), "timestep": torch.tensor(3)}]
    expected = [run(unet, **call) for call in calls]
    wrong = []

    def work(index):
        for _ in range(8):
            try:
                if not torch.equal(run(unet, **calls[index]), expected[index]):
                    wrong.append(index)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.reset()


@pytest.fixture
def small():
    """One level: tracing is what takes the time in the tests below."""
    return tiny_unet(levels=1)


def test_apply_and_remove_after_compiling(small, compiler):
    unet = small
    dense = run(unet)
    compiled = compiler(unet)
    assert torch.equal(run(compiled), dense)
    handle = apply_tome(compiled, ratio=0.5)
    merged = run(unet)
    assert not torch.equal(merged, dense)
    assert torch.equal(run(compiled), merged)
    handle.remove()
    assert torch.equal(run(compiled), dense)
    handle = apply_tome(compiled, ratio=0.5)
    assert torch.equal(run(compiled), merged)
    handle.ratio = 0
    assert torch.equal(run(compiled), dense)


def test_a_compiled_dense_copy_does_not_serve_the_merged_one(small, compiler):
    unet = small
    clone = copy.deepcopy(unet)
    dense = run(unet)
    apply_tome(clone, ratio=0.5)
    merged = run(clone)
    assert torch.equal(run(compiler(unet)), dense)
    assert torch.equal(run(compiler(clone)), merged)
    assert torch.equal(run(compiler(unet)), dense)


def test_blocks_compiled_on_their_own(small, compiler):
    unet = small
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    expected = run(unet)
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(run(unet), expected)


def test_one_graph_without_breaks(unet):
    apply_tome(unet, ratio=0.5, **EVERYTHING)
    expected = run(unet)
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(unet, fullgraph=True, backend=count)
    for step in (500, 499, 498, 500):
        out = run(compiled, timestep=torch.tensor(step))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 2
    assert {row["kept"] for row in get_handle(compiled).stats()} == {128, 32, 8}
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "held_at_ff"),
    [({}, False), (dict(merge_mlp=True), True), (dict(refresh=2, residual="own"), False)],
)
def test_plans_are_freed_before_the_feed_forward(unet, options, held_at_ff):
    handle = apply_tome(unet, **options)
    held = []
    for name, module in unet.named_modules():
        if name.endswith("0.ff.net"):
            module[0].register_forward_pre_hook(
                lambda *_: held.append(bool(handle._state.forward.plans))
            )
    run(unet)
    assert set(held[:1]) == {held_at_ff}


def test_peak_memory_is_never_above_dense():
    """To within the byte per cell that says where destinations are."""
    from mmagic_tome.meters import peak_memory

    unet = tiny_unet(levels=2, block_out_channels=(64, 64), norm_num_groups=8)
    inputs = tiny_inputs(size=32)

    @torch.no_grad()
    def peak():
        return peak_memory(lambda: unet(**inputs).sample, "cpu")[0]

    dense = peak()
    blocks, cells = 3, 16 * 16
    for options in ({}, dict(merge_mlp=True), dict(sites="block"), dict(use_rand=False)):
        with apply_tome(unet, ratio=0.5, **options):
            assert peak() <= dense + blocks * cells + 64, options
