# Where merging loses detail on the demo model, and what a residual recovers: one change at a time
# from ToMe at ratio 0.5 around the finest level's self-attention. One round of cost is enough for
# the operations of the levels.
#   python tools/evaluate.py configs/benchmarks/merging_demo.py --rounds 1
# The names are those of the published tables (docs/benchmarks/merging.md).
_base_ = "../demo/sd-emoji.py"

_targets = ("mlp", "crossattn", "block", "stack")
_quarters = [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]
_plain = {
    # Where: resolution levels, blocks of the finest level in running order.
    "downsample: 1": dict(ratio=dict(downsample={1: 0.5})),
    "downsample: 2": dict(ratio=dict(downsample={2: 0.5}), max_downsample=2),
    "downsample: 4": dict(ratio=dict(downsample={4: 0.5}), max_downsample=4),
    "downsample: 1, 2, 4": dict(ratio=0.5, max_downsample=4),
    "block: down": dict(ratio=dict(depth=[0.5, 0, 0])),
    "block: up, first": dict(ratio=dict(depth=[0, 0.5, 0])),
    "block: up, second": dict(ratio=dict(depth=[0, 0, 0.5])),
    # When: a quarter of the run at a time.
    **{
        f"timestep_range: {low:g} to {high:g}": dict(
            ratio=dict(base=0.5, timestep=dict(timestep_range=(low, high)))
        )
        for low, high in _quarters
    },
    # For how many steps a plan is reused.
    **{f"plan_interval: {k}": dict(ratio=0.5, plan_interval=k) for k in (2, 4, 8)},
    # What is added at steps that reuse a plan.
    "residual: plan_interval 2": dict(ratio=0.5, plan_interval=2, residual=True),
}
# Other rules for which tokens merge.
_methods = {
    **{
        f"method: {label}, {ratio:g}": dict(ratio=ratio, method=method)
        for label, method, ratio in [
            *[("ToMe", "tome", 0.25), ("ToFu", "tofu", 0.5), ("ToMA", "toma", 0.5)],
            *[("importance", "importance", 0.5), ("SiTo", "sito", 0.5)],
            *[("PiToMe", "pitome", 0.25), ("PiToMe", "pitome", 0.5)],
        ]
    },
    "method: PiToMe, 0.25, margin 0.75": dict(ratio=0.25, method=dict(type="pitome", margin=0.75)),
}
_weighted = {
    # Ratios per level of about as many operations.
    **{
        f"ratios: {one:g}, {two:g}, {four:g}": dict(
            ratio=dict(downsample={1: one, 2: two, 4: four}), max_downsample=4
        )
        for one, two, four in [
            *[(0.5, 0.25, 0.25), (0.5, 0.5, 0), (0.55, 0, 0), (0.45, 0.5, 0.5)],
            *[(0.55, 0.25, 0), (0.4, 0.6, 0.6), (0.25, 0.75, 0.75)],
        ]
    },
    **{
        f"residual: plan_interval {k}": dict(ratio=0.5, plan_interval=k, residual=True)
        for k in (3, 4, 8)
    },
    "share_plans: plan_interval 1": dict(ratio=0.5, share_plans=True),
    "share_plans: plan_interval 2": dict(ratio=0.5, plan_interval=2, share_plans=True),
}
_others = {
    **{f"targets: {target}": dict(ratio=0.5, targets=target) for target in _targets},
    # The same with a residual.
    **{
        f"targets, residual: {target}": dict(
            ratio=0.5, targets=target, plan_interval=2, residual=True
        )
        for target in _targets
    },
}

evaluation = dict(
    prompts="demo",
    limit=16,
    steps=16,
    guidance=3.0,
    batch_size=8,
    metrics=["psnr", "latent_error"],
    fewer_steps=[0.8, 0.5],
    methods=[
        *[
            dict(name=name, tome_cfg=options)
            for name, options in {**_plain, **_methods, **_others}.items()
        ],
        *[
            dict(name=f"{name}, prop_attn", tome_cfg=dict(**options, prop_attn=True))
            for name, options in {**_plain, **_methods, **_weighted}.items()
        ],
    ],
)
