"""Maps show where the chosen neurons fire, and scores equal those of an independent computation."""

import copy
import hashlib
import json
import runpy
import sys

import h5py
import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from sklearn.metrics import accuracy_score, average_precision_score, jaccard_score, precision_recall_curve
from torch.testing import assert_close
from torchvision.transforms.functional import resize

from tests import definition
from tests.conftest import ROOT, run_script
from tests.photos import discs, write_mat
from utils import segmentation
from utils.data.segmentation_row import Row
from utils.data.segmentation_set import SegmentationSet
from utils.model.clip import load_clip
from utils.runtime import flags as shared_flags
from utils.runtime.errors import UserError
from utils.runtime.results import Results
from utils.segmentation import (
    AttentionMaps,
    CheferMaps,
    FirstOrderMaps,
    GradCAMMaps,
    NeuronMaps,
    RolloutMaps,
    Scores,
    enlarge,
    neurons_of_classes,
    predicted_class,
    random_neurons,
    row_of,
    row_of_image,
)

LAYERS, CLASSES, SIDE = (1, 2, 3), 7, 32


def random_maps(n=8, side=24):
    """Maps and masks with every special case: constant maps, no object, nothing but object, ignored
    pixels.
    """
    rng = np.random.default_rng(0)
    masks = (rng.random((n, side, side)) < 0.3).astype(np.int8)
    maps = (0.6 * rng.random((n, side, side)) + 0.4 * masks * rng.random((n, side, side))).astype(np.float32)
    maps[0] = 0
    maps[1] = 1
    masks[2] = 0
    masks[3] = 1
    masks[4:6][rng.random((2, side, side)) < 0.2] = -1
    return maps, masks


def reference_scores(maps, masks, thr=0.5):
    """The scores that `Scores` defines, from all pixels at once, by scikit-learn."""
    pixels = np.concatenate([m.ravel() for m in maps])
    truth = np.concatenate([m.ravel() for m in masks])
    pixels = pixels[truth >= 0]
    truth = truth[truth >= 0]
    predicted = (pixels > thr).astype(int)
    precisions = []
    for scores, mask in zip(maps, masks, strict=True):
        scores = scores[mask >= 0]
        mask = mask[mask >= 0]
        both = np.stack([1 - scores, scores])
        precisions.append(average_precision_score(np.eye(2)[mask].T.ravel(), both.ravel()))
    iou = [jaccard_score(truth, predicted, pos_label=label, zero_division=0) for label in (0, 1)]
    return {
        "pixel_accuracy": 100 * accuracy_score(truth, predicted),
        "mIoU": 100 * np.mean(iou),
        "mAP": 100 * np.mean(precisions),
        "IoU_background": 100 * iou[0],
        "IoU_object": 100 * iou[1],
    }


def scored(maps, masks, thr=0.5):
    scores = Scores(thr)
    scores.add(maps, masks)
    return scores


@pytest.mark.parametrize("thr", [0, 0.3, 0.5])
def test_scores_equal_those_of_scikit_learn(thr):
    maps, masks = random_maps()
    assert scored(maps, masks, thr).result() == pytest.approx(reference_scores(maps, masks, thr), rel=1e-9)


def test_scores_do_not_depend_on_how_images_are_batched():
    maps, masks = random_maps()
    pieces = Scores(0.5)
    for piece in (slice(0, 3), slice(3, 4), slice(4, 8)):
        pieces.add(maps[piece], masks[piece])
    assert pieces.result() == scored(maps, masks).result()


def test_a_perfect_map_scores_100_and_an_inverted_one_0():
    _, masks = random_maps()
    perfect = scored((masks == 1).astype(np.float32), masks).result()
    assert list(perfect.values()) == [100] * 5
    inverted = scored((masks != 1).astype(np.float32), masks).result()
    assert inverted["IoU_object"] == inverted["mIoU"] == inverted["pixel_accuracy"] == 0
    assert inverted["mAP"] <= 50.0


def test_an_image_with_ignored_pixels_only_adds_a_0_to_the_mean_precision():
    maps, masks = random_maps()
    alone = scored(maps[:1], masks[:1]).result()
    ignored = np.full_like(masks[:1], -1)
    both = scored(maps[:2], np.concatenate([masks[:1], ignored])).result()
    assert both == {**alone, "mAP": alone["mAP"] / 2}
    assert set(scored(maps[:1], ignored).result().values()) == {0}


def test_a_set_of_nothing_but_background_has_an_object_iou_of_0():
    maps = np.zeros((2, 8, 8), np.float32)
    result = scored(maps, np.zeros((2, 8, 8), np.int8)).result()
    assert result == {"pixel_accuracy": 100, "mIoU": 50, "mAP": 100, "IoU_background": 100, "IoU_object": 0}


def test_the_precision_recall_curve_is_exact_at_its_thresholds():
    maps, masks = random_maps()
    precision, recall = scored(maps, masks).precision_recall()
    pixels = maps[masks >= 0]
    truth = masks[masks >= 0]
    for k in (0, 1, 1000, 30000, 32768, 50001, 65535, 65536):
        found = pixels >= k / 65536
        assert precision[k] == truth[found].mean() and recall[k] == truth[found].sum() / truth.sum()
    assert (precision[-1], recall[-1]) == (1, 0)
    rough = (np.floor(maps * 64) / 64).astype(np.float32)  # scikit-learn's thresholds are then among ours
    precision, recall = scored(rough, masks).precision_recall()
    expected = precision_recall_curve(truth, rough[masks >= 0])
    at = (expected[2] * 65536).astype(int)
    np.testing.assert_allclose(precision[at], expected[0][:-1], rtol=1e-12)
    np.testing.assert_allclose(recall[at], expected[1][:-1], rtol=1e-12)


