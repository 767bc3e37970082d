"""The page of the paper's tables and figures: its numbers against plain models and numpy, what is left out,
and resuming.
"""

import copy
import csv
import json
import re
import shutil
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from applications.paper import measures, page
from applications.paper.items import ALIASES, ITEMS
from tests import definition
from tests.conftest import ROOT, TINY
from tests.launcher import run_stage_of_user
from tests.photos import SYNSETS, discs, write_mat, write_photos
from utils.model.clip import load_clip
from utils.runtime.results import Results

LAYER, K, DRAWN, IMAGES = 2, 3, 5, 6
CLASSES = ("anchor", "big_cat", "cup <b>")
WORDS = ["a dog", "the sea", "red", "a temple in china", "flowers", "sky", "roof", "petals", "night", "house"]
DRAWING = """
from PIL import Image
import numpy as np

def draw(text, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8))
"""


class World:
    """A tiny model, photos, texts, masks, and the whole page of them."""

    def __init__(self, root, model):
        self.root, self.model = root, model
        write_photos(root / "photos", classes=CLASSES, per_class=4, side=40)
        (root / "pool.txt").write_text("\n".join(WORDS))
        (root / "drawing.py").write_text(DRAWING)
        write_mat(root / "discs.mat", *discs(4))
        self.flags = ["--model", model, "--pretrained", "random", "--output_dir", "out", "--device", "cpu"]
        self.flags += ["--dataset", "folder", "--data_path", "photos", "--num_workers", 0, "--batch_size", 4]
        self.flags += [
            "--mlp_layer",
            LAYER,
            "--mlp_layers",
            2,
            3,
            "--top_k_pca",
            K,
            "--drawn_neurons",
            DRAWN,
            "--drawn_images",
            IMAGES,
        ]
        self.flags += ["--text_descriptions", "pool.txt", "--components", 4, "--counts", 1, 2, 4]
        self.flags += [
            "--segmentation",
            "discs.mat",
            "--top_neurons",
            20,
            "--tasks",
            "cup <b>: anchor",
            "--seeds",
            2,
        ]
        self.flags += [
            "--neurons_num",
            20,
            "--overall_words",
            5,
            "--results_per_generation",
            2,
            "--pictures",
            2,
        ]
        self.flags += [
            "--text_model",
            "template",
            "--image_model",
            "drawing:draw",
            "--similarity_model",
            "clip",
        ]
        self.flags += ["--cosim_similarity", 2]
        self.first = self.run("all")
        self.folder = root / "out" / "paper_tiny_random"
        self.page = json.loads((self.folder / "paper.json").read_text())["items"]
        self.clip = load_clip(model, "random", "cpu")
        self.results = Results(root / "out", model, "random")

    def run(self, *items, check=True, more=(), **constants):
        where = {"folder": str(self.root), "templates": 2, **constants}
        flags = [*items, *self.flags, *more]
        return run_stage_of_user("reproduce_paper.py", *flags, folder=self.root, check=check, constants=where)

    def rows(self, name):
        return {row["what"]: row for row in self.page[name]["rows"]}

    def pixels(self, split):
        from utils.data.images import load_images

        images = load_images("folder", self.root / "photos", split, self.clip.transform)
        return torch.stack([pixels for pixels, _ in images]), images.labels


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return World(tmp_path_factory.mktemp("paper"), tiny_model)


def accuracy(world, representations, labels):
    classifier = np.load(world.root / "out" / "folder_classifier_tiny_random.npy")
    return 100 * float(((representations.numpy() @ classifier).argmax(axis=1) == labels).mean())


def test_every_item_is_made_or_left_out_with_a_reason(world):
    left = {name: item["left_out"] for name, item in world.page.items() if item["left_out"]}
    assert list(world.page) == list(ITEMS) and set(left) == {"fig9", "fig10", "table7"}
    assert "ViT-L-14" in left["fig9"] and "--imagenet_r" in left["fig10"] and "--text_model" in left["table7"]
    for name, item in world.page.items():
        if not item["left_out"]:
            assert item["rows"] and item["cost"]
            assert all((world.folder / picture).stat().st_size > 2000 for picture in item["pictures"])
            for row in item["rows"]:
                assert row["ours"] is None or np.isfinite(row["ours"])
                assert row["beside"] or row["note"] or "nothing ablated" in row["what"], (name, row)
    commands = {command for item in world.page.values() for command in item["commands"]}
    stages = ("python compute_", "python evaluate_", "python generate_")
    assert all(command.startswith(stages) for command in commands)
    printed = [line for line in world.first.stdout.splitlines() if line.startswith("$ ")]
    assert len(printed) == len(set(printed)) == len(commands)  # nothing runs twice


