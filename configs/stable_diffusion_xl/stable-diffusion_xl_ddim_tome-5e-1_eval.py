# Stable Diffusion XL with half of the tokens merged, against its baseline:
#   python tools/test.py THIS_FILE
_base_ = ["./stable-diffusion_xl_ddim_tome-5e-1.py", "../_base_/tome_eval.py"]

globals().update(_base_.tome_eval)