def test_the_clamp_changes_the_curve_alone():
    """Against scikit-learn's curve of clamped scores, as the published --thr has it."""
    maps, masks = random_maps()
    maps = (np.floor(maps * 64) / 64).astype(np.float32)
    clamped = Scores(thr=0.25)
    clamped.add(maps, masks)
    precision, recall = clamped.precision_recall()
    expected = precision_recall_curve(masks[masks >= 0], np.maximum(maps[masks >= 0], 0.25))
    at = (expected[2] * 65536).astype(int)
    np.testing.assert_allclose(precision[at], expected[0][:-1], rtol=1e-12)
    np.testing.assert_allclose(recall[at], expected[1][:-1], rtol=1e-12)
    assert at.min() == 0.25 * 65536 and clamped.result() == scored(maps, masks).result()


def test_maps_are_enlarged_then_scaled_and_constant_ones_are_background():
    maps = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    maps[1] = 0.7
    maps[2] = -3
    large = enlarge(maps, (3, 4), (24, 32))
    assert large.shape == (4, 24, 32) and large.min() == 0
    assert large[[0, 3]].amax(dim=(1, 2)).tolist() == [1, 1]
    assert not large[1:3].any()
    patches = np.asarray(maps[0].reshape(3, 4).double())
    centres = [(np.arange(8 * n) + 0.5) / 8 - 0.5 for n in patches.shape]
    columns = np.stack([np.interp(centres[1], range(4), row) for row in patches])
    expected = np.stack([np.interp(centres[0], range(3), column) for column in columns.T], axis=1)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(large[0].numpy(), expected, atol=1e-6)


@pytest.fixture(scope="module")
def clip(tiny_model):
    return load_clip(tiny_model, "random", "cpu")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def activations_of(visual, pixels):
    """Post-GELU activations of every layer, one image at a time: list over images of [L, T, N]."""
    images = []
    for image in pixels:
        seen = []
        handles = [
            block.mlp.gelu.register_forward_hook(lambda m, x, y, to=seen: to.append(y[0]))
            for block in visual.transformer.resblocks
        ]
        visual(image[None])
        for handle in handles:
            handle.remove()
        images.append(torch.stack(seen).double().numpy())
    return images


@pytest.mark.parametrize("sign", ["both", "positive"])
def test_a_map_is_the_mean_over_the_neurons_of_the_images_own_class(clip, pixels, sign, monkeypatch):
    monkeypatch.setattr(segmentation, "RANKED", 3)
    vit = clip.vit
    pcas, classifier = random_inputs(vit)
    flat = torch.from_numpy(np.concatenate(list(pcas.values())))
    columns = torch.from_numpy(classifier)
    neurons, weights = neurons_of_classes(flat, columns, 20, sign)
    maps = NeuronMaps(vit, LAYERS, neurons, weights, predicted_class(columns))(pixels, 0).double().numpy()
    for image, activations, found in zip(pixels, activations_of(clip.vit.visual, pixels), maps, strict=True):
        column = classifier[:, np.argmax(vit(image[None])[0].numpy() @ classifier)]
        products = [(r @ column, l, n) for l, rows in pcas.items() for n, r in enumerate(rows)]
        top = sorted(products, key=lambda p: -(abs(p[0]) if sign == "both" else p[0]))[:20]
        expected = np.mean([activations[l, 1:, n] for _, l, n in top], axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_only_positive_neurons_are_taken_even_if_they_are_few():
    pcas = torch.tensor([[1.0], [-9.0], [2.0], [-1.0]])
    neurons, weights = neurons_of_classes(pcas, torch.tensor([[1.0, -1.0, 0.0]]), 3, "positive")
    assert neurons[0, :2].tolist() == [2, 0] and weights[0].tolist() == [0.5, 0.5, 0]
    assert neurons[1, :2].tolist() == [1, 3] and weights[1].tolist() == [0.5, 0.5, 0]
    assert not weights[2].any()  # the map of such a class is constant
    neurons, weights = neurons_of_classes(pcas, torch.tensor([[1.0]]), 2, "both")
    assert neurons.tolist() == [[1, 2]] and weights.tolist() == [[0.5, 0.5]]


def test_random_neurons_depend_on_the_seed_and_the_image_alone():
    neurons, weights = random_neurons(4, 50, 10, seed=1)
    assert all(len(set(row)) == 10 for row in neurons.tolist())
    assert weights.sum(dim=1).tolist() == pytest.approx([1] * 4)
    assert torch.equal(random_neurons(2, 50, 10, seed=1)[0], neurons[:2])
    assert not torch.equal(random_neurons(4, 50, 10, seed=2)[0], neurons)
    assert neurons[0].tolist() != neurons[1].tolist()


def test_a_batch_in_the_middle_takes_the_neurons_of_its_images(clip, pixels):
    vit = clip.vit
    neurons, weights = random_neurons(5, len(LAYERS) * vit.N, 10, seed=1)
    rows = torch.tensor([4, 0, 2, 2, 1])
    found = NeuronMaps(vit, LAYERS, neurons, weights, row_of_image(rows))(pixels[2:4], 2).double().numpy()
    for i, activations in enumerate(activations_of(vit.visual, pixels[2:4])):
        chosen = [divmod(n, vit.N) for n in neurons[rows[2 + i]].tolist()]
        expected = np.mean([activations[LAYERS[l], 1:, n] for l, n in chosen], axis=0)
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-6)


