# MMagic's ControlNet animation with attention injection, with half of the tokens merged.
_base_ = "mmagic::controlnet_animation/anythingv3_config.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
# With attention injection keys come from other frames, so queries are merged as well.
tome_cfg = dict(ratio=0.5, targets=["attn"])

model = dict(attention_injection=True)
