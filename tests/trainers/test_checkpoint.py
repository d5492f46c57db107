import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank.trainers.checkpoint import CheckpointStore, DamagedCheckpointError, step_name, verify


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "trainer.pt").write_bytes(b"state")


def make(folder: Path, keep: int = 2, keep_best: bool = True) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", keep=keep, keep_best=keep_best)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def refuse(text: str) -> None:
    raise AssertionError(text)


def test_a_saved_checkpoint_is_whole(tmp_path: Path) -> None:
    store = make(tmp_path)
    folder = store.save(200, 3.5, write)
    assert folder.name == "step-00000200"
    found = store.newest(refuse)
    assert found is not None
    assert (found.step, found.val_loss, found.folder) == (200, 3.5, folder)
    assert names(store) == ["step-00000200"]


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    store = make(tmp_path)
    losses = {10: 5.0, 20: 3.0, 30: None, 40: 4.0, 50: 4.5, 60: float("nan")}
    for step, loss in losses.items():
        store.save(step, loss, write)
    assert names(store) == [step_name(20), step_name(50), step_name(60)]
    assert (best := store.best()) is not None
    assert best.step == 20
    without = make(tmp_path / "other", keep=1, keep_best=False)
    for step, loss in losses.items():
        without.save(step, loss, write)
    assert names(without) == [step_name(60)]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, remove, empty])
@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "manifest.json"])
def test_damage_is_named_and_passed_over(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    store = make(tmp_path)
    store.save(10, None, write)
    broken = store.save(20, None, write)
    damage(broken / name)
    with pytest.raises(DamagedCheckpointError, match=name):
        verify(broken)
    warnings: list[str] = []
    found = store.newest(warnings.append)
    assert found is not None
    assert found.step == 10
    assert len(warnings) == 1
    assert name in warnings[0]
    assert str(broken) in warnings[0]


def test_every_byte_of_the_manifest_matters(tmp_path: Path) -> None:
    folder = make(tmp_path).save(10, 2.5, write)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    meaning = json.loads(whole)
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            verify(folder)
        except ValueError:
            continue
        # Only white space may change unnoticed.
        assert json.loads(path.read_bytes()) == meaning


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    store = make(tmp_path)
    flip(store.save(10, None, write) / "trainer.pt")
    with pytest.raises(ValueError, match="every checkpoint"):
        store.newest(lambda text: None)
    assert make(tmp_path / "nothing").newest(refuse) is None


def test_a_write_that_fails_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.save(10, None, write)

    def fail(folder: Path) -> None:
        write(folder)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        store.save(20, None, fail)
    assert (found := store.newest(refuse)) is not None
    assert found.step == 10
    store.remove_leftovers()
    assert names(store) == [step_name(10)]


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    folder = make(tmp_path).save(10, None, write)
    other = folder.rename(folder.with_name(step_name(30)))
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
        verify(other)


def test_a_newer_format_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path).save(10, None, write)
    monkeypatch.setattr("lowrank.trainers.checkpoint.FORMAT", 0)
    with pytest.raises(ValueError, match="has format 1; this version reads 0"):
        verify(folder)


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    store = make(tmp_path)
    flip(store.save(10, None, write) / "trainer.pt")
    verify(store.save(10, None, write))
    assert names(store) == [step_name(10)]


def test_later_checkpoints_can_be_removed(tmp_path: Path) -> None:
    store = make(tmp_path, keep=5)
    for step in (10, 20, 30):
        store.save(step, None, write)
    assert [path.name for path in store.remove_after(10)] == [step_name(30), step_name(20)]
    assert names(store) == [step_name(10)]
