"""Make semantic adversarial images: drawn from class_1 and words of neurons, taken by CLIP for class_0.

    python generate_adversarial_images.py --model ViT-B-32 --pretrained openai --class_0 "vacuum cleaner" \\
        --class_1 cat --mlp_layers 8 9 10 --neurons_num 100 --text_descriptions 30k --dataset_path PICTURES

In the demo's world, without any other model:  --text_model template --similarity_model clip \\
        --image_model demo.world:draw_description --image_options '{"opacity": 0.5}'

Reads components and descriptions of neurons from --output_dir (or --input_dir), and the classifier if it is
there. The descriptions are those of compute_sparse_decomposition.py; for --word_source fires_on, and for
random_fires_on, its control, those of evaluate_descriptions.py. The classes are any two texts. Writes to
DATASET_PATH/CLASS0_CLASS1_SOURCE_seedSEED/
    candidates.json   the neurons, and their words by score
    words.json        the words taken; those dropped, and why
    prompts.json      the descriptions (generations.json: the language model's answers)
    images.json       which file shows which description
    images/*.png
    files.csv         every image, and how CLIP takes it
    results.json      the rates
A step whose file exists is not repeated. No description names class_0. To leave a picture out, set its "keep"
in files.csv to 0 and repeat the command with --recount. The language, sentence and drawing models need:
    pip install -r requirements-adversarial.txt
"""

import os
import sys
from functools import partial

from huggingface_hub.utils import disable_progress_bars

from applications.attack.drawings import draw, fill_template, plan_drawings, write_descriptions
from applications.attack.generators import (
    LanguageModel,
    load_image_model,
    load_similarity,
    parse_options,
    require_packages,
)
from applications.attack.judging import classify_drawings, find_classifier, recount
from applications.attack.run import Run
from applications.attack.words import (
    BLOCK_LIST,
    NeuronWords,
    PoolWords,
    check_classes,
    filter_words,
    load_block_list,
    read_words,
)
from utils.data.images import train_set_of
from utils.model.clip import load_clip
from utils.model.preprocessing import describe
from utils.model.texts import text_vectors
from utils.runtime import flags
from utils.runtime.layers import parse_layers
from utils.runtime.results import Results
from utils.statistics import find_k

BY_NEURONS = {  # word sources, and how the texts of neurons are read
    "second_order": NeuronWords.load,
    "random": NeuronWords.load,
    "fires_on": NeuronWords.load_fires_on,
    "random_fires_on": NeuronWords.load_fires_on,
}
SOURCES = (*BY_NEURONS, "similar", "random_words", "file")
CLIP_THRESHOLD = 0.9  # CLIP's cosines of any two words are large
SENTENCE_THRESHOLD = 0.6
CLIP_BATCH = 64  # texts in one forward pass


def main(args):
    class_0 = " ".join(args.class_0.split())
    class_1 = " ".join(args.class_1.split())
    blocked = load_block_list(args.block_list, class_0)
    check_classes(class_0, class_1, blocked)
    run = Run(args.dataset_path, (class_0, class_1, args.word_source), args.seed)
    if args.recount:
        return recount(run)
    options = parse_options(args.image_options)
    with run.lock():
        run.prepare(args.overwrite)
        attack(args, run, blocked, options)


def attack(args, run, blocked, options):
    """Take the five steps, in the folder of a `Run`."""
    clip = load_clip(args.model, args.pretrained, args.device)
    texts = text_vectors(clip, [run.class_0, run.class_1], 2)
    candidates = mine(args, run, clip, v=texts[0] - texts[1])
    words = choose(args, run, clip, candidates, blocked)
    descriptions = write(args, run, words)
    drawings = draw_descriptions(args, run, descriptions, options)
    classify(args, run, clip, drawings, texts)


def mine(args, run, clip, v):
    """Return [[word, score], ...], best first. v: [D], the difference of the classes' text vectors."""
    settings = {**clip.record, "dataset": args.dataset}
    settings |= {"class_0": run.class_0, "class_1": run.class_1, "seed": args.seed}
    settings |= {"word_source": args.word_source, "text_descriptions": args.text_descriptions}
    inputs, make = open_source(args, clip, v)
    return run.step("candidates.json", settings | inputs, make)["words"]


def open_source(args, clip, v):
    """Return {name: value} of everything that the words are made from, and the function that mines them."""
    if args.word_source == "file":
        words = read_words(args.words)
        return {"words": words}, lambda: {"words": words}
    known = {"clip": clip, "also": args.dataset_path, "descriptions_dir": args.descriptions_dir}
    results = Results(args.input_dir, args.model, args.pretrained, **known)
    if args.word_source in ("similar", "random_words"):
        pool = PoolWords(results, args.text_descriptions, args.descriptions_dir)
        make = partial(pool.similar, v)
        if args.word_source == "random_words":
            make = partial(pool.random, args.seed)
        return {"inputs": pool.digest()}, make
    train = args.train_dataset or train_set_of(args.dataset)
    layers = parse_layers(args.mlp_layers, clip.vit)
    args.top_k_pca = find_k(args.top_k_pca, results, train, layers)
    names = {"dataset": train, "texts": args.text_descriptions, "k": args.top_k_pca}
    names |= {"components": args.components, "alpha": args.transform_alpha}
    neurons = BY_NEURONS[args.word_source](results, layers, **names)
    inputs = {"train_dataset": train, "mlp_layers": layers, "neurons_num": args.neurons_num}
    inputs |= {"components": args.components, "transform_alpha": args.transform_alpha}
    inputs |= {"top_k_pca": args.top_k_pca, "inputs": neurons.digest()}
    seed = args.seed if args.word_source.startswith("random") else None
    return inputs, partial(neurons.mine, v, args.neurons_num, seed)


