# timm's ViT-L/16 at the paper's r, random weights unless `pretrained=True`.
custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)

model = dict(type="ToMe", model=dict(type="TimmModel", name="vit_large_patch16_224"), r=8)
vit_input = dict(kind="image", size=224, patch=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
