# Step caching and token merging together, for large images.
_base_ = "./textual_inversion_cache-balanced.py"

tome_cfg = dict(ratio=0.5)
