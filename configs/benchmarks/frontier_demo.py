# Every way to make the demo model faster, at several strengths: measured time against error.
#   python tools/evaluate.py configs/benchmarks/frontier_demo.py
# With 50 steps: frontier_demo_50.py.
# The names are those of the published tables (docs/benchmarks/demo_model.md).
_base_ = "../demo/sd-emoji.py"

from mmagic_tome.lab.prompts import read_prompts, spread  # noqa: E402

_network = dict(region="network", error_feedback=0.5, timestep_range=(0.1, 0.65))
_inner = dict(region="inner", error_feedback=0.5)
# Step caches at the same steps of every run.
_fixed = {
    "fixed: inner": [dict(_inner, timestep_range=(0.1, 0.8))],
    "fixed: both": [_network, dict(_inner, timestep_range=(0.65, 0.95))],
    "fixed: most": [dict(region="network"), dict(_inner, timestep_range=(0.0, 0.7))],
}

evaluation = dict(
    # 64 of the captions, two images of each.
    prompts=[one.text for one in spread(read_prompts("demo"), 64) for _ in range(2)],
    steps=20,
    guidance=3.0,
    batch_size=8,
    methods=[
        # Step caching with linear extrapolation.
        *[dict(name=name, tome_cfg=dict(cache=cache)) for name, cache in _fixed.items()],
        *["cache:quality", "cache:balanced", "cache:fast"],
        dict(name="network every 2nd", tome_cfg=dict(cache=dict(region="network"))),
        dict(
            name="network every 2nd, half of the run",
            tome_cfg=dict(cache=dict(region="network", timestep_range=(0.1, 0.6))),
        ),
        # Step caching as others do it: the cached output is reused unchanged.
        dict(
            name="network every 2nd, order 0", tome_cfg=dict(cache=dict(region="network", order=0))
        ),
        dict(name="inner every 2nd, order 0", tome_cfg=dict(cache=dict(region="inner", order=0))),
        *[
            dict(name=f"DeepCache {k}", deepcache=dict(cache_interval=k, cache_branch_id=0))
            for k in (2, 3, 5)
        ],
        # Merging with a residual.
        dict(
            name="ToMe 0.75, residual",
            tome_cfg=dict(ratio=0.75, plan_interval=2, residual=True),
        ),
        # Merging with proportional attention.
        *[
            dict(name=f"ToMe {r:g}, prop_attn", tome_cfg=dict(ratio=r, prop_attn=True))
            for r in (0.25, 0.5)
        ],
        dict(
            name="attn_kv 0.5, prop_attn, plan_interval 4",
            tome_cfg=dict(ratio=0.5, prop_attn=True, targets="attn_kv", plan_interval=4),
        ),
        dict(
            name="attn_kv 0.5, prop_attn, residual",
            tome_cfg=dict(
                ratio=0.5, prop_attn=True, targets="attn_kv", plan_interval=2, residual=True
            ),
        ),
        dict(
            name="fixed: both, and ToMe 0.5, prop_attn",
            tome_cfg=dict(ratio=0.5, prop_attn=True, cache=_fixed["fixed: both"]),
        ),
        # Merging alone, by every method; ToDo keeps the queries.
        *[
            dict(name=f"{label} {r:g}", tome_cfg=dict(ratio=r, method=method))
            for label, method in (
                ("ToMe", "tome"),
                ("ToFu", "tofu"),
                ("ToMA", "toma"),
                ("importance", "importance"),
                ("SiTo", "sito"),
                ("prune", "prune"),
            )
            for r in (0.25, 0.5, 0.75)
        ],
        # Merges pairs, so at most half.
        *[dict(name=f"PiToMe {r:g}", tome_cfg=dict(ratio=r, method="pitome")) for r in (0.25, 0.5)],
        dict(name="ToMe 0.5, plan_interval 4", tome_cfg=dict(ratio=0.5, plan_interval=4)),
        dict(name="ToMe 0.5, blocks", tome_cfg=dict(ratio=0.5, targets="block", max_downsample=4)),
        *[
            dict(
                name=f"CA-ToMe {threshold:g}",
                tome_cfg=dict(method=dict(type="threshold", threshold=threshold), ratio=0.75),
            )
            for threshold in (0.7, 0.9)
        ],
        *[
            dict(
                name=f"ToDo {factor}",
                tome_cfg=dict(method=dict(type="todo", downsample_factor=factor), ratio=0.75),
            )
            for factor in (2, 4)
        ],
        dict(name="downsample", tome_cfg=dict(method="downsample", ratio=0.75)),
        *[dict(name=f"tomesd {r:g}", tomesd=dict(ratio=r)) for r in (0.25, 0.5, 0.75)],
    ],
    fewer_steps=[0.9, 0.8, 0.65, 0.5, 0.4],
    rounds=9,
)
del read_prompts, spread
