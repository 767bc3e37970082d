"""Take pictures of the gallery, and of the page of one decision, for docs/, with a headless Chromium.

    python -m demo.screenshots --demo demo/output --output_dir docs

Writes gallery.png (neurons of layer 4 that a search finds), gallery_neuron.png (neuron 469), and explain.png
(what decides for a heart over an anchor; it runs explain_image.py on the results of run_demo.py).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from demo.layout import COMPONENTS, HERE, MODEL, ROOT, WEIGHTS

# {name of the file: (address, size in pixels)}
SHOTS = {"gallery": ("#4?q=green", "1280,760"), "gallery_neuron": ("#4/469", "1280,1010")}
EXPLAINED = "world/symbols/val/heart/00007.png"
TEXTS = ("--text", "a heart", "--against", "an anchor")
SIZE = "1180,740"  # of its page
COLOURS = 256  # of its picture
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000")


def shoot(address, size, path):
    """Take a picture of a page."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("error: there is no chromium and no google-chrome on the PATH; install one")
    words = [chromium, *FLAGS, f"--window-size={size}", f"--screenshot={path}", address]
    subprocess.run(words, check=True, capture_output=True)


def explain(demo, folder):
    """Explain a picture of the demo; return the page. folder: where it is written."""
    words = [sys.executable, "explain_image.py", demo / EXPLAINED, *TEXTS, "--dataset", "folder"]
    words += ["--model", MODEL, "--pretrained", WEIGHTS, "--device", "cpu", "--num_workers", 0]
    words += ["--text_descriptions", "words", "--components", COMPONENTS]
    words += ["--input_dir", demo / "symbols", "--output_dir", folder]
    subprocess.run(list(map(str, words)), check=True, cwd=ROOT)
    [page] = Path(folder).glob("explanation_*.html")
    return page


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--demo", type=Path, default=HERE / "output", help="the folder of run_demo.py")
    parser.add_argument("--output_dir", type=Path, default=HERE.parent / "docs")
    args = parser.parse_args()
    demo = args.demo.resolve()
    for name, (address, size) in SHOTS.items():
        path = args.output_dir / f"{name}.png"
        shoot((demo / "gallery/index.html").as_uri() + address, size, path)
        print(f"wrote {path}")
    path = args.output_dir / "explain.png"
    with tempfile.TemporaryDirectory() as folder:
        shoot(explain(demo, folder).as_uri(), SIZE, path)
    Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
