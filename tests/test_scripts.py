"""Every stage as a user runs it: a process of its own, the README's commands, on an ImageNet-shaped tree of
photographs.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse
from numpy.testing import assert_allclose
from safetensors.torch import save_file

from tests.conftest import ROOT, TINY, TINY_RESNET
from tests.launcher import run_stage_of_user
from tests.photos import SYNSETS, write_photos
from utils.model.clip import load_clip

WORDS = "a dog\nthe sea\nred\na temple in china\nflowers\nsky\nroof\npetals\nnight\nhouse\n"
D, N, L, H = 24, 96, 5, 4


class World:
    """A tree of photos, a model, a text file and an output directory, with the flags that name them."""

    def __init__(self, root, model):
        self.root, self.output, self.logs = root, root / "out", root / "logs"
        self.logs.mkdir()
        self.photos = write_photos(root / "photos", per_class=5, side=48)
        self.words = root / "words.txt"
        self.words.write_text(WORDS)
        self.model = ["--model", model, "--pretrained", "random"]
        self.data = ["--dataset", "imagenet", "--data_path", self.photos, "--subsample", 1]

    def run(self, script, *flags, output=None, **options):
        where, few = (
            ["--output_dir", output or self.output],
            {"templates": 2},
        )  # test_clip_and_data.py takes all 80
        return run_stage_of_user(
            script, *self.model, *where, *flags, folder=self.logs, constants=few, **options
        )

    def stages(self, output=None):
        """The commands of the README's order."""
        passing = [*self.data, "--batch_size", 4, "--num_workers", 0]
        layers = ["--mlp_layer", "1", "3"]
        self.run("compute_representations.py", *passing, "--split", "train", output=output)
        self.run("compute_representations.py", *passing, "--split", "val", output=output)
        self.run(
            "compute_classifier_projection.py", "--dataset", "imagenet", "--batch_size", 8000, output=output
        )
        self.run(
            "compute_second_order_neuron_prs.py",
            *passing,
            "--split",
            "train",
            *layers,
            "--merged",
            output=output,
        )
        pca = [*layers, "--top_k_pca", 5]
        self.run("compute_pcas.py", "--dataset", "imagenet", *pca, output=output)
        self.run("compute_ablations.py", *passing, *pca, output=output)
        self.run("compute_text_set_projection.py", "--text_descriptions", self.words, output=output)
        decompose = [*pca, "--text_descriptions", "words", "--components", 4, "--evaluate"]
        self.run("compute_sparse_decomposition.py", *passing, *decompose, output=output)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    world = World(tmp_path_factory.mktemp("scripts"), tiny_model)
    world.stages()
    return world


def read(world, name):
    return np.load(world.output / name)


