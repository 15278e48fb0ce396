# MMagic's DreamBooth with step caching, the recommended setting: training computes every step,
# since caching pauses where gradients are enabled.
_base_ = "../_base_/dreambooth.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
cache_cfg = "balanced"
