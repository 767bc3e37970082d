"""Measure graded descriptions and the gallery at full size: time, memory, disk, and the page in Chromium.

    python -m benchmarks.descriptions --images 5124 --val_images 5000 --texts 30000     # the paper's sizes

They are compared with `compute_representations.py` on the same photos. Texts have random unit vectors and the
words of our list. Without chromium, chromedriver and selenium the rows about the browser are left out.
"""

import hashlib
import shutil
import tempfile
from typing import NamedTuple

from benchmarks.common import ROOT, Table, bars, bench_parser, median, real_size_inputs, row, run, stage

QUERIES = ("water", "red", "house", "people", "green light", "old", "music", "animal")
FIRST_PICTURE = """
const look = () => {
  const thumb = document.querySelector(".thumb");
  if (!thumb) return requestAnimationFrame(look);
  const image = new Image();
  image.src = getComputedStyle(thumb).backgroundImage.slice(5, -2);
  const seen = () => (window.firstPicture = performance.now());
  image.decode().then(() => requestAnimationFrame(() => requestAnimationFrame(seen)));
};
requestAnimationFrame(look);
"""
TYPE = """
const [queries, done] = arguments;
const field = document.getElementById("search"), main = document.getElementById("main"), times = [];
const frame = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
(async () => {
  await new Promise((resolve) => setTimeout(resolve, 1000)); // a reader looks before typing
  for (const query of queries) {
    for (let n = 1; n <= query.length; n++) {
      const start = performance.now();
      field.value = query.slice(0, n);
      field.dispatchEvent(new Event("input"));
      const drawn = () => main.getAttribute("aria-busy") === "false" && main.dataset.shown === location.hash;
      while (!drawn()) await new Promise((resolve) => setTimeout(resolve));
      await frame();
      times.push(performance.now() - start);
    }
  }
  done(times);
})();
"""


class Found(NamedTuple):
    """`Found` is all that was measured."""

    processes: dict  # {name: `Process`}
    refit: object  # `Process` that fits texts
    size: int  # of the gallery, bytes
    files: int
    same: bool  # whether a second run wrote equal files
    first_picture: float  # milliseconds in the browser
    strokes: list


def set_up(args, folder):
    """Make photos, a classifier, text vectors, effects, components and descriptions.

    Returns the results, the flags of a plain pass, and those of the stages.
    """
    words = (ROOT / "text_descriptions/30k.txt").read_text().splitlines()[: args.texts]
    photos, results = real_size_inputs(args, folder, words)
    model = ["--model", args.model, "--pretrained", "random", "--device", args.device]
    model += ["--output_dir", results.directory]
    images = [*model, "--data_path", photos, "--subsample", 1, "--batch_size", args.batch_size]
    layer = ["--mlp_layer", args.mlp_layer, "--top_k_pca", min(100, args.images)]
    described = [*layer, "--text_descriptions", "words", "--components", args.components]
    stage("compute_second_order_neuron_prs", *images, *layer, "--split", "train", "--keep", "top")
    stage("compute_pcas", *model, *layer)
    stage("compute_sparse_decomposition", *model, *described)
    return results, images, [*images, "--train_subsample", 1, *described]


