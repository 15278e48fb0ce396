# The settings of frontier_demo.py at 50 steps; methods of merging at fewer strengths.
#   python tools/evaluate.py configs/benchmarks/frontier_demo_50.py
_base_ = "./frontier_demo.py"

evaluation = dict(
    steps=50,
    only=[
        *["fixed: *", "quality", "balanced", "fast"],
        *["network every 2nd", "network every 2nd, half of the run"],
        "network every 2nd, order 0",
        "inner every 2nd, order 0",
        "DeepCache *",
        "ToMe 0.5, prop_attn",
        "attn_kv 0.5, prop_attn, plan_interval 4",
        *["ToMe 0.5", "ToMe 0.75", "ToMe 0.5, plan_interval 4", "ToMe 0.5, blocks"],
        *["ToFu 0.5", "ToMA 0.5", "importance 0.5", "SiTo 0.5", "PiToMe 0.5", "prune 0.5"],
        *["ToFu 0.75", "ToMA 0.75", "importance 0.75", "SiTo 0.75", "PiToMe 0.25", "prune 0.75"],
        *["CA-ToMe *", "ToDo *", "downsample"],
        "tomesd *",
        "* steps",
    ],
)
