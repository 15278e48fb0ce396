# ControlNet for edges with half of the UNet's tokens merged, against its baseline. State an image of
# edges, or one for each prompt:
#   python tools/test.py THIS_FILE --cfg-options infer_cfg.controls=edges.png
_base_ = ["./controlnet-canny_tome-5e-1.py", "../_base_/tome_eval.py"]

globals().update(_base_.tome_eval)
test_dataloader.dataset.prompts = ["a bird on a branch", "a blue bird, watercolor"]
infer_cfg = dict(controls="data/controlnet/edges.png")
