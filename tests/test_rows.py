"""Arrays appear whole or not at all, and a broken pass goes on where it stopped."""

import errno
import json
import os

import numpy as np
import pytest

from utils import rows as module
from utils.artifacts import meta_path
from utils.errors import UserError
from utils.rows import RowWriter, row_pieces

PIECES = row_pieces(9, 2)  # the last one is shorter


def writer_of(path, meta, pieces=PIECES, **options):
    arrays = {path: ((9, 3), "float32"), path.with_name("b.npy"): ((9,), "int32"), path.with_name("c.npy"): ((4, 9), "float32")}
    return RowWriter(arrays, meta, pieces, columns=[path.with_name("c.npy")], **options)


def fill(writer, path, count=None):
    for number, (start, stop) in writer.todo[:count]:
        values = np.arange(start, stop)
        blocks = {path: np.repeat(values[:, None], 3, axis=1), path.with_name("b.npy"): values}
        blocks[path.with_name("c.npy")] = values + 100 * np.arange(4)[:, None]
        writer.write(number, start, blocks)


def test_rows_and_columns_that_were_written_in_two_runs_equal_those_of_one(tmp_path):
    path = tmp_path / "a.npy"
    with pytest.raises(RuntimeError), writer_of(path, {"batch_size": 2}) as writer:
        fill(writer, path, 3)
        raise RuntimeError("power cut")
    assert not path.exists()
    with writer_of(path, {"batch_size": 2}) as writer:
        assert writer.todo == [[3, [6, 8]], [4, [8, 9]]]
        fill(writer, path)
    assert np.array_equal(np.load(path), np.repeat(np.arange(9.0)[:, None], 3, axis=1))
    assert np.array_equal(np.load(tmp_path / "b.npy"), np.arange(9)) and np.load(tmp_path / "b.npy").dtype == np.int32
    assert np.array_equal(np.load(tmp_path / "c.npy"), np.arange(9) + 100.0 * np.arange(4)[:, None])
    assert {file.name for file in tmp_path.iterdir()} == {f"{x}.{end}" for x in "abc" for end in ("npy", "meta.json")}
    assert json.loads(meta_path(path).read_text()) == {"batch_size": 2, "shape": [9, 3], "dtype": "float32"}


def test_what_belongs_to_another_run_is_refused_until_it_is_overwritten(tmp_path):
    path = tmp_path / "a.npy"
    with writer_of(path, {"seed": 2}) as writer:
        fill(writer, path, 2)
    with pytest.raises(UserError, match="other seed.*--overwrite"), writer_of(path, {"seed": 4}):
        pass
    with pytest.raises(UserError, match="other division into pieces"), writer_of(path, {"seed": 2}, row_pieces(9, 3)):
        pass
    with writer_of(path, {"seed": 4}, overwrite=True) as writer:
        assert len(writer.todo) == 5
        fill(writer, path)
    assert np.load(path)[8, 0] == 8


def test_a_disk_that_fails_while_the_pass_goes_on_ends_it_and_its_rows_do_not_count(tmp_path, monkeypatch):
    path, sync = tmp_path / "a.npy", os.fsync

    def failing(file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    with pytest.raises(UserError, match="a.npy cannot be written .Input/output error"), writer_of(path, {}) as writer:
        fill(writer, path, 1)
        writer.commit()  # these are safe
        monkeypatch.setattr(os, "fsync", failing)
        writer.todo = writer.todo[1:]
        fill(writer, path)
    monkeypatch.setattr(os, "fsync", sync)
    with writer_of(path, {}) as writer:
        assert [number for number, _ in writer.todo] == [1, 2, 3, 4]


def test_rows_of_another_precision_are_not_gone_on_with(tmp_path):
    path, pieces = tmp_path / "a.npy", row_pieces(4, 2)
    with RowWriter({path: ((4, 2), "float32")}, {}, pieces) as writer:
        writer.write(0, 0, {path: np.ones((2, 2))})
    with pytest.raises(UserError, match="other arrays"), RowWriter({path: ((4, 2), "float16")}, {}, pieces):
        pass


def test_a_file_that_another_pass_began_anew_is_not_gone_on_with(tmp_path):
    a, b, pieces = tmp_path / "a.npy", tmp_path / "b.npy", row_pieces(4, 1)
    both, one = {a: ((4,), "int32"), b: ((4,), "int32")}, {b: ((4,), "int32")}
    with RowWriter(both, {"layers": [8, 9]}, pieces) as writer:
        writer.write(0, 0, {a: np.ones(1), b: np.ones(1)})
    with RowWriter(one, {"layers": [9]}, pieces) as writer:
        writer.write(0, 0, {b: np.full(1, 2)})
    with RowWriter(both, {"layers": [8, 9]}, pieces) as writer:
        assert len(writer.todo) == 4


def test_a_pass_that_fails_before_its_first_row_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), writer_of(tmp_path / "a.npy", {}):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_what_broke_while_the_files_got_their_names_is_finished(tmp_path, monkeypatch):
    """The machine dies between the first file's name and the second's."""
    path = tmp_path / "a.npy"
    replace = os.replace

    def dies(source, target):
        if str(target).endswith("b.npy"):
            raise KeyboardInterrupt
        replace(source, target)

    with pytest.raises(KeyboardInterrupt), writer_of(path, {}) as writer:
        fill(writer, path)
        monkeypatch.setattr(module.os, "replace", dies)
    monkeypatch.setattr(module.os, "replace", replace)
    assert path.is_file() and not (tmp_path / "b.npy").is_file()
    with writer_of(path, {}) as writer:
        assert writer.todo == []
    assert np.array_equal(np.load(path)[:, 0], np.arange(9)) and np.array_equal(np.load(tmp_path / "b.npy"), np.arange(9))
    assert not list(tmp_path.glob("*.p*")) and len(list(tmp_path.iterdir())) == 6


def test_what_cannot_fit_on_the_disk_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="GB free"), RowWriter({tmp_path / "a.npy": ((10**12, 100), "float32")}, {}, []):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pieces", [2, 5])
def test_a_piece_that_could_not_be_written_ends_the_pass_and_does_not_count(tmp_path, monkeypatch, pieces):
    """Pieces are written in a thread; of the last one the error comes when the pass ends."""
    path, write = tmp_path / "a.npy", RowWriter._write_at
    rows_of_a = []

    def full(self, file, entry, values):
        if file == path:
            rows_of_a.append(entry)
            if len(rows_of_a) == pieces:
                raise OSError(errno.ENOSPC, "No space left on device")
        write(self, file, entry, values)

    monkeypatch.setattr(RowWriter, "_write_at", full)
    with pytest.raises(UserError, match="a.npy cannot be written .No space left"), writer_of(path, {}) as writer:
        fill(writer, path, pieces)
    assert not path.exists()
    monkeypatch.setattr(RowWriter, "_write_at", write)
    with writer_of(path, {}) as writer:
        assert [number for number, _ in writer.todo] == list(range(pieces - 1, 5))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system does not reserve room on the disk")
def test_room_for_all_rows_is_taken_before_the_first(tmp_path):
    path = tmp_path / "a.npy"
    with RowWriter({path: ((1000, 100), "float32")}, {}, row_pieces(1000, 10)):
        assert (tmp_path / "a.npy.partial").stat().st_blocks * 512 >= 400_000
