# The protocol of tomesd_table.py at the size of the demo model, with what the package ships:
#   python tools/evaluate.py configs/benchmarks/demo_table.py
_base_ = "../demo/sd-emoji.py"

evaluation = dict(
    # Of the captions that the model was trained on. The Fréchet distance needs 50 at least.
    prompts="demo",
    limit=60,
    steps=16,
    guidance=3.0,
    batch_size=4,
    methods=[
        *[dict(name=f"ToMe {r:g}", tome_cfg=dict(ratio=r)) for r in (0.25, 0.5, 0.75)],
        dict(name="ToMe 0.5, regular", tome_cfg=dict(ratio=0.5, use_rand=False)),
        # Other options and methods of this package.
        dict(name="ToMe 0.5, plan_interval 4", tome_cfg=dict(ratio=0.5, plan_interval=4)),
        dict(name="ToMe 0.5, all of attention", tome_cfg=dict(ratio=0.5, targets="attn")),
        dict(name="ToDo", tome_cfg=dict(ratio=0.75, method="todo")),
        *[dict(name=f"tomesd {r:g}", tomesd=dict(ratio=r)) for r in (0.25, 0.5, 0.75)],
        *["cache:quality", "cache:balanced", "cache:fast"],
    ],
    fewer_steps=[0.8, 0.65, 0.5],
    rounds=7,
)
