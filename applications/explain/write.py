"""Write a question's page and its .json, and say what they are made of."""

import hashlib
import json
import re
from pathlib import Path

from utils.runtime.errors import UserError
from utils.runtime.files import digest, save_atomic, save_json
from utils.runtime.records import complete, digests_of_files

WORDS = 40  # letters of the texts in the name of a page


def record_of(args, clip, asked, layers, means):
    """Return everything that the answers are made of."""
    record = {
        **clip.record,
        **clip.units_record,
        "preprocessing": clip.transform.digest,
        "texts": asked.texts,
    }
    record |= {"pictures": list(digests_of_files(asked.paths)), "baseline": args.baseline, "layers": layers}
    record |= {"activations": digest(*means.values()), "counts": args.counts, "seed": args.seed}
    record |= {"neurons": args.neurons, "dataset": args.dataset, "text_descriptions": args.text_descriptions}
    record["components"] = args.components
    return complete(record)


def path_of(results, asked, record):
    """Return the path of the page: its name has the texts, and a digest of the question."""
    words = re.sub(r"[^a-z0-9]+", "-", "_".join(asked.texts).lower())[:WORDS].strip("-")
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    return Path(results.directory) / f"explanation_{results.clip}_{words or 'text'}_{key}.html"


def title_of(texts):
    """Return the page's title."""
    if len(texts) == 1:
        return f"“{texts[0]}”: what brings the score about"
    return f"“{texts[0]}” or “{texts[1]}”: what decides"


def head_of(record, total, kind, one):
    """Return the lines about the model and about what taking a neuron away means.

    total, kind, one: how many there are, what they are, and the word for one of them.
    """
    layers = record["layers"]
    numbers = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    lines = [f"{record['model']}, {record['pretrained']}: {total:,} {kind} of {numbers}."]
    if record["baseline"] == "zero":
        lines.append(f"A {one} that is taken away has activation 0 (--baseline zero), not its mean.")
    else:
        lines.append(f"A {one} that is taken away acts as on average over the training images.")
    return lines


def check_finite(answers):
    """Raise UserError where an answer holds NaN or infinity. answers: list of dicts."""
    try:
        json.dumps(answers, allow_nan=False)
    except ValueError as error:
        what = "a score is NaN or infinite without some neurons, and nothing is written"
        fix = "make the mean activations again (compute_second_order_neuron_prs.py --overwrite)"
        raise UserError(f"{what}; {fix}") from error


def write(path, html, record, answers):
    """Write the page, and the .json beside it."""
    content = {**record, "answers": [{"name": name, **answer} for name, answer, _ in answers]}
    save_json(path.with_suffix(".json"), content)
    save_atomic(path, lambda file: file.write(html.encode("utf-8", "backslashreplace")))
