"""The prose does not point at things that are gone: names, files and commands in it exist."""

import importlib
import re
from pathlib import Path

import pytest
from typer.main import get_command

from turnout.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def spans(page):
    """What stands in single backticks on one line, outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def resolves(dotted):
    """Whether `turnout.a.b` is a module, or an attribute of one."""
    parts = dotted.split(".")
    found = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], start=1):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[: depth + 1]))
            except ModuleNotFoundError:
                return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_backticks_exist(page):
    names = {match[0] for span in spans(page) if (match := re.match(r"turnout(\.\w+)+", span))}
    assert [name for name in sorted(names) if not resolves(name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_in_backticks_exist(page):
    paths = {span for span in spans(page) if re.fullmatch(r"[\w./*-]+(\.py|\.md|\.toml|/)", span)}
    missing = [
        path
        for path in sorted(paths)
        if not any(list(base.glob(path.rstrip("/"))) for base in (ROOT, ROOT / "src" / "turnout"))
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_backticks_exist(page):
    commands = {match[1] for span in spans(page) if (match := re.match(r"turnout (\w+)", span))}
    assert commands <= set(get_command(app).commands)


def test_make_targets_in_the_prose_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(
            r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.M
        ):
            assert re.search(rf"^{target}:", makefile, flags=re.M), f"{page.name}: make {target}"
