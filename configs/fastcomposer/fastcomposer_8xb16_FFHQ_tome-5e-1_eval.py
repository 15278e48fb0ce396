# FastComposer with half of the tokens merged, against its baseline. State an image of the person:
#   python tools/test.py THIS_FILE --cfg-options infer_cfg.references=face.png
_base_ = ["./fastcomposer_8xb16_FFHQ_tome-5e-1.py", "../_base_/tome_eval.py"]

globals().update(_base_.tome_eval)
test_dataloader.dataset.prompts = ["a man img sitting in a park", "a man img reading a book"]
infer_cfg = dict(references="data/fastcomposer/face.png")
# MMagic's runtime names a training and a validation without data, which mmengine refuses.
train_cfg = optim_wrapper = val_cfg = val_evaluator = None
