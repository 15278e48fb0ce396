# Step caching and token merging together, for large images.
_base_ = "./controlnet-canny_cache-balanced.py"

tome_cfg = dict(ratio=0.5)