def test_table_1_equals_a_plain_model_with_replaced_activations(world):
    train, _ = world.pixels("train")
    val, labels = world.pixels("val")
    visual = world.clip.vit.visual
    gelu, seen = visual.transformer.resblocks[LAYER].mlp.gelu, []
    handle = gelu.register_forward_hook(lambda module, inputs, output: seen.append(output))
    visual(train)
    handle.remove()
    mean = seen[0].mean(dim=0)
    handle = gelu.register_forward_hook(lambda module, inputs, output: mean.expand_as(output))
    without = visual(val)
    handle.remove()
    rows = world.rows("table1")
    assert rows["accuracy, nothing ablated"]["ours"] == accuracy(world, visual(val), labels)
    assert rows[f"accuracy without the indirect effects of layer {LAYER}"]["ours"] == accuracy(
        world, without, labels
    )
    ablated = json.loads(
        (world.root / "out" / f"folder_val_ablations_tiny_random_0-1-2-3_{K}.json").read_text()
    )["accuracy"]
    second = rows[f"accuracy without the second-order effects of layer {LAYER}"]["ours"]
    assert second == ablated[str(LAYER)]["without all effects"]


def test_first_order_parts_are_ablated_as_by_hand(world):
    """The mean of a layer's parts in place of its own, alone and up to the layer, in float64."""
    visual = copy.deepcopy(world.clip.vit.visual).double()
    parts = {}
    for split in ("train", "val"):
        runs = [definition.run(visual, image.double()) for image in world.pixels(split)[0]]
        found = {"attention": [], "mlp": [], "rep": [100 * run.rep / run.rep.norm() for run in runs]}
        for run in runs:
            sigma = torch.sqrt(run.z[-1][0].var(unbiased=False) + visual.ln_post.eps)
            for kind, own in (
                ("attention", [a[0] - z[0] for a, z in zip(run.middle, run.z, strict=False)]),
                ("mlp", [m[0] for m in run.mlp]),
            ):
                rows = torch.stack(own)
                rows = ((rows - rows.mean(dim=1, keepdim=True)) / sigma * visual.ln_post.weight) @ visual.proj
                found[kind].append(100 / run.rep.norm() * rows)
        parts[split] = {kind: torch.stack(rows) for kind, rows in found.items()}
    _, labels = world.pixels("val")
    rows = world.rows("fig11")
    for kind in ("attention", "mlp"):
        change = parts["train"][kind].mean(dim=0) - parts["val"][kind]
        for l in range(world.clip.vit.L):
            alone, all_up_to = (
                parts["val"]["rep"] + change[:, l],
                parts["val"]["rep"] + change[:, : l + 1].sum(dim=1),
            )
            assert rows[f"layer {l}: without {kind} of the layer"]["ours"] == accuracy(
                world, alone.float(), labels
            )
            assert rows[f"layer {l}: without {kind} of all layers up to it"]["ours"] == accuracy(
                world, all_up_to.float(), labels
            )


