"""Control dictionaries and rotated units, against numpy, scipy and scikit-learn, and on models of noise."""

import copy
import json
from argparse import Namespace

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.testing import assert_allclose
from scipy.stats import pearsonr
from sklearn.linear_model import orthogonal_mp
from sklearn.metrics import average_precision_score

from demo import train_sae
from demo.layout import MODEL, WEIGHTS
from tests import definition
from tests.conftest import run_script
from tests.launcher import run_stage_of_user, shared_world, the_line
from utils import omp
from utils.controls import CHANCE, Compared, Rotation, above, control_dictionary, lengths_of
from utils.model.dictionary_files import save_dictionary
from utils.prs import fold, second_order

LAYER = 3
LENGTHS = [1, 2, 4, 8]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def drawn_by_hand(vectors, seed):
    """A control dictionary: as many normal vectors of equal mean and covariance, made unit vectors."""
    distinct = np.array(sorted({tuple(row) for row in vectors}))
    root = np.real(scipy.linalg.sqrtm(np.cov(distinct.T, bias=True)))
    drawn = np.random.default_rng(seed).standard_normal(distinct.shape) @ root + distinct.mean(axis=0)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# dictionaries


def test_a_control_has_the_mean_and_covariance_of_the_texts(rng):
    """In many dimensions, where making unit vectors of them changes little."""
    scales = np.linspace(2, 0.5, 64)
    vectors = unit(rng.standard_normal((4000, 64)) * scales + 4 * (np.arange(64) == 5))
    drawn = control_dictionary(torch.from_numpy(vectors), 0).numpy()
    assert drawn.shape == vectors.shape
    assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-6)
    assert_allclose(drawn.mean(axis=0), vectors.mean(axis=0), atol=0.01)
    assert_allclose(np.diag(np.cov(drawn.T)), np.diag(np.cov(vectors.T)), rtol=0.2)
    assert drawn.mean(axis=0)[5] > 0.3


def test_a_control_is_its_definition_and_equal_texts_count_once(rng):
    vectors = unit(rng.standard_normal((300, 8)) + 1)
    twice = torch.from_numpy(np.concatenate([vectors, vectors[:50]]))
    found = control_dictionary(twice, 3)
    assert_allclose(found.numpy(), drawn_by_hand(vectors, 3), atol=1e-6)
    assert torch.equal(found, control_dictionary(twice, 3))
    assert not torch.allclose(found, control_dictionary(twice, 4), atol=0.1)


@pytest.mark.parametrize(
    ("components", "lengths"), [(1, [1]), (8, [1, 2, 4, 8]), (6, [1, 2, 4, 6]), (3, [1, 2, 3])]
)
def test_graded_lengths_are_powers_of_two_and_all(components, lengths):
    assert lengths_of(components) == lengths


def test_shorter_descriptions_are_least_squares_on_the_first_atoms(rng):
    atoms, targets = rng.standard_normal((80, 24)), rng.standard_normal((10, 24))
    support = np.array([rng.choice(80, 8, replace=False) for _ in range(10)])
    support[4, 3:] = -1  # stopped early
    found, shares = omp.nested_fits(*map(torch.from_numpy, (support, atoms, targets)), lengths=[1, 2, 5, 8])
    for j, m in enumerate([1, 2, 5, 8]):
        for n in range(10):
            chosen = support[n, :m][support[n, :m] >= 0]
            x, *_ = np.linalg.lstsq(atoms[chosen].T, targets[n], rcond=None)
            expected = np.zeros(8)
            expected[: len(chosen)] = x
            assert_allclose(found[j, n], expected, atol=1e-9)
            left = targets[n] - x @ atoms[chosen]
            assert float(shares[j, n]) == pytest.approx(1 - left @ left / (targets[n] @ targets[n]), abs=1e-9)


# what is over noise


def compared(texts, controls, measure="pearson"):
    return Compared(measure, list(range(1, texts.shape[1] + 1)), texts, controls)


