# MMagic's ControlNet for edges with half of the tokens of the UNet merged.
_base_ = "../_base_/controlnet.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)
