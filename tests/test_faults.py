"""What goes wrong around a run: kills, damaged checkpoints, full disks, signals. Nothing may be lost, or silently wrong.

DUKD_KILLS=100 python -m pytest -s tests/test_faults.py kills a hundred times where twelve are the rule, and counts aloud."""
import collections
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import models
import train
from test_train import error_of, pictures, rows, same, weights

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("DUKD_KILLS", 12))
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills and full disks as Linux has them")

# Imports train once; then each line of its input is a run in a process of its own, forked from it. It answers with the
# process's number, and with the exit status when it is over (the number stays the process's own until the next line).
# die_at: the process kills itself before its nth opening, renaming or making of a file in the run folder.
# limit: no file may grow beyond this many bytes.
SERVER = """
import json, os, resource, signal, sys, traceback
import torch, torch._dynamo, torch.utils.flop_counter  # all that a run imports
torch.set_num_threads(1)
import train

def die(at, folder):
    count = 0
    def hook(event, args):
        nonlocal count
        if event in ("os.rename", "os.mkdir") or event == "open" and args[1] and args[1].strip("rbt"):
            count += str(args[0]).startswith(folder)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        for descriptor in (1, 2):
            os.dup2(os.open(job["log"] + str(descriptor), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        if "limit" in job:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        if "die_at" in job:
            die(job["die_at"], job["folder"])
        code, parse = 0, train.parse
        train.parse = lambda argv: print("listening", flush=True) or parse(argv)
        try:
            train.main(job["argv"])
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    print(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status, flush=True)
    next(sys.stdin)
    os.waitpid(pid, 0)
"""


class Server:
    """Runs of train.py, each in a process of its own, without seconds of imports each."""

    def __init__(self, base):
        self.log = base / "output"
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        bufsize=0, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert self.process.stdout.readline() == b"ready\n"

    def run(self, argv, meanwhile=None, **job):
        """The exit code of train.main(argv) (negative: the signal that ended it), its output and its errors.

        meanwhile(pid, over) is called while it runs; over() tells whether it still does."""
        job |= dict(argv=[str(a) for a in argv], log=str(self.log))
        for descriptor in (1, 2):
            Path(f"{self.log}{descriptor}").write_bytes(b"")
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        pid = int(self.process.stdout.readline())
        if meanwhile:
            meanwhile(pid, lambda: bool(select.select([self.process.stdout], [], [], 0)[0]))
        code = int(self.process.stdout.readline())
        self.process.stdin.write(b"\n")
        return code, Path(f"{self.log}1").read_text(), Path(f"{self.log}2").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.stdin.close()
    server.process.wait(30)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base = tmp_path_factory.mktemp("place")
    torch.manual_seed(1)
    models.save(base / "teacher.pt", models.build("edsr_c8b3", 4))
    pictures(base / "train", [(64, 80), (72, 64)])
    pictures(base / "val", [(48, 56)], seed=1)
    return base


def command(place, out, steps, *more):
    return ["--teacher", place / "teacher.pt", "--student", "edsr_c4b3", "--data", place / "train", "--val", place / "val",
            "--batch", 2, "--patch", 12, "--steps", steps, "--log-every", 2, "--val-every", 3, "--save-minutes", 0,
            "--lr", "1e-2", "--device", "cpu", "--precision", "float32", "--cache", place / "cache", "--out", out, *more]


def again(place, out, steps, *more):
    """The command that a user gives after a kill: go on, or, where there is no run folder yet, the same again."""
    return ["--resume", "--out", out] if out.exists() else command(place, out, steps, *more)


def finished(server, place, out, steps, *more):
    code, _, errors = server.run(command(place, out, steps, *more))
    assert code == 0, errors
    return out


