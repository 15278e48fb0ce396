# AnimateDiff as MMagic has it. Three quarters of the tokens of a clip are merged, those of one frame
# with those of another too, around cross-attention and feed-forward. Finding them costs as much as
# it saves, so what was found serves ten steps.
_base_ = "mmagic::animatediff/animatediff_ToonYou.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.75, sites=["crossattn", "mlp"], across_frames=True, refresh=10)
