# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Evaluations of a random model: options that make them quick, and what to look at in them."""

import json
from pathlib import Path

# 64 tokens, two or three steps: an evaluation takes a second.
QUICK = ["--size", "64", "--steps", "4", "--device", "cpu", "--fewer-steps", "0.5"]
METRICS = ["--metrics", "psnr", "ssim", "latent_error"]


def quality(results):
    """What of results must not depend on how and when pictures were made."""
    keys = ("name", "kind", "ratio", "steps", "pictures", "skipped_pictures", "quality")
    return [{key: row[key] for key in keys} for row in results["contenders"]]


def pixels(folder):
    """Path below ``pictures`` -> digest of the pixels, of all committed pictures."""
    # Names with a dot in front are of files that are being written.
    records = sorted((Path(folder) / "pictures").rglob("[!.]*.json"))
    return {
        record.relative_to(folder).as_posix(): json.loads(record.read_text())["sha256"]
        for record in records
    }
