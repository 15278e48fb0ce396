# A subject learned by ViCo, with half of the tokens merged, against the baseline. State an image of the
# subject:
#   python tools/test.py THIS_FILE CHECKPOINT --cfg-options infer_cfg.references=dog.png
_base_ = ["./vico_tome-5e-1.py", "../_base_/tome_eval.py"]

globals().update(_base_.tome_eval)
test_dataloader.update(_delete_=True)  # MMagic's config has None for these two
test_cfg.update(_delete_=True)
test_dataloader.dataset.prompts = ["a photo of a S*", "a S* on the beach"]
infer_cfg = dict(references="data/vico/dog7/0.png")
