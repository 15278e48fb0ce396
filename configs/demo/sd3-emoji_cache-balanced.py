# The demo diffusion transformer with step caching, the recommended setting.
_base_ = "./sd3-emoji.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
cache_cfg = "balanced"
