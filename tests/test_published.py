"""A user of the published code changes nothing: its commands, its flags, and the files that it left."""

import hashlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import scipy.sparse
import torch
from numpy.testing import assert_allclose
from PIL import Image
from safetensors.torch import save_file
from sklearn.decomposition import SparseCoder

from tests import definition
from tests.conftest import ROOT
from tests.launcher import run_stage_of_user
from tests.photos import SYNSETS, discs, write_mat, write_photos
from utils.data.images import load_images
from utils.model.clip import load_clip
from utils.neurons import NeuronLayer
from utils.runtime import flags
from utils.runtime.errors import UserError
from utils.runtime.results import Results
from utils.statistics import choose_k

HERE = Path(__file__).parent
HUB_FOLDER = (
    "models--timm--vit_base_patch32_clip_224.openai"  # where open_clip looks for the tag `openai` of ViT-B-32
)


def lines_of(name):
    """The lines of a text file of commands, without comments."""
    return [line for line in (HERE / name).read_text().splitlines() if line and not line.startswith("#")]


@pytest.fixture
def parser_of(monkeypatch):
    """The parser of a script."""

    def found(script):
        parsers = []
        monkeypatch.setattr(flags, "run", lambda main, parser, **_: parsers.append(parser))
        monkeypatch.setattr(sys, "argv", [script])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        return parsers[0]

    return found


# Defaults that are other than the published ones, as the README's table of differences says; X stands for a
# path.
OTHER = {"device", "batch_size", "num_workers", "image_size", "evaluate", "save_img", "method"}
OTHER |= {
    "cosim_similarity"
}  # None: 0.6 for sentence models, as published, and another one for CLIP's own cosines


@pytest.mark.parametrize("line", lines_of("published_flags.txt"), ids=lambda line: line.split()[0])
def test_every_published_flag_is_accepted_and_its_default_is_the_published_one(parser_of, line):
    script, *words = shlex.split(line)
    parser = parser_of(script)
    parser.error = lambda message: pytest.fail(f"{script}: {message}")
    given, required = parser.parse_args(words), [action.dest for action in parser._actions if action.required]
    assert required in ([], ["data_path"])
    for name, value in vars(given).items():
        default = parser.get_default(name)
        if name == "top_k_pca" and value:
            default = choose_k(default, given.dataset, {})  # on ImageNet, as published
        paths = value == "X" or name == "unused" or name in required
        batch = (
            name == "batch_size" and script == "generate_adversarial_images.py"
        )  # pictures of each description
        data = (script, name) == ("compute_ablations.py", "dataset")
        if batch or not (paths or data or name in OTHER):
            assert value == default or [str(item) for item in np.atleast_1d(default)] == value, name


# Stand-ins for the models that cannot be here. Everything else of the commands below is the real thing.


def similarity(model, clip, batch_size):
    """Sentence vectors that depend on the text alone."""

    def encode(texts):
        seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
        vectors = np.array([np.random.default_rng(seed).normal(size=99) for seed in seeds])
        return torch.nn.functional.normalize(torch.from_numpy(vectors), dim=-1)

    return encode


class Writer:
    """A language model that writes what it is asked for."""

    def __init__(self, model, device):
        pass

    def __call__(self, request, count, seed):
        [class_1] = re.findall(r'has to name "([^"]*)"', request)
        return "".join(f"{i}. a {class_1}, number {i}\n" for i in range(1, count + 1)), False


def painter(model, device, options, offload):
    def draw(description, seed):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))

    return draw


def nothing(*models, **more):
    pass


STAND_INS = {
    "applications.attack.generators.require_packages": nothing,
    "applications.attack.generators.load_similarity": similarity,
    "applications.attack.generators.LanguageModel": Writer,
    "applications.attack.generators.load_image_model": painter,
}


