"""The recurrent examples: what they print, draw and save, how they go on, what they refuse."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples need fastdni[examples]")

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "the quick brown fox jumps over the lazy dog. " * 200


@pytest.fixture
def examples(monkeypatch, tmp_path):
    """The examples as modules, in a folder of their own."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    import char_lm
    import copy_task

    (tmp_path / "fox.txt").write_text(TEXT)
    return copy_task, char_lm


def test_copy_task_reports_and_draws(examples, tmp_path, capsys):
    copy_task, _ = examples
    out, found = tmp_path / "a" / "copy.png", tmp_path / "copy.json"
    arguments = ["--seconds", "0.3", "--method", *copy_task.METHODS]
    assert copy_task.main([*arguments, "--out", str(out), "--json", str(found)]) == 0
    printed = capsys.readouterr()
    for method in copy_task.METHODS.values():
        assert method.name in printed.out and method.name in printed.err
    assert out.read_bytes().startswith(b"\x89PNG")
    assert list(json.loads(found.read_text())["solved"]) == list(copy_task.METHODS)


def test_what_is_copied(examples):
    copy_task, _ = examples
    generator = torch.Generator().manual_seed(0)
    x, y = copy_task.episode("repeat", 3, 2, generator)
    assert x.shape == (10, 64, 3) and (y[:4] == -100).all()
    assert torch.equal(x[:3].argmax(2), y[4:7]) and torch.equal(y[4:7], y[7:])
    assert (x[3, :, 2] == 2).all() and not x[4:].any()
    cut = copy_task.windows(10, 4, generator)
    assert cut[0][0] == 0 and cut[-1][1] == 10 and all(1 <= b - a <= 4 for a, b in cut)
    assert [a for a, _ in cut[1:]] == [b for _, b in cut[:-1]]


def test_copy_task_learns(examples):
    copy_task, _ = examples
    torch.set_num_threads(1)
    for method in ("bptt", "dni", "lambda"):
        made = copy_task.Run(method, "copy", 3, 0)
        while not made.longest and made.windows < 20000:
            made.train_episode()
        assert made.longest >= 1


@pytest.mark.parametrize("method", ["bptt", "lambda", "horizon"])
def test_copy_task_goes_on_as_though_nothing_had_been(examples, tmp_path, method):
    copy_task, _ = examples
    runs = [copy_task.Run(method, "copy", 3, 0) for _ in range(2)]
    for _ in range(8):
        runs[0].train_episode()
    path = tmp_path / "run.pt"
    torch.save(runs[0].state_dict(), path)
    runs[1].load_state_dict(torch.load(path, weights_only=True))
    for each in runs:
        for _ in range(8):
            each.train_episode()
    assert runs[0].windows == runs[1].windows and runs[0].errors == runs[1].errors
    pairs = zip(runs[0].rnn.parameters(), runs[1].rnn.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_char_lm_reports_writes_and_draws(examples, tmp_path, capsys):
    _, char_lm = examples
    out, found = tmp_path / "chars.png", tmp_path / "chars.json"
    arguments = ["fox.txt", "--windows", "100", "--batch", "8", "--hidden", "16", "--sample", "30"]
    assert char_lm.main([*arguments, "--out", str(out), "--json", str(found)]) == 0
    printed = capsys.readouterr().out
    for key, method in char_lm.METHODS.items():
        assert f"{method.name} writes:" in printed
        of_method = json.loads(found.read_text())[key]
        assert len(of_method["curves"][0]) == char_lm.CHECKS and of_method["test bits"][0] > 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["bptt", "dni", "lambda"])
def test_char_lm_goes_on_as_though_nothing_had_been(examples, tmp_path, method):
    _, char_lm = examples
    arguments = ["fox.txt", "--windows", "60", "--batch", "8", "--hidden", "16"]
    options, text = char_lm.parse(arguments)
    runs = [char_lm.Run(method, text, 0, options) for _ in range(2)]
    for _ in range(21):
        runs[0].train_window()
    path = tmp_path / "run.pt"
    torch.save(runs[0].state_dict(), path)
    runs[1].load_state_dict(torch.load(path, weights_only=True))
    for each in runs:
        for _ in range(20):
            each.train_window()
    pairs = zip(runs[0].rnn.parameters(), runs[1].rnn.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(runs[0].state[0], runs[1].state[0])


@pytest.mark.parametrize(
    ("number", "arguments", "message"),
    [
        (0, ["--bptt", "0"], "argument --bptt: must be an integer >= 1, got '0'"),
        (0, ["--seconds", "-1"], "argument --seconds: must be a finite number > 0"),
        (0, ["--method", "rtrl"], "argument --method: invalid choice: 'rtrl'"),
        (0, ["--out", "a.pdf"], "argument --out: must name a .png file, got a.pdf"),
        (1, [], "the following arguments are required: text"),
        (1, ["none.txt"], "cannot read none.txt: No such file or directory"),
        (1, ["fox.txt", "--batch", "5000"], "characters for such windows"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(examples, capsys, number, arguments, message):
    with pytest.raises(SystemExit) as ended:
        examples[number].main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said
    assert len(said.strip().splitlines()) == 1
