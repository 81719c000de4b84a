"""What README and docs/ say: links lead somewhere, commands parse, the reference is fresh."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from spin_cli.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The names that a page's headings get on the web."""
    titles = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


def called(line: str) -> list[str] | None:
    """The arguments of the spin command in a shell line, if there is one."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"", "quoted", line)  # a | in quotes is no pipe
    words = shlex.split(plain, comments=True)
    for start, word in enumerate(words):
        if word == "spin" and (not start or words[start - 1] in ("|", "$", "&&", "do")):
            rest = words[start + 1 :]
            break
        if word == "spin_cli" and words[start - 1] == "-m":
            rest = words[start + 1 :]
            break
    else:
        return None
    ends = [i for i, word in enumerate(rest) if word in ("|", "&&", ";", "&") or word[0] in "<>"]
    return rest[: ends[0]] if ends else rest


def command_lines(text: str) -> list[tuple[str, bool]]:
    """Every command of a page, and whether it is whole (else a name for it, in running text)."""
    found = []
    for kind, block in FENCE.findall(text):
        joined = re.sub(r"\\\n\s*|\|\n\s+", lambda m: "| " if m[0][0] == "|" else " ", block)
        for line in joined.splitlines():
            if kind in ("sh", "bash", "console", "") and re.search(r"\bspin(_cli)? +[a-z]", line):
                found.append((line, True))
    text = re.sub(r"\s*\n\s*", " ", FENCE.sub("", text))
    return found + [(code, False) for code in re.findall(r"`((?:spin|torchrun) [^`]+)`", text)]


def test_command_lines_are_found():
    block = "echo 'a | b' |\n    spin predict h - > out\nspin select a \\\n    --top-k 3\n"
    text = f"```sh\n{block}```\nand `spin run`"
    lines = command_lines(text)
    assert [called(line) for line, _ in lines] == [
        ["predict", "h", "-"], ["select", "a", "--top-k", "3"], ["run"],
    ]  # fmt: skip
    assert [whole for _, whole in lines] == [True, True, False]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page):
    for line, whole in command_lines(page.read_text(encoding="utf-8")):
        args = called(line)
        if not args or args[0].startswith("-") or args[0].isupper():
            continue
        command = COMMANDS.get(args[0])
        assert command is not None, f"{page.name}: {line}"
        if whole and "…" not in line and "[OPTIONS]" not in line:
            try:
                command.make_context(args[0], args[1:])
            except Exception as error:
                pytest.fail(f"{page.name}: {line}\n{error}")
        known = {name for param in command.params for name in param.opts} | {"--help", "-h"}
        for option in args[1:]:
            if option.startswith("-") and option != "-":
                name, _, _ = option.partition("=")
                assert name in known, f"{page.name}: {line}"


def test_the_reference_is_what_make_docs_writes(tmp_path):
    recipe = re.search(r"-m (typer .+) --output docs/cli.md", (ROOT / "Makefile").read_text())
    assert recipe
    subprocess.run(
        [sys.executable, "-m", *shlex.split(recipe[1]), "--output", tmp_path / "cli.md"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    fresh = (tmp_path / "cli.md").read_text(encoding="utf-8")
    assert (ROOT / "docs/cli.md").read_text(encoding="utf-8") == fresh, "run `make docs`"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("sel", ["select"]),
        ("train --calibration ", ["none", "temperature", "per-class"]),
        ("extract --pooling mean,m", ["mean,max"]),
        ("extract data -m bundled:m", ["bundled:minilm"]),
        ("extract data -m bundled:g", ["bundled:gemma3"]),
        ("ablate run --site h", ["hidden"]),
    ],
)
def test_the_shell_is_offered_what_can_be_typed(typed, offered, monkeypatch, capsys):
    words = f"spin {typed}"
    monkeypatch.setenv("_SPIN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    with pytest.raises(SystemExit) as end:
        app(prog_name="spin")
    assert end.value.code == 0
    assert capsys.readouterr().out.split() == offered