SMALL = {  # as deep as ViT-B-32, with its image size and patches
    "embed_dim": 160,
    "vision_cfg": {
        "image_size": 224,
        "patch_size": 32,
        "layers": 12,
        "width": 64,
        "head_width": 16,
        "mlp_ratio": 4.0,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def cache_of(folder, config):
    """A Hugging Face cache that holds seeded random weights, of the shape of a config, under the name of
    OpenAI's ViT-B-32.
    """
    snapshot = folder / "hub" / HUB_FOLDER / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    torch.manual_seed(0)
    model = open_clip.CLIP(**config, quick_gelu=True)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, snapshot / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache with weights of the real shape."""
    return cache_of(tmp_path_factory.mktemp("hf"), open_clip.get_model_config("ViT-B-32"))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """An ImageNet-shaped tree: 25,003 training images, of which 100 are taken, and 39 for validation, of
    which 3.
    """
    root = write_photos(tmp_path_factory.mktemp("ilsvrc"), per_class=8, side=64)
    photos = {split: sorted((root / split).rglob("*.JPEG")) for split in ("train", "val")}
    for i in range(25_003 - len(photos["train"])):
        os.link(photos["train"][i % 32], root / "train" / SYNSETS[i % 4] / f"more_{i:05d}.JPEG")
    for i in range(39 - len(photos["val"])):
        os.link(photos["val"][i], root / "val" / SYNSETS[i % 4] / f"more_{i:05d}.JPEG")
    return root


@pytest.mark.parametrize("line", [0, 2])
def test_published_commands_run_on_a_model_of_the_real_shape(tmp_path, hub, imagenet, line):
    """Representations and effects. Prompts for all classes would take minutes; the next test has every
    command.
    """
    words = shlex.split(lines_of("published_commands.txt")[line])
    places = {"$datapath": imagenet, "$outputdir": tmp_path / "out"}
    cache = {"huggingface_hub.constants.HF_HUB_CACHE": str(hub / "hub")}
    run_stage_of_user(*(places.get(word, word) for word in words[1:]), folder=tmp_path, constants=cache)
    shapes = {path.name: np.load(path, mmap_mode="r").shape for path in (tmp_path / "out").glob("*.npy")}
    expected = (
        {"imagenet_train_representations_ViT-B-32_openai.npy": (100, 512)},
        {"imagenet_train_mlps_ViT-B-32_openai_9_coefficients.npy": (100, 24, 3072)},
    )
    assert expected[line // 2].items() <= shapes.items()


def test_the_published_commands_run_as_they_stand(tmp_path, imagenet):
    """All of them, on a smaller model under the name of ViT-B-32."""
    out, logs = tmp_path / "out put", tmp_path / "logs"
    logs.mkdir()
    renditions = write_photos(
        tmp_path / "imagenet-r", splits=(".",), classes=SYNSETS[:2], per_class=10, side=64
    )
    places = {"$datapath": imagenet, "$outputdir": out, "$inputdir": out, "$IMAGENET_R": renditions}
    (tmp_path / "text_descriptions").mkdir()
    words = (ROOT / "text_descriptions" / "30k.txt").read_text().split()[:30_000:150]
    (tmp_path / "text_descriptions" / "30k.txt").write_text("\n".join(words))
    (tmp_path / "imagenet_seg").mkdir()
    write_mat(tmp_path / "imagenet_seg" / "gtsegs_ijcv.mat", *discs(3))
    cache = {"huggingface_hub.constants.HF_HUB_CACHE": str(cache_of(tmp_path / "hf", SMALL) / "hub")}
    model = {"open_clip.factory._MODEL_CONFIGS": {"ViT-B-32": SMALL}, "templates": 1}
    constants = {"folder": str(tmp_path), **cache, **model, **STAND_INS}
    for line in lines_of("published_commands.txt"):
        python, script, *words = (str(places.get(word, word)) for word in shlex.split(line))
        assert python == "python"
        run_stage_of_user(script, *words, folder=logs, constants=constants)

    names = {path.name for path in out.iterdir()}
    base, expected = "imagenet_train_mlps_ViT-B-32_openai_9", set()
    expected |= {
        "imagenet_train_representations_ViT-B-32_openai.npy",
        "imagenet_train_classes.npy",
        f"{base}_100_pca.npy",
    }
    expected |= {"imagenet_classifier_ViT-B-32_openai.npy", f"{base}_100_norm.npy", "30k_ViT-B-32_openai.npy"}
    for layer in (8, 9, 10):
        described = f"imagenet_mlps_ViT-B-32_openai_{layer}_30k_decomposition_omp_1.0_128"
        expected |= {f"{described}.json", f"{described}.npz"}
    assert expected <= names and not [name for name in names if "partial" in name or "progress" in name]
    assert np.load(out / "imagenet_train_representations_ViT-B-32_openai.npy").shape == (100, 160)
    assert np.load(out / "imagenet_train_classes.npy").tolist() == sorted(
        np.load(out / "imagenet_train_classes.npy")
    )
    assert json.loads((out / "imagenet_val_ablations_ViT-B-32_openai_9_100.json").read_text())["images"] == 3
    assert (
        json.loads((out / "imagenet_r_val_ablations_imagenet_ViT-B-32_openai_9_100.json").read_text())[
            "images"
        ]
        == 2
    )
    for folder, images in (("vacuum-cleaner_cat", 4), ("stop-sign_yield", 16)):
        [table] = out.glob(f"{folder}_second_order_seed0/files.csv")
        assert len(table.read_text().splitlines()) == images + 1
        assert len(list(table.parent.glob("images/*.png"))) == images
    rows = [path.name for path in out.glob("gtsegs_ijcv_segmentation_*.json") if "meta" not in path.name]
    middle = "gtsegs_ijcv_segmentation_ViT-B-32_openai_second_order"
    assert sorted(rows) == [f"{middle}_8-9-10_200.json", f"{middle}_9_200.json"]


def test_the_tag_openai_is_read_from_the_local_cache_of_hugging_face(hub, tmp_path):
    """In a process of its own, by HF_HOME alone: its own loading path, and the activation of the tag."""
    code = "from utils.model.clip import load_clip; "
    code += "print(load_clip('ViT-B-32', 'openai', 'cpu').vit.blocks[0].mlp.gelu)"
    environment = {**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and "QuickGELU" in done.stdout, done.stderr[-1000:]


# A folder that the published code left: arrays at its names, no records, nothing of ours


LAYER, K, WORDS = (
    3,
    5,
    ["a dog", "the sea", "red", "a temple in china", "flowers", "sky", "roof", "petals", "night", "house"],
)
PUBLISHED = {"dataset": "imagenet", "layer": LAYER, "k": K, "texts": "pool", "components": 4, "alpha": 1.0}


class Published:
    """The published files of a tiny model, made from their definitions, in float64, by numpy and
    scikit-learn.
    """

    def __init__(self, root, model):
        self.root, self.model, self.folder = root, model, root / "published"
        self.folder.mkdir()
        self.photos = write_photos(root / "photos", per_class=5, side=48)
        (root / "my texts").mkdir()
        (root / "my texts" / "pool.txt").write_text("\n".join(WORDS))
        self.clip = load_clip(model, "random", "cpu")
        self.results = Results(self.folder, model, "random")
        visual = load_clip(model, "random", "cpu").text.visual.double()
        images = load_images("imagenet", self.photos, "train", self.clip.transform, subsample=1)
        phi = torch.stack(
            [definition.effects(visual, images[i][0].double(), LAYER) for i in range(len(images))]
        ).numpy()
        centred = phi - phi.mean(axis=0)
        self.norms = np.linalg.norm(centred, axis=-1)  # [images, N]
        pcas = []
        for n in range(phi.shape[1]):
            rows = centred[np.argsort(self.norms[:, n])[-K:], n]
            first = np.linalg.svd(rows, full_matrices=False)[2][0]
            pcas.append(first if ((rows @ first) > 0).sum() > K // 2 else -first)
        self.mean, self.pcas, self.centred = phi.mean(axis=0), np.array(pcas), centred
        texts = self.embed(WORDS)
        prompts = self.embed(
            [open_clip.OPENAI_IMAGENET_TEMPLATES[0](name) for name in open_clip.IMAGENET_CLASSNAMES]
        )
        self.save("merged", phi)
        self.save("pca", self.pcas)
        self.save("norm", np.sort(self.norms, axis=0)[-K:].T)
        self.save("classifier", prompts.T)
        self.save("texts", 100 * texts)
        atoms = 100 * (texts - texts.mean(axis=0)) / np.linalg.norm(texts - texts.mean(axis=0), axis=0)
        coder = SparseCoder(atoms, transform_algorithm="omp", transform_n_nonzero_coefs=4)
        self.coefficients = coder.transform(self.pcas)
        self.described = {}
        for n, row in enumerate(self.coefficients):
            self.described[n] = [
                (int(j), float(row[j]), WORDS[j]) for j in np.argsort(-abs(row), kind="stable")[:4]
            ]
        path = self.results.path("decomposition", **PUBLISHED)
        path.write_text(json.dumps(self.described))
        scipy.sparse.save_npz(path.with_suffix(".npz"), scipy.sparse.csc_matrix(self.coefficients))
        write_mat(root / "discs.mat", *discs(3))

    def embed(self, texts):
        with torch.no_grad():
            return self.clip.text.encode_text(self.clip.tokenizer(texts), normalize=True).double().numpy()

    def save(self, kind, array):
        np.save(self.results.path(kind, **PUBLISHED), array.astype(np.float32))

    def run(self, script, *words, output, check=True, **options):
        (self.root / "logs").mkdir(exist_ok=True)
        where = [
            "--model",
            self.model,
            "--pretrained",
            "random",
            "--input_dir",
            self.folder,
            "--output_dir",
            output,
        ]
        return run_stage_of_user(script, *where, *words, folder=self.root / "logs", check=check, **options)


@pytest.fixture(scope="module")
def published(tmp_path_factory, tiny_model):
    return Published(tmp_path_factory.mktemp("published"), tiny_model)


def test_a_folder_of_the_published_code_holds_what_its_names_say(published):
    names = {path.name for path in published.folder.iterdir()}
    base = f"imagenet_train_mlps_tiny_random_{LAYER}"
    assert names == {
        f"{base}_merged.npy", f"{base}_{K}_pca.npy", f"{base}_{K}_norm.npy",
        "imagenet_classifier_tiny_random.npy", "pool_tiny_random.npy",
        f"imagenet_mlps_tiny_random_{LAYER}_pool_decomposition_omp_1.0_4.json",
        f"imagenet_mlps_tiny_random_{LAYER}_pool_decomposition_omp_1.0_4.npz",
    }  # fmt: skip


def test_components_of_published_effects(published, tmp_path):
    published.run("compute_pcas.py", "--mlp_layer", LAYER, "--top_k_pca", K, output=tmp_path)
    results = Results(tmp_path, published.model, "random")
    found = {
        kind: np.load(results.path(kind, **PUBLISHED)) for kind in ("pca", "norm", "mean", "image_norms")
    }
    assert_allclose(np.abs((found["pca"] * published.pcas).sum(axis=1)), 1, atol=1e-4)
    assert_allclose(found["image_norms"], published.norms, rtol=1e-4)
    assert_allclose(found["mean"], published.mean, atol=1e-5)


def test_ablations_with_published_statistics(published, tmp_path):
    """Means come from the dense effects; the accuracies are those of a plain loop over the definition."""
    data = ["--data_path", published.photos, "--subsample", 1, "--num_workers", 0]
    said = published.run(
        "compute_ablations.py", *data, "--mlp_layer", LAYER, "--top_k_pca", K, output=tmp_path
    ).stdout
    assert "_merged.npy is averaged" in said
    predicted = np.load(tmp_path / f"imagenet_val_ablations_tiny_random_{LAYER}_{K}_predictions.npy")[:, 0]
    images = load_images("imagenet", published.photos, "val", published.clip.transform, subsample=1)
    visual, classifier = (
        load_clip(published.model, "random", "cpu").text.visual.double(),
        np.load(published.results.path("classifier", **PUBLISHED)).astype(float),
    )
    thresholds, agreeing = np.sort(published.norms, axis=0)[-K], 0
    for i in range(len(images)):
        pixels = images[i][0].double()
        rep = definition.run(visual, pixels).rep.numpy()
        c = definition.effects(visual, pixels, LAYER).numpy() - published.mean
        rep = 100 * rep / np.linalg.norm(rep)
        base, large = rep - c.sum(axis=0), np.linalg.norm(c, axis=1) > thresholds
        pc = ((c * published.pcas).sum(axis=1)[:, None] * published.pcas).sum(axis=0)
        ablated = [rep, base, base + c[~large].sum(axis=0), base + c[large].sum(axis=0), base + pc]
        agreeing += sum(int(np.argmax(x @ classifier)) == predicted[i, j] for j, x in enumerate(ablated))
    assert agreeing >= 5 * len(images) - 2  # classes of a random model nearly tie


def test_descriptions_from_published_components_and_texts(published, tmp_path):
    texts = [
        "--text_descriptions",
        "pool",
        "--descriptions_dir",
        published.root / "my texts",
        "--components",
        4,
    ]
    data = ["--data_path", published.photos, "--subsample", 1, "--num_workers", 0, "--evaluate"]
    stage = ["compute_sparse_decomposition.py", "--mlp_layer", LAYER, "--top_k_pca", K]
    published.run(*stage, *texts, *data, output=tmp_path)
    path = Results(tmp_path, published.model, "random").path("decomposition", **PUBLISHED)
    found = scipy.sparse.load_npz(path.with_suffix(".npz")).toarray()
    assert_allclose(found, published.coefficients, atol=1e-4)
    assert path.with_name(f"{path.stem}_evaluation.json").is_file()


def test_an_evaluation_needs_images_where_no_record_says_where_they_were(published, tmp_path):
    texts = [
        "--text_descriptions",
        "pool",
        "--descriptions_dir",
        published.root / "my texts",
        "--components",
        4,
    ]
    stage = ["compute_sparse_decomposition.py", "--mlp_layer", LAYER, "--top_k_pca", K, "--evaluate"]
    done = published.run(*stage, *texts, output=tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.endswith(
        "error: --evaluate needs held-out images; add --data_path\n"
    )


def test_texts_that_are_not_those_of_the_vectors_are_refused(published, tmp_path):
    """Vectors without a record do not say what they were made of: as many texts in another order look the
    same.
    """
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "pool.txt").write_text("\n".join(WORDS[1:] + WORDS[:1]))
    texts = ["--text_descriptions", "pool", "--descriptions_dir", tmp_path / "texts", "--components", 4]
    stage = ["compute_sparse_decomposition.py", "--mlp_layer", LAYER, "--top_k_pca", K]
    done = published.run(*stage, *texts, output=tmp_path / "out", check=False)
    assert (
        done.returncode == 1
        and "does not hold the vectors of" in done.stderr
        and "10 of 10 texts differ" in done.stderr
    )
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("source", ["second_order", "random", "similar"])
def test_an_attack_from_published_files(published, tmp_path, source):
    words = [
        "--text_descriptions",
        "pool",
        "--descriptions_dir",
        published.root / "my texts",
        "--neurons_texts",
        4,
    ]
    words += [
        "--mlp_layers",
        LAYER,
        "--top_k_pca",
        K,
        "--neurons_num",
        9,
        "--overall_words",
        3,
        "--word_source",
        source,
    ]
    models = ["--results_per_generation", 2]
    classes = ["--class_0", "tench", "--class_1", "goldfish", "--dataset_path", tmp_path]
    stage = "generate_adversarial_images.py"
    said = published.run(stage, *words, *models, *classes, output=tmp_path, constants=STAND_INS).stdout
    assert "% of 8 images of goldfish" in said and "among all classes of the classifier" in said


def test_segmentation_from_published_files(published, tmp_path):
    flags = [
        "--data_path",
        published.root / "discs.mat",
        "--mlp_layers",
        LAYER,
        "--top_neurons",
        9,
        "--top_k_pca",
        K,
    ]
    published.run("compute_segmentation.py", *flags, "--num_workers", 0, output=tmp_path)
    assert (tmp_path / f"discs_segmentation_tiny_random_second_order_{LAYER}_9.json").is_file()


def test_a_notebook_looks_at_neurons_of_published_files(published):
    images = load_images("imagenet", published.photos, "train", published.clip.transform, subsample=1)
    described = {"texts": "pool", "components": 4}
    neurons = NeuronLayer(published.clip, published.results, images, LAYER, described=described, k=K)
    assert neurons.explained is None and neurons.descriptions[7] == published.described[7]
    for n in (0, 7, 95):
        norms, projections = neurons.measured(n)
        assert_allclose(norms, published.norms[:, n], rtol=1e-4)
        assert_allclose(projections, published.centred[:, n] @ published.pcas[n], atol=1e-4)
        assert neurons.top_images(n, 4).tolist() == np.argsort(-published.norms[:, n])[:4].tolist()
        expected = np.argsort(-(published.centred[:, n] @ published.pcas[n]))[:4]
        assert neurons.top_images(n, 4, by="projection").tolist() == expected.tolist()
    assert neurons.card(7, pictures=4).axes
    val = load_images("imagenet", published.photos, "val", published.clip.transform, subsample=1)
    with pytest.raises(
        UserError, match="imagenet_val_mlps.*is missing.*compute_second_order_neuron_prs.py.*--split val"
    ):
        NeuronLayer(published.clip, published.results, val, LAYER, described=described, k=K)


def test_a_notebook_looks_at_validation_images_once_their_effects_are_stored(published, tmp_path):
    for path in published.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = [
        "--data_path",
        published.photos,
        "--subsample",
        1,
        "--num_workers",
        0,
        "--split",
        "val",
        "--mlp_layer",
        LAYER,
    ]
    model = ["--model", published.model, "--pretrained", "random", "--output_dir", tmp_path]
    run_stage_of_user("compute_second_order_neuron_prs.py", *model, *data, folder=tmp_path)
    images = load_images("imagenet", published.photos, "val", published.clip.transform, subsample=1)
    results = Results(tmp_path, published.model, "random")
    neurons = NeuronLayer(
        published.clip, results, images, LAYER, described={"texts": "pool", "components": 4}, k=K
    )
    visual = load_clip(published.model, "random", "cpu").text.visual.double()
    phi = torch.stack(
        [definition.effects(visual, images[i][0].double(), LAYER) for i in range(len(images))]
    ).numpy()
    centred = phi - published.mean  # about the mean of the training images
    for n in (0, 7):
        norms, projections = neurons.measured(n)
        assert_allclose(norms, np.linalg.norm(centred[:, n], axis=-1), rtol=1e-4)
        assert_allclose(projections, centred[:, n] @ published.pcas[n], atol=1e-4)
    assert neurons.card(7, pictures=4, by="norm").axes


def test_inputs_are_looked_for_in_both_folders(published, tmp_path):
    """The README's $inputdir is the folder of the stage before; what this stage's own folder has is found as
    well.
    """
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    for kind in ("merged", "classifier"):
        path = published.results.path(kind, **PUBLISHED)
        (first / path.name).write_bytes(path.read_bytes())
    model = ["--model", published.model, "--pretrained", "random", "--mlp_layer", LAYER, "--top_k_pca", K]
    where = [*model, "--output_dir", second, "--input_dir", first]
    run_stage_of_user("compute_pcas.py", *where, folder=tmp_path)
    data = ["--data_path", published.photos, "--subsample", 1, "--num_workers", 0]
    run_stage_of_user("compute_ablations.py", *where, *data, folder=tmp_path)
    assert list(second.glob("*ablations*.json"))


def test_published_pools_are_fetched_and_compared_with_their_sums(tmp_path, monkeypatch):
    there, here = tmp_path / "there" / "text_descriptions", tmp_path / "here"
    there.mkdir(parents=True)
    here.mkdir()
    (there.parent / "LICENSE.txt").write_text("MIT License")
    for name in ("30k.txt", "google_10000_english.txt", "image_descriptions_per_class.txt"):
        (there / name).write_text("a\nb\n")
    script = [
        sys.executable,
        ROOT / "text_descriptions/fetch_published.py",
        "--address",
        there.parent.as_uri(),
    ]
    done = subprocess.run([*script, "--output_dir", here], capture_output=True, text=True)
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: 30k.txt has the sha256")
        and not list(here.iterdir())
    )
    fetching = runpy.run_path(str(ROOT / "text_descriptions/fetch_published.py"))
    right = hashlib.sha256(b"a\nb\n").hexdigest()
    monkeypatch.setitem(
        fetching["main"].__globals__,
        "POOLS",
        {ours: (name, right) for ours, (name, _) in fetching["POOLS"].items()},
    )
    monkeypatch.setattr(sys, "argv", ["fetch", "--address", there.parent.as_uri(), "--output_dir", str(here)])
    fetching["main"]()
    assert {path.name for path in here.iterdir()} == {*fetching["POOLS"], "published_LICENSE.txt"}
