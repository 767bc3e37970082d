"""Explaining one decision by command line: the numbers of the .json, the page, a line for every fault."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from applications.explain.known import graded, naming
from applications.explain.words import of_deletion, turned
from tests.conftest import TINY
from tests.launcher import run_stage_of_user
from tests.test_towers import siglip
from utils.controls import Compared
from utils.model.clip import load_clip
from utils.runtime.results import Results

COUNTS = [1, 3]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    """A folder with pictures, and mean activations of all layers of a tiny model."""
    root = tmp_path_factory.mktemp("explain")
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for i in range(3):
        pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"pictures/{i}.png")
    (root / "results").mkdir()
    results = Results(root / "results", tiny_model, "random")
    for layer in range(4):
        mean = rng.random((17, 96), dtype=np.float32)
        np.save(results.path("activations", dataset="folder", layer=layer), mean)
    return root


def explain(world, tiny_model, *flags, output=None, check=True):
    """Run the stage; returns it and the folder that it wrote."""
    output = output or world / f"out{len(list(world.glob('out*')))}"
    common = ["--model", tiny_model, "--pretrained", "random", "--dataset", "folder", "--device", "cpu"]
    common += ["--input_dir", world / "results", "--output_dir", output, "--num_workers", 0]
    common += ["--counts", *COUNTS, "--neurons", 4]
    done = run_stage_of_user("explain_image.py", *flags, *common, folder=world, check=check)
    return done, output


def answers_of(output):
    """The content of the only .json, and the html beside it."""
    [path] = output.glob("explanation_*.json")
    return json.loads(path.read_text()), path.with_suffix(".html").read_text()


def first_drawn(draws, total):
    """The first neuron of every random order of seed 0."""
    return [int(np.random.default_rng([0, i]).permutation(total)[0]) for i in range(draws)]


@pytest.mark.parametrize("texts", [["a dog", "a cat"], ["a cat", "a dog"]])  # once each has won
def test_the_numbers_are_those_of_the_model_with_the_neurons_taken_away(texts, world, tiny_model):
    flags = ["--text", texts[0], "--against", texts[1]]
    done, output = explain(world, tiny_model, world / "pictures/0.png", *flags)
    content, html = answers_of(output)
    [answer] = content["answers"]
    assert content["texts"] == texts and answer["name"] == "0.png"
    clip = load_clip(tiny_model, "random", "cpu")
    tokens = clip.tokenizer(texts)
    with torch.inference_mode():
        vectors = normalize(clip.text.encode_text(tokens), dim=-1)
    v = vectors[0] - vectors[1]
    pixels = clip.transform(Image.open(world / "pictures/0.png").convert("RGB"))[None]
    results = Results(world / "results", tiny_model, "random")
    paths = [results.path("activations", dataset="folder", layer=l) for l in range(4)]
    means = [torch.from_numpy(np.load(path)) for path in paths]

    def score(taken):
        """taken: {layer: neurons}."""

        def put(l, p):
            p = p.clone()
            p[..., taken[l]] = means[l][:, taken[l]]
            return p

        changes = {f"blocks.{l}.mlp.post": lambda p, l=l: put(l, p) for l in taken}
        with torch.inference_mode(), clip.vit.edit(changes):
            return float(100 * normalize(clip.vit(pixels), dim=-1)[0] @ v)

    assert answer["score"] == pytest.approx(score({}), abs=1e-4)
    assert answer["scores"][0] - answer["scores"][1] == pytest.approx(answer["score"], abs=1e-4)
    sign = 1 if answer["score"] >= 0 else -1
    assert answer["prediction"] == content["texts"][0 if sign > 0 else 1]
    neurons = answer["neurons"]
    assert len(neurons) == 4 and all(sign * item["contribution"] > 0 for item in neurons)
    largest = [abs(item["contribution"]) for item in neurons]
    assert largest == sorted(largest, reverse=True)
    for item in [*neurons, *answer["against"]]:
        without = score({item["layer"]: [item["neuron"]]})
        assert item["deleted"] == pytest.approx(answer["score"] - without, abs=1e-3)
    for row in answer["proof"]["delete"]["contribution"]:
        first = neurons[: row["count"]]
        taken = {}
        for item in first:
            taken.setdefault(item["layer"], []).append(item["neuron"])
        assert row["score"] == pytest.approx(score(taken), abs=1e-3)
        assert row["left"] == pytest.approx(row["score"] / answer["score"], abs=1e-3)
    sources = answer["proof"]["delete"]
    assert list(sources) == ["contribution", "second_order", "activation_norm", "random"]
    with torch.inference_mode(), clip.vit.record("blocks.*.mlp.post") as cache:
        clip.vit(pixels)
    sizes = []
    for l in range(4):
        w = clip.vit.blocks[l].mlp.c_proj.weight.norm(dim=0)
        sizes.append(cache[f"blocks.{l}.mlp.post"][0].abs().sum(dim=0) * w)
    layer, n = divmod(int(torch.cat(sizes).argmax()), 96)
    assert sources["activation_norm"][0]["score"] == pytest.approx(score({layer: [n]}), abs=1e-3)
    random = [score({i // 96: [i % 96]}) for i in first_drawn(3, 4 * 96)]
    row = sources["random"][0]
    assert [row["low"], row["high"]] == pytest.approx([min(random), max(random)], abs=1e-3)
    whole = score({l: list(range(96)) for l in range(4)})
    assert answer["proof"]["nothing"]["score"] == pytest.approx(whole, abs=1e-3)
    assert answer["naming"]["verdict"] == "No text names these neurons: there are no descriptions of them."
    assert answer["naming"]["verdict"] in html and answer["naming"]["verdict"] in done.stdout
    assert "wins over" in done.stdout and "random" in done.stdout
    assert f"{neurons[0]['layer']}/{neurons[0]['neuron']}" in done.stdout


def test_several_pictures_share_a_page_without_network_and_foreign_names_are_escaped(world, tiny_model):
    odd = world / "<img src=x onerror=alert(1)>&.png"
    Image.open(world / "pictures/1.png").save(odd)
    flags = ["--text", "<script>alert('dog')</script>"]
    _, output = explain(world, tiny_model, odd, world / "pictures/0.png", *flags)
    content, html = answers_of(output)
    assert len(content["answers"]) == 2 and html.count("<section>") == 2
    assert "<script" not in html and "<img src=x" not in html and "&lt;img src=x" in html
    assert not re.search(r"https?:|url\(|@import", html)
    assert set(re.findall(r'(?:src|href)="([^:"]*)', html)) == {"data"}
    assert "style=" not in html  # the policy lets none in
    assert str(world) not in html and str(world) not in json.dumps(content)
    assert content["answers"][0]["prediction"] is None
    assert "left" not in content["answers"][0]["proof"]["delete"]["contribution"][0]


def test_the_same_question_has_the_same_page_and_another_one_another(world, tiny_model):
    picture = world / "pictures/2.png"
    _, output = explain(world, tiny_model, picture, "--text", "a dog")
    [first] = output.glob("*.html")
    before = first.read_bytes()
    explain(world, tiny_model, picture, "--text", "a dog", output=output)
    assert [path.read_bytes() for path in output.glob("*.html")] == [before]
    explain(world, tiny_model, picture, "--text", "a cat", output=output)
    assert len(list(output.glob("*.html"))) == 2 and first.read_bytes() == before
    assert not list(output.glob("*partial*"))


def test_a_folder_has_the_mean_contributions_of_its_pictures(world, tiny_model):
    flags = ["--text", "a dog", "--against", "a cat"]
    _, output = explain(world, tiny_model, world / "pictures", *flags)
    content, _ = answers_of(output)
    [answer] = content["answers"]
    assert answer["pictures"] == 3 and answer["proof"]["pictures"] == 3
    paths = sorted((world / "pictures").glob("*.png"))
    _, output = explain(world, tiny_model, *paths, *flags)
    singles, _ = answers_of(output)
    mean = np.mean([single["score"] for single in singles["answers"]])
    assert answer["score"] == pytest.approx(mean, abs=1e-3)
    for layer in range(4):
        of = [[single["layers"][layer][k] for k in ("positive", "negative")] for single in singles["answers"]]
        together = answer["layers"][layer]
        assert together["positive"] + together["negative"] == pytest.approx(np.sum(of) / 3, abs=1e-2)


def test_without_means_the_baseline_is_zero_and_the_page_says_so(world, tiny_model):
    flags = ["--text", "a dog", "--baseline", "zero", "--input_dir", world]
    common = ["--model", tiny_model, "--pretrained", "random", "--output_dir", world / "outzero"]
    run_stage_of_user("explain_image.py", world / "pictures/0.png", *flags, *common, folder=world)
    _, html = answers_of(world / "outzero")
    assert "--baseline zero" in html


POOLINGS = {
    "average": {"pool_type": "avg", "final_ln_after_pool": True},
    "average of norms": {"pool_type": "avg"},
    "attention": {"attentional_pool": True, "attn_pooler_queries": 1, "attn_pooler_heads": 4},
    "attention and an MLP": {"timm_model_name": "siglip", "timm_pool": "map", "timm_proj": "none"},
}


def small(name, trunk, **options):
    """A small trunk, in place of timm's of that name."""
    return trunk


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_kind_of_pooling_is_explained(pooling, world, tmp_path):
    config = {**TINY, "vision_cfg": {**TINY["vision_cfg"], **POOLINGS[pooling]}}
    if "timm_model_name" in POOLINGS[pooling]:
        config |= {"embed_dim": 48, "vision_cfg": {"image_size": 32, **POOLINGS[pooling]}}
    (tmp_path / "model.json").write_text(json.dumps(config))
    flags = ["--text", "a dog", "--against", "a cat", "--baseline", "zero", "--output_dir", tmp_path / "out"]
    common = ["--model", tmp_path / "model.json", "--pretrained", "random"]
    run_stage_of_user(
        "explain_image.py",
        world / "pictures/0.png",
        *flags,
        *common,
        folder=tmp_path,
        constants={"timm.create_model": partial(small, trunk=siglip().trunk)},
    )
    content, html = answers_of(tmp_path / "out")
    [answer] = content["answers"]
    assert len(content["layers"]) == (5 if pooling == "attention" else 4)  # the SigLIP has 4 layers
    assert np.array(answer["map"]["patches"]).shape == (4, 4)
    assert all(item["heads"] for item in answer["neurons"])
    assert ("pool." in html) == pooling.startswith("attention")


