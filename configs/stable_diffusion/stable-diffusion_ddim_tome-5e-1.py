# MMagic's Stable Diffusion v1.5 with half of the tokens merged.
_base_ = "mmagic::stable_diffusion/stable-diffusion_ddim_denoisingunet.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.5)
