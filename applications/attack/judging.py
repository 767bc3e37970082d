"""Classify the drawings of an attack: predicted classes, the table of all images, and the rates."""

import csv
import io

import torch
from PIL import Image

from utils.data.images import IMAGENET, Images, classes_of, train_set_of
from utils.data.splits import Split
from utils.runtime.errors import UserError
from utils.runtime.files import read_json, save_atomic, save_json
from utils.runtime.records import load_record

BATCH = 64  # images in one forward pass
COLUMNS = (
    "file",
    "description",
    "seed",
    "keep",
    "black",
    "binary",
    "predicted",
    "adversarial",
    "cosine_class_0",
    "cosine_class_1",
)


def load_named_classifier(results, dataset):
    """Return the zero-shot classifier [D, classes] on the model's device, and its class names.

    The names are those in its record, else ImageNet's. Raises UserError where it has neither.

    results: `Results` of a loaded model.
    """
    dataset = train_set_of(dataset)
    classifier = results.load("classifier", dataset=dataset)
    path = results.find("classifier", dataset=dataset)
    class_names = load_record(path).get("class_names")
    if not class_names and dataset in IMAGENET:
        class_names = classes_of(dataset)["class_names"]
    count = classifier.shape[1]
    if len(class_names or []) != count:
        command = results.command("classifier", dataset=dataset)
        fix = f"make it again with: {command} --overwrite"
        raise UserError(f"{path} does not name its {count} classes; {fix}")
    return torch.from_numpy(classifier).to(results.loaded.device), class_names


def find_classifier(results, dataset, classes):
    """Return `load_named_classifier`, or (None, []) if there is no classifier or it lacks a class."""
    train = train_set_of(dataset)
    if not results.find("classifier", dataset=train).is_file():
        command = results.command("classifier", dataset=train)
        missing = f"no classifier of {dataset}, so images are judged between the two names alone"
        print(f"note: {missing}; make it with: {command}")
        return None, []
    classifier, class_names = load_named_classifier(results, dataset)
    if None in [place_of(name, class_names) for name in classes]:
        return None, []
    return classifier, class_names


def plain(name):
    """Return the name of a class without capitals and underscores."""
    return " ".join(name.replace("_", " ").lower().split())


def place_of(name, class_names):
    """Return the index of a class among a classifier's class names; None if it is not there."""
    for i, known in enumerate(class_names):
        if plain(known) == plain(name):
            return i
    return None


@torch.inference_mode()
def representations(folder, drawings, clip):
    """Return the unit representations [images, D] of the drawings.

    folder: of the run.
    drawings: the "images" of `plan_drawings`.
    """
    files = [(str(folder / item["file"]), 0) for item in drawings]
    images = Images(files, [], [], clip.transform)
    batches = Split(images, clip.device, batch_size=BATCH).walk()
    vectors = [clip.vit(pixels) for _, pixels in batches]
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)


def judge(vectors, texts, classes, classifier=None, class_names=()):
    """Return how CLIP takes pictures, a dict of columns.

    vectors: unit representations [images, D].
    texts: [2, D], the unit vectors of the bare names of class_0 and class_1.
    classes: the two names.
    classifier: [D, classes]; not needed where it does not hold both classes.
    class_names: the names of the classifier's columns.

    Columns: "binary", whether the cosine with class_0 is above that with class_1 (the published score); the
    cosines; and where the classifier has both classes "predicted", the name of its largest logit, and
    "adversarial", whether that is class_0.
    """
    of_0, of_1 = (vectors @ torch.as_tensor(texts).to(vectors).T).T.tolist()
    columns = {"binary": [int(a > b) for a, b in zip(of_0, of_1, strict=True)]}
    places = [place_of(name, class_names) for name in classes]
    if None not in places:
        found = (vectors @ classifier).argmax(dim=1).tolist()
        columns["predicted"] = [class_names[i] for i in found]
        columns["adversarial"] = [int(i == places[0]) for i in found]
    columns["cosine_class_0"] = [f"{x:.5f}" for x in of_0]
    columns["cosine_class_1"] = [f"{x:.5f}" for x in of_1]
    return columns


def blacked_out(folder, drawings):
    """Return 1 for every drawing that is black all over, as safety filters make them; 0 for the others."""
    black = []
    for item in drawings:
        with Image.open(folder / item["file"]) as picture:
            black.append(int(picture.convert("L").getextrema()[1] == 0))
    return black


