"""Stages with --units: the files that they leave, against numpy and the model; guards and bad input."""

import csv
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from numpy.testing import assert_allclose

from tests.conftest import ROOT
from tests.launcher import RARE, World, run_ranks, run_stage_of_user, two_sided
from tests.test_dictionaries import save
from utils.controls import Compared
from utils.data.images import load_images
from utils.data.splits import Split
from utils.evaluation import Graded, LayerResults
from utils.model.clip import load_clip
from utils.model.dictionaries import Dictionary
from utils.model.dictionary_files import read_dictionary, save_dictionary
from utils.neurons import NeuronLayer
from utils.prs import second_order
from utils.reports import save_lines
from utils.runtime.errors import UserError
from utils.runtime.results import Results
from utils.units import Features, check_rebuilding, look_at

TOP = 5
COUNTS = (20, 19, 12, 5, 1, 0)  # training images on which the last units act: 20 are enough to be graded
FEW = 5  # units that are not
PREFIX = "folder_train_mlps_tiny_random_1_mine_"


class Units(World):
    """A world whose stages look at the units of a dictionary."""

    def units(self, script, *flags):
        own = [*self.model, "--units", self.root / "mine.safetensors", "--output_dir", self.root / "out"]
        return run_stage_of_user(script, *own, *flags, folder=self.root)


def training_images(world, model):
    """The tower, and all training images."""
    clip = load_clip(model, "random", "cpu", image_only=True)
    images = load_images("folder", world.photos, "train", clip.transform)
    return clip, torch.stack([image for image, _ in images])


def acting_on(counts, clip, pixels):
    """A dictionary whose last units act on so many of some images, by their biases."""
    found = two_sided()
    with clip.vit.record("blocks.2.resid.pre") as cache:
        clip.vit(pixels)
    largest = (cache["blocks.2.resid.pre"] @ found.encoder[-len(counts) :].T).amax(dim=1)
    ordered = largest.sort(dim=0, descending=True).values  # [images, counts]
    for place, count in enumerate(counts):
        unit = len(found.encoder) - len(counts) + place
        if count:
            found.encoder_bias[unit] = -ordered[count - 1 : count + 1, place].mean()
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("units")
    made = Units(root, tiny_model, per_class=12)
    made.mine = acting_on(COUNTS, *training_images(made, tiny_model))
    save_dictionary(root / "mine.safetensors", made.mine)
    out = root / "out"
    made.said = {"effects": made.units("compute_second_order_neuron_prs.py", *made.train, "--top_k_pca", TOP)}
    made.said["pcas"] = made.units("compute_pcas.py", "--dataset", "folder", "--top_k_pca", TOP)
    for name in ("classifier", "texts"):
        made.run(name, out)
    texts = ["--top_k_pca", TOP, "--text_descriptions", "words", "--components", 2]
    made.units("compute_ablations.py", *made.val, "--top_k_pca", TOP)
    decomposition = "compute_sparse_decomposition.py"
    made.units(decomposition, *made.val, *texts, "--evaluate", "--order", "total", "--delete", 3)
    made.units(decomposition, *made.val, *texts)
    made.graded = made.units(
        "evaluate_descriptions.py", *made.val, *texts, "--controls", 2, "--rotated_units", 16, "--delete", 3
    )
    return made


def array(world, name):
    return np.load(world.root / "out" / f"{PREFIX}{name}.npy")


@pytest.fixture(scope="module")
def phi(world, tiny_model):
    """The effects of the units on all training images, [images, N, D], and their activations."""
    clip, pixels = training_images(world, tiny_model)
    units = Features(clip.vit, read_dictionary(world.dictionary))
    _, [found] = second_order(clip.vit, pixels, [units.fold(clip.vit)])
    return found.dense().double().numpy(), found.p.double().numpy()


