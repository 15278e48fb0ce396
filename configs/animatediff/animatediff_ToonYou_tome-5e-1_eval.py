# AnimateDiff with half of the tokens of every frame merged, against its baseline. Metrics are over all
# frames.
#   python tools/test.py THIS_FILE
_base_ = ["./animatediff_ToonYou_tome-5e-1.py", "../_base_/tome_eval.py"]

globals().update(_base_.tome_eval)
test_dataloader.dataset.prompts = ["a sailboat at sunset, best quality", "a dog in the snow"]
infer_cfg = dict(frames=16, steps=25, guidance=7.5)
# MMagic's list of seeds is for its own demo; mmengine's runners take one number.
randomness = dict(_delete_=True, seed=0)
