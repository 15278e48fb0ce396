"""A CLIP tokenizer of our own: byte-pair encoding with `</w>` ends, trained on the captions."""

from __future__ import annotations

from pathlib import Path

import common
from common import save_json

START, END = "<|startoftext|>", "<|endoftext|>"

# How people word a prompt; the plain caption is by far the most frequent in training.
TEMPLATES = (
    "{}",
    "a {}",
    "{} emoji",
    "an emoji of {}",
    "a 3d emoji of a {}",
    "a picture of a {}",
)
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .,!?&'\"-:;()/#+"


def train_tokenizer(
    captions: list[str], folder: Path, vocab_size: int = 2000, max_length: int = 24
):
    common.repair_torchvision()
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    core = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"),
                behavior="removed",
                invert=True,
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    lines = [t.format(c) for c in captions for t in TEMPLATES] + list(ALPHABET)
    core.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            end_of_word_suffix="</w>",
            min_frequency=1,
            show_progress=False,
        ),
    )
    import json

    trained = json.loads(core.to_str())["model"]
    vocab, merges = trained["vocab"], trained["merges"]
    # CLIP's layout wants every byte to be able to end a word too.
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab.setdefault(byte + "</w>", len(vocab))
    merges = [m if isinstance(m, str) else " ".join(m) for m in merges]
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    save_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": max_length,
            "bos_token": START,
            "eos_token": END,
            "unk_token": END,
            "pad_token": END,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
        },
    )
    save_json(
        folder / "special_tokens_map.json",
        {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END},
    )
    return CLIPTokenizer.from_pretrained(folder)
