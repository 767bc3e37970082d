"""Arrays appear whole or not at all, and an interrupted pass resumes where it stopped."""

import errno
import json
import os

import numpy as np
import pytest
import torch

from utils.runtime import passes as module
from utils.runtime.arrays import ArrayFile
from utils.runtime.errors import UserError
from utils.runtime.passes import Pass, pieces_of
from utils.runtime.records import METHOD, load_record, record_path

PIECES = pieces_of(9, 2)  # the last one is shorter


def pass_of(path, record, pieces=PIECES, **options):
    b, c = path.with_name("b.npy"), path.with_name("c.npy")
    return Pass(
        {path: ((9, 3), "float32"), b: ((9,), "int32"), c: ((4, 9), "float32")}, record, pieces, **options
    )


def fill(work, path, count=None):
    """Write the next `count` pieces; returns the first rows of those that were to be done."""
    done = []
    for rows in work:
        if len(done) == count:
            break
        values = np.arange(rows.start, rows.stop)
        work[path][rows] = np.repeat(values[:, None], 3, axis=1)
        work[path.with_name("b.npy")][rows] = values
        work[path.with_name("c.npy")][:, rows] = values + 100 * np.arange(4)[:, None]
        done.append(rows.start)
    return done


class PowerCut(Exception):
    pass


def interrupted(path, record, count, **options):
    """A pass that ends in the middle, when `count` pieces are done."""
    with pytest.raises(PowerCut), pass_of(path, record, **options) as work:
        fill(work, path, count)
        raise PowerCut


def test_rows_and_columns_that_were_written_in_two_runs_equal_those_of_one(tmp_path):
    path = tmp_path / "a.npy"
    interrupted(path, {"seed": 2}, 3)
    assert not path.exists()
    with pass_of(path, {"seed": 2}) as work:
        assert fill(work, path) == [6, 8]
    assert np.array_equal(np.load(path), np.repeat(np.arange(9.0)[:, None], 3, axis=1))
    assert (
        np.array_equal(np.load(tmp_path / "b.npy"), np.arange(9))
        and np.load(tmp_path / "b.npy").dtype == np.int32
    )
    assert np.array_equal(np.load(tmp_path / "c.npy"), np.arange(9) + 100.0 * np.arange(4)[:, None])
    assert {file.name for file in tmp_path.iterdir()} == {
        f"{x}.{end}" for x in "abc" for end in ("npy", "meta.json")
    }
    record = json.loads(record_path(path).read_text())
    assert record == {"seed": 2, "method_number": METHOD, "shape": [9, 3], "dtype": "float32"}


def test_every_third_row_is_written_in_its_place(tmp_path):
    path = tmp_path / "a.npy"
    every = pieces_of(9, 2)
    every.rounds = [[slice(first, 9, 3) for first in range(3)]]
    with Pass({path: ((9, 2), "int32")}, {}, every) as work:
        for rows in work:
            work[path][rows] = np.arange(18).reshape(9, 2)[rows]
    assert np.array_equal(np.load(path), np.arange(18).reshape(9, 2))


def test_a_piece_whose_turn_is_interrupted_does_not_count(tmp_path):
    path = tmp_path / "a.npy"
    with pytest.raises(PowerCut), pass_of(path, {}) as work:
        for rows in work:
            work[path][rows] = np.full((rows.stop - rows.start, 3), 7)
            if rows.start == 4:
                raise PowerCut
    with pass_of(path, {}) as work:
        assert fill(work, path) == [4, 6, 8]


def test_a_finished_pass_is_skipped_and_made_again_only_when_asked(tmp_path):
    path = tmp_path / "a.npy"
    with pass_of(path, {"seed": 2}) as work:
        fill(work, path)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    with pass_of(path, {"seed": 2}, pieces_of(9, 2, batch_size=3)) as work:  # a setting of resumption only
        assert work.finished and fill(work, path) == []
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    with pass_of(path, {"seed": 2}, overwrite=True) as work:
        assert fill(work, path) == [0, 2, 4, 6, 8]