def test_drawn_effects_are_those_of_the_definition_and_of_deleted_neurons(world):
    [path] = world.folder.glob(f"folder_train_{IMAGES}_{LAYER}_{DRAWN}_drawn.npy")
    found, record = np.load(path), json.loads(path.with_suffix(".meta.json").read_text())
    neurons = record["neurons"]
    assert neurons == sorted(set(neurons)) and len(neurons) == DRAWN and found.shape == (IMAGES, 4, DRAWN, 24)
    train, _ = world.pixels("train")
    chosen = train[measures.drawn(len(train), IMAGES)]
    visual, exact = world.clip.vit.visual, copy.deepcopy(world.clip.vit.visual).double()
    representation = visual(chosen)
    for i, image in enumerate(chosen):
        second = definition.effects(exact, image.double(), LAYER)[neurons]
        assert_allclose(found[i, 1], second, rtol=1e-3, atol=1e-4 * float(second.abs().max()))
    for j, n in enumerate(neurons):

        def silence(module, inputs, output, n=n):
            output = output.clone()
            output[..., n] = 0
            return output

        handle = visual.transformer.resblocks[LAYER].mlp.gelu.register_forward_hook(silence)
        lost = 100 * (representation - visual(chosen)) / representation.norm(dim=1, keepdim=True)
        handle.remove()
        assert_allclose(found[:, 3, j], lost, rtol=1e-2, atol=1e-3)
    truth, rows = found[:, 3].astype(float), world.rows("causal")
    for kind, own in zip(
        ("direct", "second-order", "indirect"), found[:, :3].transpose(1, 0, 2, 3).astype(float), strict=True
    ):
        each = [
            np.corrcoef((own[:, n] - own[:, n].mean(0)).ravel(), (truth[:, n] - truth[:, n].mean(0)).ravel())[
                0, 1
            ]
            for n in range(DRAWN)
        ]
        assert_allclose(
            rows[f"layer {LAYER}: correlation of {kind} effects with what is lost"]["ours"],
            np.mean(each),
            atol=1e-3,
        )
    centred = found[:, 2, 0] - found[:, 2, 0].mean(axis=0)
    squares = np.linalg.svd(centred.astype(float), compute_uv=False) ** 2
    assert_allclose(measures.explained(found[:, 2, 0].astype(float)), squares[0] / squares.sum(), rtol=1e-6)


@torch.no_grad()
def test_decisions_are_those_of_a_plain_model_by_its_gradient(world):
    """Contributions are (p - mean) ds/dp, and neurons are taken away by hooks."""
    visual = copy.deepcopy(world.clip.vit.visual).requires_grad_(False)
    train, _ = world.pixels("train")
    val, _ = world.pixels("val")
    classifier = torch.from_numpy(np.load(world.root / "out" / "folder_classifier_tiny_random.npy"))
    gelus = [block.mlp.gelu for block in visual.transformer.resblocks][:-1]
    seen = {}

    def run(images, taken=None):
        """Logits, and activations in `seen`; taken: bool [layers, N], neurons at their means."""

        def change(module, inputs, output):
            l = gelus.index(module)
            seen[l] = output.requires_grad_() if torch.is_grad_enabled() else output
            return seen[l] if taken is None else torch.where(taken[l], means[l], output)

        handles = [gelu.register_forward_hook(change) for gelu in gelus]
        rep = visual(images)
        for handle in handles:
            handle.remove()
        return 100 * rep @ classifier / rep.norm(dim=-1, keepdim=True)

    run(train)
    means = [seen[l].mean(dim=0) for l in range(4)]
    norms = [block.mlp.c_proj.weight.detach().norm(dim=0) for block in visual.transformer.resblocks][:-1]
    left, same, agreed = [], [], []
    for i, image in enumerate(val.split(1)):
        with torch.enable_grad():
            [logits] = run(image)
            c, r = logits.topk(2).indices
            gradients = torch.autograd.grad(logits[c] - logits[r], [seen[l] for l in range(4)])
        margin = (logits[c] - logits[r]).item()
        p = [seen[l].detach() for l in range(4)]
        said = torch.stack([((p[l] - means[l]) * gradients[l])[0].sum(dim=0) for l in range(4)])
        size = torch.stack([p[l][0].abs().sum(dim=0) * norms[l] for l in range(4)])

        def without(places, c=c, r=r, image=image):
            taken = torch.zeros(4 * 96, dtype=torch.bool)
            taken[places] = True
            [logits] = run(image, taken.view(4, 96))
            return float(logits[c] - logits[r]), int(logits.argmax()) == c

        orders = [of.flatten().argsort(descending=True) for of in (said, size)]
        left.append([[without(order[:m])[0] / margin for m in (1, 2, 5, 10, 20)] for order in orders])
        same.append([[without(order[m:])[1] for m in (20, 100)] for order in orders])
        for l in range(4):
            drawn = measures.drawn(96, DRAWN, [l, i])
            lost = [margin - without([96 * l + n])[0] for n in drawn]
            agreed.append(np.corrcoef(said[l, drawn], lost)[0, 1])
    rows = list(world.rows("decisions").values())
    assert len(rows) == 5 + 2 + 4 and {row["n"] for row in rows} == {len(val)}
    by_contribution, by_size = 100 * np.median(left, axis=0)
    assert_allclose([row["ours"] for row in rows[:5]], by_contribution, rtol=1e-3, atol=1e-2)
    assert_allclose(beside(rows[:5], 1), by_size, atol=0.06)
    by_contribution, by_size = 100 * np.mean(same, axis=0)
    assert_allclose([row["ours"] for row in rows[5:7]], by_contribution, rtol=1e-5)
    assert_allclose(beside(rows[5:7], 1), by_size, atol=0.06)
    expected = np.mean(np.reshape(agreed, (len(val), 4)), axis=0)
    assert_allclose([row["ours"] for row in rows[7:]], expected, atol=1e-3)
    assert by_contribution[0] != by_size[0] and expected.min() > 0.3


