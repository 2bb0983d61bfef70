"""The README says what is true: its commands parse, its paths and functions exist, its figures stand in results/."""
import ast
import json
import re
import shlex
from pathlib import Path

import pytest

import evaluate
import models
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.S | re.M)
COMMANDS = [line.split("  #")[0] for block in BLOCKS for line in block.splitlines() if re.match(r"(python|torchrun|pip) ", line)]


def test_there_are_commands():
    assert len(COMMANDS) > 10 and any("pytest" in c for c in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if " train.py" in c])
def test_train_commands_parse(command, monkeypatch):
    words = shlex.split(command.split(" train.py ", 1)[1])
    monkeypatch.setattr(train, "resumed", lambda c, given: c)  # the run folder of an example need not exist
    c = train.parse(words)
    if c.student != "small":
        models.parse(c.student, 4)


@pytest.mark.parametrize("command", [c for c in COMMANDS if " evaluate.py" in c])
def test_evaluate_commands_parse(command):
    evaluate.parse(shlex.split(command)[2:])


def test_named_files_and_functions_exist():
    names = set(re.findall(r"`([\w.]+\.(?:py|pt|txt))`", README)) - set(re.findall(r"`([\w.]*[-_]x\d[\w.-]*\.pt|RCAN_\w+\.pt)`", README))
    names -= {"student.pt", "best.pt"}  # of a run folder
    assert {"dukd.py", "edsr_baseline.pt"} <= names and not [n for n in names if not (ROOT / n).is_file()]
    for cells, file in re.findall(r"((?:`[\w., ]+`,? ?)+) in `(\w+\.py)`", README):
        defined = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        for name in re.findall(r"`(\w+)`", cells):
            assert name in defined, f"{name} is not in {file}"


def test_flags_named_in_the_text_exist():
    source = {train.flag(f.name) for f in train.dataclasses.fields(train.Config)} | {"--help"}
    source |= {train.flag(f"no_{f.name}") for f in train.dataclasses.fields(train.Config) if f.type is bool}
    source |= set(re.findall(r'"(--[\w-]+)"', (ROOT / "evaluate.py").read_text()))
    assert not set(re.findall(r"(?<![\w-])(--[a-z][\w-]+)", README)) - source - {"--index-url", "--nproc_per_node"}


def figures(node):
    """Every PSNR/SSIM pair in a JSON, as the tables print it."""
    if isinstance(node, dict):
        if {"psnr", "ssim"} <= node.keys():
            yield f"{node['psnr']:.2f}/{node['ssim']:.4f}"
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from figures(child)


def test_every_figure_stands_in_results():
    known = {f for path in (ROOT / "results").glob("*.json") for f in figures(json.loads(path.read_text()))}
    named = re.findall(r"\d\d\.\d\d/0\.\d{4}", README)
    assert len(named) > 5 and not [f for f in named if f not in known]
