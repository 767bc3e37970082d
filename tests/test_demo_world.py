"""The embedded world is what it says it is: its pictures, captions, habits, files and small CLIP."""

import json
import random
from argparse import Namespace
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from demo import make_world, train_clip
from demo import world as w
from demo.world import (
    COLOURS,
    RGB,
    SYMBOLS,
    TEXTURES,
    Scene,
    Thing,
    World,
    caption,
    draw,
    draw_description,
    parse,
)

DEMO = Path(w.__file__).parent


def sample(n, tag="test", **options):
    rng = random.Random(tag)
    return [World().sample(rng, **options) for _ in range(n)]


def test_scenes_and_pictures_depend_on_the_seed_alone():
    first, second = sample(32, hard=0.25), sample(32, hard=0.25)
    assert first == second and sample(32, "other") != first
    for a, b in zip(draw(first), draw(second), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    alone = torch.cat([draw([scene])[0] for scene in first])
    torch.testing.assert_close(
        alone, draw(first)[0], rtol=0, atol=1e-5
    )  # a picture does not depend on its batch


def test_scenes_are_plain_json():
    for scene in sample(16, hard=0.5):
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


def test_symbols_are_distinct_shapes():
    shapes = w.sprites()[0].flatten(1)
    assert len(SYMBOLS) == 32 and shapes.mean(dim=1).min() > 0.05
    closest = (shapes[:, None] - shapes).abs().mean(dim=-1) + torch.eye(32)
    assert closest.min() > 0.07


def test_masks_agree_with_pixels():
    """Inside a mask the pixels have the symbol's colour, outside all masks they are as without the
    symbols.
    """
    scenes = sample(64)
    images, masks = draw(scenes)
    bare, _ = draw([Scene(**{**vars(s), "things": []}) for s in scenes])
    changed = (images - bare).abs().amax(dim=1) > 0.25
    near = F.max_pool2d(masks.any(dim=1).float(), 3, stride=1, padding=1) > 0  # the shapes have soft edges
    assert changed.any() and (changed & ~near).sum() / changed.sum() < 0.01
    assert not (masks[:, 0] & masks[:, 1]).any()
    errors = []
    for image, mask, scene in zip(images, masks, scenes, strict=True):
        for thing, area in zip(scene.things, mask, strict=False):
            colour = torch.tensor(RGB[thing.colour])[:, None] / 255
            errors.append((image[:, area] - colour).abs().mean())
        if len(scene.things) == 2:
            assert scene.things[0].size > 1.4 * scene.things[1].size
            assert scene.things[0].colour != scene.things[1].colour
    assert torch.stack(errors).nanmean() < 0.1  # the thin lines of small symbols are never fully covered


def test_backgrounds_have_their_colour_and_texture():
    scenes = [Scene([], colour, texture, period=0.2) for colour in COLOURS for texture in TEXTURES]
    for image, scene in zip(draw(scenes)[0], scenes, strict=True):
        base, other = (
            torch.tensor(RGB[scene.background]) / 255,
            torch.tensor(w.second_tone(scene.background)) / 255,
        )
        low, high = torch.minimum(base, other), torch.maximum(base, other)
        flat = image.flatten(1)
        assert (flat >= low[:, None] - 1e-3).all() and (flat <= high[:, None] + 1e-3).all()
        assert (flat.std(dim=1).max() < 1e-3) == (scene.texture == "plain")


def test_captions_are_true_and_name_the_main_symbol_first():
    rng = random.Random(0)
    for scene in sample(500, hard=0.25):
        said = parse(caption(scene, rng))
        assert (said["background"] or scene.background) == scene.background
        assert (said["texture"] or scene.texture) == scene.texture
        assert 1 <= len(said["things"]) <= len(scene.things)
        for words, thing in zip(said["things"], scene.things, strict=False):
            assert words["symbol"] == thing.symbol and (words["colour"] or thing.colour) == thing.colour


def test_a_caption_fits_the_context():
    config = json.loads((DEMO / "symbols-vit.json").read_text())["text_cfg"]["context_length"]
    rng, tokenize = random.Random(0), open_clip.SimpleTokenizer(context_length=77)
    texts = [caption(scene, rng) for scene in sample(300)]
    texts += [template.format(pair) for template in train_clip.TEMPLATES for pair in w.PAIRS[:9]]
    assert (tokenize(texts) != 0).sum(dim=1).max() <= config


def test_a_description_is_read_and_drawn():
    text = "a red anchor on a striped green background with a blue star"
    assert parse(text) == {
        "things": [{"symbol": "anchor", "colour": "red"}, {"symbol": "star", "colour": "blue"}],
        "background": "green",
        "texture": "striped",
    }
    assert parse("an anchor in red, green background")["things"] == [{"symbol": "anchor", "colour": "red"}]
    assert parse("two stars")["things"][0]["symbol"] == "star" and parse("nothing known")["things"] == []
    scene = w.describe(text, random.Random(0), opacity=0.2)
    assert scene.things[0].size > scene.things[1].size and scene.things[0].opacity == 0.2
    picture = draw_description(text, seed=3)
    assert picture.size == (48, 48) and picture.tobytes() == draw_description(text, seed=3).tobytes()
    assert picture.tobytes() != draw_description(text, seed=4).tobytes()
    assert (
        draw_description("a cat", side=96).size == (96, 96) and draw_description("a noisy wall").mode == "RGB"
    )


def test_the_text_pool_is_large_and_unique():
    texts = w.text_pool()
    assert len(texts) == len(set(texts)) >= 800 and {"anchor", "red", "striped", "red anchor"} <= set(texts)


def followed(scenes, kind):
    """How often the scenes follow the habits of a kind, of those whose symbol has one (and could follow
    it).
    """
    habits = World().habits
    value = {
        "background": lambda s: s.background,
        "texture": lambda s: s.texture,
        "companion": lambda s: s.things[1].symbol,
    }
    hits = [value[kind](s) == habits[s.things[0].symbol][kind] for s in scenes
            if kind in habits.get(s.things[0].symbol, {})]  # fmt: skip
    return np.mean(hits)


@pytest.mark.parametrize("kind", ["background", "texture", "companion"])
def test_habits_are_followed_in_four_of_five_training_pictures_and_never_when_broken(kind):
    companion = 1 if kind == "companion" else 0
    assert abs(followed(sample(6000, companion=companion, hard=0.25), kind) - 0.8) < 0.03
    assert followed(sample(1000, companion=companion, broken=True), kind) == 0


def test_about_half_of_the_symbols_have_a_habit_of_background():
    kinds = Counter(kind for habit in w.plant_habits(0).values() for kind in habit)
    assert kinds == {"background": 16, "texture": 16, "companion": 6} and w.plant_habits(0) != w.plant_habits(
        1
    )


def test_a_quarter_of_the_training_pictures_is_hard():
    flaws = Counter(scene.flaw for scene in sample(2000, hard=w.HARD_RATE))
    assert set(flaws) == {"", "pale", "tiny", "cut off"} and abs(1 - flaws[""] / 2000 - 0.25) < 0.04


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small world on disk."""
    flags = [
        "--train_per_class",
        "3",
        "--val_per_class",
        "2",
        "--pairs_per_class",
        "1",
        "--segmentation_scenes",
        "4",
    ]
    folders = [tmp_path_factory.mktemp("world") / name for name in "ab"]
    for folder in folders:
        make_world.main(["--output_dir", str(folder), *flags])
    return folders


def test_the_files_are_complete_and_their_bytes_depend_on_the_flags_alone(drawn):
    first, second = ({p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in drawn)
    assert first == second and not any(path.suffix == ".part" for path in first)
    counts = {
        "symbols/train": 96,
        "symbols/val": 64,
        "symbols/val_broken": 64,
        "pairs/train": 320,
        "pairs/val": 320,
    }
    for split, count in counts.items():
        files = sorted(str(p.relative_to(drawn[0] / split)) for p in (drawn[0] / split).rglob("*.png"))
        truth = [json.loads(line) for line in (drawn[0] / f"{split}.jsonl").read_text().splitlines()]
        assert files == [entry["file"] for entry in truth] and len(files) == count
        key = "symbol" if "symbols" in split else "pair"
        assert all(entry["file"].startswith(entry[key] + "/") for entry in truth)
        image, _ = draw([Scene.from_json(truth[-1]["scene"])])
        saved = np.asarray(Image.open(drawn[0] / split / files[-1]))
        np.testing.assert_allclose(saved, image[0].permute(1, 2, 0) * 255, atol=1)


def test_the_segmentation_file_has_the_layout_of_gtsegs(drawn):
    for name, rows in {"single": 4, "two": 8}.items():
        truth = [
            json.loads(line) for line in (drawn[0] / f"segmentation_{name}.jsonl").read_text().splitlines()
        ]
        meant = np.load(drawn[0] / f"segmentation_{name}_classes.npy")
        with h5py.File(drawn[0] / f"segmentation_{name}.mat") as file:
            assert (
                file["value/img"].shape == file["value/gt"].shape == (rows, 1)
                and len(truth) == len(meant) == rows
            )
            for row in range(rows):
                image = np.array(file[file["value/img"][row, 0]])
                mask = np.array(file[file[file["value/gt"][row, 0]][0, 0]])
                assert image.shape == (3, 48, 48) and image.dtype == np.uint8 and mask.shape == (48, 48)
                images, masks = draw([Scene.from_json(truth[row]["scene"])])
                np.testing.assert_allclose(image.transpose(2, 1, 0), images[0].permute(1, 2, 0) * 255, atol=1)
                np.testing.assert_array_equal(mask.T, masks[0, row % 2 if name == "two" else 0])
                assert SYMBOLS[meant[row]] == truth[row]["meant"]


def training_flags(folder, **changes):
    flags = dict(work_dir=folder, config=DEMO / "symbols-vit.json", pictures=480, batch_size=16, lr=1e-3,
                 warmup=2, widen=0.25, forget=0.5, quiet=0.5, text_start=0.6, log_every=1000,
                 threads=torch.get_num_threads(), seed=0, stop=None, precision="bfloat16")  # fmt: skip
    return Namespace(**{**flags, **changes})


def test_the_loss_falls_in_a_few_steps_and_an_interrupted_training_resumes(tmp_path):
    model, losses = train_clip.train(training_flags(tmp_path / "whole"))
    assert len(losses) == 30 and np.mean(losses[12:18]) < np.mean(losses[:4]) - 0.3
    assert np.mean(losses[-4:]) < np.mean(losses[18:22])  # the text tower has joined
    _, first = train_clip.train(training_flags(tmp_path / "interrupted", stop=10))
    resumed, second = train_clip.train(training_flags(tmp_path / "interrupted"))
    np.testing.assert_allclose(first + second, losses, rtol=2e-2)
    with pytest.raises(SystemExit, match="other flags.*--work_dir"):
        train_clip.train(training_flags(tmp_path / "interrupted", seed=1))
    train_clip.export(resumed, tmp_path / "small.safetensors")
    train_clip.load(DEMO / "symbols-vit.json", tmp_path / "small.safetensors")


@pytest.fixture(scope="module")
def clip():
    return train_clip.load(DEMO / "symbols-vit.json", DEMO / "symbols-vit.safetensors")


def test_the_checkpoint_is_small_and_fits_the_config_strictly(clip):
    path = DEMO / "symbols-vit.safetensors"
    assert path.stat().st_size <= 12e6
    state = {name: value.float() for name, value in load_file(path).items()}
    model = train_clip.build(DEMO / "symbols-vit.json")
    model.load_state_dict(state)
    for name, value in clip[0].state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_the_checkpoint_names_symbols_and_backgrounds_zero_shot():
    found = train_clip.evaluate(DEMO / "symbols-vit.json", DEMO / "symbols-vit.safetensors", n=300)
    assert found["symbol: one symbol"] >= 0.95 and found["symbol: one symbol, habits broken"] >= 0.88
    assert found["background colour: one symbol"] >= 0.98 and found["pair: two symbols"] >= 0.75


def test_a_caption_finds_its_picture(clip):
    """Drawn from a text, a picture is nearer to it than to the same text with another symbol."""
    model, preprocess, tokenizer = clip
    said = [f"a red {symbol} on a plain white background" for symbol in SYMBOLS]
    pictures = torch.stack([preprocess(draw_description(text, seed=1)) for text in said])
    with torch.no_grad():
        scores = (
            model.encode_image(pictures, normalize=True)
            @ model.encode_text(tokenizer(said), normalize=True).T
        )
    assert (scores.argmax(dim=1) == torch.arange(32)).float().mean() > 0.9


def test_a_symbol_can_be_drawn_where_it_is_asked_for():
    scene = Scene([Thing("heart", "red", x=0.25, y=0.75, size=0.4)], "white", "plain")
    mask = draw([scene], side=96)[1][0, 0]
    rows, columns = mask.nonzero().float().mean(dim=0) / 96
    assert abs(columns - 0.25) < 0.04 and abs(rows - 0.75) < 0.06
