"""Class folders, picture files and lists of names as people have them."""

import os
import re
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision.datasets import ImageFolder

from applications.paper.section5 import own_images
from utils.data.folders import endings
from utils.data.images import classes_of, load_images, names_for
from utils.data.text_sets import read_texts
from utils.model.clip import load_clip
from utils.runtime.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def write_tree(root, *paths):
    """Write files ROOT/val/PATH: pictures by their ending, or a letter. Returns ROOT."""
    for path in paths:
        file = root / "val" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() in (".png", ".jpg"):
            Image.fromarray(PIXELS).save(file)
        else:
            file.write_text("x")
    return root


def link(place, target):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target.absolute())


def found(root):
    """(path below ROOT/val, class) of every sample."""
    images = load_images("folder", root, "val")
    return [(os.path.relpath(path, root / "val"), images.folders[label]) for path, label in images.samples]


@pytest.fixture(scope="module")
def transform(tiny_model):
    return load_clip(tiny_model, "random", "cpu", image_only=True).transform


@pytest.fixture
def told(transform, capsys):
    """What a stage says of a tree about what is left out, in lines."""

    def told(root):
        load_images("folder", root, "val", transform)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("images of folder val: ")
        return [line for line in lines if line.startswith("left out")]

    return told


def one_line_of(call, *arguments, **options):
    """The text of the UserError that a call raises."""
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Folders


def test_the_samples_are_torchvisions_in_its_order(tmp_path):
    paths = ["b.png", "B.PNG", "a.jpg", "10.png", "9.png"]
    paths += ["a-b/1.png", "a/c/1.png", "a/1.png", "é/1.png", "Z/1.png", "x.png/1.png"]
    write_tree(tmp_path, *(f"{name}/{path}" for name in ("dog", "Cat", "a b", "10", "9") for path in paths))
    pool = write_tree(tmp_path / "pool", "x/1.png", "x/sub/2.png", "y/3.png").joinpath("val")
    link(tmp_path / "val" / "linked", pool / "x")
    link(tmp_path / "val" / "dog" / "a" / "linked", pool / "y")
    link(tmp_path / "val" / "dog" / "linked.png", pool / "y" / "3.png")
    truth = ImageFolder(str(tmp_path / "val"))
    images = load_images("folder", tmp_path, "val")
    assert images.samples == truth.samples and images.folders == truth.classes
    assert len(images) == 5 * len(paths) + 4


@pytest.mark.parametrize("target", [".", "val", "val/cat", "val/cat/sub", "val/dog", "val/dog/sub", ".."])
@pytest.mark.parametrize("place", ["val/cat/again", "val/cat/sub/again", "val/cat/a"])
def test_a_link_to_a_folder_that_is_counted_or_that_holds_it_adds_nothing(tmp_path, told, place, target):
    paths = ["cat/1.png", "cat/sub/2.png", "dog/3.png", "dog/sub/4.png"]
    root = write_tree(tmp_path / "data", *paths)
    write_tree(root / "train", "cat/5.png")
    link(root / place, root / target)
    assert found(root) == [(path, path[:3]) for path in paths]
    assert told(root) == ["left out: 1 link to a folder that is there already"]


def test_links_in_a_pool_lead_neither_back_nor_twice_to_a_folder(tmp_path):
    root = write_tree(tmp_path / "data", "dog/1.png", "../train/dog/4.png")
    pool = write_tree(tmp_path / "pool", "cat/2.png", "more/3.png", "other/5.png").joinpath("val")
    link(root / "val" / "cat", pool / "cat")
    link(pool / "cat" / "back", root)
    link(pool / "cat" / "up", pool)
    link(pool / "cat" / "more", pool / "more")
    link(root / "val" / "dog" / "more", pool / "more")
    link(pool / "more" / "dog", root / "val" / "dog")
    assert found(root) == [("cat/2.png", "cat"), ("cat/more/3.png", "cat"), ("dog/1.png", "dog")]