def rates(columns, class_1, keep=None):
    """Return counts, and rates in per cent, of the images that count.

    columns: as `judge` returns them, and "black"; black images do not count.
    class_1: the class that is drawn.
    keep: which images count; None for all.

    Rates: "binary_rate", images with "binary"; where there are predictions "argmax_rate", images whose
    largest logit is that of class_0, and "class_1_rate", of class_1.
    """
    count = len(columns["binary"])
    black = columns.get("black") or [0] * count
    if keep is None:
        keep = [1] * count
    kept = [i for i in range(count) if keep[i] and not black[i]]
    if not kept:
        why = "each has keep 0 in files.csv, or is black"
        raise UserError(f"no image is left to count: {why}; set keep to 1 for some, or draw others")
    hits = {"binary_rate": columns["binary"]}
    if "predicted" in columns:
        hits["argmax_rate"] = columns["adversarial"]
        hits["class_1_rate"] = [plain(name) == plain(class_1) for name in columns["predicted"]]
    found = {"images": len(kept), "black": sum(black)}
    for name, hit in hits.items():
        found[name] = 100 * sum(hit[i] for i in kept) / len(kept)
    return found


def write_table(path, drawings, columns):
    """Write files.csv, a row for each image, and return its column "keep".

    A person may set "keep" to 0 to leave an image out. The "keep" of an earlier file stays.
    """
    keep = [1] * len(drawings)
    if path.is_file():
        _, earlier = read_table(path)
        if len(earlier) == len(drawings):
            keep = earlier
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for i, item in enumerate(drawings):
        row = {name: values[i] for name, values in columns.items()}
        writer.writerow({**item, "keep": keep[i], **row})
    save_atomic(path, lambda file: file.write(table.getvalue().encode()))
    return keep


def read_table(path):
    """Read files.csv: the columns that `rates` needs, and which images count.

    Raises UserError for a file that is missing, or has something else than 0 or 1 in these columns.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        fix = "run the same command without --recount first"
        raise UserError(f"{path} cannot be read ({error.strerror}); {fix}") from error
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)  # spreadsheet programs change it
    rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    for number, row in enumerate(rows, start=2):
        check_row(row, f"{path}, line {number}")
    columns = {name: [int(row[name]) for row in rows] for name in ("black", "binary")}
    if rows and all(row.get("predicted") and row.get("adversarial") for row in rows):
        columns["predicted"] = [row["predicted"] for row in rows]
        columns["adversarial"] = [int(row["adversarial"]) for row in rows]
    return columns, [int(row["keep"]) for row in rows]


def check_row(row, place):
    """Raise UserError unless the flags of a row of files.csv are 0 or 1. place: file and line."""
    for name in ("keep", "black", "binary"):
        if row.get(name) not in ("0", "1"):
            raise UserError(f"{place}: {name} is {row.get(name)!r}; it has to be 0 or 1")
    if row.get("adversarial") not in ("0", "1", "", None):
        raise UserError(f"{place}: adversarial is {row['adversarial']!r}; it has to be 0, 1 or empty")


def classify_drawings(run, drawings, clip, texts, classifier, class_names):
    """Write how CLIP takes every drawing to files.csv, and report the rates.

    run: `Run`.
    drawings: the "images" of `plan_drawings`.
    texts, classifier, class_names: as in `judge`.
    """
    vectors = representations(run.folder, drawings, clip)
    columns = {"black": blacked_out(run.folder, drawings)}
    columns |= judge(vectors, texts, (run.class_0, run.class_1), classifier, class_names)
    keep = write_table(run.folder / "files.csv", drawings, columns)
    report(run, columns, keep)


def recount(run):
    """Report the rates again, after a person has edited files.csv."""
    columns, keep = read_table(run.folder / "files.csv")
    report(run, columns, keep)


def report(run, columns, keep):
    """Write the rates to results.json and print them, the published one first.

    run: `Run`.
    columns, keep: as in `rates`.
    """
    found = rates(columns, run.class_1, keep)
    settings = read_json(run.folder / "images.json", "", "remove it, or add --overwrite")["settings"]
    save_json(run.folder / "results.json", {"settings": settings, **found})
    nearer = f"images of {run.class_1} are nearer to {run.class_0} (the two bare names)"
    print(f"{found['binary_rate']:.1f} % of {found['images']} {nearer}")
    if found["black"]:
        print(f"{found['black']} pictures are black, as safety filters make them, and do not count")
    if "argmax_rate" in found:
        as_0 = f"{found['argmax_rate']:.1f} % are taken for {run.class_0}"
        as_1 = f"{found['class_1_rate']:.1f} % for {run.class_1}"
        print(f"among all classes of the classifier {as_0} and {as_1}")
    print(f"see {run.folder / 'files.csv'}")