def test_attention_maps_are_those_of_the_running_model(clip, pixels):
    """The last layer's attention, and the product over layers of (A + 1) / 2, from the model's own attention
    weights.
    """
    vit = clip.vit
    patterns = []
    with vit.record("*.ln1.out") as cache:
        vit(pixels)
    for l, block in enumerate(vit.blocks):
        x = cache[f"blocks.{l}.ln1.out"]
        patterns.append(block.attn(x, x, x, need_weights=True, average_attn_weights=True)[1].double())
    rollout = torch.eye(vit.T, dtype=torch.float64).expand(len(pixels), -1, -1)
    for A in patterns:
        A = A + torch.eye(vit.T, dtype=torch.float64)
        rollout = (A / A.sum(dim=-1, keepdim=True)) @ rollout
    for method, expected in ((AttentionMaps(vit), patterns[-1]), (RolloutMaps(vit), rollout)):
        assert_close(method(pixels, 0).double(), expected[:, 0, 1:], rtol=1e-4, atol=1e-6)


def score_with(visual, image, column, extra):
    """The cosine of an image with a class, in a tower run by hand in float64, where `extra` [L, H, T, T] is
    added to the attention probabilities. Returns it and the probabilities."""
    z = visual._embeds(image[None])[0]
    patterns = []
    for block, more in zip(visual.transformer.resblocks, extra, strict=True):
        W_Q, W_K, W_V, b_Q, b_K, b_V, W_O = definition.heads(block.attn)
        x = block.ln_1(z)
        q, k, v = (x @ W + b[:, None] for W, b in ((W_Q, b_Q), (W_K, b_K), (W_V, b_V)))  # [H, T, e]
        patterns.append(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) + more)
        z = z + ((patterns[-1] @ v) @ W_O).sum(dim=0) + block.attn.out_proj.bias
        z = z + block.mlp(block.ln_2(z))
    representation = visual.ln_post(z[0]) @ visual.proj
    return torch.nn.functional.cosine_similarity(representation, column, dim=0), torch.stack(patterns)


def test_methods_with_gradients_equal_a_tower_run_by_hand(clip, pixels):
    """GradCAM and Chefer against float64 autograd by hand, and that against finite differences."""
    vit = clip.vit
    rows = torch.tensor([3, 0, 6, 6, 1])
    classifier = torch.from_numpy(random_inputs(vit)[1])
    visual = copy.deepcopy(vit.visual).double()
    with torch.inference_mode():  # as the stage runs them
        cam = GradCAMMaps(vit, classifier, row_of_image(rows))(pixels, 0).double()
        chefer = CheferMaps(vit, classifier, row_of_image(rows))(pixels, 0).double()
    for i, image in enumerate(pixels.double()):
        column = classifier[:, rows[i]].double()
        extra = torch.zeros(vit.L, vit.H, vit.T, vit.T, dtype=torch.float64, requires_grad=True)
        score, A = score_with(visual, image, column, extra)
        [gradient] = torch.autograd.grad(score, extra)
        A = A.detach()
        h = 1e-5
        for place in ((0, 1, 2, 3), (vit.L - 1, 0, 0, 5), (2, 3, 7, 0)):
            step = torch.zeros_like(gradient)
            step[place] = h
            up, down = (score_with(visual, image, column, sign * step)[0] for sign in (1, -1))
            assert_close((up - down) / (2 * h), gradient[place], rtol=1e-4, atol=1e-9)
        last = (gradient[-1, :, 0, 1:].mean(dim=1, keepdim=True) * A[-1, :, 0, 1:]).mean(dim=0).clamp_min(0)
        assert_close(cam[i], last, rtol=1e-3, atol=1e-3 * float(last.max()) + 1e-9)
        R = torch.eye(vit.T, dtype=torch.float64)
        for l in range(vit.L):
            R = R + (gradient[l] * A[l]).clamp_min(0).mean(dim=0) @ R
        assert_close(chefer[i], R[0, 1:], rtol=1e-3, atol=1e-3 * float(R[0, 1:].max()))