def test_class_folders_that_are_one_folder_are_refused(tmp_path):
    root = write_tree(tmp_path, "cat/1.png", "dog/2.png")
    link(root / "val" / "kitten", root / "val" / "cat")
    said = one_line_of(load_images, "folder", root, "val")
    assert f"{root}/val/cat and {root}/val/kitten are the same folder; remove the link" in said
    (root / "val" / "kitten").unlink()
    for target in (root / "val", root, root.parent):
        link(root / "val" / "all", target)
        said = one_line_of(load_images, "folder", root, "val")
        assert f"{root}/val/all is a link to a folder above it" in said
        (root / "val" / "all").unlink()
    assert len(found(root)) == 2


def test_on_a_disk_that_does_not_number_its_folders_they_differ_by_path(tmp_path, monkeypatch):
    def without_numbers(*arguments, **options):
        status = stat(*arguments, **options)
        return os.stat_result((status.st_mode, 0, *status[2:]))

    root = write_tree(tmp_path, "cat/1.png", "cat/sub/2.png", "dog/3.png")
    link(root / "val" / "cat" / "again", root / "val" / "cat" / "sub")
    stat = os.stat
    monkeypatch.setattr(os, "stat", without_numbers)
    assert found(root) == [("cat/1.png", "cat"), ("cat/sub/2.png", "cat"), ("dog/3.png", "dog")]


RUBBISH_FOLDERS = (
    *("__MACOSX", "Network Trash Folder", "Temporary Items", "$RECYCLE.BIN", "System Volume Information"),
    *("@eaDir", "@EADIR", "#recycle", "#Snapshot", "@Recycle", "@Recently-Snapshot", "~snapshot", ".zfs"),
    *("lost+found", "__pycache__"),
)
RUBBISH_FILES = (
    *("Thumbs.db", "THUMBS.DB", "ehthumbs.db", "desktop.ini", ".DS_Store", "._1.png", "Icon\r"),
    *("1.png:Zone.Identifier", "1.png@SynoEAStream"),
)


@pytest.mark.parametrize("name", RUBBISH_FOLDERS)
def test_folders_that_systems_leave_do_not_exist(tmp_path, told, name):
    inside = [f"cat/{name}/2.png", f"cat/{name}/x.txt", f"cat/sub/{name}/deep/4.png"]
    write_tree(tmp_path, "cat/1.png", f"{name}/3.png", *inside)
    assert found(tmp_path) == [("cat/1.png", "cat")] and told(tmp_path) == []


@pytest.mark.parametrize("name", RUBBISH_FILES)
def test_files_that_systems_leave_do_not_exist(tmp_path, told, name):
    write_tree(tmp_path, "cat/1.png", f"cat/{name}", f"cat/sub/{name}", name)
    assert found(tmp_path) == [("cat/1.png", "cat")] and told(tmp_path) == []


@pytest.fixture
def readable_by_all():
    """A folder that every user can enter. Tests that run as root are another user in the meantime."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def as_a_user(call):
    """Call without root's right to read everything."""
    before = os.geteuid()
    endings()  # loads Pillow's plugins, which that user may not be able to read
    if before == 0:
        os.seteuid(65534)
    try:
        return call()
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
@pytest.mark.parametrize("place", ["val/cat/sub", "val/cat", "val", "."])
def test_a_folder_that_cannot_be_read_is_named(readable_by_all, place, mode):
    root = write_tree(readable_by_all / "data", "cat/1.png", "cat/sub/2.png")
    assert as_a_user(lambda: len(found(root))) == 2
    (root / place).chmod(mode)
    try:
        if (place, mode) == (".", 0o111):  # its folders are reached by name
            assert as_a_user(lambda: len(found(root))) == 2
        else:
            said = as_a_user(lambda: one_line_of(load_images, "folder", root, "val"))
            assert said.startswith(f"the folder {root / place} cannot be read (Permission denied); make it")
    finally:
        (root / place).chmod(0o755)


def test_links_to_nothing_are_told_and_refused_where_a_picture_or_a_class_is_missing(tmp_path, told):
    root = write_tree(tmp_path, "cat/1.png")
    link(root / "val" / "cat" / "pool", root / "nowhere")
    (root / "val" / "cat" / "loop").symlink_to("loop")
    assert found(root) == [("cat/1.png", "cat")]
    assert told(root) == ["left out: 2 files that Pillow does not read (broken link 2)"]
    for place in (root / "val" / "cat" / "2.png", root / "val" / "dog"):
        link(place, root / "nowhere")
        said = one_line_of(load_images, "folder", root, "val")
        assert f"{place} is a link to nothing; fix or remove it" in said
        place.unlink()