def beside(rows, place):
    """The numbers at a place of what stands beside rows: second order, activation times norm, random."""
    return [float(re.findall(r"-?\d+\.\d+", row["beside"])[place]) for row in rows]


def test_a_decision_needs_two_classes():
    split = SimpleNamespace(images=SimpleNamespace(class_names=["dog"]))
    args = SimpleNamespace(data_path="x", split="val")
    paper = SimpleNamespace(args=args, images=lambda _: split)
    assert ITEMS["decisions"].lacks(paper) == "it needs images of two classes"
    split.images.class_names.append("cat")
    assert ITEMS["decisions"].lacks(paper) == ""


def test_where_descriptions_are_noise_no_text_names_the_neurons_of_a_decision(world):
    shutil.copytree(world.root / "out", world.root / "noise")
    for path in (world.root / "noise").glob("*_controls.npy"):
        grades = np.load(path)
        if len(grades) > 1:  # rotated units have no controls
            grades[0] = grades[1:].mean(axis=0)  # of the texts
            np.save(path, grades)
    picture = next((world.root / "photos" / "val").rglob("*.JPEG"))
    flags = ["--model", world.model, "--pretrained", "random", "--dataset", "folder", "--input_dir", "noise"]
    flags += ["--text_descriptions", "pool.txt", "--components", 4, "--top_k_pca", K]
    flags += ["--text", "a dog", "--against", "red", "--output_dir", "explained"]
    constants = {"folder": str(world.root)}
    done = run_stage_of_user("explain_image.py", picture, *flags, folder=world.root, constants=constants)
    [path] = (world.root / "explained").glob("*.json")
    found = json.loads(path.read_text())["answers"][0]["naming"]
    assert found["described"] == found["graded"] == found["neurons"] > 5 and found["named"] == 0
    assert found["verdict"].startswith("No text names these 15 neurons: ")
    assert found["verdict"] in path.with_suffix(".html").read_text() and found["verdict"] in done.stdout


def test_fig_4_equals_separate_runs_of_each_number_of_texts(world):
    rows = world.rows("fig4")
    for m in (1, 2, 4):
        words = [
            "--dataset",
            "folder",
            "--data_path",
            "photos",
            "--num_workers",
            0,
            "--mlp_layer",
            LAYER,
            "--top_k_pca",
            K,
        ]
        words += [
            "--text_descriptions",
            "pool.txt",
            "--components",
            m,
            "--evaluate",
            "--model",
            world.model,
            "--pretrained",
            "random",
        ]
        words += ["--input_dir", "out", "--output_dir", "separate", "--device", "cpu"]
        run_stage_of_user(
            "compute_sparse_decomposition.py",
            *words,
            folder=world.root,
            constants={"folder": str(world.root)},
        )
        name = f"folder_mlps_tiny_random_{LAYER}_pool_decomposition_omp_1.0_{m}_evaluation.json"
        separate = json.loads((world.root / "separate" / name).read_text())["accuracy"][str(LAYER)]
        assert (
            abs(rows[f"pool, {m} text{'s' if m > 1 else ''}"]["ours"] - separate) <= 100 / 12 + 1e-9
        )  # one of twelve images at most, by rounding


