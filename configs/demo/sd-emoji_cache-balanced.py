# The demo model with step caching, the recommended setting.
_base_ = "./sd-emoji.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
cache_cfg = "balanced"
infer_cfg = dict(steps=20)