def test_the_pictures_of_fig_8_are_found_in_the_same_way(tmp_path, capsys):
    folder = write_tree(tmp_path, "b.png", "a/2.png", "@eaDir/3.png", "a/x.svg").joinpath("val")
    link(folder / "a" / "again", folder)
    args = SimpleNamespace(images=folder, device="cpu", num_workers=0, batch_size=2)
    images = own_images(SimpleNamespace(args=args, clip=SimpleNamespace(transform=None))).images
    assert [path for path, _ in images.samples] == [f"{folder}/a/2.png", f"{folder}/b.png"]
    said = "left out: 1 file that Pillow does not read (.svg 1); 1 link to a folder that is there already\n"
    assert capsys.readouterr().out == said


# Endings

FORMATS = {  # endings with the format and mode in which Pillow writes them
    **dict.fromkeys(("jpg", "jpeg", "jfif", "jpe", "mpo"), ("JPEG", "RGB")),
    **dict.fromkeys(("png", "apng"), ("PNG", "RGB")),
    **dict.fromkeys(("tif", "tiff"), ("TIFF", "RGB")),
    **dict.fromkeys(("ppm", "pgm", "pnm"), ("PPM", "RGB")),
    **dict.fromkeys(("jp2", "j2k", "jpx"), ("JPEG2000", "RGB")),
    **dict.fromkeys(("sgi", "rgb"), ("SGI", "RGB")),
    **dict.fromkeys(("avif", "bmp", "dds", "dib", "gif", "ico"), (None, "RGB")),
    **dict.fromkeys(("pcx", "qoi", "tga", "webp"), (None, "RGB")),
    **dict.fromkeys(("msp", "xbm"), (None, "1")),
}


@pytest.mark.parametrize("ending", FORMATS)
def test_pictures_of_every_format_that_pillow_reads_count(tmp_path, transform, told, ending):
    if f".{ending}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow does not know .{ending}")
    name, mode = FORMATS[ending]
    root = write_tree(tmp_path, "cat/1.png")
    for end in (ending, ending.upper()):
        Image.fromarray(PIXELS).convert(mode).save(root / "val" / "cat" / f"x.{end}", format=name or ending)
    images = load_images("folder", root, "val", transform)
    assert {Path(path).name for path, _ in images.samples} == {"1.png", f"x.{ending}", f"x.{ending.upper()}"}
    assert [image.shape for image, _ in (images[i] for i in range(3))] == [(3, 32, 32)] * 3
    assert told(root) == []


def test_no_ending_counts_whose_format_pillow_only_recognises():
    stubs = set()
    for ending, name in Image.registered_extensions().items():
        reader = Image.OPEN.get(name, [None])[0]
        if isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile):
            stubs.add(ending)
    assert {".h5", ".grib", ".bufr", ".wmf", ".emf"} <= stubs and not stubs & endings()
    assert not {".eps", ".ps", ".pdf", ".palm", ".mpg", ".svg", ".json", ""} & endings()


