# What proportional attention is worth on the demo model.
#   python tools/evaluate.py configs/benchmarks/proportional_demo.py --rounds 0
_base_ = "../demo/sd-emoji.py"

_merged = [
    ("ToMe 0.5", dict(ratio=0.5)),
    ("ToMe 0.75", dict(ratio=0.75)),
    ("ToMe 0.5, keys and values", dict(ratio=0.5, targets="attn_kv")),
    ("ToMe 0.75, keys and values", dict(ratio=0.75, targets="attn_kv")),
    ("CA-ToMe", dict(ratio=0.75, method="threshold")),
    ("importance, keys and values", dict(ratio=0.5, targets="attn_kv", method="importance")),
    ("PiToMe, keys and values", dict(ratio=0.5, targets="attn_kv", method="pitome")),
    ("keys and values, plans for 4 steps", dict(ratio=0.5, targets="attn_kv", plan_interval=4)),
    (
        "keys and values, exact residual",
        dict(ratio=0.5, targets="attn_kv", plan_interval=2, residual=True),
    ),
]
# Every key represents equally many tokens: nothing to correct.
_even = [
    ("ToDo", dict(method="todo", ratio=0.75)),
    ("averages of keys and values", dict(method="downsample", targets="attn_kv", ratio=0.75)),
]

evaluation = dict(
    prompts="demo",
    limit=16,
    steps=16,
    guidance=3.0,
    batch_size=4,
    metrics=["psnr", "ssim", "latent_error"],
    fewer_steps=[],
    methods=[
        setting
        for name, options in _merged
        for setting in (
            dict(name=name, tome_cfg=options),
            dict(name=f"{name}, proportional", tome_cfg=dict(**options, prop_attn=True)),
        )
    ]
    + [dict(name=name, tome_cfg=options) for name, options in _even],
)
