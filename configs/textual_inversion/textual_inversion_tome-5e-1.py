# MMagic's textual inversion, trained and sampled with half of the tokens merged.
_base_ = "../_base_/textual_inversion.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)
