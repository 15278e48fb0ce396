# The same, and a quarter of the tokens of the ControlNet itself.
_base_ = "mmagic::controlnet/controlnet-canny.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5, controlnet=dict(ratio=0.25))
