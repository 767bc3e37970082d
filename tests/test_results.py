"""What results are called, and what is checked when they are read."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from utils.runtime.artifacts import ARTIFACTS
from utils.runtime.errors import UserError
from utils.runtime.records import record_path, save_array
from utils.runtime.results import Results, model_name, pretrained_name

NAMES = {
    "dataset": "imagenet",
    "split": "val",
    "layer": 9,
    "k": 100,
    "texts": "30k",
    "components": 128,
    "alpha": 1.0,
}


def test_names_of_models_and_weights_in_file_names():
    assert (
        model_name("ViT-B-32") == "ViT-B-32"
        and pretrained_name("ViT-B-32", "laion2b_s34b_b79k") == "laion2b_s34b_b79k"
    )
    assert model_name("some/where/tiny.json") == "tiny"
    assert pretrained_name("tiny.json", "run/epoch_3.safetensors") == "epoch_3"
    assert pretrained_name("tiny.json", "weights.pt") == "weights"
    assert (
        model_name("hf-hub:laion/CLIP-x") == "laion-CLIP-x"
        and pretrained_name("hf-hub:laion/CLIP-x", "openai") == "hf-hub"
    )
    assert (
        model_name("local-dir:./models/mine/") == "mine"
        and pretrained_name("local-dir:mine", "openai") == "local-dir"
    )


@pytest.mark.parametrize(
    ("kind", "more", "name"),
    [
        ("representations", {}, "imagenet_val_representations_ViT-B-32_openai.npy"),
        ("classes", {}, "imagenet_val_classes.npy"),
        ("classifier", {}, "imagenet_classifier_ViT-B-32_openai.npy"),
        ("merged", {"split": "train"}, "imagenet_train_mlps_ViT-B-32_openai_9_merged.npy"),
        ("pca", {"split": "train"}, "imagenet_train_mlps_ViT-B-32_openai_9_100_pca.npy"),
        ("ablations", {"layer": [8, 9]}, "imagenet_val_ablations_ViT-B-32_openai_8-9_100.json"),
        (
            "ablations",
            {"train_dataset": "CIFAR10"},
            "imagenet_val_ablations_CIFAR10_ViT-B-32_openai_9_100.json",
        ),
        ("texts", {}, "30k_ViT-B-32_openai.npy"),
        ("decomposition", {}, "imagenet_mlps_ViT-B-32_openai_9_30k_decomposition_omp_1.0_128.json"),
        (
            "decomposition",
            {"normalise": "axis"},
            "imagenet_mlps_ViT-B-32_openai_9_30k_decomposition_omp_1.0_128.json",
        ),
        (
            "decomposition",
            {"normalise": "text"},
            "imagenet_mlps_ViT-B-32_openai_9_30k_decomposition_omp_1.0_128_text.json",
        ),
        (
            "decomposition",
            {"alpha": 0.5},
            "imagenet_mlps_ViT-B-32_openai_9_30k_decomposition_omp_0.5_128.json",
        ),
    ],
)
def test_file_names(kind, more, name):
    assert Results("out", "ViT-B-32", "openai").path(kind, **{**NAMES, **more}) == Path("out") / name


def test_statistics_are_of_the_train_split():
    names = {key: value for key, value in NAMES.items() if key != "split"}
    assert Results("out", "M", "P").path("mean", **names).name == "imagenet_train_mlps_M_P_9_mean.npy"


def test_arrays_have_the_shapes_of_the_table():
    results = Results("out", "M", "P")
    sizes = {"images": 5, "K": 36, "N": 3072, "D": 512, "e": 64, "k": 100, "layers": 2}
    arrays = results.arrays(["coefficients", "top_images", "predictions", "values"], sizes, **NAMES)
    shapes = [
        ((5, 36, 3072), "float32"),
        ((3072, 100), "int32"),
        ((5, 2, 5), "int32"),
        ((36, 3072, 64), "float32"),
    ]
    assert list(arrays.values()) == shapes
    assert list(results.arrays(["coefficients"], sizes, {"coefficients": "float16"}, **NAMES).values()) == [
        ((5, 36, 3072), "float16")
    ]


def test_commands_repeat_what_is_known_and_quote_it():
    results = Results("my results", "ViT-B-32", "a b/weights.pt", data_path="/data/мои фото", split=None)
    words = shlex.split(results.command("coefficients", dataset="folder", split="train", layer=[8, 9]))
    assert words[:2] == ["python", "compute_second_order_neuron_prs.py"]
    flags = " ".join(words[2:]).split(" --")
    expected = {
        "mlp_layer 8 9",
        "dataset folder",
        "split train",
        "data_path /data/мои фото",
        "output_dir my results",
    }
    assert expected | {"model ViT-B-32", "pretrained a b/weights.pt"} == {
        flag.removeprefix("--") for flag in flags
    }
    unknown = Results("out", "M", "P")
    assert "--data_path DATA_PATH" in unknown.command("coefficients", dataset="imagenet", layer=9)
    assert "DATA_PATH" not in unknown.command(
        "classifier", dataset="imagenet"
    )  # its class names need no images
    assert "DATA_PATH" in unknown.command("classifier", dataset="CIFAR10")
    assert unknown.command("merged", **NAMES).split().count("--merged") == 1
    assert "--keep top --top_k_pca 100" in unknown.command("top_images", **NAMES)
    assert "--normalise" not in unknown.command("decomposition", **NAMES, normalise="axis")
    assert "--normalise text" in unknown.command("decomposition", **NAMES, normalise="text")


def test_inputs_are_checked(tmp_path):
    results = Results(tmp_path, "M", "P")
    path, names = (
        results.path("mean", dataset="imagenet", layer=9),
        {"dataset": "imagenet", "layer": 9, "k": 5},
    )
    command = "python compute_pcas.py --dataset imagenet --mlp_layer 9 --top_k_pca 5 --model M --pretrained P"
    command += f" --output_dir {tmp_path}"
    with pytest.raises(UserError) as error:
        results.load("mean", **names)
    assert str(error.value) == f"{path} is missing; make it with: {command}"
    save_array(path, np.zeros((4, 5)), {"fingerprint": "aaa", "data": "x"})
    assert results.load("mean", {"D": 5}, {"fingerprint": "aaa", "data": None}, **names).shape == (4, 5)
    assert results.load("mean", {}, {"coefficient": 100.0}, **names).shape == (
        4,
        5,
    )  # the record does not know of it
    again = re.escape(f"make it again with: {command} --overwrite")
    with pytest.raises(UserError, match=f"4 x 5 where any x 6 is needed.*{again}"):
        results.load("mean", {"D": 6}, **names)
    with pytest.raises(UserError, match=f"fingerprint 'aaa', and here it is 'bbb'; {again}"):
        results.load("mean", {}, {"fingerprint": "bbb"}, **names)
    record_path(path).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        results.load("mean", {}, {"fingerprint": "aaa"}, **names)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"cannot be read .*{again}"):
        results.load("mean", **names)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        results.load("mean", **names)


def test_numbers_that_are_none_are_named(tmp_path):
    results, names = Results(tmp_path, "M", "P"), {"dataset": "imagenet", "layer": 9, "k": 5}
    for wrong in (np.nan, np.inf, -np.inf):
        array = np.zeros((4, 5), np.float32)
        array[2, 3] = array[3, 0] = wrong
        np.save(results.path("mean", **names), array)
        with pytest.raises(UserError, match="mean.npy would hold NaN or infinity"):
            save_array(results.path("mean", **names), array, {})
        with pytest.raises(
            UserError,
            match=r"mean.npy holds NaN or infinity, first at \[2, 3\]; make it again with: .*compute_pcas",
        ):
            results.load("mean", **names)


def test_an_array_and_its_record_are_saved_together_or_not_at_all(tmp_path):
    class Unwritable:
        shape, dtype = (2,), np.dtype("float32")

        def __array__(self, *arguments, **options):
            raise OSError("no")

    path = tmp_path / "x.npy"
    save_array(path, np.ones(2), {"seed": 1})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(OSError, match="no"):
        save_array(path, Unwritable(), {"seed": 2})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def table_of_files():
    """The lines of the table in docs/files.md, from the code's own."""
    fields = {
        "dataset": "DS",
        "split": "SPLIT",
        "clip": "M_P",
        "layer": "LAYER",
        "k": "k",
        "texts": "NAME",
        "file": "FILE",
    }
    fields |= {
        "control": "0",
        "row": "ROW",
        "alpha": "ALPHA",
        "components": "S",
        "source": "",
        "variant": "",
        "judge": "",
        "unit_set": "",
    }
    lines, last = ["| script | file | content |", "|---|---|---|"], None
    for artifact in ARTIFACTS.values():
        script = artifact.maker[0].removesuffix(".py")
        shape = f" [{', '.join(artifact.shape.split())}]" if artifact.shape else ""
        name = artifact.file.format(**fields)
        lines.append(f"| {script if script != last else ''} | `{name}`{shape} | {artifact.content} |")
        last = script
    return lines


def test_the_table_of_files_is_the_codes():
    assert "\n".join(table_of_files()) in (Path(__file__).parent.parent / "docs/files.md").read_text()
