# What attention that knows how many tokens its keys stand for is worth, on the demo model.
#   python tools/evaluate.py configs/benchmarks/proportional_demo.py --cost-rounds 0
_base_ = "../demo/sd-emoji.py"

_merged = [
    ("ToMe 0.5", dict(ratio=0.5)),
    ("ToMe 0.75", dict(ratio=0.75)),
    ("ToMe 0.5, keys and values", dict(ratio=0.5, sites="attn_kv")),
    ("ToMe 0.75, keys and values", dict(ratio=0.75, sites="attn_kv")),
    ("CA-ToMe", dict(ratio=0.75, method="threshold")),
    ("importance, keys and values", dict(ratio=0.5, sites="attn_kv", method="importance")),
    ("PiToMe, keys and values", dict(ratio=0.5, sites="attn_kv", method="pitome")),
    ("keys and values, plans for 4 steps", dict(ratio=0.5, sites="attn_kv", refresh=4)),
    (
        "keys and values, exact residual",
        dict(ratio=0.5, sites="attn_kv", refresh=2, residual="exact"),
    ),
]
# Every key stands for as many tokens: nothing to set right.
_even = [
    ("ToDo", dict(method="todo", ratio=0.75)),
    ("averages of keys and values", dict(method="downsample", sites="attn_kv", ratio=0.75)),
]

evaluation = dict(
    prompt_set="demo",
    limit=16,
    steps=16,
    guidance=3.0,
    batch_size=4,
    metrics=["psnr", "ssim", "latent_error"],
    fewer_steps=[],
    contenders=[
        contender
        for name, options in _merged
        for contender in (
            dict(name=name, tome_cfg=options),
            dict(name=f"{name}, proportional", tome_cfg=dict(**options, proportional=True)),
        )
    ]
    + [dict(name=name, tome_cfg=options) for name, options in _even],
)