def test_a_finished_result_of_something_else_is_never_replaced_without_being_asked(tmp_path):
    path = tmp_path / "a.npy"
    with pass_of(path, {"seed": 2, "data": "x"}) as work:
        fill(work, path)
    content = path.read_bytes()
    with (
        pytest.raises(UserError, match="a.npy is there, made with other seed; .*--overwrite"),
        pass_of(path, {"seed": 3, "data": "x"}),
    ):
        pass
    arrays = {path: ((9, 4), "float32")}
    with (
        pytest.raises(UserError, match="made with other shape"),
        Pass(arrays, {"seed": 2, "data": "x"}, PIECES),
    ):
        pass
    record_path(path).unlink()  # as the published code leaves it
    with (
        pytest.raises(UserError, match="made by another program.*--overwrite"),
        pass_of(path, {"seed": 2, "data": "x"}),
    ):
        pass
    assert path.read_bytes() == content and not list(tmp_path.glob("*.partial"))
    with pass_of(path, {"seed": 3, "data": "x"}, overwrite=True) as work:
        fill(work, path)
    assert load_record(path)["seed"] == 3


def test_a_result_that_another_run_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    """What the evaluation keeps until it has graded goes away while a second start looks at it."""
    path = tmp_path / "a.npy"
    with pass_of(path, {"seed": 2}) as work:
        fill(work, path)

    def remove_and_load(path):
        for file in (path, record_path(path)):
            file.unlink(missing_ok=True)
        return load_record(path)

    monkeypatch.setattr("utils.runtime.records.load_record", remove_and_load)
    with pass_of(path, {"seed": 2}) as work:
        assert fill(work, path) == [0, 2, 4, 6, 8]


def test_results_of_older_mathematics_are_made_again(tmp_path):
    path = tmp_path / "a.npy"
    with pass_of(path, {"seed": 2}) as work:
        fill(work, path)
    for older in ({}, {"method_number": METHOD - 1}):
        record = load_record(path)
        record.pop("method_number")
        record_path(path).write_text(json.dumps(record | older))
        with pass_of(path, {"seed": 2}) as work:
            assert not work.finished and fill(work, path) == [0, 2, 4, 6, 8]
        assert load_record(path)["method_number"] == METHOD


