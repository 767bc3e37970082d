"""Write the N most frequent English words, one a line: the text set from which neurons are described.

python text_descriptions/make_words.py --words 30000 --output text_descriptions/30k.txt
"""

import argparse
from pathlib import Path

from wordfreq import iter_wordlist


def common_words(n):
    """Return the n most frequent English words of two or more plain letters, most frequent first."""
    words = []
    for word in iter_wordlist("en", wordlist="large"):
        if len(words) == n:
            break
        if word.isascii() and word.isalpha() and (len(word) > 1 or word in ("a", "i")):
            words.append(word)
    return words


if __name__ == "__main__":
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--words", type=int, default=30_000)
    parser.add_argument("--output", type=Path, default="text_descriptions/30k.txt")
    args = parser.parse_args()
    args.output.write_text("\n".join(common_words(args.words)) + "\n", encoding="utf-8")
    print(f"wrote {args.output}")
