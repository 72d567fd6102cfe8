"""`make gpu` as far as a machine without a GPU can show it: what it says there, that it goes on
where it stopped, what it writes."""

import json
import pickle
import shutil
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu
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
    ran = tmp_path / "ran"
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
    assert gpu.run_steps(steps[:2], tmp_path / "work", lambda: 100, said.append) == ["second"]
    assert said[0].startswith("first: done in") and "second: FAILED, exit code 1" in said[1]
    fixed.touch()
    said.clear()
    missing = gpu.run_steps(steps, tmp_path / "work", lambda: 100, said.append)
    assert missing == ["third"] and ran.read_text() == "xx"
    assert said[0] == "first: done before" and "third: FAILED, stopped after 11 s" in said[2]


def test_what_other_sources_have_done_is_done_again(tmp_path):
    ran = tmp_path / "ran"
    step = gpu.Step("one", python(f"open({str(ran)!r}, 'a').write('x')"), 60)
    other = step._replace(command=[*step.command, "--quick"])
    for of, which in (("a", step), ("a", step), ("b", step), ("b", other)):
        assert gpu.run_steps([which], tmp_path / "work", lambda: 100, lambda text: None, of) == []
    assert ran.read_text() == "xxx"


def test_a_tool_that_is_not_there_stops_nothing_else(tmp_path):
    said: list[str] = []
    steps = [gpu.Step("absent", [tmp_path / "absent"], 60), gpu.Step("next", python(""), 60)]
    assert gpu.run_steps(steps, tmp_path / "work", lambda: 100, said.append) == ["absent"]
    assert "absent: FAILED, not started: " in said[0] and said[1].startswith("next: done in")


def test_a_step_is_stopped_with_what_it_has_started(tmp_path):
    child = "import os, time; os.fork() or (time.sleep(2), open('late', 'w')); time.sleep(9)"
    code = f"import os; os.chdir({str(tmp_path)!r}); {child}"
    assert gpu.run(python(code), 1, tmp_path / "log") == "stopped after 1 s"
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_what_there_is_no_time_for_is_left(tmp_path):
    said: list[str] = []
    steps = [gpu.Step("late", python(""), 60)]
    assert gpu.run_steps(steps, tmp_path / "work", lambda: 5, said.append) == ["late"]
    assert said == ["late: no time left; run it again to go on"]


def test_results_become_a_table_and_pictures(tmp_path):
    (tmp_path / "work").mkdir()
    for number, name in enumerate(gpu.QUICK):
        base = 2e-5 * (number + 1)
        seconds = {
            form: Timing.of([[base * times] * 8] * 8)
            for form, times in {"fastdni cuda": 1, "eager": 20, "backprop": 8}.items()
        }
        limit = Limit(1e8 * (number + 1), 1e6, 5e13, 4e12)
        result = Result({"size": name, "case": "made up"}, seconds, limit)
        (tmp_path / "work" / f"{name}.pickle").write_bytes(pickle.dumps(result))
    assert gpu.main(["--draw", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert [r["case"]["size"] for r in stored["results"]] == list(gpu.QUICK)
    assert "| eager" in (tmp_path / "gpu.md").read_text()
    for picture in ("speedup.png", "roofline.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_constants_program_compiles(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-O2", "-std=c++17", "-arch=sm_90a", "-c", gpu.HERE / "device_constants.cu"]
    done = subprocess.run([*command, "-o", tmp_path / "made.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
