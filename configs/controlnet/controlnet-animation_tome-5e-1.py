# MMagic's ControlNet animation with attention injection, with half of the tokens merged.
_base_ = "mmagic::controlnet_animation/anythingv3_config.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)

model = dict(attention_injection=True)