def test_a_finished_array_that_was_cut_off_is_made_again(tmp_path):
    path = tmp_path / "a.npy"
    with pass_of(path, {}) as work:
        fill(work, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pass_of(path, {}) as work:
        assert len(fill(work, path)) == 5
    assert path.read_bytes() == whole


def test_what_belongs_to_another_run_is_refused_until_it_is_overwritten(tmp_path):
    path = tmp_path / "a.npy"
    interrupted(path, {"seed": 2}, 2)
    with pytest.raises(UserError, match="other seed.*--overwrite"), pass_of(path, {"seed": 4}):
        pass
    with (
        pytest.raises(UserError, match="other division into pieces"),
        pass_of(path, {"seed": 2}, pieces_of(9, 3)),
    ):
        pass
    with (
        pytest.raises(UserError, match="other batch_size"),
        pass_of(path, {"seed": 2}, pieces_of(9, 2, batch_size=2)),
    ):
        pass
    with pass_of(path, {"seed": 4}, overwrite=True) as work:
        assert len(fill(work, path)) == 5
    assert np.load(path)[8, 0] == 8
    assert len(list(tmp_path.iterdir())) == 6  # nothing of the other run is left


def test_a_disk_that_fails_in_the_middle_ends_the_pass_and_its_rows_do_not_count(tmp_path, monkeypatch):
    path, sync = tmp_path / "a.npy", os.fsync

    def failing(file):
        raise OSError(errno.EIO, "Input/output error")

    interrupted(path, {}, 1)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(os, "fsync", failing)
    with (
        pytest.raises(UserError, match="a.npy cannot be written .Input/output error"),
        pass_of(path, {}) as work,
    ):
        fill(work, path)
    monkeypatch.setattr(os, "fsync", sync)
    with pass_of(path, {}) as work:
        assert fill(work, path) == [2, 4, 6, 8]


def test_rows_of_another_precision_are_not_resumed(tmp_path):
    path, pieces = tmp_path / "a.npy", pieces_of(4, 2)
    with pytest.raises(PowerCut), Pass({path: ((4, 2), "float32")}, {}, pieces) as work:
        for rows in work:
            if rows.start:
                raise PowerCut
            work[path][rows] = np.ones((2, 2))
    with pytest.raises(UserError, match="other arrays"), Pass({path: ((4, 2), "float16")}, {}, pieces):
        pass


def test_progress_that_says_more_than_this_pass_does_is_not_left_behind(tmp_path):
    """As an earlier version wrote it: a run from scratch would leave its files beside the result."""
    path = tmp_path / "a.npy"
    interrupted(path, {"seed": 2}, 2, pieces=pieces_of(9, 2, layers=[8]))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match="belongs to a run with other layers"), pass_of(path, {"seed": 2}):
        pass
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_passes_that_share_an_array_do_not_disturb_each_other(tmp_path):
    """One of layers 8 and 9 is interrupted, one of layer 9 alone is finished, the former is resumed."""
    a, b = tmp_path / "a.npy", tmp_path / "b.npy"
    both, one = {a: ((4,), "int32"), b: ((4,), "int32")}, {b: ((4,), "int32")}

    def write(work, files, stop):
        done = []
        for rows in work:
            if rows.start == stop:
                raise PowerCut
            for file in files:
                work[file][rows] = np.full(1, rows.start)
            done.append(rows.start)
        return done

    with pytest.raises(PowerCut), Pass(both, {"seed": 1}, pieces_of(4, 1, layers=[8, 9])) as work:
        write(work, both, 2)
    with Pass(one, {"seed": 1}, pieces_of(4, 1, layers=[9])) as work:
        assert write(work, one, None) == [0, 1, 2, 3]
    with Pass(both, {"seed": 1}, pieces_of(4, 1, layers=[8, 9])) as work:
        assert write(work, both, None) == [2, 3]
    assert np.load(a).tolist() == np.load(b).tolist() == [0, 1, 2, 3]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_pass_that_fails_before_its_first_row_leaves_nothing(tmp_path):
    with pytest.raises(PowerCut), pass_of(tmp_path / "a.npy", {}):
        raise PowerCut
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_death_while_the_files_get_their_names_loses_nothing(tmp_path, monkeypatch, overwrite):
    """The machine dies between the first file's name and the second's; never does an array stand beside a
    record of another.
    """
    path, replace = tmp_path / "a.npy", os.replace
    if overwrite:
        with pass_of(path, {"seed": 1}) as work:
            fill(work, path)

    def dies(source, target):
        if str(target).endswith("b.npy"):
            raise KeyboardInterrupt
        replace(source, target)

    with pytest.raises(KeyboardInterrupt), pass_of(path, {"seed": 2}, overwrite=overwrite) as work:
        fill(work, path)
        monkeypatch.setattr(os, "replace", dies)
    monkeypatch.setattr(os, "replace", replace)
    assert load_record(path)["seed"] == 2 and not (tmp_path / "b.npy").is_file()
    if overwrite:  # c.npy is still of the older run, with its record
        assert load_record(tmp_path / "c.npy")["seed"] == 1
        return
    with pass_of(path, {"seed": 2}) as work:
        assert fill(work, path) == []
    assert np.array_equal(np.load(path)[:, 0], np.arange(9)) and np.array_equal(
        np.load(tmp_path / "b.npy"), np.arange(9)
    )
    assert not list(tmp_path.glob("*.p*")) and len(list(tmp_path.iterdir())) == 6


def test_what_cannot_fit_on_the_disk_is_refused_before_any_work(tmp_path):
    with (
        pytest.raises(UserError, match="GB free"),
        Pass({tmp_path / "a.npy": ((10**12, 100), "float32")}, {}, pieces_of(0, 1)),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pieces", [2, 5])
def test_a_piece_that_could_not_be_written_ends_the_pass_and_does_not_count(tmp_path, monkeypatch, pieces):
    """Pieces are written in a thread; the error of the last one comes when the pass ends."""
    path, write = tmp_path / "a.npy", ArrayFile._write_at
    rows_of_a = []

    def full(self, entry, values):
        if self.path == path:
            rows_of_a.append(entry)
            if len(rows_of_a) == pieces:
                raise OSError(errno.ENOSPC, "No space left on device")
        write(self, entry, values)

    monkeypatch.setattr(ArrayFile, "_write_at", full)
    with pytest.raises(UserError, match="a.npy cannot be written .No space left"), pass_of(path, {}) as work:
        fill(work, path, pieces)
    assert not path.exists()
    monkeypatch.setattr(ArrayFile, "_write_at", write)
    with pass_of(path, {}) as work:
        assert fill(work, path) == [2 * i for i in range(pieces - 1, 5)]


@pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"), reason="this system does not reserve room on the disk"
)
def test_room_for_all_rows_is_taken_before_the_first(tmp_path):
    path = tmp_path / "a.npy"
    with pytest.raises(PowerCut), Pass({path: ((1000, 100), "float32")}, {}, pieces_of(1000, 10)):
        [partial] = tmp_path.glob("a.npy.*.partial")
        assert partial.stat().st_blocks * 512 >= 400_000
        raise PowerCut


