# The demo model: token merging and step caching against the baseline.
#   python tools/test.py configs/demo/sd-emoji_eval.py
_base_ = ["./sd-emoji.py", "../_base_/tome_eval.py"]

custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)
globals().update(_base_.tome_eval)

infer_cfg = dict(steps=20)
test_dataloader.dataset.prompts = ["red apple", "smiling face with sunglasses", "sailboat"]
test_cfg.methods = [
    dict(name="merged", tome_cfg=dict(ratio=0.5)),
    dict(name="cached", cache_cfg="balanced"),
]
# The loop itself applies the methods and says what they did.
custom_hooks = []
