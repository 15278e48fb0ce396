# Step caching and token merging together, for large images. MMagic's UNet for clips takes no mask, so
# there is no proportional attention.
_base_ = "./animatediff_ToonYou_cache-balanced.py"

tome_cfg = dict(ratio=0.5)