def test_a_tower_without_contributions_is_refused_by_name(world, tmp_path):
    vision = {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    (tmp_path / "model.json").write_text(json.dumps({**TINY, "vision_cfg": vision}))
    flags = ["--text", "a dog", "--baseline", "zero", "--output_dir", tmp_path / "out"]
    flags += ["--model", tmp_path / "model.json", "--pretrained", "random"]
    picture = world / "pictures/0.png"
    done = run_stage_of_user("explain_image.py", picture, *flags, folder=tmp_path, check=False)
    assert done.returncode == 1 and "ConvNeXt, which has no attention" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("out/*"))


FAULTS = {
    "no picture": (["missing.png", "--text", "dog"], "there is no picture missing.png"),
    "a bad picture": (["BAD", "--text", "dog"], "bad.png cannot be read"),
    "an empty folder": (["EMPTY", "--text", "dog"], "there are no pictures in"),
    "a folder and a picture": (["EMPTY", "BAD", "--text", "dog"], "give one folder alone"),
    "an empty text": (["PICTURE", "--text", "  "], "--text is empty"),
    "an empty other text": (["PICTURE", "--text", "dog", "--against", ""], "--against is empty"),
    "equal texts": (["PICTURE", "--text", "a dog", "--against", "a  dog "], "give two different texts"),
    "alike texts": (["PICTURE", "--text", "a dog", "--against", "A DOG"], "does not tell"),
    "a long text": (["PICTURE", "--text", "dog " * 90], "longer than the 77 tokens"),
    "no means": (
        ["PICTURE", "--text", "dog", "--dataset", "CIFAR10"],
        "mean activations of layer 0, 1, 2, 3",
    ),
    "no layer": (["PICTURE", "--text", "dog", "--mlp_layer", "4"], "has no attention after it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_nothing_is_written(fault, world, tiny_model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    places = {"EMPTY": tmp_path / "empty", "BAD": tmp_path / "bad.png", "PICTURE": world / "pictures/0.png"}
    words, expected = FAULTS[fault]
    flags = [places.get(word, word) for word in words]
    common = ["--model", tiny_model, "--pretrained", "random", "--output_dir", tmp_path / "out"]
    common += ["--input_dir", world / "results"]
    if "--dataset" not in flags:
        common += ["--dataset", "folder"]
    done = run_stage_of_user("explain_image.py", *flags, *common, folder=tmp_path, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0], done.stderr
    assert list((tmp_path / "out").iterdir()) == []
    if fault == "no means":
        assert "compute_second_order_neuron_prs.py" in lines[0] and "--mlp_layer 0 1 2 3" in lines[0]
        assert "--split train" in lines[0] and "--baseline zero" in lines[0]


def test_signs_turn_towards_the_text_that_has_won():
    row = {"score": -3.0, "low": -4.0, "high": -2.0, "left": 0.5, "changed": 0.0}
    assert turned(row) == {"score": 3.0, "low": 2.0, "high": 4.0, "left": 0.5, "changed": 0.0}
    assert turned({"positive": 2.0, "negative": -5.0}) == {"positive": 5.0, "negative": -2.0}
    assert turned([{"positive_on": 0.25, "count": 7, "scores": [1, 2]}]) == [
        {"positive_on": 0.75, "count": 7, "scores": [1, 2]}
    ]


@pytest.mark.parametrize("lost, kind", [(4.0, "sure"), (0.15, "unsure"), (-4.0, "unsure")])
def test_a_choice_is_sure_only_where_it_costs_far_more_than_random_neurons(lost, kind):
    random = {"count": 1, "score": 9.95, "low": 9.9, "high": 10.05}
    rows = {"contribution": {"count": 1, "score": 10 - lost}, "random": random}
    answer = {"score": 10.0, "proof": {}, "neurons": [{"contribution": 1.0, "deleted": 1.0}]}
    assert [kind for kind, _ in of_deletion(answer, rows, 100)] == ["deletion", kind]


def test_texts_are_shown_as_many_as_are_justified_where_they_are_better_than_noise(tmp_path):
    entries = [(2, "dog", 0.9), (0, "cat", -0.5), (1, "cow", 0.1)]
    np.savez(tmp_path / "x.npz", support=np.array([[0, 2, 1]] * 4))
    ungraded = graded(0, entries, tmp_path / "x.npz", None, 0)
    assert ungraded["verdict"] == "not graded" and ungraded["grade"] is None
    assert ungraded["texts"] == [["dog", 0.9], ["cat", -0.5], ["cow", 0.1]]
    texts = np.array([[0.5, 0.6], [0.5, 0.5], [0.5, 0.5], [0.1, 0.5]])
    controls = np.array([np.full((4, 2), x) + [0, 0.3] for x in (0.09, 0.1, 0.11)])
    compared = Compared("share", [1, 3], texts, controls)
    assert compared.lengths[compared.justified()] == 1
    better = graded(0, entries, tmp_path / "x.npz", compared, 0)
    assert better == {
        "texts": [["cat", -0.5]],  # the first in the order of choice
        "grade": 0.5,
        "control": 0.1,
        "verdict": "better than noise",
    }
    noise = graded(3, entries, tmp_path / "x.npz", compared, 3)
    assert noise["texts"] == [] and noise["verdict"] == "no better than noise"


NAMES = {"texts": [["dog", 0.9]], "grade": 0.5}
NOISE = {"texts": [], "grade": 0.4}
UNGRADED = {"texts": [["cat", 0.9]], "grade": None}
NAMINGS = {
    "no descriptions": ([{}, {}], (0, 0, 0), "No text names these neurons: there are no descriptions"),
    "no grades": ([{"writes": UNGRADED}, {}], (1, 0, 0), "Whether texts name these neurons is not known"),
    "noise": (
        [{"writes": NOISE, "fires_on": NOISE}] * 2,
        (2, 2, 0),
        "No text names these 2 neurons: the descriptions of 2 are",
    ),
    "some noise": (
        [{"writes": NOISE}, {"writes": UNGRADED}],
        (2, 1, 0),
        "No text names these 2 neurons: the descriptions of 1 are",
    ),
    "names": (
        [{"writes": NOISE, "fires_on": NAMES}, {"writes": NOISE}],
        (2, 2, 1),
        "Texts name 1 of these 2 neurons; the descriptions of 2 are graded.",
    ),
}


@pytest.mark.parametrize("case", NAMINGS)
def test_an_answer_says_whether_texts_name_its_neurons(case):
    known, counts, said = NAMINGS[case]
    found = naming([{"known": of} for of in known])
    assert (found["described"], found["graded"], found["named"]) == counts and found["neurons"] == 2
    assert said in found["verdict"]
