"""The pool of visual concepts: what its file holds, and how make_concepts.py chooses words."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from text_descriptions import make_concepts

FOLDER = ROOT / "text_descriptions"
MEMBERS = {
    "colours": "red blue teal beige",
    "textures, patterns and shapes": "striped checkered furry rusty glossy transparent spiral",
    "materials": "wood glass denim marble cardboard",
    "parts of things": "handle wheel zipper chimney",
    "parts of bodies and plants": "eye beak paw petal",
    "people": "person crowd baby",
    "animals": "dog zebra butterfly octopus",
    "plants": "tree fern cactus",
    "food and drink": "pizza banana coffee",
    "clothing and jewellery": "hat shoe necklace",
    "furniture and household things": "chair bottle lamp",
    "vehicles": "car bicycle airplane",
    "tools, machines and other things": "hammer camera computer",
    "musical instruments": "guitar trumpet",
    "art, signs and decoration": "graffiti logo text",
    "sports and activities": "tennis skiing",
    "buildings and structures": "castle bridge lighthouse",
    "rooms and indoor places": "kitchen classroom",
    "outdoor places": "beach forest street",
    "nature, weather and light": "cloud snow lightning sunset",
}
LICENCE = "  1 This software and database is being provided to you, the LICENSEE\n"
SYNSETS = """\
00000001 03 n 01 animal 0 000 | a living thing that moves
00000002 03 n 03 dog 0 hound 0 Bello 0 001 @ 00000001 n 0000 | an animal that barks; "a dog | a cat"
00000003 03 n 01 feline 0 001 @ 00000001 n 0000 | a kind of animal
00000004 03 n 01 cat 0 002 @ 00000003 n 0000 ~ 00000009 n 0000 | a kind of feline
00000005 03 n 01 Rover 0 001 @ 00000001 n 0000 | the name of a dog
00000006 03 n 01 bear 0 001 @ 00000001 n 0000 | an animal of which seldom anyone speaks
00000007 03 n 01 slang 0 000 | words that are not for everywhere
00000008 03 n 01 mutt 0 002 @ 00000001 n 0000 ;u 00000007 n 0000 | rude word for a dog
00000009 03 n 02 tabby 0 mouser 0 001 @ 00000004 n 0000 | a kind of cat
00000010 03 n 01 owl 0 001 @ 00000001 n 0000 | a kind of animal
00000011 03 n 01 tool 0 000 | a thing to work with
00000012 03 n 01 saw 0 001 @ 00000011 n 0000 | a tool with teeth
00000013 03 n 01 cats 0 001 @ 00000001 n 0000 | several animals
00000014 03 n 01 gland 0 001 @ 00000001 n 0000 | what nobody sees
00000015 03 n 01 idea 0 000 | what nobody sees either
"""
SENSES = """\
animal n 1 1 ~ 1 0 00000001
bear n 1 1 @ 1 0 00000006
bello n 1 1 @ 1 0 00000002
cat n 2 1 @ 2 1 00000004 00000012
cats n 1 1 @ 1 0 00000013
dog n 1 1 @ 1 0 00000002
feline n 1 1 @ 1 0 00000003
gland n 1 1 @ 1 0 00000014
hound n 1 1 @ 1 0 00000002
idea n 1 0 1 0 00000015
mutt n 1 2 @ ;u 1 0 00000008
owl n 1 1 @ 1 0 00000010
rover n 1 1 @ 1 0 00000005
saw n 2 1 @ 2 2 00000012 00000001
slang n 1 0 1 0 00000007
tabby n 1 1 @ 1 0 00000009
tool n 1 0 1 0 00000011
"""
COUNTS = """\
bear%1:03:00:: 1 2
bear%2:42:00:: 1 9
cat%1:03:00:: 1 5
cat%1:06:00:: 2 5
dog%1:03:00:: 1 7
"""
WORDS = "idea rover dog bear hound mutt cats cat gland animal saw feline tabby owl of unknown"
CATEGORIES = {
    "nothing of WordNet": make_concepts.Category(0, "", "tabby, dark\n  red"),
    "tools": make_concepts.Category(5, "tool.1", ""),
    "animals": make_concepts.Category(4, "animal.1 feline.1", "polar bear, owls"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A WordNet of 15 synsets and a list of words, with categories to match."""
    contents = {"data.noun": LICENCE + SYNSETS, "index.noun": LICENCE + SENSES, "cntlist.rev": COUNTS}
    for name, content in (contents | {"words.txt": "\n".join(WORDS.split())}).items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(make_concepts, "CATEGORIES", CATEGORIES)
    monkeypatch.setattr(make_concepts, "LEFT_OUT", "gland.1")
    monkeypatch.setattr(make_concepts, "EXCLUDED", {"animal"})
    options = ["--wordnet", tmp_path, "--words", tmp_path / "words.txt", "--output", tmp_path / "pool.txt"]
    monkeypatch.setattr(sys, "argv", ["make_concepts.py", *map(str, options)])
    return tmp_path