@pytest.mark.parametrize(
    ("index", "block", "said"),
    [
        (slice(0, 2), np.ones((2, 2)), r"has the shape \(2, 3\), and the block \(2, 2\)"),
        (slice(0, 2), np.ones((3, 3)), r"\(2, 3\), and the block \(3, 3\)"),
        (slice(0, 2), np.ones(6), r"\(2, 3\), and the block \(6,\)"),
        (slice(0, 2), torch.ones(2, 3, 1), r"\(2, 3\), and the block \(2, 3, 1\)"),
        (slice(8, 10), np.ones((2, 3)), r"\(1, 3\), and the block \(2, 3\)"),
        ((slice(None), slice(0, 2)), np.ones((2, 9)), r"\(9, 2\), and the block \(2, 9\)"),
        (slice(0, 2), np.ones((2, 3), np.complex64), "holds float32, and the block complex64"),
        (slice(0, 2), np.array([["a", "b", "c"]] * 2), "holds float32, and the block <U1"),
    ],
)
def test_a_block_that_does_not_fit_its_rows_is_refused_before_a_byte_is_written(tmp_path, index, block, said):
    path = tmp_path / "a.npy"
    with pytest.raises(ValueError, match=said), Pass({path: ((9, 3), "float32")}, {}, PIECES) as work:
        for rows in work:
            if rows.start == 4:
                work[path][index] = block
            work[path][rows] = np.full((rows.stop - rows.start, 3), 7)
    with Pass({path: ((9, 3), "float32")}, {}, PIECES) as work:
        for rows in work:
            work[path][rows] = np.full((rows.stop - rows.start, 3), 7)
    assert (np.load(path) == 7).all()


@pytest.mark.parametrize("block", [np.ones(2), torch.ones(2), torch.ones(2, dtype=torch.bfloat16)])
def test_fractions_are_not_cut_to_whole_numbers(tmp_path, block):
    path = tmp_path / "a.npy"
    with (
        pytest.raises(ValueError, match="holds int32, and the block float"),
        Pass({path: ((2,), "int32")}, {}, pieces_of(2, 2)) as work,
    ):
        work[path][0:2] = block


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_of_other_precisions_are_converted(tmp_path, dtype):
    path = tmp_path / "a.npy"
    with Pass({path: ((2,), "float32")}, {}, pieces_of(2, 2)) as work:
        for rows in work:
            work[path][rows] = torch.tensor([1, 3], dtype=dtype)
    assert np.load(path).tolist() == [1, 3] and np.load(path).dtype == np.float32


@pytest.mark.parametrize("name", ["a[1].npy", "[ab]*?.npy", "a.0123456789ab.b.npy", "{x}.npy", "ü.npy"])
def test_names_are_names_and_no_patterns(tmp_path, name):
    path, other = tmp_path / name, tmp_path / "a1.npy"
    interrupted(other, {"seed": 1}, 2)
    before = {file.name for file in tmp_path.iterdir()}
    with pytest.raises(PowerCut), Pass({path: ((9,), "float32")}, {}, PIECES) as work:
        for rows in work:
            if rows.start == 4:
                raise PowerCut
            work[path][rows] = np.arange(rows.start, rows.stop)
    with Pass({path: ((9,), "float32")}, {}, PIECES) as work:
        rest = [
            rows.start for rows in work if not work[path].__setitem__(rows, np.arange(rows.start, rows.stop))
        ]
    assert rest == [4, 6, 8] and np.load(path).tolist() == list(range(9))
    assert {file.name for file in tmp_path.iterdir()} == before | {name, record_path(path).name}