def test_what_is_left_out_is_told_with_numbers_and_endings(tmp_path, told, capsys):
    names = ["1.svg", "2.SVG", "sub/3.svg", "list", "note", "a.json", "x.eps", "b.é", "d.tar.gz"]
    names.append(os.fsdecode(b"c.\xff"))
    root = write_tree(tmp_path, "cat/1.png", *(f"cat/{name}" for name in names), "beside.png", "README.md")
    [line] = told(root)
    start = "left out: 10 files that Pillow does not read (.svg 3, without ending 2, "
    assert line.startswith(start) and line.endswith("); 1 picture beside the class folders")
    kinds = re.fullmatch(r".*\((.*)\).*", line)[1].split(", ")
    assert Counter(kinds[2:]) == Counter([".json 1", ".eps 1", ".é 1", r".\udcff 1", ".gz 1"])
    write_tree(tmp_path, *(f"cat/x.{letter}" for letter in "abcde"))
    [line] = told(root)
    assert line.startswith("left out: 15 files") and "4 other endings); 1 picture" in line
    load_images("folder", root, "val")
    classes_of("folder", root, "val")
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("ending", ["avif", "dds", "gif", "ico", "jp2", "png", "qoi", "tga", "tiff", "webp"])
def test_damaged_pictures_of_any_format_are_named(tmp_path, transform, ending):
    if f".{ending}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow does not know .{ending}")
    root = write_tree(tmp_path, "cat/1.jpg")
    path = root / "val" / "cat" / f"2.{ending}"
    Image.fromarray(PIXELS).save(path)
    whole = path.read_bytes()
    other = whole[:20] + b"\xff" * 60 + whole[80:]
    for damaged in (whole[: len(whole) // 2], whole[:60], other, b""):
        path.write_bytes(damaged)
        item = load_images("folder", root, "val", transform)[1]
        if isinstance(item, UserError):
            assert f"the image {path} cannot be read" in str(item) and "\n" not in str(item)
        else:  # pixels of other values
            assert damaged == other and item[0].shape == (3, 32, 32)


# Names


COMPOSED = unicodedata.normalize("NFC", "café élan")
APART = unicodedata.normalize("NFD", "café élan")
NAMES = {  # what is special: folders, lines, and the names that the sorted folders get
    "capitals": ("Cat Heart anchor dice", "anchor Cat dice Heart", "Cat Heart anchor dice"),
    "other capitals": ("cat heart anchor", "Cat HEART Anchor", "Anchor Cat HEART"),
    "natural order": ("class1 class2 class10", "class1 class2 class10", "class1 class10 class2"),
    "whole numbers": ("9 10 11", "10 11 9", "9 10 11"),
    "underscores": ("sea_lion seal sea-bass", "seal sea·bass sea·lion", "sea·bass sea·lion seal"),
    "underscores as typed": ("sea_lion ant", "sea_lion ant", "ant sea_lion"),
    "composed accents": (f"{APART} zoo", f"zoo {COMPOSED}", f"{COMPOSED} zoo"),
    "decomposed accents": (f"{COMPOSED} a", f"{APART} a", f"a {APART}"),
    "folders that differ in capitals": ("cat Cat ant", "cat Cat ant", "Cat ant cat"),
    "nothing in common": ("n01 n02 n03", "tench goldfish shark", "tench goldfish shark"),
    "some names, at their places": ("a cat dog", "x cat dog", "x cat dog"),
    "a name twice, once at its place": ("crane crane_bird", "crane crane", "crane crane"),
    "only alike where two folders are": ("Cat cat dog", "CAT x DOG", "CAT x DOG"),
}


def write_names(root, folders, lines):
    """Make class folders and a file of names. A dot in the middle stands for a space."""
    write_tree(root, *(f"{name}/1.png" for name in folders.split(" ")))
    (root / "names.txt").write_text("\n".join(lines.split(" ")).replace("·", " ") + "\n", encoding="utf-8")
    return root / "names.txt"


@pytest.mark.parametrize("case", NAMES)
def test_names_go_to_the_folders_that_they_name(tmp_path, transform, capsys, case):
    folders, lines, expected = NAMES[case]
    file = write_names(tmp_path, folders, lines)
    images = load_images("folder", tmp_path, "val", transform, class_names=file)
    assert sorted(images.folders) == sorted(folders.split(" "))
    assert images.class_names == [name.replace("·", " ") for name in expected.split(" ")]
    assert classes_of("folder", tmp_path, "val", file) == images.classes
    first, last = (f"{images.folders[i]} = {images.class_names[i]}" for i in (0, -1))
    assert f"classes ({first}, ..., {last})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folders", "lines", "name", "folder", "place"),
    [
        ("ant cat dog", "x dog y", "2, dog", "dog", "cat"),
        ("ant cat dog", "Cat x dog", "1, Cat", "cat", "ant"),
        ("ant cat dog", "cat dog cat", "1, cat", "cat", "ant"),
        ("ant sea_cow", "Sea·cow x", "1, Sea cow", "sea_cow", "ant"),
        ("Cat ant cat", "cat Cat CAT", "2, Cat", "Cat", "ant"),
    ],
)
def test_names_that_stand_at_another_folders_place_are_refused(tmp_path, folders, lines, name, folder, place):
    file = write_names(tmp_path, folders, lines)
    for call in (load_images, classes_of):
        said = one_line_of(call, "folder", tmp_path, "val", class_names=file)
        words = f"name {name}, is that of folder {folder} and stands at the place of folder {place}; "
        assert said.startswith(f"--class_names {file}: {words}")
        assert "list the names in the order of the sorted folders, or use the name of every folder" in said


