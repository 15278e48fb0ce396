# Which region of the demo model to skip at which steps, and how to extrapolate its output: one
# change at a time (docs/benchmarks/fixed_steps.md).
#   python tools/evaluate.py configs/benchmarks/step_caching_demo.py --rounds 0
_base_ = "../demo/sd-emoji.py"

_all = (0.0, 1.0)
_network = dict(region="network", timestep_range=_all)
_inner = dict(region="inner", timestep_range=_all)
_tried = {
    "network every 2nd, order 0": dict(**_network, order=0),
    "network every 2nd, order 1": _network,
    "network every 2nd, order 1, range 0.1 to 0.75": dict(
        region="network", timestep_range=(0.1, 0.75)
    ),
    "network every 2nd, order 2": dict(**_network, order=2),
    "network every 3rd, order 1": dict(**_network, interval=3),
    "inner every 2nd, order 0": dict(**_inner, order=0),
    "inner every 2nd, order 1": _inner,
    "inner every 3rd, order 1": dict(**_inner, interval=3),
    "network every 2nd, inner every 2nd of those, range 0 to 0.7": [
        dict(region="network"),
        dict(region="inner", timestep_range=(0.0, 0.7)),
    ],
    "network every 2nd, inner every 2nd of those": [dict(region="network"), _inner],
}
_with_feedback = {
    "inner every 2nd, order 1": _inner,
    "inner every 3rd, order 1": dict(**_inner, interval=3),
    "network every 2nd, order 1": _network,
    "network every 3rd, order 1": dict(**_network, interval=3),
}
# Regions and windows together, without error feedback.
_together = {
    "fixed: inner": [dict(region="inner", timestep_range=(0.1, 0.8))],
    "fixed: both": [
        dict(region="network", timestep_range=(0.1, 0.65)),
        dict(region="inner", timestep_range=(0.65, 0.95)),
    ],
    "fixed: most": [
        dict(region="network", timestep_range=(0.0, 0.95)),
        dict(region="inner", timestep_range=(0.0, 0.7)),
    ],
}

# The same with it; "most" skips the network early in a run too, where feedback hurts.
_fixed = {
    name: [
        dict(**one, error_feedback=0.5 * (name != "fixed: most" or one["region"] == "inner"))
        for one in caches
    ]
    for name, caches in _together.items()
}

evaluation = dict(
    prompts="demo",
    limit=16,
    steps=20,
    guidance=3.0,
    batch_size=8,
    metrics=["psnr", "latent_error"],
    fewer_steps=[0.8, 0.65, 0.5],
    methods=[
        *[dict(name=name, tome_cfg=dict(cache=cache)) for name, cache in _fixed.items()],
        *[dict(name=name, tome_cfg=dict(cache=cache)) for name, cache in _tried.items()],
        *[
            dict(
                name=f"{name}, error feedback {fraction:g}",
                tome_cfg=dict(cache=dict(**cache, error_feedback=fraction)),
            )
            for name, cache in _with_feedback.items()
            for fraction in (0.5, 1.0)
        ],
        *[
            dict(name=f"{name}, error feedback 0", tome_cfg=dict(cache=cache))
            for name, cache in _together.items()
        ],
    ],
)
