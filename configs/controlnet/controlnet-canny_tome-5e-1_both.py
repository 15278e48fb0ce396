# The same, and a quarter of the tokens of the ControlNet itself.
_base_ = "./controlnet-canny_tome-5e-1.py"

tome_cfg = dict(ratio=0.5, controlnet=dict(ratio=0.25))
