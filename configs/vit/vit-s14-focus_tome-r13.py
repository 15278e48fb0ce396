# The same, 13 tokens merged in each of its 12 blocks: 257 tokens become 101.
_base_ = "./vit-s14-focus.py"

model = dict(_delete_=True, type="ToMe", model=dict(type="FocusViT"), r=13)