def test_skill_and_better_than_noise_are_their_definitions(rng):
    controls = 0.4 + 0.1 * rng.standard_normal((5, 50, 3))
    texts = 0.5 + 0.1 * rng.standard_normal((50, 3))
    for measure, power in (("pearson", 2), ("share", 1)):
        noise = (controls**power).mean(axis=(0, 1))
        expected = ((texts**power).mean(axis=0) - noise) / (1 - noise)
        assert_allclose(compared(texts, controls, measure).skill(), expected, rtol=1e-9)
    better = np.zeros((50, 3), bool)
    for m in range(3):
        squares = sum(((controls[:, n, m] - controls[:, n, m].mean()) ** 2).sum() for n in range(50))
        deviation = np.sqrt(squares / (50 * 4))
        for n in range(50):
            better[n, m] = texts[n, m] > controls[:, n, m].mean() + 2 * deviation
    assert (compared(texts, controls).better() == better).all() and 0 < better.mean() < 1


def test_a_control_in_the_texts_place_is_no_better_than_noise(rng):
    controls = 0.5 + 0.1 * rng.standard_normal((6, 3000, 2))
    of = compared(controls[0], controls[1:])
    assert (of.better().mean(axis=0) < CHANCE).all() and (of.by_chance() < CHANCE).all()
    assert (of.by_chance() > 0.02).all()  # the rule does not pass nobody
    assert of.justified() is None and (np.abs(of.skill()) < 0.05).all()


def test_the_justified_length_has_the_largest_skill_among_those_over_noise():
    controls = np.zeros((2, 100, 3)) + [[[0.1]], [[0.2]]]
    texts = np.full((100, 3), 0.15)
    texts[:30, 1], texts[:20, 2] = 0.8, 0.9  # the second has more skill
    assert compared(texts, controls).justified() == 1
    assert compared(texts[:, :1], controls[..., :1]).justified() is None
    one = np.full((100, 1), 0.15)
    one[0] = 1  # much skill, of a single neuron
    assert compared(one, controls[..., :1]).justified() is None


def test_deviations_are_pooled_over_neurons():
    controls = np.array([[[0.0], [0.5]], [[0.0], [0.7]]])  # of the first neuron alone it would be 0
    deviation = np.sqrt(0.02 / 2)
    assert above(np.array([[1.99 * deviation], [1]]), controls).ravel().tolist() == [False, True]
    assert above(np.array([[2.01 * deviation], [1]]), controls).ravel().tolist() == [True, True]


# rotated units


def test_all_rotated_units_together_write_what_the_neurons_write(visual, vit, images):
    neurons = fold(vit, 1)
    rotation = Rotation(neurons, vit.N)
    assert_allclose(rotation.R @ rotation.R.T, np.eye(vit.N), atol=1e-5)
    with torch.inference_mode():
        _, [phi] = second_order(vit, images[:1], [neurons])
        units = rotation(phi)
        found = units.sum()[0].numpy()
    expected = definition.effects(copy.deepcopy(visual).double(), images[0].double(), 1).sum(dim=0).numpy()
    assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_rotated_unit_acts_and_writes_by_its_row(visual, vit, images):
    """As a neuron of the float64 definition whose activation and vector are the row's."""
    rotation = Rotation(fold(vit, 1), 5)
    with torch.inference_mode():
        _, [phi] = second_order(vit, images[:1], [fold(vit, 1)])
        found = rotation(phi).dense()[0].numpy()
    tower = copy.deepcopy(visual).double()
    R = rotation.R.double()
    run = definition.run(tower, images[0].double())
    mlp = tower.transformer.resblocks[1].mlp
    for u in range(5):
        changed = (run.p[1] @ R[u])[:, None] * (mlp.c_proj.weight.double() @ R[u])
        moved = definition.representation_with_changed_mlp(tower, images[0].double(), 1, changed)
        own = 100 * (moved - run.rep) / run.rep.norm()
        difference = found[u] - own.numpy()  # the shares of means and biases, equal for all units
        if u == 0:
            shares = difference
        assert_allclose(difference, shares, atol=1e-5 * np.abs(found).max())
    dense = definition.effects(tower, images[0].double(), 1)
    moved = run.p[1][:, :1] * mlp.c_proj.weight.double()[:, 0]
    alone = definition.representation_with_changed_mlp(tower, images[0].double(), 1, moved)
    of_neuron = dense[0] - 100 * (alone - run.rep) / run.rep.norm()
    assert_allclose(shares, of_neuron, atol=2e-5 * np.abs(found).max())