def test_statistics_are_those_of_all_effects(world, phi):
    effects, p = phi
    mean = effects.mean(axis=0)
    centred = effects - mean
    norms = np.linalg.norm(centred, axis=2)
    size = np.abs(effects).max()
    assert_allclose(array(world, "mean"), mean, atol=1e-5 * size)
    assert_allclose(array(world, "image_norms"), norms, atol=1e-4 * size)
    assert_allclose(array(world, f"{TOP}_norm"), np.sort(norms, axis=0)[-TOP:].T, atol=1e-4 * size)
    for n in (0, 17, 80):
        rows = centred[np.argsort(-norms[:, n], kind="stable")[:TOP], n]
        r = np.linalg.svd(rows)[2][0]
        assert abs(r @ array(world, f"{TOP}_pca")[n]) > 1 - 1e-5
    assert_allclose(array(world, "activations"), p.mean(axis=0), atol=1e-5 * np.abs(p).max())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_pass_leaves_the_bytes_of_two_but_for_norms(world, size):
    """Most of the largest effects of the last units are 0. In `out`, of few images, the mean came first."""
    output = world.root / f"once_by_{size}"
    flags = [*world.model, "--units", world.root / "mine.safetensors", "--output_dir", output, *world.train]
    logs = run_ranks(
        size,
        "compute_second_order_neuron_prs.py",
        *flags,
        "--top_k_pca",
        TOP,
        log=world.root / f"once_by_{size}.log",
        constants={"utils.top_effects.FEW": 7},
    )
    assert "one pass has found the largest effects of" in logs[0] and "units for certain" in logs[0]
    names = {path.name for path in output.glob("*.npy")}
    differing = [name for name in names if (output / name).read_bytes() != array_bytes(world, name)]
    assert len(names) > 6 and differing == [f"{PREFIX}image_norms.npy"]


def array_bytes(world, name):
    return (world.root / "out" / name).read_bytes()


def test_the_component_of_a_rare_unit_points_where_it_acts(world, phi):
    effects, p = phi
    pcas = array(world, f"{TOP}_pca")
    acting = (p != 0).any(axis=1)  # [images, N]
    assert sorted(acting.sum(axis=0))[1] == 1 < TOP / 2  # most of its largest effects are of other images
    for n in np.arange(len(pcas))[-len(COUNTS) : -1]:
        along = (effects[:, n] - effects[:, n].mean(axis=0)) @ pcas[n]
        assert along[np.abs(along).argmax()] > 0
        assert along[acting[:, n]].mean() > 0 > along[~acting[:, n]].mean()


def test_it_is_counted_on_how_many_images_units_act(world, phi):
    acts = array(world, "acts")
    assert acts.dtype == np.int32
    assert (acts == (phi[1] != 0).any(axis=1).sum(axis=0)).all()
    assert acts[-RARE:].tolist() == list(COUNTS) and (acts[:-RARE] > 20).all()


def test_what_they_rebuild_is_said(world, phi):
    said = world.said["effects"].stdout
    on_a_token = (phi[1] != 0).sum(axis=2).mean()
    assert f"102 units of mine write resid.post of layer 1, {on_a_token:.1f} on a token" in said
    assert "they rebuild 100.0 % of its variance (first 47 images)" in said
    assert "units 100 %, the decoder's bias 0 %, the error 0 %" in said
    assert "without any attention the site adds" in said


def test_the_predictions_are_those_of_numpy(world, phi, tiny_model):
    out = world.root / "out"
    clip = load_clip(tiny_model, "random", "cpu", image_only=True)
    images = load_images("folder", world.photos, "val", clip.transform)
    pixels = torch.stack([image for image, _ in images])
    units = Features(clip.vit, read_dictionary(world.dictionary))
    rep, [found] = second_order(clip.vit, pixels, [units.fold(clip.vit)])
    effects = found.dense().double().numpy()
    rep = 100 * torch.nn.functional.normalize(rep, dim=-1).double().numpy()
    mean = phi[0].mean(axis=0)
    centred = effects - mean
    r = array(world, f"{TOP}_pca").astype(np.float64)
    base = rep - centred.sum(axis=1)
    pc = base + np.einsum("ind,nd,ne->ie", centred, r, r)
    classifier = np.load(out / "folder_classifier_tiny_random.npy")
    predictions = np.load(out / f"folder_val_ablations_tiny_random_1_mine_{TOP}_predictions.npy")[:, 0]
    for column, representation in ((0, rep), (1, base), (4, pc)):
        scores = np.sort(representation @ classifier, axis=1)
        clear = scores[:, -1] - scores[:, -2] > 1e-3 * np.abs(scores).max()
        classes = (representation @ classifier).argmax(axis=1)
        assert (predictions[clear, column] == classes[clear]).all() and clear.sum() > 20


