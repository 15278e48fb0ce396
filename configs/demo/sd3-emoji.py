# The demo diffusion transformer without any acceleration: a small Stable
# Diffusion 3 for images of emoji that comes with the package, as a pipeline of
# diffusers.

# Declaring a (here empty) base keeps this a text config for mmengine, which
# would otherwise take the import below for its lazy style.
_base_ = []

from mmagic_tome.assets import asset_path  # noqa: E402

# Where the weights are depends on how the package was installed.
pipeline = dict(from_pretrained=asset_path("demo_dit"))

# What `tools/infer.py` generates by default, at the size of the weights.
infer_cfg = dict(
    prompts=["red apple", "smiling face with sunglasses", "sailboat"],
    steps=20,
    guidance=3.0,
    # The pipeline appends tokens of zeros in place of the third text encoder.
    # Its default is 256 of them; fewer take less time.
    extra=dict(max_sequence_length=1),
)
