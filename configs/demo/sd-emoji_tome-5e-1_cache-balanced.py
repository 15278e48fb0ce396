# Step caching and token merging together. On images this small, merging saves hardly any time.
_base_ = "./sd-emoji_cache-balanced.py"

tome_cfg = dict(ratio=0.5)
