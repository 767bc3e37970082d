"""Measure the way from a CLIP and a folder of pictures to the page of all neurons, in one command.

    python -m benchmarks.page        # ViT-B-32, 1,000 photos, the visual concepts and 30,000 words

make_gallery.py runs everything from the effects to the page. The seconds of the control dictionaries, by its
progress bars, are shown, and left out of the ratio. Beside it a plain pass over the same photos by
compute_representations.py.
"""

import os
import re
import shutil
from typing import NamedTuple

from benchmarks.common import Table, bench_parser, of_model, row, run, stage, write_photos
from benchmarks.descriptions import browse, browser_rows


class Found(NamedTuple):
    """`Found` is all that was measured."""

    plain: float  # seconds of a pass over all photos
    whole: dict  # {text set: `Process`}
    controls: dict  # {text set: seconds of the controls}
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
    """Time the plain pass, then the whole command for every text set, then a second run."""
    folder, model, data = case
    plain = 0
    for split in ("train", "val"):
        flags = [*model, *data, "--split", split, "--output_dir", folder / "plain"]
        plain += stage("compute_representations", *flags).seconds
    whole, controls, size = {}, {}, {}
    for texts in args.texts:
        out = folder / texts
        flags = [*model, *data, "--mlp_layer", *args.mlp_layer, "--output_dir", out]
        flags += ["--text_descriptions", texts, "--components", args.components]
        whole[texts] = stage("make_gallery", *flags)
        size[texts] = sum(path.stat().st_size for path in (out / "gallery").rglob("*") if path.is_file())
        controls[texts] = seconds_of_controls(whole[texts].errors)
        print(f"{texts}: {whole[texts].seconds:.0f} s, controls {controls[texts]:.0f} s", flush=True)
    again = stage("make_gallery", *flags)
    first_picture, strokes = None, []
    if shutil.which("chromium") and shutil.which("chromedriver"):
        first_picture, strokes = browse(
            out / "gallery", "0" if "all" in args.mlp_layer else args.mlp_layer[-1]
        )
    return Found(plain, whole, controls, size, again, first_picture, strokes)


def seconds_of_controls(errors):
    """Return the seconds of the progress bars of control dictionaries. errors: stderr of the command."""
    bars = re.findall(r"([^\r\n:]+): 100%[^\r\n]*\[(?:(\d+):)?(\d+):(\d+)<", errors)
    found = {}
    for number, (title, hours, minutes, seconds) in enumerate(bars):
        dictionary = re.search(r"(?:controls of|by deletion).*, (\d+) of \d+$", title)
        again = title == "soft-WPMI" and any(other == "soft-WPMI" for _, other in found)
        if (dictionary and dictionary[1] != "0") or again:
            found[number, title] = 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)
        elif title == "soft-WPMI":
            found[number, title] = 0  # the first is of the text set
    return sum(found.values())


def table(args, found):
    """Return the table, with bars where the full sizes were measured."""
    full = args.model == "ViT-B-32" and args.images >= 1000 and args.mlp_layer == ["9"]
    most = {"concepts": 6, "30k": 9}
    rows = [row(f"a plain pass over {args.images} photos", found.plain, "s", note="both splits, two starts")]
    for texts, process in found.whole.items():
        left = process.seconds - found.controls[texts]
        bar = most.get(texts) if full else None
        rows.append(row(f"{texts}: the whole command", process.seconds, "s"))
        rows.append(row(f"{texts}: of this the controls", found.controls[texts], "s"))
        rows.append(row(f"{texts}: without the controls", left / found.plain, "x plain", at_most=bar))
        rows.append(row(f"{texts}: peak memory", process.peak / 1e9, "GB", at_most=3 if full else None))
        rows.append(row(f"{texts}: the page", found.bytes[texts] / 1e6, "MB"))
    rows.append(row("a second run", found.again.seconds, "s"))
    if found.strokes:
        rows += browser_rows(found, lambda value: value if full else None)
    layers = ", ".join(args.mlp_layer)
    title = (
        f"From a folder to the page, {args.model}, random weights, layer {layers}, {args.components} texts"
    )
    name = of_model("page", args.model)
    return Table(name if args.mlp_layer == ["9"] else f"{name}_{'-'.join(args.mlp_layer)}", title, rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--mlp_layer", nargs="+", default=["9"])
    parser.add_argument("--images", type=int, default=1000, help="photos in the folder")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--components", type=int, default=128, help="texts for a neuron")
    parser.add_argument("--texts", nargs="+", default=["concepts", "30k"], help="text sets")
    tiny = {"texts": ["concepts"], "images": 80, "components": 2, "mlp_layer": ["10"]}
    run(parser, set_up, measure, table, tiny)