def assert_same_outcome(a, b):
    """The weights, the log and the pictures of two runs, byte for byte, and nothing left lying about."""
    for name in ("student.pt", "best.pt"):
        for key in ("params", "params_ema"):
            assert same(*(torch.load(out / name, weights_only=True)[key] for out in (a, b))), (name, key)
    for name in ("student.pt", "best.pt", "log.csv", "val/im0_x4.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert {p.relative_to(a) for p in a.rglob("*")} == {p.relative_to(b) for p in b.rglob("*")}
    assert not list(b.parent.glob("*.tmp"))


def unfinished(out):
    """What is being written at this moment: in the run folder, or the folder itself."""
    return [*out.parent.glob("*.tmp"), *out.glob("*.tmp"), *out.glob("val/*.tmp")]


# ------------------------------------------------------------------------------------------------ kills
def killer(rng, out, longest):
    """Kills a process at a random moment, or when a file of a name drawn by chance is half written."""
    aim = rng.choice(["", "", "*.tmp", "last.ckpt.tmp", "last.ckpt.tmp", "student.pt.tmp", "best.pt.tmp", "no last.ckpt"])
    moment = time.monotonic() + rng.uniform(0, longest if out.exists() and rng.random() < 0.7 else longest / 4)

    def meanwhile(pid, over):
        hit = {"": lambda: True, "*.tmp": lambda: unfinished(out),
               "no last.ckpt": lambda: out.exists() and not (out / "last.ckpt").exists()}.get(aim, lambda: (out / aim).exists())
        while not over() and not (time.monotonic() > moment and hit()):
            pass
        os.kill(pid, signal.SIGKILL)
    return meanwhile


def test_killed_at_any_moment_and_resumed_equals_uninterrupted(server, place, tmp_path):
    """Also while a checkpoint is being written, between its two renames, and before there is a run folder."""
    rng, count = random.Random(KILLS), collections.Counter()
    settings = (20, "--lr", 0.3, "--ema", 0)  # so wild that the best held-out PSNR is not the last
    began = time.monotonic()
    whole = finished(server, place, tmp_path / "whole", *settings)
    longest = (time.monotonic() - began) * 0.7
    while count["kills"] < KILLS:
        out, code = tmp_path / f"killed{count['runs']}", None
        count["runs"] += 1
        while code != 0:
            count["resumed"] += out.exists()
            killing = killer(rng, out, longest) if count["kills"] < KILLS else None
            code, _, errors = server.run(again(place, out, *settings), killing)
            assert code in (0, -signal.SIGKILL), errors
            if code:
                count["kills"] += 1
                count["before there was a run folder"] += not out.exists()
                count["while a file was being written"] += bool(unfinished(out))
                count["while last.ckpt was being written"] += (out / "last.ckpt.tmp").exists()
                count["gone on from previous.ckpt"] += out.exists() and not (out / "last.ckpt").exists()
        assert_same_outcome(whole, out)
    print("\n" + ", ".join(f"{number} {name}" for name, number in count.items()))


def test_killed_before_each_writing_of_a_file(server, place, tmp_path):
    """Each opening and renaming in turn, with the same outcome (every fifth, unless DUKD_KILLS asks for more)."""
    whole, count = finished(server, place, tmp_path / "whole", 3), collections.Counter()
    for at in range(1, 200, 1 if KILLS > 12 else 5):
        out = tmp_path / f"killed{at}"
        code, _, errors = server.run(command(place, out, 3), die_at=at, folder=str(out))
        assert code in (0, -signal.SIGKILL), errors
        if code == 0:
            break
        count["kills"] += 1
        count["before there was a run folder"] += not out.exists()
        count["gone on from previous.ckpt"] += out.exists() and not (out / "last.ckpt").exists()
        code, _, errors = server.run(again(place, out, 3))
        assert code == 0, errors
        assert_same_outcome(whole, out)
    print("\n" + ", ".join(f"{number} {name}" for name, number in count.items()))
    assert count["kills"] >= 6 and count["before there was a run folder"]


# ------------------------------------------------------------------------------------------------ damaged checkpoints
@pytest.fixture(scope="module")
def stopped(server, place, tmp_path_factory):
    """A run of 6 steps, whole, and the same stopped after 4, with checkpoints of steps 3 and 4."""
    base = tmp_path_factory.mktemp("stopped")
    whole = finished(server, place, base / "whole", 6)
    assert server.run(command(place, base / "part", 6, "--stop-at", 4))[0] == 0
    return whole, base / "part"


def step_of(path):
    return models.read_file(path)["step"]


def altered(change):
    """Damage to a checkpoint that is a valid file of torch's, with other content."""
    def damage(path):
        torch.save(change(torch.load(path, weights_only=True)), path)
    return damage


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def flipped_weight(path):
    """One bit of the first convolution's bias: the file stays readable to torch.load."""
    bias = torch.load(path, weights_only=True)["student"]["conv_first.bias"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(bias) + 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)


def without(key):
    return altered(lambda state: {k: v for k, v in state.items() if k != key})


DAMAGE = dict(
    missing=Path.unlink, empty=cut(0), one_byte=lambda path: path.write_bytes(b"P"), half=cut(0.5), nearly_whole=cut(0.999),
    rubbish=lambda path: path.write_bytes(random.Random(1).randbytes(50_000)), zeros=lambda path: path.write_bytes(bytes(50_000)),
    flipped=flipped_weight, text=lambda path: path.write_text("error 404"), tensor=altered(lambda state: torch.zeros(3)),
    without_step=without("step"), without_optimizer=without("optimizer"), odd_step=altered(lambda state: {**state, "step": "four"}),
    other_network=altered(lambda state: {**state, "student": models.build("edsr_c8b3", 4).state_dict()}))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_broken_checkpoint_falls_back_to_the_one_before_with_a_warning(server, stopped, tmp_path, kind):
    whole, part = stopped
    out = shutil.copytree(part, tmp_path / "run")
    assert (step_of(out / "previous.ckpt"), step_of(out / "last.ckpt")) == (3, 4)
    DAMAGE[kind](out / "last.ckpt")
    code, output, errors = server.run(["--resume", "--out", out, "--stop-at", 4])
    assert code == 0 and "resumed after step 3 of 6" in output
    assert errors.count("warning: ") == ("last.ckpt" in errors) == (kind != "missing"), errors
    assert (step_of(out / "previous.ckpt"), step_of(out / "last.ckpt")) == (3, 4)  # the good one has not made way to a broken one
    assert server.run(["--resume", "--out", out])[0] == 0
    assert_same_outcome(whole, out)


def test_two_broken_checkpoints_are_an_error(server, stopped, tmp_path):
    out = shutil.copytree(stopped[1], tmp_path / "run")
    cut(0.7)(out / "last.ckpt")
    altered(lambda state: dict(other=1))(out / "previous.ckpt")
    code, _, errors = server.run(["--resume", "--out", out])
    both = r"\(.*last.ckpt is not a whole .*; .*previous.ckpt holds no state of this run\)"
    assert code == 2 and re.fullmatch(f"error: no checkpoint can be read {both}; start again with another --out\n", errors), errors
    for name in train.CHECKPOINTS:
        (out / name).unlink()
    code, _, errors = server.run(["--resume", "--out", out])
    assert code == 2 and re.fullmatch("error: .* holds no run to resume .*\n", errors), errors


def test_no_single_damage_to_a_checkpoint_is_read_as_good(stopped, tmp_path):
    """Bits flipped, runs of bytes zeroed and cuts anywhere: refused, or of no consequence."""
    def leaves(x):
        x = list(x.values()) if isinstance(x, dict) else x
        return [y for v in x for y in leaves(v)] if isinstance(x, (list, tuple)) else [x]

    good, rng, refused = (stopped[1] / "last.ckpt").read_bytes(), random.Random(0), 0
    expected = leaves(models.read_file(stopped[1] / "last.ckpt"))
    for i in range(150):
        bad, at = bytearray(good), rng.randrange(len(good))
        if i % 3 == 0:
            bad[at] ^= 1 << rng.randrange(8)
        elif i % 3 == 1:
            bad[at:at + 64] = bytes(len(bad[at:at + 64]))
        else:
            del bad[at:]
        (tmp_path / "bad.ckpt").write_bytes(bad)
        try:
            found = leaves(models.read_file(tmp_path / "bad.ckpt"))
        except models.CheckpointError:
            refused += 1
            continue
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(found, expected)), i
    assert refused > 100


