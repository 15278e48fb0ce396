# What parts of the demo model to leave out at which steps, and how to foretell what they would
# have said: one change at a time (docs/research/foretold_steps.md).
#   python tools/evaluate.py configs/benchmarks/foretold_demo.py --cost-rounds 0
_base_ = "../demo/sd-emoji.py"

_all = (0.0, 1.0)
_tried = {
    "network again": dict(network=dict(steps=2, order=0, between=_all)),
    "network on the line": dict(network=dict(steps=2, between=_all)),
    "network on the line, noise 0.1 to 0.75": dict(network=dict(steps=2, between=(0.1, 0.75))),
    "network on the parabola": dict(network=dict(steps=2, between=_all, order=2)),
    "network every 3rd": dict(network=dict(steps=3, between=_all)),
    "inner levels again": dict(deep=dict(steps=2, order=0, between=_all)),
    "inner levels on the line": dict(deep=dict(steps=2, between=_all)),
    "inner levels every 3rd": dict(deep=dict(steps=3, between=_all)),
    "network, inner levels every 2nd of those": dict(
        network=2, deep=dict(steps=2, between=(0, 0.7))
    ),
    "network, inner levels every 2nd of those, no window": dict(
        network=2, deep=dict(steps=2, between=_all)
    ),
}
# With half or all of what was foretold wrongly made good at the next run.
_repaid = {
    "inner levels on the line": dict(deep=dict(steps=2, between=_all)),
    "inner levels every 3rd": dict(deep=dict(steps=3, between=_all)),
    "network on the line": dict(network=dict(steps=2, between=_all)),
    "network every 3rd": dict(network=dict(steps=3, between=_all)),
}

evaluation = dict(
    prompt_set="demo",
    limit=16,
    steps=20,
    guidance=3.0,
    batch_size=8,
    metrics=["psnr", "latent_error"],
    presets=["quality", "balanced", "fast"],
    fewer_steps=[0.8, 0.65, 0.5],
    contenders=[
        *[
            dict(name=name, tome_cfg=dict(ratio=0, reuse=options))
            for name, options in _tried.items()
        ],
        *[
            dict(
                name=f"{name}, repay {repay:g}",
                tome_cfg=dict(
                    ratio=0,
                    reuse={part: dict(**scope, repay=repay) for part, scope in options.items()},
                ),
            )
            for name, options in _repaid.items()
            for repay in (0.5, 1.0)
        ],
        # Presets without it.
        *[
            dict(
                name=f"{name}, repay 0",
                tome_cfg=dict(preset=name, reuse={part: dict(repay=0.0) for part in parts}),
            )
            for name, parts in (
                ("quality", ("deep",)),
                ("balanced", ("network", "deep")),
                ("fast", ("network", "deep")),
            )
        ],
        # In place of parts: every transformer stack.
        dict(
            name="all stacks on the line",
            tome_cfg=dict(
                sites="stack",
                max_downsample=4,
                refresh=dict(steps=2, warmup=2),
                residual=dict(kind="reuse", order=1),
            ),
        ),
    ],
)