# the stage, from drawing to skill


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return shared_world(tmp_path_factory, tiny_model)


def read(world, ending, units=""):
    [path] = (world.whole / "evaluation").glob(f"*_{LAYER}{units}_{ending}")
    return np.load(path)


def pursued(atoms, target, m):
    """The first m atoms of scikit-learn's pursuit; their least squares by numpy."""
    coefficients = orthogonal_mp(atoms.T, target, n_nonzero_coefs=m)
    chosen = np.flatnonzero(coefficients)
    x, *_ = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)
    return chosen, x


def graded_by_hand(dictionary, looked, n):
    """The grades of one neuron from one dictionary, [slots without soft-WPMI]."""
    features, effects, held_out, acts, r = looked
    centred = (features["train"] - features["train"].mean(axis=0)) @ dictionary.T
    spread = np.linalg.norm(centred, axis=0)
    target = effects["train"][:, n] - effects["train"][:, n].mean()
    correlations, precisions, shares = [], [], []
    for m in LENGTHS:
        chosen, x = pursued((centred / spread).T, target / np.linalg.norm(target), m)
        predicted = held_out @ ((x / spread[chosen]) @ dictionary[chosen])
        correlations.append(pearsonr(predicted, effects["val"][:, n]).statistic)
        precisions.append(average_precision_score(acts[:, n], predicted))
        atoms = 100 * (dictionary - dictionary.mean(axis=0))
        atoms = 100 * atoms / np.linalg.norm(atoms, axis=0)
        chosen, x = pursued(atoms, r[n], m)
        shares.append(1 - np.square(r[n] - x @ atoms[chosen]).sum())
    return [*correlations, *precisions, *shares]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_one_layer_is_numpys_and_scikit_learns_from_drawing_to_skill(world):
    path = next((world.whole / "evaluation").glob(f"*_{LAYER}_words_8_controls.npy"))
    found = np.load(path).astype(np.float64)
    slots = json.loads(path.with_suffix(".meta.json").read_text())["slots"]
    expected_slots = [["fires_on", "pearson", m] for m in LENGTHS]
    expected_slots += [["fires_on", "auprc", m] for m in LENGTHS] + [["writes", "share", m] for m in LENGTHS]
    assert slots[:12] == expected_slots and [slot[0] for slot in slots[12:]] == ["wpmi", "wpmi"]
    effects = {
        s: np.float64(read_split(world, s, f"mlps_tiny_random_{LAYER}_5_projections"))
        for s in ("train", "val")
    }
    features = {s: np.float64(read_split(world, s, "representations_tiny_random")) for s in ("train", "val")}
    count = round(5 / 63 * len(effects["val"]))
    acts = effects["val"] >= np.sort(effects["val"], axis=0)[-count]
    r = np.load(world.base / f"folder_train_mlps_tiny_random_{LAYER}_5_pca.npy").astype(np.float64)
    looked = (features, effects, features["val"], acts, r)
    vectors = unit(np.load(world.base / "words_tiny_random.npy").astype(np.float64))
    dictionaries = [vectors, *(drawn_by_hand(vectors, seed) for seed in range(5))]
    chosen = range(0, 96, 9)
    expected = np.array([[graded_by_hand(d, looked, n) for n in chosen] for d in dictionaries])
    close = np.abs(found[:, list(chosen), :12] - expected) < 2e-3
    assert close.mean() > 0.98, "but for near ties"
    whole = json.loads(summary_of(world).read_text())["over_noise"][str(LAYER)]
    squares = found[:, :, :4] ** 2
    noise = squares[1:].mean(axis=(0, 1))
    skill = (squares[0].mean(axis=0) - noise) / (1 - noise)
    assert_allclose(whole["fires_on"]["pearson"]["skill"], skill, atol=1e-5)
    assert_allclose(whole["writes"]["share"]["control"], found[1:, :, 8:12].mean(axis=(0, 1)), atol=1e-5)


