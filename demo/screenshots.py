"""Take pictures of the gallery for docs/, with a headless Chromium.

    python -m demo.screenshots --gallery demo/output/gallery --output_dir docs

Writes gallery.png (neurons of layer 4 that a search finds) and gallery_neuron.png (neuron 469).
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from demo.layout import HERE

# {name of the file: (address, size in pixels)}
SHOTS = {"gallery": ("#4?q=green", "1280,760"), "gallery_neuron": ("#4/469", "1280,1010")}
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000")


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--gallery", type=Path, default=HERE / "output/gallery", help="of make_gallery.py")
    parser.add_argument("--output_dir", type=Path, default=HERE.parent / "docs")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("error: there is no chromium and no google-chrome on the PATH; install one")
    for name, (address, size) in SHOTS.items():
        page = (args.gallery / "index.html").resolve().as_uri() + address
        path = args.output_dir / f"{name}.png"
        words = [chromium, *FLAGS, f"--window-size={size}", f"--screenshot={path}", page]
        subprocess.run(words, check=True, capture_output=True)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