def test_fig_8_is_that_of_the_definition_in_all_three_forms(world):
    """Effects by the definition, in float64; components and descriptions as they lie on disk."""
    exact = copy.deepcopy(world.clip.vit.visual).double()
    train, val = (world.pixels(split)[0] for split in ("train", "val"))
    val = val[measures.drawn(len(val), 8)]
    known, new = (
        np.array([definition.effects(exact, image.double(), LAYER).numpy() for image in images])
        for images in (train, val)
    )
    mean = known.mean(axis=0)
    r = np.load(world.root / "out" / f"folder_train_mlps_tiny_random_{LAYER}_{K}_pca.npy").astype(float)
    usual, along = (np.einsum("ind,nd->in", phi - mean, r) for phi in (known, new))
    norms, of_new = (np.linalg.norm(phi - mean, axis=-1) for phi in (known, new))
    weights = {"fires_on": (along - usual.mean(axis=0)) / usual.std(axis=0), "writes": of_new}
    found = concepts_by_image(world)
    assert [list(forms) for forms in found] == [["fires_on", "writes", "nearest"]] * 8
    for form, name in (("fires_on", "fires_on_omp_4"), ("writes", "decomposition_omp_1.0_4")):
        path = world.root / "out" / f"folder_mlps_tiny_random_{LAYER}_pool_{name}.json"
        described = json.loads(path.read_text())
        for i, listed in enumerate(found):
            scores = {}
            for n in np.flatnonzero(of_new[i] > np.sort(norms, axis=0)[-K]):
                for _, coefficient, text in described[str(n)]:
                    scores[text] = scores.get(text, 0) + coefficient * weights[form][i, n]
            assert listed[form].keys() == scores.keys() and len(scores) > 3
            size = max(map(abs, scores.values()))
            for text, score in listed[form].items():
                assert_allclose(score, scores[text], rtol=1e-3, atol=1e-3 * size + 6e-6)
    vectors = np.load(world.root / "out" / "pool_tiny_random.npy") / 100
    for image, listed in zip(val, found, strict=True):
        representation = world.clip.vit.visual(image[None])[0].numpy()
        cosines = vectors @ representation / np.linalg.norm(representation)
        assert list(listed["nearest"]) == [WORDS[i] for i in np.argsort(-cosines)]
        assert_allclose(list(listed["nearest"].values()), np.sort(cosines)[::-1], atol=1e-4)
    said = [what.split(",")[0] for what in world.rows("fig8")]
    assert said[:6] == ["fires on", "writes", "nearest"] * 2
    counts = {"train": range(1000), "val": range(500)}
    paper = SimpleNamespace(images=counts.get, args=SimpleNamespace(split="val"))
    assert 1508 <= ITEMS["fig8"].passes(paper) <= 1600  # the stages' images, and its own


def concepts_by_image(world):
    """The concepts of Fig. 8's images, [{form: {text: score}}, ...]."""
    with open(world.folder / "concepts.csv") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        if row["form"] == "fires_on" and row["rank"] == "0":
            found.append({})
        found[-1].setdefault(row["form"], {})[row["text"]] = float(row["score"])
    return found


class Writer:
    """A language model: two descriptions, of which one forgets the class."""

    def __init__(self, model, device):
        pass

    def __call__(self, request, count, seed):
        assert f"Write {count} of" in request
        return f"1. {request.split(' of ')[1]} in the snow\n2. a red house\n", False


def nothing(*models, **more):
    pass


def test_table_7_is_a_pool_of_what_a_language_model_writes(world):
    (world.root / "request.txt").write_text("Write {count} of {class_name}")
    stand_ins = {
        "applications.attack.generators.LanguageModel": Writer,
        "applications.attack.generators.require_packages": nothing,
    }
    more = ["--text_model", "any", "--request", "request.txt", "--output_dir", "seven"]
    world.run("table7", more=more, **stand_ins)
    texts = (world.root / "seven" / "paper_tiny_random" / "image_descriptions.txt").read_text().splitlines()
    assert texts == ["anchor in the snow", "a red house", "big cat in the snow", "cup <b> in the snow"]
    rows = json.loads((world.root / "seven" / "paper_tiny_random" / "paper.json").read_text())["items"][
        "table7"
    ]["rows"]
    assert [row["ours"] for row in rows] == [4, 50]


def test_imagenet_r_takes_everything_else_from_imagenet(world):
    photos = write_photos(world.root / "imagenet", per_class=2, side=40)
    renditions = write_photos(
        world.root / "renditions", splits=(".",), classes=SYNSETS[:2], per_class=2, side=40
    )
    more = [
        "--dataset",
        "imagenet",
        "--data_path",
        photos,
        "--imagenet_r",
        renditions,
        "--subsample",
        1,
        "--output_dir",
        "r",
    ]
    world.run("fig10", more=more, templates=1)
    item = json.loads((world.root / "r" / "paper_tiny_random" / "paper.json").read_text())["items"]["fig10"]
    assert not item["left_out"] and {row["n"] for row in item["rows"]} == {4} and len(item["rows"]) == 4 * 5
    assert "chance 0.1 %" in item["rows"][0]["beside"]


