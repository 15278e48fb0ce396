# A subject learned by DreamBooth, with half of the tokens merged, against the baseline:
#   python tools/test.py THIS_FILE CHECKPOINT
_base_ = ["./dreambooth_tome-5e-1.py", "../_base_/tome_eval.py"]

globals().update(_base_.tome_eval)
test_dataloader.update(_delete_=True)  # MMagic's config has None for these two
test_cfg.update(_delete_=True)
test_dataloader.dataset.prompts = _base_.val_prompts
