"""A damaged file of a checkpoint is noticed before it is loaded."""

import json
import logging
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from qlora_exp.training.checkpoints import checkpoint_to_resume, damaged_file, is_complete, seal
from qlora_exp.utils.errors import ConfigError

FILES = (
    "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
    "trainer_state.json",
)  # fmt: skip


def make(folder, sealed=True, best=None):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": torch.rand(99), "b": torch.zeros(0)}, folder / "adapter_model.safetensors", {"format": "pt"})
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt"):
        torch.save({"values": torch.rand(999)}, folder / name)
    state = {"global_step": int(folder.name[11:]), "best_model_checkpoint": best and str(best)}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if sealed:
        seal(folder)
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def garbage(file):
    file.write_bytes(bytes(range(256)) * 40)


def longer(file):
    file.write_bytes(file.read_bytes() + b"more")


def changed(file):
    """Change bytes in the middle, as a bad disk does: the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def gone(file):
    file.unlink()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, empty, garbage, changed, gone])
def test_any_damaged_file_is_noticed(name, damage, tmp_path):
    folder = make(tmp_path / "checkpoint-1")
    assert (damaged_file(folder), is_complete(folder)) == (None, True)
    damage(folder / name)
    assert damaged_file(folder) == name


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("damage", [cut, empty, garbage])
def test_truncated_file_is_noticed_in_a_checkpoint_of_others(name, damage, tmp_path):
    folder = make(tmp_path / "checkpoint-1", sealed=False)
    assert damaged_file(folder) is None
    damage(folder / name)
    assert damaged_file(folder) == name
    assert not is_complete(folder)


def test_checkpoint_whose_sealing_was_killed_is_sealed_when_training_resumes(tmp_path):
    folder = make(tmp_path / "checkpoints" / "checkpoint-1", sealed=False)
    (folder / ".qlora_exp.0123456789abcdef.part").write_text('{"half')
    config = SimpleNamespace(
        refusal=lambda _: None, training=SimpleNamespace(resume_from_checkpoint=None, load_best_model_at_end=False)
    )
    assert checkpoint_to_resume(config, tmp_path, resumed=True) == folder
    assert not list(folder.glob(".*"))
    changed(folder / "adapter_model.safetensors")
    assert damaged_file(folder) == "adapter_model.safetensors"


@pytest.mark.parametrize("sealed", [True, False])
def test_no_damage_to_the_directory_of_a_zip_file_raises_an_error(sealed, tmp_path):
    folder = make(tmp_path / "checkpoint-1", sealed)
    file = folder / "scheduler.pt"
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        begin = archive.start_dir
    noticed = 0
    positions = range(begin, len(whole), 3)
    for position in positions:
        file.write_bytes(whole[:position] + b"\xf5" + whole[position + 1 :])
        noticed += damaged_file(folder) == "scheduler.pt"
    assert noticed == len(positions) if sealed else noticed


@pytest.mark.parametrize("text", ["[]", "{", "null", '{"optimizer.pt": 3}', "\0"])
def test_damaged_digests_stop_nothing(text, tmp_path):
    folder = make(tmp_path / "checkpoint-1")
    (folder / "qlora_exp_digests.json").write_text(text)
    assert damaged_file(folder) is None


def config(checkpoint=None, best=False):
    training = SimpleNamespace(resume_from_checkpoint=checkpoint, load_best_model_at_end=best)
    return SimpleNamespace(training=training, refusal=lambda _: None)


def test_newest_checkpoint_without_damage_is_used(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    folders = [make(tmp_path / "checkpoints" / f"checkpoint-{step}") for step in (2, 4, 10)]
    assert checkpoint_to_resume(config(), tmp_path, True) == folders[2]
    assert not caplog.records
    changed(folders[2] / "optimizer.pt")
    assert checkpoint_to_resume(config(), tmp_path, True) == folders[1]
    assert caplog.messages == [f"missing or damaged: checkpoint-10/optimizer.pt; training resumes from {folders[1]}"]
    elsewhere = shutil.copytree(tmp_path / "checkpoints", tmp_path / "other" / "checkpoints")
    for folder in folders[:2]:
        empty(folder / "scheduler.pt")
    caplog.clear()
    assert checkpoint_to_resume(config(), tmp_path, True) is None
    assert caplog.messages == [
        "missing or damaged: checkpoint-10/optimizer.pt, checkpoint-4/scheduler.pt, checkpoint-2/scheduler.pt; "
        "training starts over"
    ]
    for configured in (elsewhere.parent, elsewhere, elsewhere / "checkpoint-4"):
        assert checkpoint_to_resume(config(str(configured)), tmp_path, True) == elsewhere / "checkpoint-4"
    with pytest.raises(ConfigError, match="is complete; missing or damaged: checkpoint-10/optimizer.pt"):
        checkpoint_to_resume(config(str(elsewhere / "checkpoint-10")), tmp_path, False)


def test_checkpoint_whose_best_one_is_damaged_is_not_used(tmp_path):
    first = make(tmp_path / "checkpoints" / "checkpoint-2")
    best = make(tmp_path / "checkpoints" / "checkpoint-4", best=first)
    last = make(tmp_path / "checkpoints" / "checkpoint-6", best=best)
    garbage(best / "adapter_model.safetensors")
    assert checkpoint_to_resume(config(), tmp_path, True) == last
    assert checkpoint_to_resume(config(best=True), tmp_path, True) == first
    shutil.rmtree(best)
    assert checkpoint_to_resume(config(best=True), tmp_path, True) == first


def test_zip_file_with_a_wrong_checksum_is_damaged(tmp_path):
    folder = make(tmp_path / "checkpoint-1", sealed=False)
    with zipfile.ZipFile(folder / "optimizer.pt") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = (folder / "optimizer.pt").read_bytes()
    at = largest.header_offset + 1000
    (folder / "optimizer.pt").write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
    assert damaged_file(folder) == "optimizer.pt"
    assert is_complete(folder)  # a quick check does not read it
