# At the size that its position embedding was made for: 37 x 37 patches, 1370 tokens become 470.
_base_ = "./vit-s14-focus_tome-r13.py"

model = dict(r=75)
vit_input = dict(size=518)
