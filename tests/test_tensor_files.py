"""Tensors in files: what safetensors reads is what was written, and neither side ever holds all of it at once."""

import json
import os
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmssl.files import LazyTensors, Shape, TensorFile, digest, open_tensors, renamed, save_tensors

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3) / 7,
    "half": torch.tensor([[1.5], [float("inf")]], dtype=torch.float16),
    "brain": torch.tensor([3.0, float("nan")], dtype=torch.bfloat16),
    "scalar": torch.tensor(-(2**40)),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 4),
    "across": torch.arange(12.0).view(3, 4).T,
    "ünï/code": torch.tensor([1], dtype=torch.int32),
    "small": torch.tensor([[-1, 2]], dtype=torch.int8),
    "short": torch.tensor([300], dtype=torch.int16),
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_the_safetensors_reader_reads_every_type_and_shape(tmp_path):
    save_tensors(tmp_path / "x", TENSORS)
    assert_same(load_file(tmp_path / "x"), TENSORS)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert set(file.keys()) == set(TENSORS)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_bytes_of_weights_are_those_of_the_safetensors_writer(tmp_path):
    weights = {"b.weight": torch.randn(3, 5), "b.bias": torch.randn(3), "äh": torch.tensor(1.0)}
    save_tensors(tmp_path / "x", weights)
    save_file(weights, tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_every_tensor_lies_at_a_multiple_of_its_width(tmp_path):
    save_tensors(tmp_path / "x", TENSORS)
    data = (tmp_path / "x").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    assert not [name for name, at in header.items() if at["data_offsets"][0] % TENSORS[name].itemsize]


def test_the_order_of_writing_is_free(tmp_path):
    shapes = {name: Shape.of(tensor) for name, tensor in TENSORS.items()}
    with TensorFile(tmp_path / "x", shapes) as file:
        for name in sorted(TENSORS, reverse=True):
            file.write(name, TENSORS[name])
    assert_same(load_file(tmp_path / "x"), TENSORS)


def test_a_file_without_tensors_is_one(tmp_path):
    save_tensors(tmp_path / "x", {})
    assert load_file(tmp_path / "x") == {}


def test_another_shape_than_was_announced_is_our_mistake(tmp_path):
    with TensorFile(tmp_path / "x", {"a": Shape("F32", (2,))}) as file, pytest.raises(AssertionError, match="a"):
        file.write("a", torch.zeros(3))


def test_opened_tensors_are_as_those_in_memory(tmp_path):
    save_tensors(tmp_path / "x", TENSORS)
    lazy = open_tensors(tmp_path / "x")
    assert_same(lazy, TENSORS)
    assert {name: lazy.shape(name) for name in lazy} == {name: Shape.of(tensor) for name, tensor in TENSORS.items()}
    assert digest(lazy) == digest(TENSORS)
    names = {"a": "odd", "b": "odd", "c": "across"}
    assert_same(renamed(lazy, names), renamed(TENSORS, names))
    assert isinstance(renamed(lazy, names), LazyTensors)
    save_tensors(tmp_path / "y", lazy)
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


class Counted(LazyTensors):
    """Lazy tensors that count how many of them are alive at most."""

    def __init__(self, count):
        super().__init__({f"t{i}": (None, "") for i in range(count)})
        self.alive, self.most = weakref.WeakSet(), 0

    def shape(self, _name):
        return Shape("F32", (1000,))

    def __getitem__(self, _name):
        made = torch.zeros(1000)
        self.alive.add(Handle(made))
        self.most = max(self.most, len(self.alive))
        return made


class Handle:
    """Lives as long as a tensor does; tensors themselves are no keys."""

    def __init__(self, tensor):
        tensor.handle = self


def test_lazy_tensors_are_written_one_at_a_time(tmp_path):
    lazy = Counted(10)
    save_tensors(tmp_path / "x", lazy)
    assert lazy.most <= 2  # the loop lets go of one when it has the next
    digest(lazy)
    assert lazy.most <= 2
    assert (tmp_path / "x").stat().st_size > 10 * 4000
