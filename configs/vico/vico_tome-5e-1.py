# MMagic's ViCo with half of the keys and values of self-attention merged. ViCo reads the
# cross-attention maps of all tokens, so cross-attention cannot be merged.
_base_ = "../_base_/vico.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)