def test_first_order_maps_are_the_class_scores_of_patches(clip, pixels):
    """Of a head and a patch: the change of the frozen output when the patch's part is taken out, in
    float64.
    """
    vit = clip.vit
    classifier = torch.from_numpy(random_inputs(vit)[1])
    maps = FirstOrderMaps(vit, classifier, predicted_class(classifier))(pixels, 0).double()
    visual = copy.deepcopy(vit.visual).double()
    for image, found in zip(pixels.double(), maps, strict=True):
        run = definition.run(visual, image)
        column = classifier[:, int((run.rep.float() @ classifier).argmax())].double()
        sigma = torch.sqrt(run.z[-1][0].var(unbiased=False) + visual.ln_post.eps)
        expected = torch.zeros(vit.T, dtype=torch.float64)
        for l, block in enumerate(visual.transformer.resblocks):
            _, _, W_V, _, _, b_V, W_O = definition.heads(block.attn)
            x = block.ln_1(run.z[l])
            for h in range(vit.H):
                for t in range(vit.T):
                    part = run.A[l][h][0, t] * (
                        (x[t] @ W_V[h] + b_V[h]) @ W_O[h] + block.attn.out_proj.bias / vit.H
                    )
                    written = ((part - part.mean()) / sigma * visual.ln_post.weight) @ visual.proj
                    expected[t] += 100 / run.rep.norm() * written @ column
        assert_close(found, expected[1:], rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def random_inputs(vit, seed=3):
    """First components {layer: [N, D]} and a classifier [D, classes]."""
    rng = np.random.default_rng(seed)
    classifier = rng.standard_normal((vit.D, CLASSES)).astype(np.float32)
    pcas = {layer: rng.standard_normal((vit.N, vit.D)).astype(np.float32) for layer in LAYERS}
    pcas = {layer: r / np.linalg.norm(r, axis=1, keepdims=True) for layer, r in pcas.items()}
    return pcas, classifier / np.linalg.norm(classifier, axis=0)


@pytest.mark.parametrize("geometry", ["paper", "aligned"])
def test_masks_are_squashed_or_follow_the_image(tmp_path, clip, geometry):
    images, masks = discs(10)
    painted = [np.where(mask[..., None] == 1, 255, 0).astype(np.uint8).repeat(3, axis=2) for mask in masks]
    path = write_mat(tmp_path / "set.mat", painted, masks)
    data = SegmentationSet(path, clip.transform, geometry, (SIDE, SIDE))
    assert len(data) == 10
    for i, mask in enumerate(masks):
        pixels, found = data[i]
        assert pixels.shape == (3, SIDE, SIDE) and found.shape == (SIDE, SIDE) and found.dtype == torch.int8
        assert set(found.unique().tolist()) <= {-1, 0, 1} and (i == 3) == (not (found == 1).any())
        drawn = (pixels[0] > pixels[0].amin() + 1.9) & (i != 3)  # the disc as the model sees it
        agreement = (drawn == (found == 1))[found >= 0].float().mean()
        if geometry == "aligned" or mask.shape[0] == mask.shape[1]:
            assert agreement > 0.99
        elif mask.shape in ((64, 40), (40, 72)) and i != 3:
            assert agreement < 0.95
        if geometry == "paper":
            squashed = np.asarray(Image.fromarray(mask.astype(np.int32)).resize((SIDE, SIDE), Image.NEAREST))
            np.testing.assert_array_equal(found, squashed)


def test_pixels_of_the_ignored_values_do_not_count(tmp_path, clip):
    images, masks = discs(3)
    unknown = [np.where(mask == -1, 255, mask).astype(np.uint8) for mask in masks]
    first = write_mat(tmp_path / "minus.mat", images, masks)
    second = write_mat(tmp_path / "void.mat", images, unknown)
    options = {"geometry": "paper", "size": (SIDE, SIDE)}
    for i in range(3):
        found = SegmentationSet(first, clip.transform, **options)[i][1]
        same = SegmentationSet(second, clip.transform, **options)[i][1]
        assert torch.equal(found, same) and (found == -1).any()
        counted = SegmentationSet(second, clip.transform, **options, ignored=[-1])[i][1]
        assert torch.equal(counted, torch.where(found == -1, 1, found))


def test_masks_are_aligned_at_other_sizes_and_with_padding(tmp_path, clip):
    images, masks = discs(5)
    painted = [np.full_like(image, 255) for image in images]  # the padding is black
    path = write_mat(tmp_path / "set.mat", painted, masks)
    padded = image_transform_v2(PreprocessCfg(size=SIDE, resize_mode="longest"), is_train=False)
    pixels, found = SegmentationSet(path, padded, "aligned", (SIDE, SIDE))[
        2
    ]  # 40 x 72: padded above and below
    padding = pixels[0] < 0
    assert padding.any() and (found[padding] == -1).all() and (found[~padding] >= 0).any()
    large = SegmentationSet(path, clip.transform, "aligned", (3 * SIDE, 3 * SIDE))[1][1]
    small = SegmentationSet(path, clip.transform, "aligned", (SIDE, SIDE))[1][1]
    assert torch.equal(large[1::3, 1::3], small)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model, clip):
    """A folder with a segmentation set, first components of three layers, and a classifier, named as the
    stages do.
    """
    folder = tmp_path_factory.mktemp("inputs")
    images, masks = discs(7)
    write_mat(folder / "discs.mat", images, masks)
    pcas, classifier = random_inputs(clip.vit)
    results = Results(folder, tiny_model, "random")
    for layer, r in pcas.items():
        np.save(results.path("pca", dataset="imagenet", layer=layer, k=100), r)
    np.save(results.path("classifier", dataset="imagenet"), classifier)
    return folder


def flags_of(inputs, tiny_model, output, *more):
    flags = ["--model", tiny_model, "--pretrained", "random", "--device", "cpu", "--num_workers", 0]
    flags += ["--data_path", inputs / "discs.mat", "--input_dir", inputs, "--output_dir", output]
    flags += ["--mlp_layers", *LAYERS, "--top_neurons", 20]
    return [str(flag) for flag in [*flags, *more]]


