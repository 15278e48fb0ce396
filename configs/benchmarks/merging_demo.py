# Where merging loses detail on the demo model, and what a residual brings back: one change at a
# time from ToMe at ratio 0.5 around the finest level's self-attention. One round of cost is
# enough for the operations of the levels.
#   python tools/evaluate.py configs/benchmarks/merging_demo.py --cost-rounds 1
#   python benchmarks/merging.py outputs/evaluate/merging_demo --plot FILE
_base_ = "../demo/sd-emoji.py"

_sites = {"feed-forward": "mlp", "cross-attention": "crossattn", "block": "block", "stack": "stack"}
_quarters = [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]
_plain = {
    # Where: levels, blocks of the finest level in running order, sites.
    "level: 1": dict(ratio=dict(level={1: 0.5})),
    "level: 2": dict(ratio=dict(level={2: 0.5}), max_downsample=2),
    "level: 4": dict(ratio=dict(level={4: 0.5}), max_downsample=4),
    "level: all": dict(ratio=0.5, max_downsample=4),
    "block: down": dict(ratio=dict(depth=[0.5, 0, 0])),
    "block: up, first": dict(ratio=dict(depth=[0, 0.5, 0])),
    "block: up, second": dict(ratio=dict(depth=[0, 0, 0.5])),
    # When: a quarter of the noise at a time.
    **{
        f"noise: {low:g} to {high:g}": dict(ratio=dict(base=0.5, noise=dict(between=(low, high))))
        for low, high in _quarters
    },
    # For how long a plan serves.
    **{f"plans for: {k}": dict(ratio=0.5, refresh=k) for k in (2, 4, 8)},
    # What is added between refreshes.
    "residual: own": dict(ratio=0.5, refresh=2, residual="own"),
    "residual: exact": dict(ratio=0.5, refresh=2, residual="exact"),
    "residual: exact, on the line": dict(
        ratio=0.5, refresh=dict(steps=2, warmup=2), residual=dict(kind="exact", order=1)
    ),
    "residual: exact, on the parabola": dict(
        ratio=0.5, refresh=dict(steps=2, warmup=3), residual=dict(kind="exact", order=2)
    ),
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
            ratio=dict(level={1: one, 2: two, 4: four}), max_downsample=4
        )
        for one, two, four in [
            *[(0.5, 0.25, 0.25), (0.5, 0.5, 0), (0.55, 0, 0), (0.45, 0.5, 0.5)],
            *[(0.55, 0.25, 0), (0.4, 0.6, 0.6), (0.25, 0.75, 0.75)],
        ]
    },
    **{
        f"gain of exact: {gain:g}": dict(
            ratio=0.5, refresh=2, residual=dict(kind="exact", gain=gain)
        )
        for gain in (0.5, 0.8)
    },
    **{f"exact every: {k}": dict(ratio=0.5, refresh=k, residual="exact") for k in (3, 4, 8)},
    **{
        f"exact, in turn, every: {k}": dict(
            ratio=0.5, refresh=dict(steps=k, stagger=True), residual="exact"
        )
        for k in (2, 3, 4, 8)
    },
    "plans of a level for: 1": dict(ratio=0.5, refresh=dict(share="level")),
    "plans of a level for: 2": dict(ratio=0.5, refresh=dict(steps=2, share="level")),
}
_others = {
    **{f"site: {name}": dict(ratio=0.5, sites=site) for name, site in _sites.items()},
    # The same with what merging lost there two steps before.
    **{
        f"site, residual {residual}: {name}": dict(
            ratio=0.5, sites=site, refresh=2, residual=residual
        )
        for name, site in _sites.items()
        for residual in ("own", "exact")
    },
    "reuse: last output": dict(ratio=0.5, refresh=2, residual="reuse"),
    "reuse: on the line": dict(
        ratio=0.5, refresh=dict(steps=2, warmup=2), residual=dict(kind="reuse", order=1)
    ),
}

evaluation = dict(
    prompt_set="demo",
    limit=16,
    steps=16,
    guidance=3.0,
    batch_size=8,
    metrics=["psnr", "latent_error"],
    fewer_steps=[0.8, 0.5],
    contenders=[
        *[
            dict(name=name, tome_cfg=options)
            for name, options in {**_plain, **_methods, **_others}.items()
        ],
        *[
            dict(name=f"{name}, proportional", tome_cfg=dict(**options, proportional=True))
            for name, options in {**_plain, **_methods, **_weighted}.items()
        ],
    ],
)