def test_units_that_act_on_few_images_are_counted_and_not_graded(world):
    said = world.graded.stdout
    assert f"102 units of mine: {102 - FEW} are graded, {FEW} act on fewer than 20 training images" in said
    [table] = (world.root / "out").glob("*grades*_1_mine_*.csv")
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 102 and "unit" in rows[0]
    for n, row in enumerate(rows):
        assert (row["fires_on pearson"] == "") == (n >= 102 - FEW)
    [summary] = (world.root / "out").glob("*_1_mine_*_summary.json")
    content = json.loads(summary.read_text())
    assert content["graded"] == {"1": [102 - FEW, 102]} and content["unit_set"] == "mine"
    grades = np.array([float(row["fires_on pearson"]) for row in rows[:-FEW]])
    assert abs(content["neurons"]["1"]["fires_on"]["pearson"]["mean"] - grades.mean()) < 1e-3
    energy = np.square(array(world, "image_norms").astype(np.float64)).sum(axis=0)[:-FEW]
    weighted = content["weighted_by_energy"]["1"]["fires_on"]["pearson"]
    assert abs(weighted - (energy * grades).sum() / energy.sum()) < 1e-3


def read_lines(text):
    """The objects of a JSON-lines file; NaN and infinity are no JSON."""

    def refuse(name):
        raise AssertionError(name)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_of_json_for_every_unit_says_what_the_table_says(world):
    [table] = (world.root / "out").glob("*grades*_1_mine_*.csv")
    with open(table) as file:
        rows = list(csv.DictReader(file))
    lines = read_lines(table.with_suffix(".jsonl").read_text())
    assert [line["unit"] for line in lines] == list(range(102))
    for n, (line, row) in enumerate(zip(lines, rows, strict=True)):
        assert (line["units"], line["site"], line["layer"]) == ("mine", "resid.post", 1)
        assert line["images"] == int(row["images on which it acts"])
        few = n >= 102 - FEW
        assert (line["grades"] is None) == few and (line["fires_on_over_noise"] is None) == few
        for side, grade in (("fires_on", "fires_on pearson"), ("writes", "writes share")):
            better = [row[f"{grade} {m}, better than noise"] == "1" for m in ("1 text", "2 texts")]
            assert few or line[f"{side}_over_noise"] == any(better)
            assert line[side] == (json.loads(row[side]) if any(better) else [])  # else no text is invented
        assert few or line["grades"]["fires_on pearson"] == float(row["fires_on pearson"])


def test_texts_that_are_no_better_than_noise_are_no_texts(tmp_path):
    """Of three units: one that texts describe, one that they do not, and one that acts on few images."""
    texts, noise = np.array([[0.9], [0.2], [0.9]]), np.array([[0.2], [0.3], [0.2]])
    controls = np.stack([noise - 0.1, noise + 0.1])
    compared = {("fires_on", "pearson"): Compared("pearson", [1], texts, controls)}
    grades = Graded(np.array([[[0.9, np.nan]], [[0.2, 0.1]], [[np.inf, 0.1]]]), ["fires_on"])
    found = LayerResults(grades, compared, None, {})
    said = [[(7, 0.5, "a dog")], [(8, -0.25, "a cat")], [(7, 0.5, "a dog")]]
    sides = {"fires_on": said, "writes": said}
    save_lines(tmp_path / "a.jsonl", found, {"layer": 1}, sides, acts=np.array([20, 400, 19]))
    first, second, third = read_lines((tmp_path / "a.jsonl").read_text())
    assert first["fires_on"] == [["a dog", 0.5]] and first["fires_on_over_noise"] is True
    assert second["fires_on"] == [] and second["fires_on_over_noise"] is False
    assert second["writes"] == [["a cat", -0.25]] and second["writes_over_noise"] is None  # no controls
    assert third["fires_on"] == third["writes"] == [] and third["grades"] is None
    name = grades.measures
    assert first["grades"][f"fires_on {name[0]}"] == 0.9 and first["grades"][f"fires_on {name[1]}"] is None
    assert first["grades"]["fires_on pearson 1 text, better than noise"] is True


