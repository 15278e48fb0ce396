# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A real browser without a window."""

import base64
import json
import os
import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
HOW = "apt-get install --no-install-recommends chromium"
# Its title is what a script found, as base64 of JSON; errors are found too.
SCRIPT = """
<script>
"use strict";
const errors = [];
onerror = (message) => { errors.push(message); };
onload = () => {
  const found = (%s)();
  const bytes = new TextEncoder().encode(JSON.stringify({ ...found, errors }));
  document.title = btoa(String.fromCharCode(...bytes));
};
</script>
"""


def find_browser():
    """The browser's path. Without one the test is skipped; on CI (CI=true) it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = f"no browser is installed, looked for {', '.join(NAMES)}: {HOW}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return found


def run_in_page(page, folder, function):
    """What a JavaScript function returns in a loaded page, and ``errors`` of the page's scripts.

    Args:
        page: The HTML.
        folder: An empty folder for the browser's own files.
        function: Without arguments; returns an object that JSON can hold.
    """
    file = folder / "page.html"
    file.write_text(page.replace("<head>", "<head>" + SCRIPT % function))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    command = [find_browser(), *options, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    title = re.search("<title>(.*?)</title>", done.stdout)[1]
    return json.loads(base64.b64decode(title))
