# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Where the networks of metrics get their weights, and what is said when they are not there."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ToMeError


def find_weights(given: str | os.PathLike | None, url: str, option: str, needed_by: str) -> Path:
    """Path of a weights file: the one that is given, torch hub's copy, or a download to there.

    Args:
        given: a path, or None.
        url: where the file comes from; its last part is the file's name in torch hub's folder.
        option: of the metric, that takes the path; for the message.
        needed_by: who asks; for the message.

    Raises:
        ToMeError: there is no such file and it cannot be downloaded (it is not tried while
            ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE`` is set). Names the file, the folder
            and the option.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise ToMeError(f"{needed_by}: {option}={str(given)!r} is not a file. Wanted is {url}")
        return path
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    if _offline():
        reason = "downloads are switched off (HF_HUB_OFFLINE)"
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Its names end in the start of their hash.
            prefix = path.stem.rsplit("-", 1)[-1]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
            return path
        except (OSError, RuntimeError) as error:  # no network, no room; a broken file
            reason = f"it cannot be downloaded ({error})"
    raise ToMeError(
        f"{needed_by} needs the file {path.name}, which is not there and {reason}. Get {url} and "
        f"put it into {folder}, or name it by the option {option}"
    )


def load_state(path: Path, needed_by: str) -> dict[str, Any]:
    """Tensors by name from a file of ``torch.save``, or from a ``.safetensors``.

    Raises:
        ToMeError: not such a file.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ToMeError(
            f"{needed_by}: {path} cannot be read as a weights file: {reason}"
        ) from error
    if not isinstance(state, dict):
        raise ToMeError(f"{needed_by}: {path} holds a {type(state).__name__}, not a state dict")
    return state


def fill(network: nn.Module, state: dict[str, Any], path: Path, needed_by: str) -> nn.Module:
    """Load ``state`` into ``network``, which must fit exactly; frozen and in eval mode after it.

    Raises:
        ToMeError: names or shapes that do not fit.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ToMeError(f"{needed_by}: {path} belongs to another network: {first[:200]}") from error
    return network.eval().requires_grad_(False)


def _offline() -> bool:
    switches = (os.environ.get(name, "0") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "TRUE", "YES", "ON") for value in switches)