def test_files_have_the_names_shapes_dtypes_and_norms_of_the_table(world):
    K = {1: 12, 3: 4}
    shapes = {
        "imagenet_train_representations_tiny_random.npy": (20, D),
        "imagenet_val_representations_tiny_random.npy": (20, D),
        "imagenet_train_classes.npy": (20,),
        "imagenet_val_classes.npy": (20,),
        "imagenet_classifier_tiny_random.npy": (D, 1000),
        "words_tiny_random.npy": (10, D),
        "imagenet_val_ablations_tiny_random_1-3_5_predictions.npy": (20, 2, 5),
        "imagenet_mlps_tiny_random_1-3_words_decomposition_omp_1.0_4_evaluation_predictions.npy": (20, 2, 1),
    }
    for m, heads in K.items():
        base = f"imagenet_train_mlps_tiny_random_{m}_"
        shapes |= {
            base + "coefficients.npy": (20, heads, N),
            base + "bias.npy": (20, D),
            base + "values.npy": (heads, N, D // 2),
            base + "outputs.npy": (heads, D // 2, D),
            base + "merged.npy": (20, N, D),
            base + "activations.npy": (17, N),
            base + "5_pca.npy": (N, D),
            base + "5_norm.npy": (N, 5),
            base + "5_explained.npy": (N,),
            base + "mean.npy": (N, D),
            base + "image_norms.npy": (20, N),
        }
    files = {path.name: np.load(path) for path in world.output.glob("*.npy")}
    assert {name: array.shape for name, array in files.items()} == shapes
    integers = {"imagenet_train_classes.npy": "int64", "imagenet_val_classes.npy": "int64"}
    for name, array in files.items():
        assert array.dtype == integers.get(name, "int32" if "predictions" in name else "float32"), name
    assert_allclose(
        np.linalg.norm(files["imagenet_val_representations_tiny_random.npy"], axis=1), 100, rtol=1e-5
    )
    assert_allclose(np.linalg.norm(files["words_tiny_random.npy"], axis=1), 100, rtol=1e-5)
    assert_allclose(np.linalg.norm(files["imagenet_classifier_tiny_random.npy"], axis=0), 1, rtol=1e-5)
    assert files["imagenet_val_classes.npy"].tolist() == sorted(list(range(4)) * 5)
    assert not list(world.output.glob("*.partial*")) and not list(world.output.glob("*progress*"))


def test_factorised_and_merged_agree(world):
    for m in (1, 3):
        C, bias, values, outputs, merged = (
            read(world, f"imagenet_train_mlps_tiny_random_{m}_{part}.npy").astype(float)
            for part in ("coefficients", "bias", "values", "outputs", "merged")
        )
        phi = np.einsum("ikn,kne,keo->ino", C, values, outputs) + bias[:, None]
        assert_allclose(merged, phi, atol=1e-5 * np.abs(phi).max())


def test_statistics_belong_to_the_merged_effects(world):
    merged = read(world, "imagenet_train_mlps_tiny_random_3_merged.npy").astype(float)
    norms = np.linalg.norm(merged - merged.mean(axis=0), axis=-1)
    assert_allclose(read(world, "imagenet_train_mlps_tiny_random_3_mean.npy"), merged.mean(axis=0), atol=1e-4)
    assert_allclose(
        read(world, "imagenet_train_mlps_tiny_random_3_5_norm.npy"), np.sort(norms, axis=0)[-5:].T, rtol=1e-3
    )


def test_a_merged_file_of_the_published_code_gives_the_same_statistics(world, tmp_path):
    for m in (1, 3):
        name = f"imagenet_train_mlps_tiny_random_{m}_merged.npy"
        shutil.copy(world.output / name, tmp_path / name)  # without the record that our stage adds
    world.run("compute_pcas.py", "--mlp_layer", "all", "--top_k_pca", 5, output=tmp_path)
    for m in (1, 3):
        for part, tolerance in (("5_pca", 5e-3), ("mean", 1e-4), ("5_norm", 1e-3)):
            name = f"imagenet_train_mlps_tiny_random_{m}_{part}.npy"
            assert_allclose(np.load(tmp_path / name), read(world, name), atol=tolerance)


def test_predictions_are_those_of_ablated_representations(world):
    """The ablation stage against numpy, from the files that a val pass of the second-order stage leaves."""
    output = world.root / "held_out"
    passing = [*world.data, "--batch_size", 4, "--num_workers", 0, "--split", "val"]
    world.run("compute_second_order_neuron_prs.py", *passing, "--mlp_layer", 3, "--merged", output=output)
    phi = np.load(output / "imagenet_val_mlps_tiny_random_3_merged.npy").astype(float)
    mean, r, norms = (
        read(world, f"imagenet_train_mlps_tiny_random_3_{part}.npy").astype(float)
        for part in ("mean", "5_pca", "5_norm")
    )
    representation = read(world, "imagenet_val_representations_tiny_random.npy").astype(float)
    classifier = read(world, "imagenet_classifier_tiny_random.npy").astype(float)
    c = phi - mean
    base = representation - phi.sum(axis=1) + mean.sum(axis=0)
    large = (np.linalg.norm(c, axis=-1) > norms[:, 0])[..., None]
    variants = [representation, base, base + (c * ~large).sum(1), base + (c * large).sum(1)]
    variants.append(base + np.einsum("ind,nd,ne->ie", c, r, r))
    matrix = scipy.sparse.load_npz(
        world.output / "imagenet_mlps_tiny_random_3_words_decomposition_omp_1.0_4.npz"
    )
    t = read(world, "words_tiny_random.npy").astype(float)
    t -= t.mean(axis=0)
    rebuilt = matrix @ (100 * t / np.linalg.norm(t, axis=0))
    variants.append(base + np.einsum("ind,nd,ne->ie", c, rebuilt, rebuilt))
    truth = np.stack([(variant @ classifier).argmax(axis=1) for variant in variants], axis=1)
    ablated = read(world, "imagenet_val_ablations_tiny_random_1-3_5_predictions.npy")[:, 1]
    evaluated = read(
        world, "imagenet_mlps_tiny_random_1-3_words_decomposition_omp_1.0_4_evaluation_predictions.npy"
    )[:, 1]
    assert (np.concatenate([ablated, evaluated], axis=1) == truth).mean() > 0.98
    classes = read(world, "imagenet_val_classes.npy")
    stored = json.loads((world.output / "imagenet_val_ablations_tiny_random_1-3_5.json").read_text())[
        "accuracy"
    ]["3"]
    assert_allclose(list(stored.values()), 100 * (ablated == classes[:, None]).mean(axis=0))


def test_descriptions_name_texts_of_the_pool(world):
    content = json.loads(
        (world.output / "imagenet_mlps_tiny_random_3_words_decomposition_omp_1.0_4.json").read_text()
    )
    assert list(content) == [str(n) for n in range(N)]
    for entries in content.values():
        assert len(entries) == 4 and all(WORDS.splitlines()[i] == text for i, _, text in entries)
        assert [abs(c) for _, c, _ in entries] == sorted((abs(c) for _, c, _ in entries), reverse=True)


def test_running_every_stage_twice_gives_the_same_bytes(world):
    again = world.root / "again"
    world.stages(output=again)
    first = {path.name: path.read_bytes() for path in world.output.iterdir()}
    second = {path.name: path.read_bytes() for path in again.iterdir()}
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_a_stage_whose_results_are_there_makes_them_no_second_time(world):
    """Also not the slow text stages; arrays and records are not touched."""
    before = {path: path.stat().st_mtime_ns for path in world.output.glob("*.np[yz]")}
    world.stages()
    assert {path: path.stat().st_mtime_ns for path in world.output.glob("*.np[yz]")} == before


@pytest.mark.parametrize(
    ("script", "flags", "made"),
    [
        ("compute_representations.py", ["--coefficient", 1], "coefficient"),
        ("compute_representations.py", ["--precision", "bfloat16"], "precision"),
        (
            "compute_second_order_neuron_prs.py",
            ["--mlp_layer", 3, "--split", "train", "--subsample", 2],
            "data",
        ),
        (
            "compute_ablations.py",
            ["--mlp_layer", 1, 3, "--top_k_pca", 5, "--precision", "bfloat16"],
            "precision",
        ),
        (
            "compute_text_set_projection.py",
            ["--text_descriptions", "{words}", "--coefficient", 1],
            "coefficient",
        ),
    ],
)
def test_runs_that_differ_in_a_flag_do_not_replace_each_others_results(world, script, flags, made):
    before = {path.name: path.read_bytes() for path in world.output.iterdir()}
    data = [] if "text" in script else [*world.data, "--batch_size", 4, "--num_workers", 0]
    done = world.run(script, *data, *(str(flag).format(words=world.words) for flag in flags), check=False)
    assert (
        done.returncode == 1
        and f"is there, made with other {made}" in done.stderr
        and "--overwrite" in done.stderr
    )
    assert {path.name: path.read_bytes() for path in world.output.iterdir()} == before


def test_descriptions_of_both_kinds_of_atoms_lie_beside_each_other(world, tmp_path):
    flags = [
        "--mlp_layer",
        3,
        "--top_k_pca",
        5,
        "--text_descriptions",
        "words",
        "--components",
        4,
        "--input_dir",
        world.output,
    ]
    for kind in ("axis", "text"):
        world.run("compute_sparse_decomposition.py", *flags, "--normalise", kind, output=tmp_path)
    base = "imagenet_mlps_tiny_random_3_words_decomposition_omp_1.0_4"
    axis, text = ((tmp_path / f"{base}{variant}.json").read_text() for variant in ("", "_text"))
    assert axis == (world.output / f"{base}.json").read_text() != text


def test_half_precision_halves_the_store(world, tmp_path):
    passing = [*world.data, "--batch_size", 4, "--num_workers", 0, "--split", "train", "--mlp_layer", 3]
    world.run("compute_second_order_neuron_prs.py", *passing, "--store_dtype", "float16", output=tmp_path)
    stored = np.load(tmp_path / "imagenet_train_mlps_tiny_random_3_coefficients.npy")
    assert stored.dtype == np.float16
    full = read(world, "imagenet_train_mlps_tiny_random_3_coefficients.npy")
    assert_allclose(stored, full, rtol=2e-3, atol=1e-4 * np.abs(full).max())
    world.run("compute_pcas.py", "--mlp_layer", 3, "--top_k_pca", 5, output=tmp_path)
    name = "imagenet_train_mlps_tiny_random_3_mean.npy"
    assert_allclose(np.load(tmp_path / name), read(world, name), atol=1e-2)


def test_statistics_of_imagenet_serve_imagenet_r(world):
    photos = write_photos(world.root / "renditions", splits=(".",), classes=SYNSETS[:2], per_class=2, side=48)
    output = world.root / "renditions_out"
    flags = [
        "--dataset",
        "imagenet_r",
        "--data_path",
        photos,
        "--subsample",
        1,
        "--num_workers",
        0,
        "--mlp_layer",
        3,
    ]
    reads = ["--top_k_pca", 5, "--input_dir", world.output]
    world.run("compute_ablations.py", *flags, *reads, output=output)
    found = json.loads((output / "imagenet_r_val_ablations_imagenet_tiny_random_3_5.json").read_text())
    assert found["images"] == 4 and found["train_dataset"] == "imagenet"
    texts = ["--text_descriptions", "words", "--components", 4, "--evaluate"]
    world.run("compute_sparse_decomposition.py", *flags, *reads, *texts, output=output)
    assert (output / "imagenet_mlps_tiny_random_3_words_decomposition_omp_1.0_4.json").is_file()
    assert (output / "imagenet_r_mlps_tiny_random_3_words_decomposition_omp_1.0_4_evaluation.json").is_file()
    said = world.run(
        "compute_classifier_projection.py", "--dataset", "imagenet_r", "--batch_size", 8000
    ).stdout
    assert "kept" in said and "imagenet_classifier_tiny_random.npy" in said  # ImageNet's serves


def test_help_shows_the_command_and_every_default(tmp_path):
    for script in sorted(ROOT.glob("*.py")):
        text = run_stage_of_user(script.name, "--help", folder=tmp_path).stdout
        assert f"python {script.name}" in text and "default:" in text


# Bad input: (what is wrong, script, flags, words of the one line that answers)
REPRESENTATIONS, EFFECTS, PCAS = (
    "compute_representations.py",
    "compute_second_order_neuron_prs.py",
    "compute_pcas.py",
)
ABLATIONS, DECOMPOSITION, TEXTS = (
    "compute_ablations.py",
    "compute_sparse_decomposition.py",
    "compute_text_set_projection.py",
)
DATA = ["--dataset", "imagenet", "--data_path", "{photos}", "--num_workers", "0"]
FAULTS = [
    ("unknown model", REPRESENTATIONS, [*DATA, "--model", "ViT-B-23"], ["did you mean", "ViT-B-32"]),
    (
        "unknown tag",
        REPRESENTATIONS,
        [*DATA, "--model", "ViT-B-32", "--pretrained", "opeani"],
        ["did you mean openai"],
    ),
    (
        "checkpoint of another model",
        REPRESENTATIONS,
        [*DATA, "--pretrained", "{checkpoint}"],
        ["does not fit", "size mismatch for text_projection"],
    ),
    (
        "no such checkpoint",
        REPRESENTATIONS,
        [*DATA, "--pretrained", "none.pt"],
        ["--pretrained none.pt", "no such file"],
    ),
    (
        "a ConvNeXt",
        EFFECTS,
        [*DATA, "--model", "convnext_base", "--pretrained", "random"],
        ["ConvNeXt, which has no attention", "choose a plain ViT"],
    ),
    (
        "a ResNet's layer",
        EFFECTS,
        [*DATA, "--model", "{resnet}", "--pretrained", "random"],
        ["--mlp_layer 9", "a ResNet counts as one layer: --mlp_layer 0"],
    ),
    ("missing data", REPRESENTATIONS, ["--data_path", "{root}/none"], ["--data_path", "no such folder"]),
    (
        "empty data",
        REPRESENTATIONS,
        ["--dataset", "folder", "--data_path", "{empty}", "--split", "val"],
        ["folder of images for every class"],
    ),
    ("wrong split", REPRESENTATIONS, [*DATA, "--split", "test"], ["--split test", "train and val"]),
    (
        "broken image",
        REPRESENTATIONS,
        ["--dataset", "folder", "--data_path", "{broken}", "--split", "val"],
        ["0001.JPEG cannot be read"],
    ),
    (
        "broken image, workers",
        EFFECTS,
        ["--dataset", "folder", "--data_path", "{broken}", "--split", "val", "--mlp_layer", "1"],
        ["0001.JPEG cannot be read"],
    ),
    ("no such layer", EFFECTS, [*DATA, "--mlp_layer", "7"], ["--mlp_layer 7", "0 to 3"]),
    ("last layer", EFFECTS, [*DATA, "--mlp_layer", "4"], ["no attention after it", "0 to 3"]),
    ("a layer that is no number", PCAS, ["--mlp_layer", "nine"], ["--mlp_layer nine"]),
    (
        "effects missing",
        PCAS,
        ["--mlp_layer", "2"],
        ["_2_coefficients.npy is missing", "compute_second_order_neuron_prs.py"],
    ),
    (
        "effects of another data set",
        PCAS,
        ["--dataset", "CIFAR10", "--mlp_layer", "1"],
        ["missing", "--dataset CIFAR10"],
    ),
    ("too few images", PCAS, ["--mlp_layer", "1", "--top_k_pca", "21"], ["--top_k_pca 21", "20 images"]),
    (
        "effects of another size",
        PCAS,
        ["--mlp_layer", "1", "--input_dir", "{wrong_bias}"],
        ["shape", "compute_second_order"],
    ),
    (
        "truncated effects",
        PCAS,
        ["--mlp_layer", "1", "--input_dir", "{truncated}"],
        ["cannot be read", "compute_second_order"],
    ),
    (
        "classifier missing",
        ABLATIONS,
        [*DATA, "--mlp_layer", "3", "--input_dir", "{empty}", "--output_dir", "{empty}"],
        ["compute_classifier_projection.py"],
    ),
    (
        "statistics missing",
        ABLATIONS,
        [*DATA, "--mlp_layer", "2", "--top_k_pca", "5"],
        ["missing", "compute_pcas.py --dataset imagenet --mlp_layer 2"],
    ),
    (
        "statistics of other weights",
        ABLATIONS,
        [*DATA, "--mlp_layer", "3", "--top_k_pca", "5", "--input_dir", "{other_weights}"],
        ["fingerprint", "compute_pcas.py"],
    ),
    (
        "statistics of another coefficient",
        ABLATIONS,
        [*DATA, "--mlp_layer", "3", "--top_k_pca", "5", "--coefficient", "1"],
        ["coefficient 100.0", "compute_pcas.py"],
    ),
    (
        "statistics of another layer",
        ABLATIONS,
        [*DATA, "--mlp_layer", "3", "--top_k_pca", "4"],
        ["4_norm.npy is missing", "--top_k_pca 4"],
    ),
    ("text file missing", TEXTS, ["--text_descriptions", "none"], ["none.txt cannot be read"]),
    ("text file empty", TEXTS, ["--text_descriptions", "{root}/empty.txt"], ["holds no text"]),
    ("text file not UTF-8", TEXTS, ["--text_descriptions", "{root}/latin.txt"], ["not UTF-8"]),
    (
        "text vectors missing",
        DECOMPOSITION,
        ["--mlp_layer", "3", "--text_descriptions", "none"],
        ["compute_text_set_projection.py"],
    ),
    (
        "more components than texts",
        DECOMPOSITION,
        ["--mlp_layer", "3", "--top_k_pca", "5", "--text_descriptions", "words", "--components", "11"],
        ["--components 11", "10 texts"],
    ),
    (
        "a file where the output should be",
        REPRESENTATIONS,
        [*DATA, "--output_dir", "{root}/words.txt"],
        ["words.txt"],
    ),
    ("a device that is none", REPRESENTATIONS, [*DATA, "--device", "tpu9"], ["--device tpu9"]),
]


@pytest.fixture(scope="module")
def faults(world):
    """Run all of them, two at a time: {what: (finished process, files of the output directory that were not
    there before)}.
    """
    root = world.root
    (root / "empty" / "val").mkdir(parents=True)
    (root / "empty.txt").write_text("\n")
    (root / "latin.txt").write_bytes("façade\n".encode("latin-1"))
    broken = (
        write_photos(root / "broken", splits=("val",), classes=("a",), per_class=2, side=48)
        / "val"
        / "a"
        / "0001.JPEG"
    )
    broken.write_bytes(broken.read_bytes()[:300])
    narrow = root / "narrow.json"
    narrow.write_text(json.dumps(TINY | {"embed_dim": 16}))
    save_file(load_clip(str(narrow), "random", "cpu").text.state_dict(), root / "narrow.safetensors")
    for name in ("wrong_bias", "truncated", "other_weights"):
        shutil.copytree(world.output, root / name)
    base = "imagenet_train_mlps_tiny_random_"
    np.save(root / "wrong_bias" / f"{base}1_bias.npy", np.zeros((19, D), np.float32))
    coefficients = root / "truncated" / f"{base}1_coefficients.npy"
    coefficients.write_bytes(coefficients.read_bytes()[:1000])
    record = root / "other_weights" / f"{base}3_mean.meta.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"fingerprint": "0123456789ab"}))
    places = {"photos": world.photos, "root": root, "checkpoint": root / "narrow.safetensors"}
    places["resnet"] = root / "resnet.json"
    places["resnet"].write_text(json.dumps(TINY_RESNET))
    places |= {name: root / name for name in ("empty", "broken", "wrong_bias", "truncated", "other_weights")}

    def run(fault):
        what, script, flags, _ = fault
        output = root / "faults" / what.replace(" ", "_")
        shutil.copytree(world.output, output)
        before = {path.name for path in output.iterdir()}
        done = world.run(script, *[flag.format(**places) for flag in flags], output=output, check=False)
        return what, (done, {path.name for path in output.iterdir()} ^ before)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(run, FAULTS))


@pytest.mark.parametrize(
    ("what", "words"), [(fault[0], fault[3]) for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_bad_input_is_answered_by_one_line(faults, what, words):
    done, changed = faults[what]
    lines = [
        line for line in done.stderr.splitlines() if line and not line.startswith(("images", "texts"))
    ]  # bars
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0]
    assert not changed  # nothing half-written