def test_what_is_not_complete_is_not_taken_for_a_result(tmp_path):
    path = tmp_path / "a.npy"
    with (
        pytest.raises(UserError, match="a.npy is not complete; run the same command again"),
        pass_of(path, {}) as work,
    ):
        fill(work, path, 2)
    assert not path.exists()
    with pass_of(path, {}) as work:
        assert fill(work, path) == [4, 6, 8]


class Photos(list):
    """Rows that know what each of them is made from."""

    @property
    def digests(self):
        return [f"{ord(letter):016x}" for letter in self]


@pytest.mark.parametrize(
    ("changed", "resumed"), [("abcdeFghi", True), ("Abcdefghi", False), ("abcdefgh", False)]
)
def test_rows_that_changed_since_count_where_their_piece_is_done(tmp_path, changed, resumed):
    """A damaged image is repaired: what was made from the others stays."""
    path = tmp_path / "a.npy"

    def run(photos, stop=None):
        arrays, pieces = {path: ((len(photos),), "int32")}, pieces_of(Photos(photos), 2)
        with Pass(arrays, {"data": f"of {photos}"}, pieces) as work:
            for rows in work:
                if rows.start == stop:
                    raise PowerCut
                work[path][rows] = np.array([ord(letter) for letter in photos[rows]])

    with pytest.raises(PowerCut):
        run("abcdefghi", 4)
    if resumed:
        run(changed)
        assert "".join(map(chr, np.load(path))) == changed and load_record(path)["data"] == f"of {changed}"
        return
    with pytest.raises(UserError, match="belongs to a run with other data"):
        run(changed)
    run("abcdefghi")
    assert "".join(map(chr, np.load(path))) == "abcdefghi"


# state and scratch


def sum_up(path, stop=None, where="between"):
    """A pass that sums the numbers 0 to 8 in its state, and keeps their squares in a scratch array."""
    arrays, state, scratch = {path: ((9,), "float32")}, {"sum": ((1,), "int64")}, {"squares": ((9,), "int64")}
    with Pass(arrays, {}, PIECES, state=state, scratch=scratch) as work:
        for rows in work:
            if rows.start == stop and where == "before":
                raise PowerCut
            numbers = np.arange(rows.start, rows.stop)
            work.state["sum"] += numbers.sum()
            work.scratch["squares"].array[rows] = numbers**2
            if rows.start == stop and where == "after":
                raise PowerCut
            work[path][rows] = numbers
        [total] = work.gather(["sum"])["sum"]
        [squares] = work.gather_scratch("squares")
        found = int(total[0]), squares.tolist()
        del squares
    return found


def save_at_once(monkeypatch):
    """Progress is saved after every piece."""
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(module, "COMMIT_SHARE", 1e9)


@pytest.mark.parametrize("commit", [0, 1000])
@pytest.mark.parametrize("where", ["before", "after"])
def test_the_state_of_an_interrupted_turn_is_not_counted_twice(tmp_path, monkeypatch, where, commit):
    save_at_once(monkeypatch)
    monkeypatch.setattr(module, "COMMIT_SECONDS", commit)
    for stop in (4, 6):
        with pytest.raises(PowerCut):
            sum_up(tmp_path / "a.npy", stop, where)
    assert sum_up(tmp_path / "a.npy") == (36, [i**2 for i in range(9)])
    assert {file.name for file in tmp_path.iterdir()} == {"a.npy", "a.meta.json"}


def test_a_damaged_record_of_the_progress_costs_the_progress_and_nothing_else(tmp_path, monkeypatch):
    save_at_once(monkeypatch)
    with pytest.raises(PowerCut):
        sum_up(tmp_path / "a.npy", 6, "before")
    [progress] = tmp_path.glob("*.progress.0")
    progress.write_bytes(progress.read_bytes()[:100])
    assert sum_up(tmp_path / "a.npy") == (36, [i**2 for i in range(9)])


def test_a_scratch_array_that_is_cut_off_is_refused(tmp_path, monkeypatch):
    save_at_once(monkeypatch)
    with pytest.raises(PowerCut):
        sum_up(tmp_path / "a.npy", 6, "before")
    [scratch] = tmp_path.glob("*.squares.0")
    os.truncate(scratch, 8)
    with pytest.raises(
        UserError, match="squares.0 of an interrupted run is missing or cut off; add --overwrite"
    ):
        sum_up(tmp_path / "a.npy")