def test_checksums_of_a_file_written_without_them_are_not_missed(tmp_path):
    from torch.serialization import set_crc32_options
    model = models.build("edsr_c4b1", 4)
    set_crc32_options(False)
    try:
        torch.save(model.state_dict(), tmp_path / "plain.pt")
    finally:
        set_crc32_options(True)
    assert same(models.load(tmp_path / "plain.pt").state_dict(), model.state_dict())


def test_a_log_that_was_cut_or_lost_does_not_stop_a_run(server, stopped, tmp_path):
    damages = dict(cut=lambda path: path.write_bytes(path.read_bytes()[:-9]), zeros=lambda path: path.write_bytes(bytes(99)),
                   rubbish=lambda path: path.write_bytes(b"\xff\x00,,\n5,5"), gone=Path.unlink)
    for name, damage in damages.items():
        out = shutil.copytree(stopped[1], tmp_path / name)
        damage(out / "log.csv")
        code, _, errors = server.run(["--resume", "--out", out])
        assert code == 0, errors
        assert rows(out)[-1] == rows(stopped[0])[-1] and same(weights(out), weights(stopped[0]))


# ------------------------------------------------------------------------------------------------ full disks
@pytest.mark.parametrize("name", ["last.ckpt", "student.pt", "best.pt", "val/im0_x4.png", "log.csv"])
def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(server, stopped, tmp_path, name):
    """Each file in turn is written to /dev/full, where the system reports a full disk."""
    whole, part = stopped
    out = shutil.copytree(part, tmp_path / "run")
    (out / f"{name}.tmp").symlink_to("/dev/full")
    code, _, errors = server.run(["--resume", "--out", out])
    assert code == 2 and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith(f"error: {out / name} cannot be written: No space left on device")
    assert not unfinished(out) and max(step_of(out / c) for c in train.CHECKPOINTS if (out / c).exists()) >= 4
    assert server.run(["--resume", "--out", out])[0] == 0
    assert_same_outcome(whole, out)


