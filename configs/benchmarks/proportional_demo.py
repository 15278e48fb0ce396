# What proportional attention is worth on the demo model.
#   python tools/evaluate.py configs/benchmarks/proportional_demo.py --rounds 0
_base_ = "../demo/sd-emoji.py"

_merged = [
    ("ToMe 0.5", dict(ratio=0.5)),
    ("ToMe 0.75", dict(ratio=0.75)),
    ("ToMe 0.5, attn_kv", dict(ratio=0.5, targets="attn_kv")),
    ("ToMe 0.75, attn_kv", dict(ratio=0.75, targets="attn_kv")),
    ("CA-ToMe", dict(ratio=0.75, method="threshold")),
    ("importance, attn_kv", dict(ratio=0.5, targets="attn_kv", method="importance")),
    ("PiToMe, attn_kv", dict(ratio=0.5, targets="attn_kv", method="pitome")),
    ("attn_kv, plan_interval 4", dict(ratio=0.5, targets="attn_kv", plan_interval=4)),
    (
        "attn_kv, residual",
        dict(ratio=0.5, targets="attn_kv", plan_interval=2, residual=True),
    ),
]
# Every key represents equally many tokens: nothing to correct.
_even = [
    ("ToDo", dict(method="todo", ratio=0.75)),
    ("averages of attn_kv", dict(method="downsample", targets="attn_kv", ratio=0.75)),
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
            dict(name=f"{name}, prop_attn", tome_cfg=dict(**options, prop_attn=True)),
        )
    ]
    + [dict(name=name, tome_cfg=options) for name, options in _even],
)