def test_a_second_run_keeps_what_is_there(world):
    arrays = {path: path.stat().st_mtime_ns for path in world.root.glob("out/**/*.np[yz]")}
    assert len(arrays) > 40
    world.run("table1", "fig4", "causal")
    again = json.loads((world.folder / "paper.json").read_text())["items"]
    assert {path: path.stat().st_mtime_ns for path in arrays} == arrays
    for name, item in world.page.items():
        assert again[name]["rows"] == item["rows"] and again[name]["seconds"] >= item["seconds"]


def test_the_page_holds_what_was_found_and_no_foreign_markup(world):
    html, text = ((world.folder / f"paper.{kind}").read_text() for kind in ("html", "md"))
    assert (
        "cup &lt;b&gt;" in html and "cup <b>" not in html and "<script" not in html and "default-src" in html
    )
    for item in world.page.values():
        for picture in item["pictures"]:
            assert f'src="{picture}"' in html and f"]({picture})" in text
    row = {"what": "x", "ours": 50.0, "paper": 52.3, "unit": "%", "beside": "", "n": 5000, "note": ""}
    assert page.cells(row) == ["x", "52.3 %", "50.0 %", "-2.3", "", "5,000", ""]


def test_each_command_is_shown_once_and_folded_and_an_item_is_short(world):
    html, text = ((world.folder / f"paper.{kind}").read_text() for kind in ("html", "md"))
    commands = {command for item in world.page.values() for command in item["commands"]}
    for command in commands:
        assert text.count(f"`{command}`") == 1
        assert unescape(html).count(f"<code>{command}</code>") == 1
    for content in (html, text):
        shown = re.sub("<details>.*?</details>", "", content, flags=re.DOTALL)
        assert "python " not in shown and "GPU" not in content
    sections = re.sub("<details>.*?</details>", "", text, flags=re.DOTALL).split("\n## ")[1:]
    assert len(sections) == len(ITEMS)
    for section in sections:
        assert section.count("\n| ") <= page.SHOWN + 2 and section.count("![") <= 1, section
    for item in world.page.values():
        for row in item["rows"]:
            assert f"| {row['what'].replace('|', chr(92) + '|')} |" in text


def test_an_item_fits_a_screen(world, browser):
    browser.get((world.folder / "paper.html").as_uri())
    height, *heights = browser.execute_script(
        "return [innerHeight, ...[...document.querySelectorAll('section')].map((s) => s.offsetHeight)]"
    )
    assert len(heights) == len(ITEMS) and max(heights) <= height, heights


def test_numbers_of_commands_are_ranges():
    assert page.ranges([7, 1, 3, 2]) == "1-3, 7" and page.ranges([]) == "" and page.ranges([4]) == "4"


def test_table_4_quotes_the_rows_that_are_not_computed_here(world):
    rows = world.rows("table4")
    quoted = {what: row["paper"] for what, row in rows.items() if what.endswith("quoted")}
    assert len(quoted) == 6 and quoted["LRP: mIoU, quoted"] == 35.8
    for what in quoted:
        assert rows[what]["ours"] is None and rows[what]["note"] == "not computed here"


