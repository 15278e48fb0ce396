# Where merging loses detail on the demo model, and what a residual brings back: one change at a
# time from ToMe at ratio 0.5 around the finest level's self-attention.
#   python tools/evaluate.py configs/benchmarks/merging_demo.py --cost-rounds 0
#   python benchmarks/merging.py outputs/evaluate/merging_demo --plot FILE
_base_ = "../demo/sd-emoji.py"

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
}
_weighted = {
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
    "site: feed-forward": dict(ratio=0.5, sites="mlp"),
    "site: cross-attention": dict(ratio=0.5, sites="crossattn"),
    "site: block": dict(ratio=0.5, sites="block"),
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
        *[dict(name=name, tome_cfg=options) for name, options in {**_plain, **_others}.items()],
        *[
            dict(name=f"{name}, proportional", tome_cfg=dict(**options, proportional=True))
            for name, options in {**_plain, **_weighted}.items()
        ],
    ],
)
