# The demo diffusion transformer with half of the image tokens merged around self-attention.
_base_ = "./sd3-emoji.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)
