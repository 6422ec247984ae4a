"""Checkpoints: written whole or not at all, on every rank alike, and read again from the newest that is whole."""

import json
import shutil

import pytest
import torch

from mmssl import checkpoint
from mmssl.checkpoint import Checkpoint
from mmssl.distributed import Council, World, world
from mmssl.engine.deepspeed_setup import connect
from mmssl.errors import MmsslError, UserError
from mmssl.files import Shape
from mmssl.launch import run

ALONE, ALL = World(), 9


class Engine:
    """What a checkpoint asks of an engine."""

    def __init__(self, value=0.0, count=5):
        self.tensors = {f"param/{i}": torch.full((3, 2), value + i) for i in range(count)}
        self.yielded = []

    def layout(self):
        return {name: Shape.of(tensor) for name, tensor in self.tensors.items()}

    def state(self):
        for name, tensor in self.tensors.items():
            self.yielded.append(name)
            yield name, tensor


def save(folder, step, keep=ALL, engine=None, me=ALONE):
    return checkpoint.save(folder, engine or Engine(step), {"step": step}, me, Council(me.size), keep)


def test_it_holds_what_the_engine_yields_and_says_where(tmp_path):
    found = Checkpoint(save(tmp_path, 7))
    assert found.step == 7
    assert found.names() == list(Engine(7).tensors)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in Engine(7).tensors.items())
    with pytest.raises(UserError, match="holds no 'param/9'"):
        found.read("param/9")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_older_ones_go_when_the_new_one_is_whole(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["3", "2"]
    seen = []
    commit = checkpoint.commit_folder

    def look(*arguments):
        seen.append([path.name[-1] for path in checkpoint.checkpoints(tmp_path)])
        commit(*arguments)

    monkeypatch.setattr(checkpoint, "commit_folder", look)
    save(tmp_path, 4, keep=1)
    assert seen == [["3", "2"]]
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["4"]


def test_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 4)
    found = Checkpoint(save(tmp_path, 4, engine=Engine(100)))
    assert found.read("param/0")[0, 0] == 100
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


FAULTS = {
    "the folder": ("mmssl.checkpoint.Path.mkdir", 1),
    "a shard": ("mmssl.files.TensorFile.write", 2),
    "its end": ("os.fsync", 1),
    "the facts": ("mmssl.checkpoint.write_json", 1),
    "the renaming": ("mmssl.checkpoint.commit_folder", 1),
}


def full_disk(monkeypatch, what):
    """Let the n-th call of something fail as on a full disk."""
    target, number = FAULTS[what]
    module, _, name = target.rpartition(".")
    where = monkeypatch_target(module)
    whole, calls = getattr(where, name), [0]

    def full(*arguments, **options):
        calls[0] += 1
        if calls[0] == number:
            raise OSError(28, "No space left on device")
        return whole(*arguments, **options)

    monkeypatch.setattr(where, name, full)


def monkeypatch_target(path):
    import os

    from mmssl import files

    return {
        "mmssl.checkpoint.Path": checkpoint.Path,
        "mmssl.files.TensorFile": files.TensorFile,
        "os": os,
        "mmssl.checkpoint": checkpoint,
    }[path]


@pytest.mark.parametrize("what", FAULTS)
def test_a_full_disk_leaves_the_one_before(tmp_path, monkeypatch, what):
    save(tmp_path, 1)
    engine = Engine()
    with monkeypatch.context() as patch:
        full_disk(patch, what)
        with pytest.raises(MmsslError, match=r"00002: .* \(No space left on device\); earlier ones are untouched"):
            save(tmp_path, 2, keep=1, engine=engine)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    # Whatever failed, each tensor was gathered once: the other ranks are in step.
    assert engine.yielded == ([] if what == "the folder" else list(engine.tensors))
    assert checkpoint.newest(tmp_path)[0].step == 1
    assert Checkpoint(save(tmp_path, 2, keep=1)).step == 2


ON_ONE_RANK = [(0, "the folder"), (0, "the facts"), (0, "a shard"), (1, "a shard")]


def fails_on_one(folder):
    """On two ranks, for each fault on one of them: a checkpoint, and a second one with the fault."""
    me = world()
    connect(me, "cpu")
    council = Council(me.size)
    found = []
    for rank, what in ON_ONE_RANK:
        here = folder / f"{rank} {what}"
        save(here, 1, me=me)
        with pytest.MonkeyPatch.context() as patch:
            if me.rank == rank:
                full_disk(patch, what)
            try:
                save(here, 2, me=me)
                said = "nothing"
            except MmsslError as error:
                said = str(error)
        newest, notes = checkpoint.newest(here, me, council)
        same = all(torch.equal(newest.read(name), Engine(1).tensors[name]) for name in Engine().tensors)
        found.append((said, newest.step, len(notes), same))
    return found


@pytest.mark.distributed
def test_a_full_disk_on_one_rank_is_told_on_all(tmp_path):
    found = run(fails_on_one, (tmp_path,), 2)
    assert found[0] == found[1]
    for (rank, what), (said, *others) in zip(ON_ONE_RANK, found[0], strict=True):
        assert "No space left on device" in said, what
        assert others == [1, 0, True]
        folder = tmp_path / f"{rank} {what}"
        assert [path.name for path in folder.iterdir()] == ["step-00000001"]
        assert len(list((folder / "step-00000001").glob("shard-*"))) == 2


def reads(folder):
    """Open the newest on two ranks."""
    me = world()
    connect(me, "cpu")
    found, notes = checkpoint.newest(folder, me, Council(me.size))
    return found.step, notes


@pytest.mark.distributed
def test_what_one_rank_finds_damaged_no_rank_takes(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    # Of two shards the second is rank 1's to verify.
    path = tmp_path / "step-00000002"
    facts = json.loads((path / "checkpoint.json").read_text())
    shutil.copy(path / facts["shards"][0]["file"], path / "more")
    facts["shards"].append({"file": "more", "sha256": "0" * 64, "tensors": []})
    (path / "checkpoint.json").write_text(json.dumps(facts))
    found = run(reads, (tmp_path,), 2)
    assert found[0] == found[1]
    step, (note,) = found[0]
    assert step == 1
    assert "damaged (its checksum differs); trying the one before" in note


def test_what_is_left_of_an_unfinished_one_is_said_and_goes_with_the_next(tmp_path):
    save(tmp_path, 1)
    left = tmp_path / ".step-00000002.tmp"
    left.mkdir()
    (left / "shard-00000-of-00001.safetensors").write_bytes(b"half")
    found, notes = checkpoint.newest(tmp_path)
    assert found.step == 1
    assert len(notes) == 1
    assert "was not finished" in notes[0]
    save(tmp_path, 2)
    assert not left.exists()


@pytest.mark.parametrize("damage", ["no facts", "half of the facts", "another format", "no shard", "a flipped bit"])
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    facts, shard = path / "checkpoint.json", path / "shard-00000-of-00001.safetensors"
    if damage == "no facts":
        facts.unlink()
    elif damage == "half of the facts":
        facts.write_text(facts.read_text()[:40])
    elif damage == "another format":
        facts.write_text(facts.read_text().replace('"format": 1', '"format": 99'))
    elif damage == "no shard":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    found, (note,) = checkpoint.newest(tmp_path)
    assert found.step == 1
    assert "step-00000002" in note
    assert note.endswith("; trying the one before")
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(UserError, match=r"there is no checkpoint to resume from; .*step-00000002"):
        checkpoint.newest(tmp_path)
