"""Files appear whole or not at all, and a broken pass goes on where it stopped."""

import json

import numpy as np
import pytest

from utils.artifacts import ColumnWriter, Names, RowWriter, load_array, meta_path, model_name, pretrained_name, save_array
from utils.errors import UserError


def test_names_of_models_and_weights_in_file_names():
    assert model_name("ViT-B-32") == "ViT-B-32" and pretrained_name("ViT-B-32", "laion2b_s34b_b79k") == "laion2b_s34b_b79k"
    assert model_name("some/where/tiny.json") == "tiny"
    assert pretrained_name("tiny.json", "run/epoch_3.safetensors") == "epoch_3"
    assert pretrained_name("tiny.json", "weights.pt") == "weights"
    assert model_name("hf-hub:laion/CLIP-x") == "laion-CLIP-x" and pretrained_name("hf-hub:laion/CLIP-x", "openai") == "hf-hub"
    assert model_name("local-dir:./models/mine/") == "mine" and pretrained_name("local-dir:mine", "openai") == "local-dir"
    names = Names("out", "ViT-B-32", "openai")
    assert names.effects("imagenet", "train", 9, "merged").name == "imagenet_train_mlps_ViT-B-32_openai_9_merged.npy"
    assert names.statistics("imagenet", 9, "100_pca").name == "imagenet_train_mlps_ViT-B-32_openai_9_100_pca.npy"
    expected = "imagenet_mlps_ViT-B-32_openai_9_30k_decomposition_omp_1_128.json"
    assert names.decomposition("imagenet", 9, "30k", 1.0, 128).name == expected


def rows(path, meta, **options):
    return RowWriter({path: ((10, 3), "float32"), path.with_name("b.npy"): ((10,), "int32")}, meta, **options)


def fill(writer, path, first, last):
    for row in range(first, last, 2):
        values = np.arange(row, row + 2)
        writer.write(row, {path: np.repeat(values[:, None], 3, axis=1), path.with_name("b.npy"): values})


def test_rows_that_were_written_in_two_runs_equal_those_of_one(tmp_path):
    path = tmp_path / "a.npy"
    with pytest.raises(RuntimeError), rows(path, {"batch_size": 2}) as writer:
        fill(writer, path, 0, 6)
        raise RuntimeError("power cut")
    assert not path.exists()
    with rows(path, {"batch_size": 2}) as writer:
        assert writer.start == 6
        fill(writer, path, 6, 10)
    assert np.array_equal(np.load(path), np.repeat(np.arange(10.0)[:, None], 3, axis=1))
    assert np.array_equal(np.load(tmp_path / "b.npy"), np.arange(10)) and np.load(tmp_path / "b.npy").dtype == np.int32
    names = {"a.npy", "b.npy", "a.meta.json", "b.meta.json"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert json.loads(meta_path(path).read_text()) == {"batch_size": 2, "shape": [10, 3], "dtype": "float32"}


def test_what_belongs_to_another_run_is_refused_until_it_is_overwritten(tmp_path):
    path = tmp_path / "a.npy"
    with rows(path, {"batch_size": 2}) as writer:
        fill(writer, path, 0, 4)
    with pytest.raises(UserError, match="other batch_size.*--overwrite"):
        rows(path, {"batch_size": 4})
    with rows(path, {"batch_size": 4}, overwrite=True) as writer:
        assert writer.start == 0
        fill(writer, path, 0, 10)
    assert np.load(path)[9, 0] == 9


def test_rows_of_another_precision_are_not_gone_on_with(tmp_path):
    path = tmp_path / "a.npy"
    with RowWriter({path: ((4, 2), "float32")}, {}) as writer:
        writer.write(0, {path: np.ones((2, 2))})
    with pytest.raises(UserError, match="other arrays"):
        RowWriter({path: ((4, 2), "float16")}, {})


def test_a_file_that_another_pass_began_anew_is_not_gone_on_with(tmp_path):
    a, b = tmp_path / "a.npy", tmp_path / "b.npy"
    both, one = {a: ((4,), "int32"), b: ((4,), "int32")}, {b: ((4,), "int32")}
    with RowWriter(both, {"layers": [8, 9]}) as writer:
        writer.write(0, {a: np.ones(3), b: np.ones(3)})
    with RowWriter(one, {"layers": [9]}) as writer:
        writer.write(0, {b: np.full(1, 2)})
    assert RowWriter(both, {"layers": [8, 9]}).start == 0


def test_a_pass_that_fails_before_its_first_row_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), rows(tmp_path / "a.npy", {}):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_what_cannot_fit_on_the_disk_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="GB free"), RowWriter({tmp_path / "a.npy": ((10**12, 100), "float32")}, {}):
        pass
    assert not list(tmp_path.iterdir())


def test_columns_make_an_array(tmp_path):
    path, truth = tmp_path / "c.npy", np.random.default_rng(0).standard_normal((4, 7)).astype(np.float32)
    with ColumnWriter(path, (4, 7), {}) as writer:
        for start in (0, 3, 6):
            writer.write(start, truth[:, start : start + 3])
    assert np.array_equal(np.load(path), truth)
    with pytest.raises(RuntimeError), ColumnWriter(tmp_path / "d.npy", (4, 7), {}):
        raise RuntimeError
    assert not list(tmp_path.glob("d.npy*"))


def test_inputs_are_checked(tmp_path):
    path = tmp_path / "x.npy"
    with pytest.raises(UserError, match="missing; make it with: python make_x.py"):
        load_array(path, "python make_x.py")
    save_array(path, np.zeros((4, 5)), {"fingerprint": "aaa", "dataset": "imagenet"})
    assert load_array(path, "", (None, 5), fingerprint="aaa", dataset=None).shape == (4, 5)
    with pytest.raises(UserError, match="4 x 5 where any x 6 is needed"):
        load_array(path, "", (None, 6))
    with pytest.raises(UserError, match="fingerprint 'aaa'"):
        load_array(path, "", fingerprint="bbb")
    meta_path(path).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_array(path, "", fingerprint="aaa")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        load_array(path, "")
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        load_array(path, "")