def segment(monkeypatch, flags):
    """Run the script in this process. Returns its exit message, None for success."""
    monkeypatch.setattr(sys, "argv", ["compute_segmentation.py", *flags])
    try:
        runpy.run_path(str(ROOT / "compute_segmentation.py"), run_name="__main__")
    except SystemExit as leaving:
        return leaving.code


def read_row(output, row):
    return json.loads((output / f"discs_segmentation_tiny_random_{row}.json").read_text())


def independent_scores(inputs, clip, choose):
    """The scores of the made-up set in paper geometry, image by image; choose(products [M N]) gives
    indices.
    """
    visual = clip.vit.visual
    pcas, classifier = random_inputs(clip.vit)
    images, masks = discs(7)
    maps = []
    squashed = []
    for image, mask in zip(images, masks, strict=True):
        pixels = clip.transform(Image.fromarray(image))
        column = classifier[:, int(np.argmax(visual(pixels[None])[0].numpy() @ classifier))]
        top = choose(np.concatenate(list(pcas.values())) @ column)
        activations = activations_of(visual, pixels[None])[0][list(LAYERS), 1:]  # [M, T-1, N]
        activations = np.concatenate(list(activations.transpose(0, 2, 1)))  # [M N, T-1]
        mean = activations[top].mean(axis=0).reshape(1, 4, 4)
        large = resize(torch.from_numpy(mean), [SIDE, SIDE], antialias=False)[0]  # scaled afterwards
        maps.append(((large - large.min()) / (large.max() - large.min())).float().numpy())
        small = Image.fromarray(mask.astype(np.int32)).resize((SIDE, SIDE), Image.NEAREST)
        squashed.append(np.asarray(small))
    return reference_scores(maps, squashed)


def test_the_script_gives_the_scores_of_an_independent_computation(tmp_path, inputs, tiny_model, clip):
    flags = flags_of(inputs, tiny_model, tmp_path, "--save_img", "--num_workers", 2)
    done = run_script("compute_segmentation.py", *flags)
    row = read_row(tmp_path, "second_order_1-2-3_20")
    expected = independent_scores(inputs, clip, lambda products: np.argsort(-np.abs(products))[:20])
    assert row["scores"] == pytest.approx(expected, abs=1e-3)
    assert row["images"] == 7 and row["layers"] == [1, 2, 3] and row["fingerprint"] == clip.fingerprint
    assert f"{row['scores']['mIoU']:.2f}" in done.stdout and "PixAcc" in done.stdout
    stem = "discs_segmentation_tiny_random_second_order_1-2-3_20"
    precision, recall = (np.load(tmp_path / f"{stem}_{part}.npy") for part in ("precision", "recall"))
    assert precision.shape == recall.shape == (65538,) and recall[0] == 1 and (np.diff(recall) <= 0).all()
    assert Image.open(tmp_path / f"{stem}.png").size[0] > 300
    pictures = sorted((tmp_path / f"{stem}_images").iterdir())
    assert [path.name for path in pictures] == [f"{i:05d}.png" for i in range(7)]
    assert Image.open(pictures[0]).size == (4 * (SIDE + 4), SIDE + 4)


def test_positive_neurons_and_classes_from_a_file(monkeypatch, tmp_path, inputs, tiny_model, clip):
    flags = flags_of(inputs, tiny_model, tmp_path, "--neuron_sign", "positive")
    assert segment(monkeypatch, flags) is None
    expected = independent_scores(inputs, clip, lambda products: np.argsort(-products)[:20])
    assert read_row(tmp_path, "second_order_1-2-3_20_positive")["scores"] == pytest.approx(expected, abs=1e-3)
    _, classifier = random_inputs(clip.vit)
    with torch.inference_mode():
        pixels = [clip.transform(Image.fromarray(image)) for image in discs(7)[0]]
        predicted = (clip.vit(torch.stack(pixels)).numpy() @ classifier).argmax(axis=1)
    np.save(tmp_path / "same.npy", predicted)
    (tmp_path / "listed.json").write_text(json.dumps(predicted.tolist()))
    (tmp_path / "other.txt").write_text("\n".join(str((c + 1) % CLASSES) for c in predicted))
    scores = {}
    for name in ("same.npy", "listed.json", "other.txt"):
        assert segment(monkeypatch, [*flags, "--class_source", str(tmp_path / name)]) is None
        scores[name] = read_row(tmp_path, f"second_order_1-2-3_20_positive_{name.split('.')[0]}")["scores"]
    predicted_scores = read_row(tmp_path, "second_order_1-2-3_20_positive")["scores"]
    assert scores["same.npy"] == scores["listed.json"] == predicted_scores
    assert scores["other.txt"] != scores["same.npy"]


