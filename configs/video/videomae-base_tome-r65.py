# VideoMAE's ViT-B on 16 frames: 1568 tokens, 65 merged per block, the same fraction as 8 of the 197
# of an image. Its 12 blocks keep half of the tokens (1.4 times fewer multiply-adds; the ViT-L has 24
# blocks and half the multiply-adds). Random weights: no package has any.
custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)

model = dict(
    type="ToMe",
    model=dict(
        type="TransformersModel",
        model="VideoMAEForVideoClassification",
        config="VideoMAEConfig",
        num_labels=400,
    ),
    r=65,
)
vit_input = dict(
    kind="video",
    size=224,
    patch=16,
    frames=16,
    tubelet=2,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
