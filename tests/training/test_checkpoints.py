"""A checkpoint that was cut short or changed is recognised, and the one before it is used."""

import json

import pytest
import torch

from openmsa.training.checkpoints import SEAL, damage, last_whole_checkpoint, seal, write_json


def make_checkpoint(folder, number):
    path = folder / f"checkpoint-{number}"
    (path / "inner").mkdir(parents=True)
    torch.save({"w": torch.arange(100.0) + number}, path / "weights.pt")
    (path / "inner" / "state.json").write_text(json.dumps({"step": number}))
    seal(path)
    return path


def cut(path):
    (path / "weights.pt").write_bytes((path / "weights.pt").read_bytes()[:-7])


def flip(path):
    content = bytearray((path / "weights.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "weights.pt").write_bytes(content)


def lose(path):
    (path / "inner" / "state.json").unlink()


def unseal(path):
    (path / SEAL).unlink()


def half_seal(path):
    (path / SEAL).write_text((path / SEAL).read_text()[:20])


@pytest.mark.parametrize("harm", [cut, flip, lose, unseal, half_seal])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(harm, tmp_path):
    before, newest = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    assert last_whole_checkpoint(tmp_path) == (newest, [])
    assert damage(newest) is None
    harm(newest)
    found, passed_over = last_whole_checkpoint(tmp_path)
    assert found == before
    assert len(passed_over) == 1 and "checkpoint-10" in passed_over[0]


def test_nothing_whole_is_none(tmp_path):
    (tmp_path / "checkpoint-x").mkdir()
    unseal(make_checkpoint(tmp_path, 1))
    found, passed_over = last_whole_checkpoint(tmp_path)
    assert found is None and len(passed_over) == 1


def test_json_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
