# The demo diffusion transformer with half of the keys and values of the image merged.
_base_ = "./sd3-emoji.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)
