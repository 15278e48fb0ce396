# MMagic's Stable Diffusion XL with step caching, the recommended setting: the expected error of the
# final latent is 0.02 of its norm.
_base_ = "mmagic::stable_diffusion_xl/stable-diffusion_xl_ddim_denoisingunet.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
cache_cfg = "balanced"
