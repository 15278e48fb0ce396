# The ViT-S/14 of configs/vit inflated to eight frames of 112 x 112: 512 tokens become 92. Never
# trained on video: it shows what merges with what (docs/vit.md).
custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)

model = dict(type="ToMe", model=dict(type="FocusVideoViT", frames=8, size=112), r=35)
vit_input = dict(
    kind="video",
    size=112,
    patch=14,
    frames=8,
    tubelet=1,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
