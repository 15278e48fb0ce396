# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Reference pages agree with the code: options, messages, commands, configs, versions."""

import importlib.util
import re
import shlex
from dataclasses import fields

import pytest
import yaml
from pages import ROOT, code_of, pages, text_of

from mmagic_tome import StepCacheConfig, ToMeConfig, __version__
from mmagic_tome.lab.cli import VERBS, build_parser
from mmagic_tome.vit import ViTConfig

OPTIONS = {"token_merging": ToMeConfig, "step_caching": StepCacheConfig}


@pytest.fixture(scope="module")
def generate():
    path = ROOT / "docs/_site/generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_tables_are_up_to_date(generate):
    for page in generate.PAGES:
        assert text_of(page) == generate.updated(page), f"{page}: run python docs/_site/generate.py"
    folders = {path.parent.name for path in ROOT.glob("configs/*/README.md")}
    assert folders == set(generate.FOLDERS)


def rows_of(text):
    """Cells of the table below '## All options'."""
    part = text.split("## All options\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`(\w+)`", line[0]), *line[1:]) for line in lines]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_its_default_and_an_example_that_works(name):
    config = OPTIONS[name]
    rows = rows_of(text_of(f"docs/reference/{name}.md"))
    assert {one for names, *_ in rows for one in names} == {one.name for one in fields(config)}
    for names, default, _, example in rows:
        given = eval(f"dict({example.strip('` ')})")
        made = config(**given)
        for one in names:
            stated = None if default == "none" else eval(default.strip("`"))
            assert getattr(config(), one) == stated, f"{one}: default"
            assert getattr(made, one) != stated or one == "sy", f"{one}: example"


def test_every_option_of_vision_transformers_is_listed():
    text = text_of("docs/reference/vision_transformers.md").split("## Options\n")[1]
    listed = set(re.findall(r"^\| `(\w+)` \|", text.split("\n## ")[0], re.M))
    assert listed == {one.name for one in fields(ViTConfig)}


def test_ratios_of_the_page_are_valid():
    (code,) = (one for one in code_of("docs/reference/token_merging.md") if "downsample=" in one)
    ratios = [line.split("#")[0] for line in code.splitlines()]
    assert len(ratios) == 5
    for line in ratios:
        given = {}
        exec(line, {}, given)
        level = 2 if "downsample" in line else "auto"
        ToMeConfig(ratio=given["ratio"], max_downsample=level, targets=["attn", "mlp"])


def test_messages_are_those_of_the_code():
    texts = []
    for path in (ROOT / "mmagic_tome").rglob("*.py"):
        # Strings that are written in several parts become one.
        texts.append(re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")))
    code = "\n".join(texts)
    messages = re.findall(r"^\| `([^`]+)` \|", text_of("docs/reference/messages.md"), re.M)
    assert len(messages) > 15
    for message in messages:
        for part in filter(None, (part.strip(" []") for part in message.split("…"))):
            assert part in code, message


# Also within a line, but no link to a script.
COMMAND = re.compile(r"(?:(?<![\[/])tools/(\w+)\.py|(?:-m|mim run) mmagic_tome (\w+))([^\n`]*)")


def test_commands_can_be_parsed_and_their_configs_exist():
    parsed = 0
    for page in pages():
        if page.endswith("commands.md"):  # made of the parsers
            continue
        for tool, module, text in COMMAND.findall(text_of(page).replace("\\\n", " ")):
            verb = tool or module
            arguments = shlex.split(text, comments=True)
            if verb in VERBS and verb not in ("test", "train") and "--help" not in arguments:
                build_parser(verb, f"{page}: {verb}{text}").parse_args(arguments)
                parsed += 1
            for one in arguments:
                if one.startswith("configs/"):
                    assert (ROOT / one).is_file(), f"{page}: {one}"
    assert parsed > 20


def test_versions_are_those_of_the_package():
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == __version__
    setup = text_of("setup.py")
    for page in ("README.md", "README_zh-CN.md"):
        badges = " ".join(re.findall(r"img\.shields\.io/badge/(\S+)\)", text_of(page)))
        assert f"version-{__version__}_" in badges and "python-3.9%2B" in badges
        assert 'python_requires=">=3.9"' in setup and "licence-Apache--2.0" in badges
    pinned = "".join(path.read_text() for path in (ROOT / "requirements/pinned").glob("*.txt"))
    table = text_of("docs/reference/versions.md")
    for name in ("torch", "diffusers", "transformers", "MMagic"):
        tested = re.search(rf"^\| {name} \|.*\| ([\d.]+) \|$", table, re.M)[1]
        assert re.search(rf"^{name}=={re.escape(tested)}\b", pinned, re.M | re.I), name


def test_issue_templates_can_be_read():
    templates = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert len(templates) == 4
    for path in templates:
        content = yaml.safe_load(path.read_text())
        assert path.name == "config.yml" or {"name", "description", "body"} <= set(content)
