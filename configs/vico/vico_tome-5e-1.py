# ViCo as MMagic has it, with half of the tokens merged around self-attention, the one site of its
# blocks that it does not look into.
_base_ = "mmagic::vico/vico.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)
