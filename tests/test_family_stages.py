"""Every stage on small towers of EVA, PE-Core, ViTamin and a ResNet, as a user runs it."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.conftest import TINY, TINY_RESNET
from tests.launcher import World, run_stage_of_user
from tests.photos import discs, write_mat
from tests.tiny_timm import vision_config
from utils.data.images import load_images
from utils.model.clip import load_clip
from utils.neurons import NeuronLayer
from utils.runtime.results import Results

FAMILIES = ("EVA02-E", "PE-Core", "ViTamin", "ResNet")
STAGES = "classifier representations full pcas ablations texts decomposition evaluation".split()
METHODS = ("second_order", "random", "attention", "rollout", "first_order", "gradcam", "chefer")
POOLED = METHODS[:3]  # what a tower has that is pooled by attention


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_runs_on_every_family(tmp_path, family):
    config = TINY_RESNET if family == "ResNet" else TINY | {"vision_cfg": vision_config(family)}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    model = str(tmp_path / "tiny.json")
    world = World(tmp_path, model, per_class=4, graded=["all"])
    write_mat(tmp_path / "discs.mat", *discs(4))
    for name in STAGES:
        world.run(name, world.base)
    world.run("gallery", world.base, "--gallery", tmp_path / "gallery")
    world.run("full", world.base, "--split", "val")
    clip = load_clip(model, "random", "cpu")
    pooled = not clip.vit.pooling.has_first_order
    for method in METHODS:
        refused = pooled and method not in POOLED
        said = world.run("segmentation", world.base, "--mlp_layers", 0, "--method", method, code=int(refused))
        why = f"--method {method} is not for towers that pool their tokens by attention"
        assert not refused or why in said
    results, layer = Results(world.base, model, "random"), clip.vit.last
    images = load_images("folder", world.photos, "val", clip.transform)
    names = {"dataset": "folder", "layer": layer, "k": 5}
    accuracies = ablated_by_numpy(clip, results, images, names)
    path = results.path("ablations", dataset="folder", split="val", layer=list(range(layer + 1)), k=5)
    stored = json.loads(path.read_text())["accuracy"][str(layer)]
    assert stored["without all effects"] == accuracies
    described = {"texts": "words", "components": 8}
    neurons = NeuronLayer(clip, results, images, layer=layer, described=described, k=5)
    assert neurons.card(3, pictures=4, words=3).axes
    explained(world, model, tmp_path)
    attacked(world, model, layer, tmp_path)


def ablated_by_numpy(clip, results, images, names):
    """The accuracy without the effects of a layer, from the stored factors."""
    parts = ("coefficients", "values", "outputs", "bias")
    read = {part: results.load(part, split="val", **names).astype(float) for part in parts}
    phi = np.einsum("ikn,kne,keo->ino", read["coefficients"], read["values"], read["outputs"])
    phi += read["bias"][:, None]
    mean = results.load("mean", **names).astype(float)
    classifier = results.load("classifier", dataset="folder").astype(float)
    with torch.inference_mode():
        unit = 100 * normalize(clip.vit(torch.stack([pixels for pixels, _ in images])), dim=1).numpy()
    predicted = ((unit - phi.sum(axis=1) + mean.sum(axis=0)) @ classifier).argmax(axis=1)
    return 100 * (predicted == images.labels).mean()


def explained(world, model, root):
    """A decision is explained, and the deletions of its proof are those of the running model."""
    [first, *_] = sorted((world.photos / "val").rglob("*.JPEG"))
    flags = ["--text", "a dog", "--against", "a cat", "--counts", 1, 3, "--neurons", 4, "--dataset", "folder"]
    flags += ["--model", model, "--pretrained", "random", "--device", "cpu", "--num_workers", 0]
    flags += ["--input_dir", world.base, "--output_dir", root / "explained"]
    run_stage_of_user("explain_image.py", first, *flags, folder=root)
    [path] = (root / "explained").glob("explanation_*.json")
    [answer] = json.loads(path.read_text())["answers"]
    [row] = [row for row in answer["proof"]["delete"]["contribution"] if row["count"] == 1]
    assert answer["neurons"][0]["deleted"] == pytest.approx(answer["score"] - row["score"], abs=1e-3)


def attacked(world, model, layer, root):
    """An attack takes words of the layer's neurons, and judges its drawings by the tower."""
    [path] = world.base.glob("*classifier*.meta.json")
    first, second, *_ = json.loads(path.read_text())["class_names"]
    flags = ["--model", model, "--pretrained", "random", "--device", "cpu", "--dataset", "folder"]
    flags += ["--class_0", first, "--class_1", second, "--mlp_layers", layer, "--neurons_num", 10]
    flags += ["--top_k_pca", 5, "--text_descriptions", "words", "--components", 8]
    flags += ["--text_model", "template", "--similarity_model", "clip", "--batch_size", 1]
    flags += ["--image_model", "demo.world:draw_description", "--dataset_path", root / "attack"]
    run_stage_of_user("generate_adversarial_images.py", *flags, "--output_dir", world.base, folder=root)
    [results] = (root / "attack").rglob("results.json")
    drawn = len(list(results.parent.glob("images/*.png")))
    assert drawn and json.loads(results.read_text())["images"] == drawn
