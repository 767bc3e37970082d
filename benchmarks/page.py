"""Measure the way from a CLIP and a folder of pictures to the page of all neurons.

    python -m benchmarks.page        # ViT-B-32, 1,000 photos, the visual concepts and 30,000 words

The stages that make_gallery.py runs, one after the other in one process, as it runs them, and the page.
Controls are left out (control dictionaries, rotated units); `noise.py` measures them. Beside it a plain pass
over the same photos by compute_representations.py, both splits in one process, too.
"""

import json
import os
import re
import shutil
from typing import NamedTuple

from benchmarks.common import Table, bench_parser, measured, of_model, row, run, stage, write_photos
from benchmarks.descriptions import browse, browser_rows

WITHOUT_CONTROLS = ["--controls", 0, "--rotated_units", 0]
IN_TURN = """import json, sys, time
from utils.runtime.stages import run_script
for command in json.loads(sys.argv[1]):
    start = time.time()
    run_script(command)
    print("STAGE", command[0], time.time() - start)
"""


class Found(NamedTuple):
    """`Found` is all that was measured."""

    plain: float  # seconds of a pass over all photos
    whole: dict  # {text set: `Process` of all stages and the page}
    stages: dict  # {text set: {stage: seconds}}
    bytes: dict  # {text set: bytes of the page}
    again: object  # `Process` of a second run
    first_picture: float  # milliseconds in the browser
    strokes: list


def set_up(args, folder):
    """Write photos into one folder. Returns it, and the flags of the model."""
    photos = write_photos(folder / "tree", args.images, ("all",))
    pictures = folder / "pictures"
    pictures.mkdir()
    for i, path in enumerate(sorted(photos.rglob("*.JPEG"))):
        os.link(path, pictures / f"{i:05d}.jpg")
    model = ["--model", args.model, "--pretrained", "random", "--device", args.device]
    data = ["--dataset", "images", "--data_path", pictures, "--batch_size", args.batch_size]
    return folder, model, data


def measure(args, case):
    """Time the plain pass, then the stages for every text set, then make_gallery.py for a second time."""
    folder, model, data = case
    flags = [*model, *data, "--output_dir", folder / "plain"]
    splits = [("compute_representations", [*flags, "--split", split]) for split in ("train", "val")]
    plain = in_one_process(splits).seconds
    whole, stages, size = {}, {}, {}
    for texts in args.texts:
        out = folder / texts
        whole[texts] = in_one_process(todo := list(commands(args, model, data, texts, out)))
        found = re.findall(r"^STAGE (\w+).py (\S+)$", whole[texts].output, re.MULTILINE)
        stages[texts] = {name: float(seconds) for name, seconds in found}
        each = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages[texts].items())
        print(f"plain {plain:.0f} s; {texts}: {whole[texts].seconds:.0f} s; {each}", flush=True)
        size[texts] = sum(path.stat().st_size for path in (out / "gallery").rglob("*") if path.is_file())
    name, flags = todo[-1]
    again = stage(name, *flags)
    first_picture, strokes = None, []
    if shutil.which("chromium") and shutil.which("chromedriver"):
        layer = "0" if "all" in args.mlp_layer else args.mlp_layer[-1]
        first_picture, strokes = browse(out / "gallery", layer)
    return Found(plain, whole, stages, size, again, first_picture, strokes)


def in_one_process(todo):
    """Run stages (script, flags) one after the other. Returns the `Process`."""
    todo = [[f"{name}.py", *map(str, flags)] for name, flags in todo]
    return measured("-c", IN_TURN, json.dumps(todo))


def commands(args, model, data, texts, out):
    """Yield (script, flags) of the stages that make_gallery.py runs, and of itself."""
    model = [*model, "--output_dir", out]
    layer = ["--mlp_layer", *args.mlp_layer]
    described = [*layer, "--text_descriptions", texts, "--components", args.components]
    yield "compute_second_order_neuron_prs", [*model, *data, *layer, "--split", "train", "--representations"]
    yield "compute_pcas", [*model, "--dataset", "images", *layer]
    yield "compute_text_set_projection", [*model, "--text_descriptions", texts]
    yield "compute_sparse_decomposition", [*model, "--dataset", "images", *described]
    deleted = ["--delete", args.delete]
    yield "evaluate_descriptions", [*model, *data, *described, *deleted, *WITHOUT_CONTROLS]
    yield "make_gallery", [*model, *data, *described]


def table(args, found):
    """Return the table, with bars where the full sizes were measured."""
    sizes = (args.model, args.mlp_layer, args.components, args.delete)
    full = args.images >= 1000 and sizes == ("ViT-B-32", ["9"], 128, 24)
    most = {"concepts": 6, "30k": 9}
    rows = [row(f"a plain pass over {args.images} photos", found.plain, "s", note="both splits, one start")]
    for texts, stages in found.stages.items():
        total, peak = found.whole[texts].seconds, found.whole[texts].peak / 1e9
        longest = max(stages, key=stages.get)
        note = f"{longest} {stages[longest]:.0f} s"
        bar = most.get(texts) if full else None
        rows.append(row(f"{texts}: all stages and the page", total, "s", note=note))
        rows.append(row(f"{texts}: the same", total / found.plain, "x plain", at_most=bar))
        rows.append(row(f"{texts}: peak memory", peak, "GB", at_most=3 if full else None))
        rows.append(row(f"{texts}: the page", found.bytes[texts] / 1e6, "MB"))
    rows.append(row("make_gallery.py again", found.again.seconds, "s"))
    if found.strokes:
        rows += browser_rows(found, lambda value: value if full else None)
    layers = ", ".join(args.mlp_layer)
    title = f"From a folder to the page, {args.model}, random weights, layer {layers}"
    title += f", {args.components} texts and {args.delete} deletions for a neuron, without controls"
    name = of_model("page", args.model)
    return Table(name if args.mlp_layer == ["9"] else f"{name}_{'-'.join(args.mlp_layer)}", title, rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--mlp_layer", nargs="+", default=["9"])
    parser.add_argument("--images", type=int, default=1000, help="photos in the folder")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--components", type=int, default=128, help="texts for a neuron")
    parser.add_argument("--delete", type=int, default=24, help="images on which a neuron is deleted")
    parser.add_argument("--texts", nargs="+", default=["concepts", "30k"], help="text sets")
    tiny = {"texts": ["concepts"], "images": 80, "components": 2, "mlp_layer": ["10"]}
    run(parser, set_up, measure, table, tiny)