@pytest.mark.parametrize("method", ["second_order", "random", "attention", "rollout"])
def test_the_batch_size_changes_no_score(monkeypatch, tmp_path, inputs, tiny_model, method):
    found = []
    for batch_size in ("1", "3", "16"):
        more = ["--method", method, "--geometry", "aligned", "--batch_size", batch_size]
        assert segment(monkeypatch, flags_of(inputs, tiny_model, tmp_path, *more)) is None
        middle = "" if method in ("attention", "rollout") else "_1-2-3_20"
        found.append(read_row(tmp_path, f"{method}{middle}_aligned")["scores"])
    # the tower's rounding depends on the batch and may swap scores that agree to 7 digits
    for scores in found[1:]:
        assert scores.pop("mAP") == pytest.approx(found[0]["mAP"], abs=1e-3)
        assert scores == {name: value for name, value in found[0].items() if name != "mAP"}


def test_random_is_a_method_that_needs_no_components(monkeypatch, tmp_path, inputs, tiny_model):
    alone = tmp_path / "alone"
    for flags in (
        ["--random", "--input_dir", str(alone)],
        ["--method", "random", "--seed", "4", "--image_size", "48", "--mask_thr", "0.4"],
    ):
        assert segment(monkeypatch, flags_of(inputs, tiny_model, tmp_path, *flags)) is None
    row = read_row(tmp_path, "random_1-2-3_20")
    other = read_row(tmp_path, "random_1-2-3_20_seed4_mask0.4_48px")
    assert row["method"] == "random" and row["seed"] == 0
    assert other["size"] == [48, 48] and row["scores"] != other["scores"]


def test_the_classifier_may_be_in_another_folder(monkeypatch, tmp_path, inputs, tiny_model):
    results = Results(inputs, tiny_model, "random")
    for layer in LAYERS:
        path = results.path("pca", dataset="imagenet", layer=layer, k=100)
        (tmp_path / path.name).write_bytes(path.read_bytes())
    flags = flags_of(inputs, tiny_model, tmp_path / "out", "--input_dir", str(tmp_path))
    assert "compute_classifier_projection.py" in segment(monkeypatch, flags)
    assert segment(monkeypatch, [*flags, "--classifier_dir", str(inputs)]) is None


ROWS = {  # name in file names: settings, besides layers 1, 2, 3 and 20 neurons
    "second_order_1-2-3_20": {},
    "random_1-2-3_20": {"method": "random", "class_source": "classes.npy"},  # it needs no class
    "attention": {"method": "attention", "seed": 3, "top_k_pca": 7},
    "rollout_thr0.25": {"method": "rollout", "thr": 0.25},
    "random_1-2-3_20_seed4_mask0.4_48px": {"method": "random", "seed": 4, "mask_thr": 0.4, "image_size": 48},
    "second_order_1-2-3_20_positive_of_all": {"neuron_sign": "positive", "class_source": "a/of_all.json"},
    "gradcam_of_all_aligned": {"method": "gradcam", "class_source": "of_all.txt", "geometry": "aligned"},
    "chefer_ignore-1": {"method": "chefer", "ignore_index": (-1,), "train_dataset": "CIFAR10"},
    "first_order_ignore-1_7_255": {"method": "first_order", "ignore_index": (-1, 7, 255)},
}


@pytest.mark.parametrize("name", ROWS)
def test_what_one_types_for_a_row_makes_this_row(monkeypatch, clip, name):
    row = Row(**{"layers": LAYERS, "top_neurons": 20, **ROWS[name]})
    found = []
    monkeypatch.setattr(shared_flags, "run", lambda main, parser, **_: found.append(parser))
    runpy.run_path(str(ROOT / "compute_segmentation.py"), run_name="__main__")
    typed = row_of(found[0].parse_args(row.flags()), clip.vit, results=None)
    assert row.name == typed.name == name and typed.record() == row.record()


def test_a_row_records_what_its_method_depends_on():
    shared = ["method", "geometry", "image_size", "mask_thr", "thr", "ignore_index"]
    of_class = ["train_dataset", "class_source"]
    neurons = ["layers", "top_neurons"]
    own = ["train_dataset", "neuron_sign", "class_source", "top_k_pca"]
    assert list(Row("second_order").record()) == [*shared, *neurons, *own]
    assert list(Row("random").record()) == [*shared, *neurons, "seed"]
    assert list(Row("rollout").record()) == shared
    assert list(Row("gradcam").record()) == [*shared, *of_class]


BAD = {
    "a file that is not one": (["--data_path", "{tmp}/text.mat"], "not a MATLAB v7.3 file"),
    "no file": (["--data_path", "{tmp}/none.mat"], "no such file"),
    "another layout": (["--data_path", "{tmp}/other.mat"], "does not have the layout"),
    "a damaged image": (["--data_path", "{tmp}/damaged.mat"], "image 1 "),
    "a damaged image between good ones": (
        ["--data_path", "{tmp}/damaged.mat", "--save_img", "--batch_size", "1"],
        "image 1 ",
    ),
    "a negative seed": (["--random", "--seed", "-1"], "--seed -1"),
    "components of another k": (
        ["--top_k_pca", "50"],
        "compute_pcas.py --dataset imagenet --mlp_layer 1 --top_k_pca 50",
    ),
    "components of another data set": (
        ["--dataset", "CIFAR10"],
        "compute_pcas.py --dataset CIFAR10",
    ),
    "a layer without components": (
        ["--mlp_layers", "0", "1"],
        "compute_pcas.py --dataset imagenet --mlp_layer 0",
    ),
    "a layer without effects": (["--mlp_layers", "3", "4"], "no attention after it"),
    "no layer": (["--mlp_layers", "x"], "0 to 3"),
    "too many neurons": (["--top_neurons", "9999"], "--top_neurons 9999"),
    "too many random neurons": (["--top_neurons", "9999", "--random"], "--top_neurons 9999"),
    "a threshold that no map can exceed": (["--mask_thr", "1.5"], "--mask_thr 1.5 is out of range"),
    "a clamp that no map can exceed": (["--thr", "1.5"], "--thr 1.5 is out of range"),
    "too few classes": (
        ["--class_source", "{tmp}/few.txt"],
        "has 2 classes and the segmentation set has 7 images",
    ),
    "a class out of range": (
        ["--class_source", "{tmp}/range.json"],
        "image 3 has the class 7, and the classifier has 0 to 6",
    ),
    "classes that are no numbers": (["--class_source", "{tmp}/words.txt"], "words.txt"),
    "classes that are no whole numbers": (["--class_source", "{tmp}/parts.npy"], "whole numbers"),
    "no class file": (["--class_source", "{tmp}/none.npy"], "none.npy"),
}


