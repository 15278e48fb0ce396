# MMagic's Stable Diffusion XL with half of the tokens merged at the finest level that has attention,
# the second one.
_base_ = "mmagic::stable_diffusion_xl/stable-diffusion_xl_ddim_denoisingunet.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)