def measure(args, case):
    results, plain, flags = case
    found = {}
    for split in ("train", "val"):
        out = ["--output_dir", results.directory / "plain"]
        found[f"plain {split}"] = stage("compute_representations", *plain, "--split", split, *out)
    found["evaluate"] = stage("evaluate_descriptions", *flags)
    for path in results.directory.glob("*_fires_on_*"):
        path.unlink()
    refit = stage("evaluate_descriptions", *flags)
    found["gallery"] = stage("make_gallery", *flags)
    gallery = results.directory / "gallery"
    before = digests(gallery)
    stage("make_gallery", *flags, "--overwrite")
    for name, process in found.items():
        took = f"{process.seconds:.0f} s, bars {bars(process.errors)}, {process.peak / 1e9:.2f} GB"
        print(f"{name}: {took}", flush=True)
    files = [path for path in gallery.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    first_picture, strokes = None, []
    if shutil.which("chromium") and shutil.which("chromedriver"):
        first_picture, strokes = browse(gallery, args.mlp_layer)
    same = digests(gallery) == before
    return Found(found, refit, size, len(files), same, first_picture, strokes)


def digests(folder):
    """Return {name: digest} of all files of a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def browse(gallery, layer):
    """Return the milliseconds until the first picture is seen, and those of each key stroke of searches.

    The first is the median of five visits.
    """
    from tests.browser import start_browser

    address = (gallery / "index.html").as_uri()
    times = []
    with tempfile.TemporaryDirectory() as profile:
        driver = start_browser(profile)
        try:
            driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": FIRST_PICTURE})
            for visit in range(5):
                driver.get("about:blank")
                driver.get(f"{address}?{visit}#{layer}")
                while (shown := driver.execute_script("return window.firstPicture ?? null")) is None:
                    pass
                times.append(shown)
            strokes = driver.execute_async_script(TYPE, QUERIES)
        finally:
            driver.quit()
    return median(times), strokes


def table(args, found):
    """Return the table, with bars where the issue's sizes were measured."""
    full = args.images >= 5124 and args.val_images >= 5000 and args.texts >= 30_000

    def bar(value):
        return value if full and args.model == "ViT-B-32" else None

    rows = stage_rows(found, bar) + gallery_rows(found, bar)
    if found.strokes:
        rows += browser_rows(found, bar)
    title = f"Descriptions graded and the gallery, {args.model}, random weights, layer {args.mlp_layer}"
    title += f", {args.images} + {args.val_images} photos, {args.texts} texts"
    title += f", {args.components} of them for each neuron"
    return Table("descriptions", title, rows)


def stage_rows(found, bar):
    """Return the rows of evaluate_descriptions.py, and of both stages' memory. bar: value -> bar or None."""
    train = found.processes["plain train"]
    val = found.processes["plain val"]
    evaluate = found.processes["evaluate"]
    plain = bars(val.errors)[0] or val.seconds
    held_out = bars(evaluate.errors)[1] / plain
    refit = found.refit.seconds
    whole = (evaluate.seconds - refit) / (train.seconds + val.seconds)
    peak = max(evaluate.peak, found.processes["gallery"].peak) / 1e9
    script = "compute_representations.py"
    return [
        row("plain pass, training photos", train.seconds, "s", note=script),
        row("plain pass, held-out photos", val.seconds, "s", note=script),
        row("evaluate_descriptions.py", evaluate.seconds, "s", note=f"peak {evaluate.peak / 1e9:.2f} GB"),
        row("its pass over the held-out photos", held_out, "x plain", at_most=bar(1.2), note="the loops"),
        row("both passes, and the grades", whole, "x plain", note="the stage without the next row"),
        row("fitting texts to a layer, and labels", refit, "s", at_most=bar(300), note="with the start-up"),
        row("peak memory", peak, "GB", at_most=bar(3), note="with their workers"),
    ]


def gallery_rows(found, bar):
    """Return the rows of make_gallery.py and its files."""
    gallery = found.processes["gallery"]
    beyond = gallery.seconds - sum(bars(gallery.errors))
    return [
        row("make_gallery.py", gallery.seconds, "s", note=f"peak {gallery.peak / 1e9:.2f} GB"),
        row("beyond its passes", beyond, "s", at_most=bar(240)),
        row("size of the gallery", found.size / 1e6, "MB", at_most=bar(80)),
        row("its files", found.files, at_most=bar(400)),
        row("files that differ after a second run", 0 if found.same else 1, at_most=0),
    ]


def browser_rows(found, bar):
    """Return the rows of the page in the browser."""
    first = found.first_picture / 1000
    strokes = sorted(found.strokes)
    note = f"median of {len(strokes)}, until the next frame is drawn"
    return [
        row("first picture in the browser", first, "s", at_most=bar(1), note="median of 5 visits"),
        row("key stroke of a search", median(strokes), "ms", note=note),
        row("19 of 20 key strokes", strokes[int(0.95 * len(strokes))], "ms", at_most=bar(50)),
        row("slowest key stroke", strokes[-1], "ms"),
    ]


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--images", type=int, default=200, help="photos of the train split, a multiple of 4")
    parser.add_argument("--val_images", type=int, default=200, help="those of the val split, a multiple of 4")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--mlp_layer", type=int, default=9)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--components", type=int, default=128)
    run(parser, set_up, measure, table, quick={"images": 8, "val_images": 8, "texts": 20, "components": 4})
