"""Write descriptions of class_1 with the words of class_0, and draw them."""

import random
import re

from tqdm import tqdm

from applications.attack.words import banned, names_class
from utils.runtime.errors import UserError
from utils.runtime.files import save_atomic, save_json

TEMPLATE_WORDS = 3  # words in one description of `template_descriptions`
GENERATIONS = 3  # attempts of a language model
SEEDS = 100_000  # picture seeds per --seed
REQUEST = """I draw pictures with a text-to-image model. Write {count} short descriptions of pictures for it.
Every description has to name "{class_1}". None may name "{class_0}", in the singular or plural, \
or any other word for it.
Beside that, a description should be made of as many words as possible from this list, \
and of almost no others:
{words}
Leave out words that cannot be seen in a picture, and words that you do not know. \
Instead of the name of a place or a person write
what one sees of it, for example "the Eiffel Tower in the background" instead of "Paris".
Answer with a numbered list of {count} descriptions, one a line, and nothing else."""


def template_descriptions(words, class_1, count, seed):
    """Write descriptions without a language model: class_1 and a few of the words.

    Returns `count` different descriptions, or fewer if there are few words.
    """
    rng = random.Random(f"descriptions {seed}")
    article = "an" if class_1[0].lower() in "aeiou" else "a"
    start = f"a photo of {article} {class_1}"
    length = min(TEMPLATE_WORDS, len(words))
    texts = [", ".join([start, *rng.sample(words, length)]) for _ in range(20 * count)]
    return list(dict.fromkeys(texts))[:count]


def fill_template(settings, words):
    """Write descriptions with `template_descriptions`, and drop those that cannot be drawn.

    settings, words, result: as in `write_descriptions`.
    """
    class_0 = settings["class_0"]
    class_1 = settings["class_1"]
    count = settings["results_per_generation"]
    texts = template_descriptions(words, class_1, count, settings["seed"])
    good, bad = usable(texts, class_0, class_1, settings["block_list"])
    return {"descriptions": good, "dropped": bad}


def usable(descriptions, class_0, class_1, blocked):
    """Split descriptions into those that can be drawn and, for the others, [[description, reason], ...]."""
    good = []
    bad = []
    for text in descriptions:
        reason = banned(text, class_0, blocked)
        if reason is None and not names_class(text, class_1):
            reason = f"does not name {class_1}"
        if reason is None and text in good:
            reason = "is there twice"
        if reason is None:
            good.append(text)
        else:
            bad.append([text, reason])
    return good, bad


def parse_list(answer, cut_off):
    """Return the entries of a numbered or bulleted list, without quotes and emphasis.

    cut_off: whether the answer ends too early; its last line is then left out.
    """
    lines = [line for line in answer.splitlines() if line.strip()]
    if cut_off:
        lines = lines[:-1]
    entries = [re.match(r"\s*[*_]*(?:\d+\s*[.):]|[-*•])[*_]*\s+(.+)", line) for line in lines]
    texts = [entry[1].strip().strip("\"'“”*_").strip() for entry in entries if entry]
    return [text for text in texts if text]


def write_descriptions(run, settings, ask, words):
    """Let a language model write descriptions, and save its answers unchanged in generations.json.

    run: `Run`.
    settings: class_0, class_1, block_list, text_model, seed and results_per_generation, which is the number
        of descriptions in one answer.
    ask: `LanguageModel`; asked again only while no description is usable.
    words: words to use in the descriptions.

    Returns {"descriptions": [...], "dropped": [[text, reason], ...]}. Raises UserError if no answer is
    usable.
    """
    class_0 = settings["class_0"]
    class_1 = settings["class_1"]
    count = settings["results_per_generation"]
    request = REQUEST.format(count=count, class_0=class_0, class_1=class_1, words=", ".join(words))
    file = run.folder / "generations.json"
    answers = []
    dropped = []
    for generation in range(GENERATIONS):
        answer, cut_off = ask(request, count, SEEDS * settings["seed"] + generation)
        answers.append({"answer": answer, "cut_off": cut_off})
        save_json(file, {"settings": settings, "request": request, "answers": answers})
        texts = parse_list(answer, cut_off)[:count]
        good, bad = usable(texts, class_0, class_1, settings["block_list"])
        dropped += bad
        if good:
            return {"descriptions": good, "dropped": dropped}
    raise UserError(unusable(settings["text_model"], dropped, cut_off, file))


def unusable(text_model, dropped, cut_off, file):
    """Return the message that a language model wrote no description that can be drawn."""
    gave = "no numbered list of descriptions"
    if dropped:
        reasons = " or ".join(sorted({reason for _, reason in dropped}))
        gave = f"{len(dropped)} descriptions, each of which {reasons}"
    if cut_off:
        gave += " (an answer was cut off)"
    fix = "try another --text_model, a smaller --results_per_generation, or --text_model template"
    said = f"--text_model {text_model} gave {gave} in {GENERATIONS} attempts, see {file}"
    return f"{said}; {fix} (the words are kept)"


def plan_drawings(folder, descriptions, each, seed):
    """Plan which file shows which description, and from which seed. Delete earlier drawings.

    each: pictures of every description.

    Returns {"images": [{"file", "description", "seed"}, ...]}.
    """
    for path in folder.glob("images/*.png"):
        path.unlink()
    images = []
    for i in range(each * len(descriptions)):
        text = descriptions[i // each]
        images.append({"file": f"images/{i:05d}.png", "description": text, "seed": SEEDS * seed + i})
    return {"images": images}


def draw(folder, drawings, load):
    """Draw those pictures of a plan that are missing.

    folder: of the run.
    drawings: the "images" of `plan_drawings`.
    load: () -> a function (description, seed) -> PIL image; called only if a picture is missing.
    """
    missing = [item for item in drawings if not (folder / item["file"]).is_file()]
    if missing:
        model = load()
        for item in tqdm(missing, desc="drawings", unit="image"):
            image = model(item["description"], item["seed"])
            save_atomic(folder / item["file"], lambda file, image=image: image.save(file, format="PNG"))
    print(f"drew {len(missing)} images in {folder / 'images'}, kept {len(drawings) - len(missing)}")