def choose(args, run, clip, candidates, blocked):
    """Return the best words that are not too close to class_0."""
    threshold = args.cosim_similarity
    if threshold is None:
        threshold = CLIP_THRESHOLD if args.similarity_model == "clip" else SENTENCE_THRESHOLD
    settings = {"overall_words": args.overall_words, "similarity_model": args.similarity_model}
    settings |= {"cosim_similarity": threshold, "block_list": blocked}

    def make():
        require_packages(args.similarity_model, args.text_model, args.image_model)
        encode = load_similarity(args.similarity_model, clip, CLIP_BATCH)
        return filter_words(candidates, run.class_0, args.overall_words, encode, threshold, blocked)

    words = [entry["word"] for entry in run.step("words.json", settings, make)["words"]]
    print(f"words: {', '.join(words)}")
    return words


def write(args, run, words):
    """Return descriptions of class_1, from the template or a language model."""

    def make():
        require_packages(text_model=args.text_model, image_model=args.image_model)
        if args.text_model == "template":
            return fill_template(run.settings, words)
        ask = LanguageModel(args.text_model, args.device)
        return write_descriptions(run, run.settings, ask, words)

    settings = {"text_model": args.text_model, "results_per_generation": args.results_per_generation}
    prompts = run.step("prompts.json", settings, make)
    texts = prompts["descriptions"]
    print(f"{len(texts)} descriptions, {len(prompts['dropped'])} dropped; {texts[0]!r}, ...")
    return texts


def draw_descriptions(args, run, descriptions, options):
    """Draw each description --batch_size times; return [{"file", "description", "seed"}, ...]."""
    settings = {"image_model": args.image_model, "image_options": options, "batch_size": args.batch_size}
    plan = partial(plan_drawings, run.folder, descriptions, args.batch_size, args.seed)
    drawings = run.step("images.json", settings, plan)["images"]
    model = partial(load_image_model, args.image_model, args.device, options, args.offload)
    draw(run.folder, drawings, model)
    return drawings


def classify(args, run, clip, drawings, texts):
    """Write how CLIP takes every drawing, and report the rates. texts: [2, D], vectors of the classes."""
    folder = args.classifier_dir or args.input_dir
    results = Results(folder, args.model, args.pretrained, also=args.dataset_path, clip=clip)
    classes = (run.class_0, run.class_1)
    classifier, class_names = find_classifier(results, args.dataset, classes)
    print(describe(clip.transform))
    classify_drawings(run, drawings, clip, texts, classifier, class_names)


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where --image_model MODULE:FUNCTION may be
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    disable_progress_bars()
    parser = flags.stage_parser(__doc__)
    add = parser.add_argument
    add("--dataset_path", default="dataset", help="where the pictures go")
    add("--class_0", default="dog", help="the class that CLIP should see; no description names it")
    add("--class_1", default="cat", help="the class that is drawn")
    add("--seed", type=int, default=0, help="of words, descriptions and images")
    add("--recount", action="store_true", help="only count again, after an edit of files.csv")
    flags.add_dataset(parser)
    help = "whose neurons' words are taken; default: --dataset"
    add("--train_dataset", choices=flags.DATASETS, help=help)
    group = parser.add_argument_group("words")
    add = group.add_argument
    help = "words that neurons along v, the classes' difference, write or fire on; those of random neurons; "
    help += "or other texts"
    add("--word_source", default="second_order", choices=SOURCES, help=help)
    add("--words", help="for --word_source file: a json [[word, score], ...], best first")
    add("--mlp_layers", nargs="+", default=["8", "9", "10"], help="zero-based MLP layers, or 'all'")
    help = "neurons, of all layers together; paper: 100"
    add("--neurons_num", type=flags.positive_int, default=50, help=help)
    help = "words to describe with; paper: 25"
    add("--overall_words", type=flags.positive_int, default=20, help=help)
    flags.add_texts(group, components=128, also=["--neurons_texts"])
    flags.add_top_k(group)
    help = "sentence-transformers id or folder, or 'clip': the model's own text tower"
    add("--similarity_model", default="sentence-transformers/all-distilroberta-v1", help=help)
    help = "largest cosine of a word with class_0; default: 0.6, with clip 0.9"
    add("--cosim_similarity", type=float, help=help)
    add("--block_list", default=BLOCK_LIST, help="a json {class: [more words to drop]}")
    group = parser.add_argument_group("descriptions and images")
    add = group.add_argument
    help = "Hugging Face id, folder or .gguf file of an instruct model, or 'template', which needs no model"
    add("--text_model", default="meta-llama/Meta-Llama-3-8B-Instruct", help=help)
    help = "descriptions that are drawn"
    add("--results_per_generation", type=flags.positive_int, default=10, help=help)
    add("--batch_size", type=flags.positive_int, default=4, help="pictures of each description")
    help = "FLUX, DeepFloyd, a diffusers id or folder, or package.module:function, which draws a description"
    add("--image_model", default="FLUX", help=help)
    add("--image_options", default="{}", help="a json of keyword arguments for the drawing")
    help = "keep only the active part of the drawing model on the GPU"
    add("--offload", action="store_true", help=help)
    flags.add_device(parser)
    parser.add_argument("--classifier_dir", help="where the classifier is; default: --input_dir")
    flags.add_unused(parser, "--num_workers", "--coefficient", "--input_file")
    flags.run(main, parser, written="dataset_path")