def test_the_lines_of_the_documentation_read_them(world, capsys):
    text = (ROOT / "docs" / "units.md").read_text()
    [code] = [of for of in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "json" in of]
    [path] = (world.root / "out").glob("*grades*_1_mine_*.jsonl")
    named = [line for line in read_lines(path.read_text()) if line["fires_on_over_noise"]]
    exec(re.sub(r'open\(".*?"', f"open({str(path)!r}", code), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == min(10, len(named)) and all(line.startswith("resid.post 1 ") for line in printed)


def test_units_of_which_none_acts_on_enough_images_are_refused(world, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(world.root / "out", out)
    np.save(out / f"{PREFIX}acts.npy", np.full(102, 19, np.int32))
    flags = [*world.model, *world.val, "--units", world.root / "mine.safetensors", "--output_dir", out]
    flags += ["--top_k_pca", TOP, "--text_descriptions", "words", "--components", 2]
    done = run_stage_of_user("evaluate_descriptions.py", *flags, folder=tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1
    assert "no unit of mine acts on 20 of the 47 training images, so none can be graded" in done.stderr


def test_the_controls_of_units_are_said_or_how_to_get_them(world):
    said = world.graded.stdout
    assert "neurons are not graded yet beside these units: run this command without --units, too" in said
    assert f"with --units random:{world.root / 'mine.safetensors'}, too" in said
    assert "rotated units: texts that they fire on" in said and "control" in said
    assert "units deleted" in said or "neurons deleted" in said


def test_only_units_that_are_graded_are_deleted(world):
    [path] = (world.root / "out").glob("*_1_mine_*_deletion_rows.meta.json")
    neurons = json.loads(path.read_text())["neurons"]
    assert neurons == list(range(102 - FEW))
    rows = np.load(path.with_name(path.name.replace(".meta.json", ".npy")))
    assert rows.shape[0] == len(neurons) and np.isfinite(rows).all()


def test_every_file_about_the_units_has_their_name_and_what_they_are_made_of(world):
    out = world.root / "out"
    of_layer = [path for path in out.glob("*_1_*.meta.json") if "words_tiny" not in path.name]
    assert of_layer and all("_1_mine_" in path.name for path in of_layer)
    digest = world.mine.digest()
    recorded = [json.loads(path.read_text()).get("unit_set") for path in out.glob(f"{PREFIX}*.meta.json")]
    assert digest in recorded and set(recorded) <= {digest, None}


def test_another_dictionary_of_that_name_is_refused(world, tmp_path):
    other = two_sided()
    other.decoder[0] *= 2
    other.encoder[0] /= 2
    save_dictionary(tmp_path / "mine.safetensors", other)
    flags = [*world.model, "--units", tmp_path / "mine.safetensors", "--output_dir", world.root / "out"]
    flags += [*world.val, "--top_k_pca", TOP]
    done = run_stage_of_user("compute_ablations.py", *flags, folder=tmp_path, check=False)
    assert done.returncode == 1 and "was made with unit_set" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_advice_about_another_dictionary_of_that_name_leads_to_components(world, tmp_path):
    out = shutil.copytree(world.root / "out", tmp_path / "out")
    other = acting_on(COUNTS, *training_images(world, world.model[1]))
    other.decoder[0] *= 2
    other.encoder[0] /= 2
    save_dictionary(tmp_path / "mine.safetensors", other)
    flags = [*world.model, "--units", tmp_path / "mine.safetensors", "--output_dir", out]
    script, words = "compute_ablations.py", [*flags, *world.val, "--top_k_pca", TOP]
    asked = []
    while (done := run_stage_of_user(script, *words, folder=tmp_path, check=False)).returncode:
        [line] = done.stderr.splitlines()
        script, *words = shlex.split(line.split(" again with: python ")[1])
        words = [str(world.photos) if word == "DATA_PATH" else word for word in words]
        asked.append(script)
        assert len(asked) < 4
    assert asked == ["compute_pcas.py", "compute_second_order_neuron_prs.py"]
    again = ["compute_pcas.py", *flags, "--dataset", "folder", "--top_k_pca", TOP, "--overwrite"]
    run_stage_of_user(*again, folder=tmp_path)
    for name in ("pca", "norm"):
        record = json.loads((out / f"{PREFIX}{TOP}_{name}.meta.json").read_text())
        assert record["unit_set"] == other.digest()


FOLDER = ["--dataset", "folder"]
READERS = {  # stages that read components or effects, and more flags
    "compute_sparse_decomposition.py": [*FOLDER, "--text_descriptions", "words", "--components", 2],
    "compute_ablations.py": None,
    "compute_pcas.py": FOLDER,
}


def assert_refused(world, folder, flags, said, scripts=tuple(READERS)[:2]):
    """Stages end with one line that says so, and write nothing."""
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for script in scripts:
        more = READERS[script] or world.val
        words = [*world.model, *flags, *more, "--top_k_pca", TOP, "--output_dir", folder]
        done = run_stage_of_user(script, *words, folder=world.root, check=False)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and re.search(said, done.stderr), done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_components_of_another_dictionary_of_that_name_are_not_described(world, tmp_path):
    out = shutil.copytree(world.root / "out", tmp_path / "out")
    other = two_sided()
    other.decoder[0] *= 2
    save_dictionary(tmp_path / "mine.safetensors", other)
    assert_refused(world, out, ["--units", tmp_path / "mine.safetensors"], "was made with unit_set")


def test_components_that_were_signed_otherwise_are_refused(world, tmp_path):
    """Those of a version before the sum said the sign of a dictionary's units."""
    out = shutil.copytree(world.root / "out", tmp_path / "out")
    for path in out.glob(f"{PREFIX}{TOP}_*.meta.json"):
        record = json.loads(path.read_text())
        record.pop("sign", None)
        path.write_text(json.dumps(record))
    flags = ["--units", world.root / "mine.safetensors"]
    assert_refused(world, out, flags, "sign 'majority', and here it is 'sum'.*compute_pcas.py .*--overwrite")


def test_results_of_neurons_and_of_as_many_units_are_not_taken_for_each_other(world, tmp_path):
    clip = load_clip(world.model[1], "random", "cpu", image_only=True)
    lines = np.random.default_rng(0).normal(size=(clip.vit.N, 48))
    np.save(tmp_path / "lines.npy", lines.astype(np.float32))
    names = {"": ["--mlp_layer", 1], "_lines": ["--units", tmp_path / "lines.npy", "--site", "mlp.out"]}
    names["_lines"] += names[""]
    world_out = world.root / "out"
    for form in ("top", "full"):
        out = tmp_path / form
        for flags in names.values():
            own = [*world.model, "--output_dir", out, *flags]
            more = [*world.train, "--top_k_pca", TOP, "--keep", form]
            run_stage_of_user("compute_second_order_neuron_prs.py", *own, *more, folder=tmp_path)
            run_stage_of_user("compute_pcas.py", *own, *FOLDER, "--top_k_pca", TOP, folder=tmp_path)
        for path in [*world_out.glob("*classifier*"), *world_out.glob("words_tiny*")]:
            shutil.copy(path, out)
        for (own, flags), other in zip(names.items(), reversed(names), strict=True):
            wrong = shutil.copytree(out, tmp_path / f"{form}{own}_wrong")
            for path in out.glob(f"*_1{other}_*"):
                if other or "_1_lines_" not in path.name:
                    shutil.copy(path, wrong / path.name.replace(f"_1{other}_", f"_1{own}_"))
            said = "was made with unit_set '.*', and here it is '.*'; make (it|them) again with: "
            assert_refused(world, wrong, flags, said, READERS)


def test_all_effects_and_the_largest_ones_have_equal_statistics(world, tmp_path):
    flags = [*world.model, "--units", world.root / "mine.safetensors", "--output_dir", tmp_path]
    effects = "compute_second_order_neuron_prs.py"
    run_stage_of_user(effects, *flags, *world.train, "--keep", "full", folder=tmp_path)
    run_stage_of_user("compute_pcas.py", *flags, "--dataset", "folder", "--top_k_pca", TOP, folder=tmp_path)
    size = np.abs(array(world, f"{TOP}_norm")).max()
    for name in ("mean", f"{TOP}_norm", f"{TOP}_pca"):
        full = np.load(tmp_path / f"{PREFIX}{name}.npy")
        assert_allclose(full[:-RARE], array(world, name)[:-RARE], atol=1e-4 * max(1, size))


def test_pairs_need_no_svd_and_are_exactly_of_rank_one(world, tmp_path):
    flags = [*world.model, "--units", "pairs", "--output_dir", tmp_path, "--mlp_layer", 2, 3]
    effects = "compute_second_order_neuron_prs.py"
    run_stage_of_user(effects, *flags, *world.train, "--top_k_pca", TOP, folder=tmp_path)
    more = ["--dataset", "folder", "--top_k_pca", TOP]
    run_stage_of_user("compute_pcas.py", *flags, *more, folder=tmp_path)
    neurons = [*world.model, "--output_dir", tmp_path, "--mlp_layer", 3, "--keep", "full"]
    run_stage_of_user(effects, *neurons, *world.train, folder=tmp_path)
    names = f"{tmp_path}/folder_train_mlps_tiny_random_3_"
    C = np.load(f"{names}coefficients.npy").astype(np.float64)
    values, outputs = (np.load(f"{names}{part}.npy").astype(np.float64) for part in ("values", "outputs"))
    B = np.einsum("kne,keo->kno", values, outputs)
    lengths = np.linalg.norm(B, axis=2)
    unit = (B / lengths[..., None]).reshape(-1, 24)
    assert_allclose(np.load(f"{names}pairs_{TOP}_pca.npy"), unit, atol=1e-5)
    norms = np.abs(C - C.mean(axis=0)) * lengths
    found = np.load(f"{names}pairs_image_norms.npy")
    assert_allclose(found, norms.reshape(len(C), -1), atol=1e-4 * norms.max())
    assert_allclose(np.load(f"{names}pairs_{TOP}_explained.npy"), 1)
    assert not list(tmp_path.glob("*pairs_activations*"))
    # stored are a number for each image and pair, and the small factors of the neurons' store
    assert_allclose(
        np.load(f"{names}pairs_coefficients.npy"), C.reshape(len(C), 1, -1), atol=1e-5 * np.abs(C).max()
    )
    assert not list(tmp_path.glob("*pairs_top_*"))
    for part, shape in {"values": (1, -1, values.shape[2]), "outputs": outputs.shape}.items():
        whole = np.load(f"{names}{part}.npy").reshape(shape)
        assert_allclose(np.load(f"{names}pairs_{part}.npy"), whole, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize(
    "flags, message", [(["--keep", "top"], "saves nothing for pairs"), (["--merged"], "is for")]
)
def test_pairs_have_one_form(world, tmp_path, flags, message):
    flags = [
        *world.model,
        *world.train,
        "--units",
        "pairs",
        "--mlp_layer",
        3,
        *flags,
        "--output_dir",
        tmp_path,
    ]
    done = run_stage_of_user("compute_second_order_neuron_prs.py", *flags, folder=tmp_path, check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize("kept", [48, 40, 32, 12])
def test_the_share_that_is_rebuilt_is_numpys_and_half_is_the_least(world, tiny_model, tmp_path, capsys, kept):
    whole = two_sided()
    rows = [*range(kept), *range(48, 48 + kept)]
    parts = (whole.encoder[rows], whole.encoder_bias[rows], whole.decoder[rows], torch.full((48,), 0.01))
    path = tmp_path / "some.safetensors"
    save_dictionary(path, Dictionary(*parts, site="resid.post", layer=1))
    clip, pixels = training_images(world, tiny_model)
    with clip.vit.record("blocks.2.resid.pre") as cache:
        clip.vit(pixels)
    x = cache["blocks.2.resid.pre"].double().flatten(0, 1).numpy()
    encoder, _, decoder, bias = (part.double().numpy() for part in parts)
    lost = np.square(x - np.maximum(x @ encoder.T, 0) @ decoder - bias).sum()
    share = 1 - lost / np.square(x - x.mean(axis=0)).sum()
    split = Split(load_images("folder", world.photos, "train", clip.transform), batch_size=4)
    look_at(clip, str(path), 1)
    if share < 0.5:
        with pytest.raises(UserError, match=f"rebuilds only {100 * share:.1f} % .*likely: another model"):
            check_rebuilding(clip, split, path)
    else:
        check_rebuilding(clip, split, path)
    assert f"they rebuild {100 * share:.1f} % of its variance (first 47 images)" in capsys.readouterr().out
    assert (share < 0.5) == (kept == 12)


MISFITS = {  # what is changed in a dictionary that fits, more flags, and what the one line says
    "another layer": ({"layer": 7}, [], "is of layer 7, and this model's layers with effects are 0 to 3"),
    "another width": ({"d": 32}, [], "reads 32 and writes 32 numbers"),
    "two layers": ({}, ["--mlp_layer", 2], "is of layer 1; leave the flag out"),
    "two sites": ({}, ["--site", "mlp.out"], "--site mlp.out"),
    "another model": ({}, [], "trained on other weights"),
    "transposed": ({}, [], "rebuilds only .* likely: another model"),
    "truncated": ({}, [], "cut off or damaged"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(world, tmp_path, name):
    changes, more, message = MISFITS[name]
    path = tmp_path / "bad.safetensors"
    dictionary = two_sided(**changes)
    if name == "another model":
        dictionary.fingerprint = "0123456789abcdef"
    if name == "transposed":
        square = torch.randn(48, 48, generator=torch.Generator().manual_seed(1))
        weights = (
            square,
            torch.zeros(48),
            torch.linalg.inv(square),
            torch.zeros(48),
        )  # square.T would rebuild
        dictionary = Dictionary(*weights, "resid.post", 1, activation="identity")
    save_dictionary(path, dictionary)
    if name == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    out = tmp_path / "out"
    flags = [*world.model, "--units", path, "--output_dir", out, *world.train, "--top_k_pca", TOP, *more]
    done = run_stage_of_user("compute_second_order_neuron_prs.py", *flags, folder=tmp_path, check=False)
    lines = [line for line in done.stderr.splitlines() if line and "image/s" not in line]
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert list(out.iterdir()) == []


def test_directions_and_random_dictionaries_need_not_rebuild_their_site(world, tmp_path):
    np.save(tmp_path / "some.npy", np.random.default_rng(0).standard_normal((7, 48)))
    out = ["--output_dir", tmp_path / "out", "--top_k_pca", TOP]
    placed = ["--site", "attn.out", "--mlp_layer", 2]
    for units, more, name in (
        (tmp_path / "some.npy", placed, "2_some"),
        (f"random:{world.root / 'mine.safetensors'}", [], "1_mine-random"),
    ):
        flags = [*world.model, "--units", units, *out, *world.train, *more]
        run_stage_of_user("compute_second_order_neuron_prs.py", *flags, folder=tmp_path)
        assert (tmp_path / "out" / f"folder_train_mlps_tiny_random_{name}_top_mean.npy").is_file()


def test_a_file_that_says_no_site_asks_for_it(world, tmp_path):
    found = read_dictionary(world.root / "mine.safetensors")
    state = {"encoder.weight": found.encoder, "encoder.bias": found.encoder_bias}
    state |= {"decoder.weight": found.decoder, "decoder.bias": found.decoder_bias}
    path = save(tmp_path / "bare.safetensors", state, activation="relu")
    flags = [*world.model, "--units", path, "--output_dir", tmp_path / "out", *world.train]
    flags += ["--top_k_pca", TOP]
    effects = "compute_second_order_neuron_prs.py"
    done = run_stage_of_user(effects, *flags, folder=tmp_path, check=False)
    assert "does not say what its units write; add --site" in done.stderr
    done = run_stage_of_user(effects, *flags, "--site", "resid.post", folder=tmp_path, check=False)
    assert "does not say of which layer its units are; add --mlp_layer" in done.stderr
    run_stage_of_user(effects, *flags, "--site", "resid.post", "--mlp_layer", 1, folder=tmp_path)


def test_a_notebook_shows_a_unit_as_it_shows_a_neuron(world, tiny_model, phi):
    clip = load_clip(tiny_model, "random", "cpu", image_only=True)
    units = str(world.root / "mine.safetensors")
    look_at(clip, units, 1)
    images = load_images("folder", world.photos, "train", clip.transform)
    results = Results(world.root / "out", tiny_model, "random", unit_set=units)
    described = {"texts": "words", "components": 2}
    found = NeuronLayer(clip, results, images, 1, described, k=TOP)
    rows = found.top_images(17, 3)
    norms = np.linalg.norm(phi[0][:, 17] - phi[0][:, 17].mean(axis=0), axis=1)
    assert rows.tolist() == np.argsort(-norms, kind="stable")[:3].tolist()
    _, maps, projections = found.look(rows, 17)
    assert_allclose(maps.reshape(3, -1), phi[1][rows][:, 1:, 17], atol=1e-4 * np.abs(phi[1]).max())
    assert_allclose(np.abs(projections), norms[rows], rtol=0.2)
    figure = found.card(17, pictures=3)
    assert "unit 17 of mine" in " ".join(text.get_text() for text in figure.findobj(match=Text))
