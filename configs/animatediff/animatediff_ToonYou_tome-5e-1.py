# MMagic's AnimateDiff with half of the tokens of every frame merged.
_base_ = "../_base_/animatediff.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)