def read_split(world, split, name):
    return np.load(world.whole / "evaluation" / f"folder_{split}_{name}.npy")


def summary_of(world):
    return next((world.whole / "evaluation").glob("*_words_8_summary.json"))


def test_rotated_units_are_described_and_graded_as_neurons_are(world):
    """Here all 96 units of the basis: their components by numpy from the stored effects of the neurons."""
    base = world.base
    C = np.load(base / f"folder_train_mlps_tiny_random_{LAYER}_coefficients.npy").astype(np.float64)
    parts = {
        kind: np.load(base / f"folder_train_mlps_tiny_random_{LAYER}_{kind}.npy")
        for kind in ("values", "outputs", "bias")
    }
    drawn = np.random.default_rng(LAYER).standard_normal((96, 96))
    Q, triangle = np.linalg.qr(drawn)
    R = (Q * np.sign(np.diag(triangle))).T
    B = np.einsum("un,kne,keo->kuo", R, parts["values"], parts["outputs"])
    for u in (0, 17, 95):
        phi = np.einsum("ik,ko->io", C @ R[u], B[:, u]) + parts["bias"]
        centred = phi - phi.mean(axis=0)
        top = np.argsort(-np.linalg.norm(centred, axis=1))[:5]
        r = np.linalg.svd(centred[top])[2][0]
        r = r if ((centred[top] @ r) > 0).sum() > 2.5 else -r
        assert_allclose(read(world, "5_pca.npy", "_rotated")[u], r, atol=1e-4)
        assert_allclose(read(world, "mean.npy", "_rotated")[u], phi.mean(axis=0), atol=1e-5)
        own = read_split(world, "train", f"mlps_tiny_random_{LAYER}_rotated_5_projections")[:, u]
        assert_allclose(own, centred @ r, atol=1e-4 * np.abs(centred).max())
    summary = json.loads(summary_of(world).read_text())["neurons"][str(LAYER)]
    grades = read(world, "words_8.npy", "_rotated")
    assert summary["rotated_fires_on"]["pearson"]["mean"] == pytest.approx(grades[:, 1, 0].mean(), abs=1e-6)
    assert not list((world.whole / "evaluation").glob("*rotated*coefficients*"))


# models whose truth is known