@pytest.mark.parametrize("flags, message", BAD.values(), ids=BAD)
def test_bad_input_is_reported_in_one_line_and_leaves_nothing(
    monkeypatch, tmp_path, inputs, tiny_model, flags, message
):
    (tmp_path / "text.mat").write_text("MATLAB 5.0 MAT-file")
    with h5py.File(tmp_path / "other.mat", "w") as file:
        file["value/img"] = np.zeros((3, 1))
    images, masks = discs(3)
    write_mat(tmp_path / "damaged.mat", [images[0], images[1][:-1], images[2]], masks)
    (tmp_path / "few.txt").write_text("1\n2\n")
    (tmp_path / "range.json").write_text("[0, 1, 2, 7, -1, 0, 0]")
    (tmp_path / "words.txt").write_text("cat\n" * 7)
    np.save(tmp_path / "parts.npy", np.full(7, 0.5))
    output = tmp_path / "out"
    flags = flags_of(inputs, tiny_model, output, *(flag.format(tmp=tmp_path) for flag in flags))
    said = segment(monkeypatch, flags)
    assert said.startswith("error: ") and message in said and "\n" not in said
    left = [path.name for path in output.iterdir()]  # an interrupted pass can be resumed
    assert all(name.endswith(".partial") or ".progress." in name for name in left), left


def of_marks(monkeypatch, tmp_path, tiny_model, name, masks, *flags):
    """What the script says, and its scores of attention maps of `discs` with these masks, or the files
    left.
    """
    path = write_mat(tmp_path / f"{name}.mat", discs(7)[0], masks)
    output = tmp_path / name
    flags = ["--model", tiny_model, "--pretrained", "random", "--device", "cpu", "--num_workers", "0", *flags]
    flags += ["--method", "attention", "--data_path", str(path), "--output_dir", str(output)]
    said = segment(monkeypatch, flags)
    if said:
        return said, list(output.iterdir())
    [row] = [path for path in output.glob("*attention*.json") if ".meta" not in path.name]
    return said, json.loads(row.read_text())["scores"]


def numbered(mask, classes):
    """The object of a mask, with numbers of classes from 1 in its place."""
    return np.where(mask == 1, 1 + np.arange(mask.size).reshape(mask.shape) % classes, mask)


OTHER_MARKS = {  # how else the masks of `discs` may be written: (a function of a mask, flags, what is told)
    "unknown as 255": (lambda mask: np.where(mask == -1, 255, mask).astype(np.uint8), [], []),
    "floats": (lambda mask: mask.astype(np.float32), [], []),
    "NaN": (lambda mask: np.where(mask == -1, np.nan, mask), [], ["7 masks"]),
    "object as 255": (lambda mask: np.where(mask == 1, 255, mask), ["--ignore_index", "-1"], ["hold 255;"]),
    "3 classes": (lambda mask: numbered(mask, 3), [], ["hold 1, 2, 3;"]),
    "30 classes": (lambda mask: numbered(mask, 30).astype(float), [], ["hold 1, 2, 3, 4, 5, 6, 7, ..., 30;"]),
}


@pytest.mark.parametrize("kind", OTHER_MARKS)
def test_masks_that_mean_the_same_have_the_same_scores(monkeypatch, tmp_path, tiny_model, capsys, kind):
    change, flags, told = OTHER_MARKS[kind]
    masks = discs(7)[1]
    expected = of_marks(monkeypatch, tmp_path, tiny_model, "plain", masks)
    assert expected[0] is None and "note:" not in capsys.readouterr().out
    changed = [change(mask) for mask in masks]
    assert of_marks(monkeypatch, tmp_path, tiny_model, "other", changed, *flags) == expected
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == len(told) and all(part in line for part, line in zip(told, notes, strict=True))


def test_masks_may_be_booleans(monkeypatch, tmp_path, tiny_model):
    masks = [(mask == 1).astype(np.uint8) for mask in discs(7)[1]]
    expected = of_marks(monkeypatch, tmp_path, tiny_model, "plain", masks)
    assert of_marks(monkeypatch, tmp_path, tiny_model, "booleans", [mask == 1 for mask in masks]) == expected


