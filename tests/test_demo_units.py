"""The world's own dictionaries: what is in the repository, and the script that trains them."""

import random
from argparse import Namespace

import pytest
import torch

from demo import train_sae
from demo.layout import HERE, MODEL, WEIGHTS
from demo.units import report, sets_of
from demo.world import World, draw, to_pil
from utils.model.clip import load_clip
from utils.model.dictionary_files import read_dictionary
from utils.prs import second_order
from utils.units import Features, Rest

NAMES = ("resid", "mlp")


@pytest.fixture(scope="module")
def clip():
    return load_clip(MODEL, WEIGHTS, "cpu", image_only=True)


def test_both_are_small_and_made_for_the_worlds_clip(clip):
    paths = [HERE / f"symbols-sae-{name}.safetensors" for name in NAMES]
    assert sum(path.stat().st_size for path in paths) < 2.5e6
    for path, site in zip(paths, ("resid.post", "mlp.out"), strict=True):
        found = read_dictionary(path)
        assert found.decoder.shape == (2048, 128) and (found.site, found.layer) == (site, 4)
        assert found.fingerprint == clip.fingerprint and found.activation == "topk"


@pytest.mark.parametrize("name", NAMES)
def test_they_rebuild_new_pictures(clip, name):
    world = World()
    rng = random.Random("not seen")
    scenes = [world.sample(rng) for _ in range(64)]
    pixels = torch.stack([clip.transform(to_pil(image)) for image in draw(scenes)[0]])
    rest = Rest(clip.vit, Features(clip.vit, read_dictionary(HERE / f"symbols-sae-{name}.safetensors")))
    found = rest.effects(pixels)
    assert rest.rebuilt() > 0.75
    _, [phi] = second_order(clip.vit, pixels, [rest.units.fold(clip.vit)])
    whole = phi.sum() + found["bias"] + found["error"]
    assert float((whole - found["site"]).norm(dim=1).max()) < 1e-4 * float(found["site"].norm(dim=1).max())


def test_training_learns_and_what_it_writes_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sae, "FIRST", 64)
    args = {"units": 96, "k": 8, "lr": 2e-3, "seed": 0, "random_decoder": False}
    found, lost = train_sae.train(Namespace(pictures=60 * train_sae.PICTURES, **args))
    _, before = train_sae.train(Namespace(pictures=4 * train_sae.PICTURES, **args))
    assert set(found) == set(NAMES) and all(0 < lost[name] < 0.7 * before[name] for name in NAMES)
    for name, dictionary in found.items():
        train_sae.save_dictionary(tmp_path / "a.safetensors", dictionary)
        read = read_dictionary(tmp_path / "a.safetensors")
        f = read.encode(torch.randn(5, 128))
        assert ((f != 0).sum(dim=1) <= 8).all() and read.decoder.shape == (96, 128)
        assert torch.allclose(read.decoder.norm(dim=1), torch.ones(96), atol=1e-2), name


def test_a_decoder_that_is_random_stays_so_and_the_rest_is_trained(monkeypatch):
    monkeypatch.setattr(train_sae, "FIRST", 64)
    args = {"units": 96, "k": 8, "lr": 2e-3, "seed": 0, "random_decoder": True}
    found, lost = train_sae.train(Namespace(pictures=60 * train_sae.PICTURES, **args))
    before, lost_before = train_sae.train(Namespace(pictures=2 * train_sae.PICTURES, **args))
    assert set(found) == {"resid"} and 0 < lost["resid"] < 0.9 * lost_before["resid"]
    assert torch.equal(found["resid"].decoder, before["resid"].decoder)
    assert not torch.equal(found["resid"].encoder, before["resid"].encoder)
    cosines = found["resid"].decoder.float() @ found["resid"].decoder.float().T
    assert cosines.fill_diagonal_(0).abs().mean() < 0.1  # 96 in 128 dimensions; of tokens it is 0.3


def test_the_table_has_a_row_for_each_set_and_its_controls():
    class Truth:
        true = torch.zeros(2, 4).numpy()

        def nearest(self):
            return 0.97

    row = {"units": 5, "fires on": [0.5, 0.6], "writes": [0.25, 0.3], "4 kept": 90.0}
    row |= {"all": 97.0, "none": 80.0}
    sets = sets_of(HERE / "output")
    assert {"random decoder, trained encoder", "random directions", "neurons", "pairs"} < sets.keys()
    graded = {"skill": 0.125, "better": 0.5, "by deletion": [0.9, 0.8]}
    table = {name: row | graded for name in sets} | {"rotated neurons": row}
    text = report(table, Truth())
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(sets) + 1
    assert "| 5 | 50; 60 | 25; 30 | 90.0 | 0.12 | 50 | 0.90; 0.80 |" in lines[2]
    assert lines[-1].endswith("| 90.0 | | | | | | |")
    assert "true of 97 %" in text and "0.0 %" in text