# Texts

JSONS = (
    '["a dog", "the sea"]',
    '\ufeff{\n "3": [[12, 0.5, "a dog"], [7, -0.2, "the sea"]]\n}\n',
    "[]",
    '{"text": "a dog"}\n{"text": "the sea"}\n',
    '[\r\n"a dog"\r\n]',
)
PLAIN = (
    ("[laughter]\n{noise}\na dog\n", ["[laughter]", "{noise}", "a dog"]),
    ("[1] a dog\n[2]\n", ["[1] a dog", "[2]"]),
    ('{"text": "a dog"}\nthe sea\n', ['{"text": "a dog"}', "the sea"]),
    ("dog,0.5\nsea,0.1\n", ["dog,0.5", "sea,0.1"]),
    ('"a dog"\n', ['"a dog"']),
    ("7\n8\n", ["7", "8"]),
    ("7\n", ["7"]),
)
OTHERS = {
    "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n": "a Git LFS pointer",
    "<!DOCTYPE html>\n<html><body>404</body></html>\n": "a web page",
    '<?xml version="1.0"?>\n<Error/>\n': "a web page",
    "a\0 \0c\0a\0t\0\n\0": "no plain text",
    '{"a": "cut': "a json",
    '[\n "a dog",\n "cut': "a json",
    "['a dog', 'a cat']\n": "a json",
    "[" * 100_000: "a json",
}


@pytest.mark.parametrize("content", OTHERS)
def test_what_is_no_text_file_is_called_by_its_name(tmp_path, content):
    path = tmp_path / "words.txt"
    path.write_bytes(content.encode())
    assert f"is {OTHERS[content]}" in one_line_of(read_texts, path)


@pytest.mark.parametrize(
    ("folders", "lines"),
    [
        (["cat", "dog"], ["dog/", "cat/"]),
        (["cat", "dog"], ['"dog"', '"cat"']),
        (["class1", "class10", "class2"], ["class 1", "class 2", "class 10"]),
        (["GoldenRetriever", "tabbyCat"], ["tabby cat", "golden retriever"]),
        (["stop.sign", "traffic.light"], ["traffic light", "stop sign"]),
        (["001.cat", "002.dog", "003.star"], ["star", "dog", "cat"]),
    ],
)
def test_other_spellings_of_the_folders_are_matched_by_name(tmp_path, folders, lines):
    (tmp_path / "names.txt").write_text("\n".join(lines) + "\n")
    letters = [re.sub(r"^\d+|\W", "", folder).lower() for folder in folders]
    found = names_for(folders, tmp_path / "names.txt")
    assert [re.sub(r"\W", "", name).lower() for name in found] == letters
    assert not [name for name in found if set(name) & set('/"')]


@pytest.mark.parametrize(
    "lines", [["n02 dog", "n01 cat"], ["n02\tdog", "n01\tcat"], ["n02: dog", "n01: cat"]]
)
def test_lines_that_begin_with_another_folders_name_are_refused(tmp_path, lines):
    (tmp_path / "names.txt").write_text("\n".join(lines) + "\n")
    assert "stands at the place of folder" in one_line_of(names_for, ["n01", "n02"], tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("\n".join(lines[::-1]) + "\n")
    assert names_for(["n01", "n02"], tmp_path / "names.txt") == lines[::-1]


@pytest.mark.parametrize("content", JSONS)
def test_a_json_is_no_text_file(tmp_path, content):
    path = tmp_path / "descriptions.txt"
    path.write_bytes(content.encode())
    said = one_line_of(read_texts, path)
    assert said == f"{path} is a json, and one text a line is needed; write its texts to a text file"


@pytest.mark.parametrize(("content", "texts"), PLAIN)
def test_texts_that_look_like_a_json_are_texts(tmp_path, content, texts):
    (tmp_path / "texts.txt").write_text(content)
    assert read_texts(tmp_path / "texts.txt") == texts
