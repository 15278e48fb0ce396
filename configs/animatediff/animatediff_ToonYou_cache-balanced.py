# MMagic's AnimateDiff with step caching, the recommended setting: the expected error of the final
# latent is 0.02 of its norm.
_base_ = "../_base_/animatediff.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
cache_cfg = "balanced"
