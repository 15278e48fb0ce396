# The demo model with half of the keys and values of self-attention merged at the finest level.
_base_ = "./sd-emoji.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)
