# A classifier of mmpretrain with token merging in its backbone; train it as any other. Names in
# `state_dict` do not change, so `load_from` takes checkpoints of the baseline model.
custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)

default_scope = "mmpretrain"

model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="ToMe",
        model=dict(type="VisionTransformer", arch="base", img_size=224, patch_size=16),
        r=13,
    ),
    head=dict(
        type="VisionTransformerClsHead",
        num_classes=1000,
        in_channels=768,
        loss=dict(type="CrossEntropyLoss"),
    ),
)
