"""`make gpu` as far as a machine without a GPU can show it: what it says there, that it goes on
where it stopped, what it writes."""

import fcntl
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu
from fastdni.bench import hardware
from fastdni.bench.limits import Limit
from fastdni.bench.network import Result
from fastdni.bench.timing import Timing


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_clear_line(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch sees no CUDA GPU: there is nothing to measure" in capsys.readouterr().err


def test_a_second_run_goes_on_where_the_first_one_stopped(tmp_path):
    ran, written = tmp_path / "ran", []
    append = f"open({str(ran)!r}, 'a').write('x')"
    fixed = tmp_path / "fixed"
    needs_it = f"import os, sys; sys.exit(not os.path.exists({str(fixed)!r}))"
    steps = [
        gpu.Step("first", python(append), 60),
        gpu.Step("second", python(needs_it), 60),
        gpu.Step("third", python("import time; time.sleep(30)"), 11),
        gpu.Step("fourth", python(append), 60),
    ]
    said: list[str] = []
    assert gpu.run_steps(steps[:2], tmp_path, lambda: 100, said.append) == ["second"]
    assert said[0].startswith("first: done in") and "second: FAILED, exit code 1" in said[1]
    fixed.touch()
    said.clear()
    how = {"after": lambda: written.append(said[-1].partition(":")[0])}
    missing = gpu.run_steps(steps, tmp_path, lambda: 100, said.append, **how)
    assert missing == ["third"] and ran.read_text() == "xx"
    assert written == ["second", "third", "fourth"]
    assert said[0] == "first: done before" and "third: FAILED, stopped after 11 s" in said[2]


def test_what_other_sources_have_done_is_done_again(tmp_path):
    ran = tmp_path / "ran"
    step = gpu.Step("one", python(f"open({str(ran)!r}, 'a').write('x')"), 60)
    other = step._replace(command=[*step.command, "--quick"])
    for of, which in (("a", step), ("a", step), ("b", step), ("b", other)):
        assert gpu.run_steps([which], tmp_path, lambda: 100, lambda text: None, of) == []
    assert ran.read_text() == "xxx"


def test_what_other_sources_have_found_is_no_result(tmp_path):
    """Nor where there is no time to find it again."""
    for name in ("one.pickle", "one.done", "one.log", "another.pickle"):
        (tmp_path / name).touch()
    steps = [gpu.Step("one", python(""), 60)]
    assert gpu.run_steps(steps, tmp_path, lambda: 5, lambda text: None, "a") == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["another.pickle"]


def test_sources_are_what_is_built_and_run(monkeypatch, tmp_path):
    """A built library is none of them: no two builds need be the same; nor are results."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    files = ["CMakeLists.txt", "csrc/cuda/a.cuh", "fastdni/b.py", "tests/simt/c.h"]
    files += ["benchmarks/d.cu"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    found = {gpu.sources("90a"), gpu.sources("80")}
    for file in files:
        (tmp_path / file).write_text(file)
        found.add(gpu.sources("90a"))
    assert len(found) == 2 + len(files)
    for file in ("fastdni/_C.so", "benchmarks/log.txt"):
        (tmp_path / file).touch()
        assert gpu.sources("90a") in found


@pytest.mark.parametrize("quick", [True, False])
def test_the_order_is_that_of_worth(tmp_path, quick):
    names = [step.name for step in gpu.steps_of(quick, tmp_path, triton=True)]
    cases = list(gpu.QUICK if quick else gpu.CASES)
    first = ["agreement", "triton_agreement", "constants", "weight_update"]
    last = ["tests", "triton_tests", "memcheck", "racecheck", "triton_memcheck"]
    assert names == [*first, *cases, *last]
    without = [step.name for step in gpu.steps_of(quick, tmp_path, triton=False)]
    assert without == ["agreement", "constants", *cases, "tests", "memcheck", "racecheck"]


def test_a_tool_that_is_not_there_stops_nothing_else(tmp_path):
    said: list[str] = []
    steps = [gpu.Step("absent", [tmp_path / "absent"], 60), gpu.Step("next", python(""), 60)]
    assert gpu.run_steps(steps, tmp_path, lambda: 100, said.append) == ["absent"]
    assert "absent: FAILED, not started: " in said[0] and said[1].startswith("next: done in")


def test_a_step_is_stopped_with_what_it_has_started(tmp_path):
    child = "import os, time; os.fork() or (time.sleep(2), open('late', 'w')); time.sleep(9)"
    code = f"import os; os.chdir({str(tmp_path)!r}); {child}"
    assert gpu.run(python(code), 1, tmp_path / "log") == "stopped after 1 s"
    time.sleep(2)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_step_ends_with_the_protocol(tmp_path, how):
    held = tmp_path / "held"
    step = f"import fcntl, time; held = open({str(held)!r}, 'w'); fcntl.flock(held, 2); "
    step += "held.write('on'); held.flush(); time.sleep(60); held.write(' and on')"
    protocol = "import signal, sys; from pathlib import Path; from benchmarks import gpu; "
    protocol += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    protocol += f"gpu.run({python(step)!r}, 90, Path({str(tmp_path / 'log')!r}))"
    running = subprocess.Popen(python(protocol), cwd=gpu.ROOT, stderr=subprocess.DEVNULL)
    while not (held.exists() and held.read_text()):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(how)
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # which there is when nobody else has it
        assert file.read() == "on"
    running.wait()


def test_a_long_log_is_its_beginning_and_its_end(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"first" + 20_000 * b"\xff" + b"last")
    text = gpu.shortened(log)
    assert text.startswith("first") and text.endswith("last") and len(text) < 8100
    log.write_bytes(b"\xff" * 8000)
    assert gpu.shortened(log) == "\ufffd" * 8000


def test_what_there_is_no_time_for_is_left(tmp_path):
    said: list[str] = []
    steps = [gpu.Step("late", python(""), 60)]
    assert gpu.run_steps(steps, tmp_path, lambda: 5, said.append) == ["late"]
    assert said == ["late: no time left; run it again to go on"]


def test_results_become_a_table_and_pictures(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "hardware.json").write_text(json.dumps(hardware() | {"gpu": "one elsewhere"}))
    (work / "constants.json").write_text("{}")
    for number, name in enumerate(gpu.QUICK):
        base = 2e-5 * (number + 1)
        seconds = {
            form: Timing.of([[base * times] * 8] * 8)
            for form, times in {"fastdni cuda graphed": 1, "eager": 20, "backprop": 8}.items()
        }
        limit = Limit(1e8 * (number + 1), 1e6, 5e13, 4e12)
        result = Result({"size": name, "case": "made up"}, seconds, limit)
        (work / f"{name}.pickle").write_bytes(pickle.dumps(result))
        (work / f"{name}.log").write_text(f"made up, {number}")
    assert gpu.main(["--draw", str(work)]) == 0
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored["hardware"]["gpu"] == "one elsewhere"
    assert [r["case"]["size"] for r in stored["results"]] == list(gpu.QUICK)
    assert "made up, 2" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "constants.json").exists()
    assert "| eager" in (tmp_path / "gpu.md").read_text()
    for picture in ("speedup.png", "roofline.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    (work / "constants.json").unlink()
    gpu.write(work, tmp_path)
    assert not (tmp_path / "constants.json").exists()


def test_the_protocol_writes_as_it_goes(monkeypatch, tmp_path):
    """What it goes on from stays with the repository's results, wherever the products go."""
    results, output = tmp_path / "results", tmp_path / "output"
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some (TM) GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu.dni, "backends", lambda: {"triton": "not installed"})

    def steps_of(quick, work, triton):
        assert quick and not triton
        find = f"open({str(work / 'constants.json')!r}, 'w').write('1')"
        look = f"assert open({str(output / 'constants.json')!r}).read() == '1'"
        return [gpu.Step("constants", python(find), 60), gpu.Step("look", python(look), 60)]

    monkeypatch.setattr(gpu, "steps_of", steps_of)
    assert gpu.main(["--quick", "--seconds", "100", "--output", str(output)]) == 0
    assert {f.name for f in output.iterdir()} == {"constants.json", "gpu.json", "gpu.md", "log.txt"}
    assert json.loads((output / "gpu.json").read_text())["hardware"]["gpu"] == "Some (TM) GPU"
    (day,) = (results / "some-tm-gpu").iterdir()
    assert day.name.endswith("-quick") and (day / "work" / "look.done").exists()


def test_the_constants_program_compiles(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-O2", "-std=c++17", "-arch=sm_90a", "-c", gpu.HERE / "device_constants.cu"]
    done = subprocess.run([*command, "-o", tmp_path / "made.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
