# MMagic's AnimateDiff with three quarters of the tokens of a clip merged, within and across frames,
# around cross-attention and feed-forward. Matching costs as much as merging saves, so a merge plan
# is reused for ten steps.
_base_ = "../_base_/animatediff.py"

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
tome_cfg = dict(ratio=0.75, targets=["crossattn", "mlp"], across_frames=True, plan_interval=10)
