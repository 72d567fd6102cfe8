"""Frames: what comes out is what went in, and what is none is refused."""

import struct

import pytest
import torch

from fastdni.distributed import channels
from fastdni.distributed.channels import DATA, DTYPES, FrameError, read, size_of, write
from fastdni.distributed.checkpoint import load, save


def framed(tensors, kind=DATA, number=3, saved=2):
    buffer = torch.zeros(size_of(tensors), dtype=torch.uint8)
    write(buffer, kind, number, saved, tensors)
    return buffer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frame_carries_any_tensor(dtype):
    tensors = [
        torch.arange(24).reshape(2, 3, 4).to(dtype),
        None,
        torch.ones(()).to(dtype),
        torch.arange(6).reshape(2, 3).t().to(dtype),  # not contiguous
    ]
    kind, frame = read(framed(tensors))
    assert (kind, frame.number, frame.saved) == (DATA, 3, 2)
    for one, two in zip(frame.tensors, tensors, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert one.dtype == two.dtype and torch.equal(one, two)


def test_a_frame_smaller_than_its_memory():
    small = [torch.ones(3)]
    buffer = torch.full((4096,), 7, dtype=torch.uint8)
    write(buffer, DATA, 0, 0, small)
    assert torch.equal(read(buffer)[1].tensors[0], small[0])


def test_empty_tensors_travel():
    (found,) = read(framed([torch.empty(0, 5)]))[1].tensors
    assert found.shape == (0, 5)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 1, "must run the same version of fastdni"),
        (1, 2, "a frame must be of version 1 of the format, got 2"),
        (3, -1, "a frame must carry up to 4 tensors"),
        (5, 9, "a frame must carry up to 4 tensors, got 9"),
        (6, 99, "a frame's tensor must have a dtype and a shape"),
        (7, 40, "a frame's tensor must have a dtype and a shape"),
        (8, -4, "a frame's tensor must have a dtype and a shape"),
        (8, 10_000, "must fit into the frame"),
    ],
)
def test_what_is_no_frame(at, value, message):
    buffer = framed([torch.ones(4)])
    buffer[8 * at : 8 * at + 8] = torch.tensor(list(struct.pack("<q", value)), dtype=torch.uint8)
    with pytest.raises(FrameError, match=message):
        read(buffer)


def test_an_activation_of_many_dimensions_has_a_limit():
    with pytest.raises(FrameError, match="up to 10 dimensions, got 11"):
        framed([torch.ones([1] * 11)])
    with pytest.raises(FrameError, match="torch.complex64"):
        framed([torch.ones(2, dtype=torch.complex64)])
    assert channels.read(framed([torch.ones([1] * 10)]))[1].tensors[0].dim() == 10


# ---- checkpoints ----


# Here there is one process, as torch says.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_holds_tensors_and_numbers(tmp_path):
    values = {
        "a": {0: {"step": torch.tensor(3.0), "rate": 0.1}, 1: (None, True, "x")},
        "b": [torch.ones(2, 3), {"c": []}],
    }
    save(tmp_path / "7", values)
    found = load(tmp_path / "7")
    assert torch.equal(found["b"][0], values["b"][0])
    assert torch.equal(found["a"][0]["step"], values["a"][0]["step"])
    found["b"][0] = values["b"][0] = found["a"][0]["step"] = values["a"][0]["step"] = None
    assert found == values
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_a_checkpoint_holds_nothing_to_be_unpickled(tmp_path):
    with pytest.raises(TypeError, match="must hold tensors and numbers, got function: .f"):
        save(tmp_path / "7", {"f": lambda: None})
    assert not (tmp_path / "7").exists()