UNCLEAR_MARKS = {  # (a function of a mask, what is said): all of these have an answer
    "object as 255": (lambda mask: 255 * (mask == 1).astype(np.uint8), "hold 0 and 255 alone, and 255"),
    "unknown as 65535": (lambda mask: mask.astype(np.uint16), "image 0 holds 65535"),  # of -1
    "unknown as -100": (lambda mask: np.where(mask == -1, -100.0, mask), "image 0 holds -100"),
}


@pytest.mark.parametrize("kind", UNCLEAR_MARKS)
def test_other_masks_are_refused_with_the_flag_that_helps(monkeypatch, tmp_path, tiny_model, kind):
    change, message = UNCLEAR_MARKS[kind]
    masks = [change(mask) for mask in discs(7)[1]]
    said, left = of_marks(monkeypatch, tmp_path, tiny_model, "other", masks)
    assert said.startswith("error: ") and message in said and "\n" not in said and not left
    unknown = 0 if kind == "object as 255" else -1
    meant = [np.where(mask == -1, unknown, mask) for mask in discs(7)[1]]
    expected = of_marks(monkeypatch, tmp_path, tiny_model, "plain", meant)
    flags = said[said.index("--ignore_index") :].split()
    assert of_marks(monkeypatch, tmp_path, tiny_model, "other", masks, *flags) == expected


WRONG_MARKS = {
    "halves": (lambda mask: np.where(mask == 1, 0.5, 0), "image 0 holds 0.5", "whole numbers"),
    "infinity": (lambda mask: np.where(mask == -1, np.inf, mask), "image 0 holds inf", "whole numbers"),
    "no object": (lambda mask: np.minimum(mask, 0), "hold -1 and 0 alone", "1 on the object"),
    "nothing known": (lambda mask: np.full(mask.shape, np.nan), "hold NaN alone", "1 on the object"),
}


@pytest.mark.parametrize("kind", WRONG_MARKS)
def test_masks_without_a_meaning_are_refused(monkeypatch, tmp_path, tiny_model, kind):
    change, *parts = WRONG_MARKS[kind]
    said, left = of_marks(monkeypatch, tmp_path, tiny_model, "other", [change(mask) for mask in discs(7)[1]])
    assert said.startswith("error: ") and all(part in said for part in parts)
    assert "\n" not in said and not left


def test_scores_of_a_changed_file_are_refused(monkeypatch, tmp_path, inputs, tiny_model):
    """One pixel of a mask is changed in place: the file keeps its size."""
    path = write_mat(tmp_path / "discs.mat", *discs(7))
    flags = flags_of(inputs, tiny_model, tmp_path / "out", "--method", "attention", "--data_path", str(path))
    size = path.stat().st_size
    assert segment(monkeypatch, flags) is None and segment(monkeypatch, flags) is None
    with h5py.File(path, "r+") as file:
        file["refs/mask2"][0, 0] = 1 - file["refs/mask2"][0, 0]
    assert path.stat().st_size == size and "made with other data" in segment(monkeypatch, flags)


def test_scores_of_earlier_versions_are_recognised(monkeypatch, tmp_path, inputs, tiny_model):
    flags = flags_of(inputs, tiny_model, tmp_path, "--method", "attention")
    assert segment(monkeypatch, flags) is None
    path = tmp_path / "discs_segmentation_tiny_random_attention_maps.meta.json"
    record = json.loads(path.read_text())
    assert len(record["data"]) == 16
    size = (inputs / "discs.mat").stat().st_size
    path.write_text(json.dumps({**record, "data": hashlib.sha256(f"7 {size}".encode()).hexdigest()[:12]}))
    assert segment(monkeypatch, flags) is None


def test_components_of_other_weights_are_refused(monkeypatch, tmp_path, inputs, tiny_model):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in inputs.glob("*.npy"):
        (folder / path.name).write_bytes(path.read_bytes())
    path = Results(folder, tiny_model, "random").path("pca", dataset="imagenet", layer=2, k=100)
    path.with_suffix(".meta.json").write_text(json.dumps({"fingerprint": "0" * 12}))
    said = segment(monkeypatch, flags_of(inputs, tiny_model, tmp_path / "out", "--input_dir", str(folder)))
    assert "fingerprint '000000000000'" in said and "compute_pcas.py --dataset imagenet --mlp_layer 2" in said


def test_a_user_sees_one_line(tmp_path, inputs, tiny_model):
    (tmp_path / "text.mat").write_text("no")
    done = run_script(
        "compute_segmentation.py",
        *flags_of(inputs, tiny_model, tmp_path, "--data_path", tmp_path / "text.mat"),
        check=False,
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
        and not done.stdout
    )


def test_an_unreadable_image_does_not_affect_the_others(tmp_path, clip):
    images, masks = discs(2)
    path = write_mat(tmp_path / "set.mat", [images[0], images[1].astype(np.float32)], masks)
    data = SegmentationSet(path, clip.transform, "paper", (SIDE, SIDE))
    assert isinstance(data[1], UserError) and "float32" in str(data[1]) and not isinstance(data[0], UserError)


def test_maps_have_the_requested_size(clip, pixels):
    vit = clip.vit
    maps = enlarge(AttentionMaps(vit)(pixels, 0), vit.grid, (20, 30))
    assert maps.shape == (5, 20, 30) and 0 <= maps.min() and maps.max() <= 1
