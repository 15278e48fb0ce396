# ViT-S/14 with real weights, the baseline: predicts where people look. The weights come with a Python
# package (docs/howto/vision_transformers.md), read by examples/focus_vit.py of a checkout. Nothing in it merges.
custom_imports = dict(imports=["mmagic_tome", "examples.focus_vit"], allow_failed_imports=False)

model = dict(type="FocusViT")

# Input of examples/vit_patches.py: 16 x 16 patches.
vit_input = dict(
    kind="image", size=224, patch=14, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