def pool():
    return (FOLDER / "concepts.txt").read_text(encoding="utf-8").splitlines()


# The file


def test_the_pool_is_what_it_claims():
    texts = pool()
    assert 1_000 <= len(texts) <= 2_500
    assert len(set(texts)) == len(texts)
    assert all(re.fullmatch("[a-z]+( [a-z]+)*", text) for text in texts)
    assert not make_concepts.EXCLUDED & set(texts) - own_words()
    assert f"{len(texts):,} visual concepts" in (FOLDER / "README.md").read_text(encoding="utf-8")


def own_words():
    return {w for category in make_concepts.CATEGORIES.values() for w in make_concepts.own_words(category)}


def test_the_pool_has_words_of_every_category():
    assert list(MEMBERS) == list(make_concepts.CATEGORIES)
    texts = set(pool())
    missing = {name: set(words.split()) - texts for name, words in MEMBERS.items()}
    assert not any(missing.values()), missing


def test_our_own_words_are_in_the_pool_and_no_two_are_the_same():
    words = [word for c in make_concepts.CATEGORIES.values() for word in make_concepts.own_words(c)]
    assert len({make_concepts.singular(word) for word in words}) == len(words)
    assert set(words) <= set(pool())


def test_the_pool_has_no_names_and_nothing_unseen():
    assert not set(pool()) & set("john rover london justice idea theory happiness week".split())


# The command


def test_words_of_a_small_wordnet(folder, capsys):
    """Names, synonyms, second forms, rude words, glands and words of other senses are left out."""
    make_concepts.main()
    expected = ["tabby", "dark red", "saw", "polar bear", "owls", "dog", "cats", "feline"]
    assert (folder / "pool.txt").read_text() == "\n".join(expected) + "\n"
    assert "5 animals, 2 of them our own" in capsys.readouterr().out


def test_a_quota_takes_the_most_common_nouns(folder, monkeypatch):
    animals = CATEGORIES["animals"]._replace(quota=1)
    monkeypatch.setattr(make_concepts, "CATEGORIES", {"animals": animals})
    make_concepts.main()
    assert (folder / "pool.txt").read_text().split("\n") == ["polar bear", "owls", "dog", ""]


@pytest.mark.parametrize("name", ["data.noun", "index.noun", "cntlist.rev"])
def test_a_missing_file_of_wordnet_is_one_line(folder, name):
    (folder / name).unlink()
    with pytest.raises(
        SystemExit, match=rf"^error: .*{name} of WordNet is missing; get it with: apt-get .*$"
    ):
        make_concepts.main()
    assert not (folder / "pool.txt").exists()


def test_a_wordnet_without_a_synset_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(make_concepts, "LEFT_OUT", "gland.2")
    with pytest.raises(
        SystemExit, match=r"^error: this WordNet has no sense gland\.2; get WordNet 3\.0 with: "
    ):
        make_concepts.main()


def test_a_missing_list_of_words_is_one_line(folder):
    (folder / "words.txt").unlink()
    with pytest.raises(SystemExit, match=r"^error: .*words\.txt is missing; make it with: python .*$"):
        make_concepts.main()


def test_a_missing_wordnet_ends_the_command_with_one_line(tmp_path):
    command = [sys.executable, FOLDER / "make_concepts.py", "--wordnet", tmp_path / "none"]
    command += ["--output", tmp_path / "pool.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "get it with: apt-get install wordnet-base" in done.stderr
