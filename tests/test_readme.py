"""The README says what is true: its commands parse, what it names exists, its figures stand in results/."""
import copy
import json
import re
import shlex
import types
from pathlib import Path

import pytest
import torch

import dukd
import evaluate
import models
import train
from results import study
from samples import noise, save

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "results/README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?:python|torchrun)\b[^&#`\n]*?\b(train|evaluate)\.py\b([^&|>`…\n]*)", README)
FLAGS = re.findall(r"`(--[\w-]+(?: [-\w.]+)+)`", README)


def test_it_starts_with_two_commands_that_need_python_alone():
    prepare = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt\n"
    first, second = re.findall(f"^```\n{re.escape(prepare)}(python .*)\n```$", README, re.M)
    assert first.startswith("python train.py --teacher edsr_baseline.pt --student small")
    assert first.endswith("--method zoom_in --quick") and second == "python -m pytest tests"


@pytest.mark.parametrize("file, words", [*COMMANDS, *(("train", flags) for flags in FLAGS)])
def test_its_commands_and_flags_with_values_parse(file, words, monkeypatch):
    fresh = dict(settings=vars(train.parse([])))
    monkeypatch.setattr(models, "read_file", lambda last: fresh)  # the run need not exist
    options = dict(train=train, evaluate=evaluate)[file].parse(shlex.split(words, comments=True))
    if file == "train" and options.student != "small":
        models.build(options.student, options.scale or 4)


def test_its_files_functions_and_flags_exist(capsys):
    named = re.findall(r"[`(]((?:results|tests)/[^`)\s*…]*|\w+\.(?:py|txt)|edsr_baseline\.pt)[`)]", README)
    assert "dukd.py" in named and not [name for name in named if not (ROOT / name).exists()]
    named = {(name, file) for names, file in re.findall(r"((?:`[^`\n]+`(?:,| and|) )+)in `(\w+)\.py`", README)
             for name in re.findall(r"`(\w+)", names)}
    defined = {(name, path.stem) for path in ROOT.glob("*.py")
               for name in re.findall(r"^(?: *def | *class |)(\w+)(?:\(| =|:)", path.read_text("utf8"), re.M)}
    assert len(named) > 5 and not named - defined
    for parse in (train.parse, evaluate.parse):
        with pytest.raises(SystemExit):
            parse(["--help"])
    known = re.findall(r"(?:^ +|, )(--[\w-]+)", capsys.readouterr().out, re.M)
    known += re.findall(r'"(--\w+)"', (ROOT / "results/study.py").read_text(encoding="utf-8"))
    known += ["--index-url", "--nproc_per_node"]  # of pip and torchrun
    assert not {*re.findall(r"(?<![\w-])--[a-z][\w-]*", README)} - {*known}


@pytest.mark.parametrize("snippet", re.findall(r"^```python\n(.*?)^```", README + RESULTS, re.S | re.M))
def test_its_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "onnx" in snippet:
        pytest.importorskip("onnxscript")  # optional; brings onnx
    models.save("student.pt", models.build("edsr_c4b2", 4))
    save(noise(12, 16, 3), "photo.jpg")
    for picture in ("Set5/HR/baby.png", "mine/baby_x4.png"):
        Path(picture).parent.mkdir(parents=True)
        save(noise(48, 48, 3), picture)
    exec(snippet, {})
    made = {path.name for path in tmp_path.iterdir()} - {"student.pt", "photo.jpg", "Set5", "mine"}
    assert made == {*re.findall(r'"(student.onnx|big.png)"', snippet)}


def test_its_lines_for_basicsr_train_the_student_alone():
    """Run as they stand, with stand-ins for what BasicSR's SRModel has."""
    made, step = re.search("^## Copying out.*?^```\n(.*?)\n\n(.*?)^```", README, re.S | re.M).groups()
    torch.manual_seed(0)
    net = models.build("edsr_c4b2", 4)
    model = types.SimpleNamespace(
        net_g=net, lq=torch.rand(2, 3, 12, 12), gt=torch.rand(2, 3, 48, 48), device="cpu",
        opt=dict(network_t="edsr_c6b2", path=dict(pretrain_network_t="teacher.pth")), loaded=[],
        optimizer_g=torch.optim.Adam(net.parameters()),
        load_network=lambda *words: model.loaded.append(words),
        reduce_loss_dict=lambda terms: {name: term.item() for name, term in terms.items()})
    names = dict(self=model, dukd=dukd, build_network=lambda name: models.build(name, 4))
    exec(made, names)
    assert model.loaded == [(model.teacher, "teacher.pth")] and not model.teacher.training
    before, taught = copy.deepcopy(net.state_dict()), copy.deepcopy(model.teacher.state_dict())
    for _ in range(2):
        model.optimizer_g.zero_grad()
        exec(step, names)
        model.optimizer_g.step()
    assert all(not torch.equal(before[name], w) for name, w in net.state_dict().items())
    assert all(torch.equal(taught[name], w) for name, w in model.teacher.state_dict().items())
    assert [*model.log_dict] == ["rec", "kd", "zoom_in"]
    assert all(p.grad is None for p in model.teacher.parameters())


def test_its_figures_stand_in_results_and_its_rows_of_studies_are_made_from_the_records():
    objects = []
    for path in (ROOT / "results").glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), object_hook=objects.append)
    known = {f"{o['psnr']:.2f}/{o['ssim']:.4f}" for o in objects if {"psnr", "ssim"} <= o.keys()}
    named = re.findall(r"\d\d\.\d\d/0\.\d{4}", README)
    assert len(named) > 5 and not {*named} - known
    rows = re.findall(r"^\| (?:2K|2K reduced|\d+) \| .*", README + RESULTS, re.M)
    made = {line for name in study.STUDIES for line in study.table(name)} | {*study.fit_of_p()}
    assert rows and not {*rows} - made
    pays = [*study.pays()]
    assert len(pays) > 5 and all(line in README for line in pays)


def test_the_table_of_runs_has_a_column_for_each_difference(tmp_path, monkeypatch, capsys):
    for name, p in [("a", 0.3), ("b", 0), ("new", 0)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(dict(settings=dict(p=p, seed=0, out=name))))
        (tmp_path / name / "log.csv").write_text("step,val_psnr\n" + "5,28.1\n10,28.0\n" * (name != "new"))
    monkeypatch.chdir(tmp_path)
    table = list(study.runs_table(map(Path, ["a", "b", "new", "no_run"])))
    assert table[0] == "| run | p | step | held-out PSNR: best, last |"
    assert table[2:] == ["| a | 0.3 | 10 | 28.10, 28.00 |", "| b | 0 | 10 | 28.10, 28.00 |",
                         "| new | 0 | 0 | none yet |"]
    assert "no_run is no run" in capsys.readouterr().err
