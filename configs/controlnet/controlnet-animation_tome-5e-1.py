# MMagic's ControlNet animation with attention injection, with half of the tokens merged. Keys and
# values include those of a reference image, so all of self-attention is named.
_base_ = "mmagic::controlnet_animation/anythingv3_config.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5, targets=["attn"])

model = dict(attention_injection=True)