MISTAKES = {
    "--tasks horse": (["--tasks", "horse"], "table3", "--tasks horse is not DRAWN:SEEN"),
    "a neuron": (
        ["--neurons", 9999],
        "table2",
        "--neurons 9999: a layer of this model has the neurons 0 to 95",
    ),
    "all layers": (["--mlp_layer", "all"], "table2", "--mlp_layer is one layer here"),
    "two pools": (["--text_descriptions", "pool.txt", "other/pool.txt"], "fig4", "have one name"),
    "no images": (["--images", "photos/none"], "fig8", "has no pictures"),
    "a request": (
        ["--request", "pool.txt", "--text_model", "any"],
        "table7",
        "does not have {class_name} in it",
    ),
    "a layer": (["--mlp_layer", 77], "table1", "this model's layers with effects are 0 to 3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_what_was_found_before_stays(world, mistake):
    more, name, said = MISTAKES[mistake]
    before = json.loads((world.folder / "paper.json").read_text())["items"]
    done = world.run(
        name, check=False, more=more, **{"applications.attack.generators.require_packages": nothing}
    )
    last = done.stderr.strip().splitlines()[-1]
    assert (
        done.returncode == 1
        and last.startswith("error: ")
        and said in last
        and "Traceback" not in done.stderr
    ), done.stderr[-1500:]
    assert json.loads((world.folder / "paper.json").read_text())["items"][name] == before[name]


def test_without_images_everything_is_left_out_and_a_damaged_page_starts_from_scratch(world):
    folder = world.root / "empty" / "paper_tiny_random"
    folder.mkdir(parents=True)
    (folder / "paper.json").write_text("[]")
    world.flags, kept = [flag for flag in world.flags if flag not in ("--data_path", "photos")], world.flags
    try:
        world.run("table1", "fig11", more=["--output_dir", "empty"])
    finally:
        world.flags = kept
    items = json.loads((folder / "paper.json").read_text())["items"]
    assert {name: item["left_out"] for name, item in items.items()} == dict.fromkeys(
        ("table1", "fig11"), "it needs images: --data_path"
    )


def test_a_tower_that_is_pooled_by_attention_has_the_items_that_it_can_have(world):
    pooled = {
        "attentional_pool": True,
        "attn_pooler_queries": 2,
        "attn_pooler_heads": 3,
        "output_tokens": True,
    }
    (world.root / "pooled.json").write_text(json.dumps({**TINY, "vision_cfg": TINY["vision_cfg"] | pooled}))
    world.run("all", more=["--model", "pooled.json", "--output_dir", "pooled"])
    items = json.loads((world.root / "pooled" / "paper_pooled_random" / "paper.json").read_text())["items"]
    left = {name for name, item in items.items() if item["left_out"]}
    assert left == {"fig9", "fig10", "fig11", "table7"} and "no first order" in items["fig11"]["left_out"]
    said = [row["what"] for item in items.values() for row in item["rows"]]
    assert not [what for what in said if "direct effects" in what and "indirect" not in what]
    assert {what.split(":")[0] for what in said if what.endswith(": mIoU")} == {
        "second_order",
        "random",
        "attention",
    }


def test_wrong_items_are_one_line(world):
    for items, said in (
        (["table9"], "table9 is no table or figure; there are table1"),
        ([], "name a table or figure, or all; --list"),
    ):
        done = world.run(*items, check=False)
        assert (
            done.returncode == 1
            and done.stderr.startswith("error: ")
            and said in done.stderr
            and "Traceback" not in done.stderr
        )
    listed = world.run("--list").stdout
    assert all(name in listed for name in (*ITEMS, *ALIASES))


def test_every_number_of_the_readmes_results_is_on_the_page_of_the_world():
    readme, page_of_world = (
        (ROOT / "README.md").read_text(),
        (ROOT / "docs" / "paper" / "paper.md").read_text(),
    )
    table = readme[readme.index("## What comes out") : readme.index("## What a description means")]
    numbers = re.findall(r"\d+\.\d+", table)
    assert len(numbers) > 20 and [number for number in numbers if number not in page_of_world] == []
    assert all(
        (ROOT / "docs" / "paper" / name).is_file() for name in re.findall(r"\]\(([\w.]+png)\)", page_of_world)
    )


def test_every_number_about_descriptions_in_the_readme_is_one_that_a_command_printed():
    """One of the demo's tables, of the paper's page, or of the benchmark of the controls."""
    places = ("demo/README.md", "docs/paper/paper.md", "benchmarks/results/noise.md")
    readme, *printed = ((ROOT / place).read_text() for place in ("README.md", *places))
    demo = "".join(printed)
    table = readme[readme.index("## What a description means") : readme.index("## What it costs")]
    numbers = re.findall(r"\d+\.\d+", table)
    assert len(numbers) >= 15 and [number for number in numbers if number not in demo] == []


def test_every_number_about_contributions_is_on_the_page_of_the_world():
    explained, page_of_world = (
        (ROOT / "docs" / "explain.md").read_text(),
        (ROOT / "docs" / "paper" / "paper.md").read_text(),
    )
    section = page_of_world[page_of_world.index("## decisions") :].split("\n## ")[0]
    numbers = re.findall(r"-?\d+\.\d+", explained[explained.index("## What contributions are worth") :])
    assert len(numbers) > 20 and [number for number in numbers if number not in section] == []
