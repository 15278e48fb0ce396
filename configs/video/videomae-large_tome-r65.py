# The paper's model for video by its shape, a ViT-L on 16 frames, and the paper's r: 65 of 1568 tokens
# per block. The multiply-adds fall to less than half. Random weights: no package has any.
_base_ = "./videomae-base_tome-r65.py"

model = dict(
    model=dict(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    )
)
