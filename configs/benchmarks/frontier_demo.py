# Every way to make the demo model faster, at several strengths: measured time against error.
#   python tools/evaluate.py configs/benchmarks/frontier_demo.py --cost-rounds 3
# With 50 steps: frontier_demo_50.py. Then, of both folders:
#   python benchmarks/frontier.py FOLDER FOLDER --plot FILE
_base_ = "../demo/sd-emoji.py"

evaluation = dict(
    prompt_set="demo",
    limit=64,
    images_per_prompt=2,
    steps=20,
    guidance=3.0,
    batch_size=8,
    contenders=[
        # Ours: parts of the network left out and foretold.
        *[dict(name=name, tome_cfg=dict(preset=name)) for name in ("quality", "balanced", "fast")],
        dict(
            name="network every 2nd",
            tome_cfg=dict(ratio=0, reuse=dict(network=dict(steps=2))),
        ),
        dict(
            name="network every 2nd, half of the run",
            tome_cfg=dict(ratio=0, reuse=dict(network=dict(steps=2, between=(0.1, 0.6)))),
        ),
        # What is done elsewhere: the last output again, of the network, of its inner levels.
        dict(
            name="network again, every 2nd",
            tome_cfg=dict(ratio=0, reuse=dict(network=dict(steps=2, order=0))),
        ),
        dict(
            name="inner levels again, every 2nd",
            tome_cfg=dict(ratio=0, reuse=dict(deep=dict(steps=2, order=0))),
        ),
        *[
            dict(name=f"DeepCache {k}", deepcache=dict(cache_interval=k, cache_branch_id=0))
            for k in (2, 3, 5)
        ],
        # Outputs of sites, repeated and foretold.
        dict(
            name="blocks again, every 2nd",
            tome_cfg=dict(sites="block", max_downsample=4, refresh=2, residual="reuse"),
        ),
        dict(
            name="blocks foretold, every 2nd",
            tome_cfg=dict(
                sites="block",
                max_downsample=4,
                refresh=dict(steps=2, warmup=2),
                residual=dict(kind="reuse", order=1),
            ),
        ),
        # Merging with a residual.
        dict(
            name="ToMe 0.75, exact residual",
            tome_cfg=dict(ratio=0.75, refresh=2, residual="exact"),
        ),
        # Merging with attention that knows what its keys stand for.
        *[
            dict(name=f"ToMe {r:g}, proportional", tome_cfg=dict(ratio=r, proportional=True))
            for r in (0.25, 0.5)
        ],
        dict(
            name="keys and values 0.5, proportional",
            tome_cfg=dict(ratio=0.5, proportional=True, sites="attn_kv", refresh=4),
        ),
        dict(
            name="keys and values 0.5, proportional, exact residual",
            tome_cfg=dict(
                ratio=0.5, proportional=True, sites="attn_kv", refresh=2, residual="exact"
            ),
        ),
        dict(
            name="balanced and ToMe 0.5, proportional",
            tome_cfg=dict(preset="balanced", ratio=0.5, proportional=True),
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
        dict(name="ToMe 0.5, refresh 4", tome_cfg=dict(ratio=0.5, refresh=4)),
        dict(name="ToMe 0.5, blocks", tome_cfg=dict(ratio=0.5, sites="block", max_downsample=4)),
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
    cost_rounds=9,
)