def symbols(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    small = [
        "--train_per_class",
        64,
        "--val_per_class",
        32,
        "--pairs_per_class",
        1,
        "--segmentation_scenes",
        2,
    ]
    run_script("-m", "demo.make_world", "--output_dir", folder / "world", *small)
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return symbols(tmp_path_factory)


def evaluated(drawn, weights, texts, units=None):
    """Run the stages up to the grades of layer 4; returns {text set: {side: numbers}} and the output.

    units: path of a dictionary of the layer that takes the neurons' place.
    """
    out = drawn / (weights.rsplit("/", 1)[-1] if units is None else units.stem)
    model = ["--model", MODEL, "--pretrained", weights, "--output_dir", out]
    data = [
        "--dataset",
        "folder",
        "--data_path",
        drawn / "world/symbols",
        "--batch_size",
        64,
        "--num_workers",
        0,
    ]
    layer = ["--mlp_layer", 4, *([] if units is None else ["--units", units])]
    run_stage_of_user(
        "compute_second_order_neuron_prs.py", *model, *data, *layer, "--split", "train", folder=drawn
    )
    run_stage_of_user("compute_pcas.py", *model, "--dataset", "folder", *layer, folder=drawn)
    for name in texts:
        own = ["--text_descriptions", drawn / "world" / f"{name}.txt"]
        run_stage_of_user("compute_text_set_projection.py", *model, *own, folder=drawn)
        own = [*layer, "--dataset", "folder", *own, "--components", 4]
        run_stage_of_user("compute_sparse_decomposition.py", *model, *own, folder=drawn)
    flags = [*model, *data, *layer, "--text_descriptions", *texts, "--components", 4, "--delete", 0]
    printed = run_stage_of_user("evaluate_descriptions.py", *flags, folder=drawn).stdout
    found = {}
    for name in texts:
        [path] = out.glob(f"*_{name}_4_summary.json")
        found[name] = json.loads(path.read_text())["over_noise"]["4"]
    return found, printed


def test_no_text_names_the_neurons_of_a_model_with_random_weights(drawn):
    found, printed = evaluated(drawn, "random", ["words", "atoms"])
    for name in ("words", "atoms"):
        fires_on, writes = found[name]["fires_on"], found[name]["writes"]
        assert min(fires_on["pearson"]["grade"]) > 0.7  # the grade alone would say much
        for of in (fires_on["pearson"], writes["share"]):
            assert max(of["better"]) <= CHANCE, of
        assert fires_on["justified"] == 0 and writes["justified"] == 0
    assert printed.count("no more than random directions say") == 4


def test_no_text_names_the_units_of_a_dictionary_for_random_weights(drawn, monkeypatch):
    """It is trained as the world's own is, and rebuilds the stream; its units mean nothing."""
    monkeypatch.setattr(train_sae, "WEIGHTS", "random")
    monkeypatch.setattr(train_sae, "FIRST", 256)
    size = {"pictures": 4800, "units": 256, "k": 16, "lr": 1e-3, "seed": 0, "random_decoder": False}
    dictionaries, _ = train_sae.train(Namespace(**size))
    path = drawn / "of_noise.safetensors"
    save_dictionary(path, dictionaries["resid"])
    found, printed = evaluated(drawn, "random", ["atoms"], path)
    fires_on, writes = found["atoms"]["fires_on"], found["atoms"]["writes"]
    for of in (fires_on["pearson"], writes["share"]):
        assert max(of["better"]) <= CHANCE, of
    assert fires_on["justified"] == 0 and writes["justified"] == 0
    assert printed.count("no more than random directions say. No number of texts is justified") == 2


def test_atomic_texts_name_the_neurons_of_the_worlds_clip(drawn):
    found, printed = evaluated(drawn, WEIGHTS, ["words", "atoms"])
    better = {
        side: of[measure]["better"]
        for side, measure, of in (
            ("fires_on", "pearson", found["atoms"]["fires_on"]),
            ("writes", "share", found["atoms"]["writes"]),
        )
    }
    assert better["fires_on"][0] >= 0.60 and better["fires_on"][2] >= 0.55
    assert better["writes"][0] >= 0.45 and better["writes"][2] >= 0.60
    skill = {name: of["fires_on"]["pearson"]["skill"] for name, of in found.items()}
    assert_allclose(skill["atoms"], [0.17, 0.17, 0.17], atol=0.03)
    assert_allclose(skill["words"], [0.13, 0.11, 0.07], atol=0.03)
    table = printed[printed.rindex("layer 4, texts that they fire on, correlation") :].splitlines()
    for line, (name, of) in zip(table[2:4], found.items(), strict=True):  # the comparison of the text sets
        columns = of["fires_on"]["pearson"]
        first = [columns[key][0] for key in ("grade", "control", "skill", "better")]
        assert line.split()[:5] == [name, *(f"{x:.2f}" for x in first)]


def test_a_single_control_is_refused(world, tmp_path):
    script, flags, _ = world.stages()["evaluation"]
    flags = [*world.model, *flags, "--controls", 1, "--output_dir", tmp_path]
    done = run_stage_of_user(script, *flags, folder=tmp_path, check=False)
    assert done.returncode == 1 and "--controls 1 shows no spread" in the_line(done.stderr)
