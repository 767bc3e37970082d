"""Fetch the three text sets of the published code, under names of their own.

    python text_descriptions/fetch_published.py

Writes published_30k.txt, published_10k.txt and published_image_descriptions.txt beside this script, for
--text_descriptions published_30k and so on, and their licence (MIT). A file is kept only if its sha256 is the
expected one.
"""

import argparse
import hashlib
import sys
import urllib.request
from pathlib import Path

COMMIT = "1d4fe4de23111feee8a62d6855ffec2105c4b710"
ADDRESS = f"https://raw.githubusercontent.com/yossigandelsman/second_order_lens/{COMMIT}"
POOLS = {  # name here: (name there, sha256)
    "published_30k.txt": ("30k.txt", "b96dfed9d570daddcc461e03c6009b7de6f72e515cb0a9eab35a9e1f21546f7b"),
    "published_10k.txt": (
        "google_10000_english.txt",
        "996ca0bd092a50a333b4a0e87a3731feb0f6f8d4e1a18e58279562d7f9fc2394",
    ),
    "published_image_descriptions.txt": (
        "image_descriptions_per_class.txt",
        "651520073306130e3f49d7e857f890da806c964f0ad9e2aa2b8ef1784778a67f",
    ),
}


def fetch(address):
    """Return the bytes at an address. Exits with one line when they cannot be fetched."""
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.read()
    except OSError as error:
        what = f"{address} cannot be fetched ({error})"
        sys.exit(f"error: {what}; check the connection and run the same command again")


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--address", default=ADDRESS, help="of the published repository's files")
    help = "where the text sets are written"
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent, help=help)
    args = parser.parse_args()
    licence = fetch(f"{args.address}/LICENSE.txt")
    if b"MIT License" not in licence:
        sys.exit(f"error: {args.address}/LICENSE.txt is not the MIT licence; nothing was written")
    for name, (theirs, expected) in POOLS.items():
        content = fetch(f"{args.address}/text_descriptions/{theirs}")
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            what = f"{theirs} has the sha256 {found}, and {expected} is expected"
            sys.exit(f"error: {what}; it was not written")
        (args.output_dir / name).write_bytes(content)
        print(f"wrote {args.output_dir / name}: {len(content.splitlines()):,} texts")
    (args.output_dir / "published_LICENSE.txt").write_bytes(licence)


if __name__ == "__main__":
    main()