def test_a_full_disk_at_the_start_leaves_nothing(server, place, tmp_path):
    for limit, named in ((1500, "config.json"), (9000, "last.ckpt")):
        code, _, errors = server.run(command(place, tmp_path / "run", 3), limit=limit)
        line = f"error: .*run cannot be made: .*{named} cannot be written: File too large; name another --out\n"
        assert code == 2 and re.fullmatch(line, errors), errors
        assert not any(tmp_path.iterdir())


def test_a_log_that_cannot_grow_is_one_line(server, stopped, tmp_path):
    out = shutil.copytree(stopped[1], tmp_path / "run")
    header, *lines = (out / "log.csv").read_text().splitlines()
    (out / "log.csv").write_text("\n".join([header, *lines * 3000]))  # the largest file, so that the limit meets it alone
    code, _, errors = server.run(["--resume", "--out", out], limit=(out / "log.csv").stat().st_size + 6001)
    assert code == 2 and errors.splitlines()[-1].startswith(f"error: {out / 'log.csv'} cannot be written: File too large"), errors
    assert step_of(out / "last.ckpt") >= 4


def test_a_real_small_disk(place, stopped, tmp_path):
    """A disk in memory that the checkpoints outgrow; made larger, the run goes on to the very same weights."""
    mount = ["unshare", "-rm", "bash", "-c"]
    if subprocess.run([*mount, f"mount -t tmpfs -o size=100k none {tmp_path}"], capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    new = " ".join(map(str, [sys.executable, "train.py", *command(place, tmp_path / "disk" / "run", 6)]))
    script = f"""
        cd {ROOT}; mkdir {tmp_path}/disk; mount -t tmpfs -o size=SIZE none {tmp_path}/disk
        {new}; echo code $?; find {tmp_path}/disk -type f -size +0
        mount -o remount,size=2m {tmp_path}/disk
        {sys.executable} train.py --resume --out {tmp_path}/disk/run; echo code $?; cp -r {tmp_path}/disk/run {tmp_path}/run"""
    size = (stopped[1] / "last.ckpt").stat().st_size * 2 // 1024  # room for one checkpoint and the first, smaller one, not more
    done = subprocess.run([*mount, script.replace("SIZE", f"{size}k")], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # as many threads as the run it is compared with
    assert re.findall(r"code (\d)", done.stdout) == ["2", "0"], done.stdout + done.stderr
    assert re.search(r"^error: \S+ cannot be written: No space left on device; .*--resume", done.stderr, re.M), done.stderr
    assert "Traceback" not in done.stderr and ".tmp" not in done.stdout and "last.ckpt" in done.stdout
    assert_same_outcome(stopped[0], tmp_path / "run")


@pytest.mark.parametrize("limit", [1000, 9000, 20000, 30000])
def test_a_full_disk_under_the_decoded_images_is_one_line_and_leaves_nothing(server, place, tmp_path, limit):
    pictures(tmp_path / "small", [(32, 32)] * 10)  # a file's buffer holds several of them
    for folder in (place / "train", tmp_path / "small"):
        argv = [*command(place, tmp_path / "run", 3), "--patch", 8, "--data", folder, "--ram", 0, "--cache", tmp_path / "cache"]
        code, _, errors = server.run(argv, limit=limit)
        assert code == 2 and re.fullmatch("error: .*cache: the decoded images .* File too large; .*--cache\n", errors), errors
        assert not (tmp_path / "run").exists() and not any((tmp_path / "cache").iterdir())


def test_an_index_on_a_full_disk_and_what_killed_runs_left(tmp_path, monkeypatch):
    """Nothing of the store stays, and old unfinished stores of the same images are removed, those of others are not."""
    folder = pictures(tmp_path / "small", [(32, 32)] * 3)
    paths, cache = data.find_images([folder]), tmp_path / "cache"
    key = data.store_key(paths, [None] * 3, 4, 8)
    cache.mkdir()
    old, young, other = (cache / name for name in (f"{key}old.tmp", f"{key}young.tmp", "other.tmp"))
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    monkeypatch.setattr(data.secrets, "token_hex", lambda n: "token")
    (cache / f"{key}.token.json.tmp").symlink_to("/dev/full")
    with pytest.raises(data.DataError, match="No space left"):
        data.build_store(paths, [None] * 3, 4, 8, 0, cache)
    assert set(cache.iterdir()) == {young, other}
    assert len(data.build_store(paths, [None] * 3, 4, 8, 0, cache)) == 3


def test_two_runs_that_store_the_same_images_at_once_both_get_them(tmp_path, monkeypatch):
    paths, cache = data.find_images([pictures(tmp_path / "small", [(32, 32)] * 3)]), tmp_path / "cache"
    build = lambda: data.build_store(paths, [None] * 3, 4, 8, 0, cache)
    replace, other = os.replace, []

    def another_run_comes_first(*names):
        if not other:
            other.append(None)
            other.append(build())
        replace(*names)
    monkeypatch.setattr(os, "replace", another_run_comes_first)
    store = build()
    assert torch.equal(store.pixels, other[1].pixels) and len(list(cache.iterdir())) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # some come within a weak reference's callback
def test_a_signal_at_any_moment_leaves_no_unfinished_store(tmp_path):
    """As a handler would, SystemExit comes at the return of each call that build_store makes, one after the other."""
    paths = data.find_images([pictures(tmp_path / "small", [(32, 32)] * 3)])
    ended = 0
    for moment in range(1, 1000):
        cache, left = tmp_path / str(moment), moment

        def after_a_call(frame, event, arg):
            nonlocal left
            caller = frame if event == "c_return" else frame.f_back if event == "return" else None
            if caller and caller.f_code is data.build_store.__code__:
                left -= 1
                if not left:
                    sys.setprofile(None)
                    raise SystemExit(143)
        try:
            sys.setprofile(after_a_call)
            data.build_store(paths, [None] * 3, 4, 8, 0, cache)
        except SystemExit:
            ended += 1
        finally:
            sys.setprofile(None)
        assert not list(cache.glob("*.tmp")), moment
        if left > 0:
            break
    assert 20 < ended < 900 and len(list(cache.iterdir())) == 2


# ------------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_time_ends_with_its_exit_code_and_no_traceback(server, place, tmp_path, number):
    rng = random.Random(int(number))
    for i, delay in enumerate([0, 0.01, 0.1] + [rng.uniform(0, 1) for _ in range(3 + KILLS // 12)]):
        out = tmp_path / f"run{i}"
        def meanwhile(pid, over):
            while not Path(f"{server.log}1").stat().st_size:
                time.sleep(0.001)
            time.sleep(delay)
            os.kill(pid, number)
        code, output, errors = server.run(command(place, out, 10_000), meanwhile)
        assert code == 128 + number and "Traceback" not in errors, (delay, code, errors)
        assert out.exists() == ("go on with: python train.py --resume --out" in output), output
        assert not unfinished(out) and (not out.exists() or step_of(out / "last.ckpt") >= 0)


def test_while_images_are_decoded_a_signal_ends_at_once_and_leaves_no_unfinished_store(server, place, tmp_path):
    pictures(tmp_path / "many", [(400, 400)] * 60)
    argv = [*command(place, tmp_path / "run", 3), "--data", tmp_path / "many", "--ram", 0, "--cache", tmp_path / "cache"]

    def meanwhile(pid, over):
        while not over() and not list((tmp_path / "cache").glob("*.tmp")):
            time.sleep(0.005)
        os.kill(pid, signal.SIGTERM)
    code, _, errors = server.run(argv, meanwhile)
    assert code == 128 + signal.SIGTERM and "Traceback" not in errors
    assert not (tmp_path / "run").exists() and not any((tmp_path / "cache").iterdir())


def test_a_second_signal_stops_at_once():
    with pytest.raises(SystemExit) as end, train.listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
    assert end.value.code == 128 + signal.SIGINT


# ------------------------------------------------------------------------------------------------ the same again
@pytest.mark.parametrize("method", train.METHODS)
def test_deterministic_runs_of_every_method_are_the_same(server, place, tmp_path, method):
    for out in (tmp_path / "a", tmp_path / "b"):
        code, _, errors = server.run(command(place, out, 3, "--deterministic", "--method", method))
        assert code == 0, errors
    assert_same_outcome(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("teacher, student", [("rcan_c16b1g2", "rcan_c16b1g1"), ("swinir_c12s6", "swinir_c12s6")])
def test_deterministic_runs_of_the_other_families(server, place, tmp_path, teacher, student):
    models.save(tmp_path / "teacher.pt", models.build(teacher, 4))
    for out in (tmp_path / "a", tmp_path / "b"):
        argv = command(place, out, 2, "--deterministic", "--teacher", tmp_path / "teacher.pt", "--student", student, "--zoom-out")
        code, _, errors = server.run(argv)
        assert code == 0, errors
    assert_same_outcome(tmp_path / "a", tmp_path / "b")


def test_where_a_run_can_not_be_resumed_the_error_says_what_to_do(capsys, place, tmp_path):
    assert "leave --resume out" in error_of(capsys, "--resume", "--out", tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    assert "another --out" in error_of(capsys, "--resume", "--out", tmp_path / "other")
