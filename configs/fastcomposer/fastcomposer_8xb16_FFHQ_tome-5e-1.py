# MMagic's FastComposer with half of the tokens merged.
_base_ = "mmagic::fastcomposer/fastcomposer_8xb16_FFHQ.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)
