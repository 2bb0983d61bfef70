"""The README says what is true: its commands parse, what it names exists, its figures stand in results/."""
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import evaluate
import models
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?:python|torchrun)\b[^&#`\n]*?\b(train|evaluate)\.py\b([^&|>`…\n]*)", README)


def test_it_starts_with_two_commands_that_need_python_alone():
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && python "
    first, second = re.findall(f"^ *{re.escape(start)}(.*)", README, re.M)
    assert first.startswith("train.py --teacher edsr_baseline.pt") and second == "-m pytest tests"


@pytest.mark.parametrize("file, words", COMMANDS)
def test_its_commands_parse(file, words, monkeypatch):
    monkeypatch.setattr(train, "resumed", lambda given: train.Config(**given))  # the run need not exist
    options = dict(train=train, evaluate=evaluate)[file].parse(shlex.split(words, comments=True))
    if file == "train" and options.student != "small":
        models.build(options.student, options.scale or 4)


def test_its_files_and_pictures_exist():
    named = re.findall(r"[`(]((?:results|tests)/[^`)\s*…]*|\w+\.(?:py|txt)|edsr_baseline\.pt)[`)]", README)
    assert "dukd.py" in named and not [name for name in named if not (ROOT / name).exists()]


def test_its_functions_are_defined_where_it_says():
    named = {(name, file) for names, file in re.findall(r"((?:`[^`\n]+`(?:,| and|) )+)in `(\w+)\.py`", README)
             for name in re.findall(r"`(\w+)", names)}
    defined = {(name, path.stem) for path in ROOT.glob("*.py")
               for name in re.findall(r"^ *(?:def|class) (\w+)", path.read_text(encoding="utf-8"), re.M)}
    assert len(named) > 5 and not named - defined


def test_its_flags_exist(capsys):
    for parse in (train.parse, evaluate.parse):
        with pytest.raises(SystemExit):
            parse(["--help"])
    known = re.findall(r"(?:^ +|, )(--[\w-]+)", capsys.readouterr().out, re.M)
    known += re.findall(r'"(--\w+)"', (ROOT / "results/study.py").read_text(encoding="utf-8"))
    known += ["--index-url", "--nproc_per_node"]  # of pip and torchrun
    assert not {*re.findall(r"(?<![\w-])--[a-z][\w-]*", README)} - {*known}


@pytest.mark.parametrize("snippet", re.findall(r"^```python\n(.*?)^```", README, re.S | re.M))
def test_its_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "onnx" in snippet:
        pytest.importorskip("onnxscript")  # optional; brings onnx
    names = dict(lr=torch.rand(2, 3, 8, 12), hr=torch.rand(2, 3, 32, 48), scale=4)
    names["teacher"] = names["student"] = models.build("edsr_c4b2", 4)
    for checkpoint in re.findall(r'"(\w+\.pt)"', snippet):
        models.save(checkpoint, names["student"])
    exec(snippet, names)
    for function, parameters in re.findall(r"^def (\w+)\((.*?)\)", snippet, re.M):
        names[function](*(names[parameter] for parameter in parameters.split(", ")))


def test_its_figures_stand_in_results():
    objects = []
    for path in (ROOT / "results").glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), object_hook=objects.append)
    known = {f"{o['psnr']:.2f}/{o['ssim']:.4f}" for o in objects if {"psnr", "ssim"} <= o.keys()}
    named = re.findall(r"\d\d\.\d\d/0\.\d{4}", README)
    assert len(named) > 5 and not {*named} - known
