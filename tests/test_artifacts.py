"""What arrays are called, and what is checked when they are read."""

import numpy as np
import pytest

from utils.artifacts import Names, load_array, meta_path, model_name, pretrained_name, save_array
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
