"""Semantic adversarial images: pictures of class_1, drawn from the words of neurons, that CLIP takes for
class_0.

    python generate_adversarial_images.py --model ViT-B-32 --pretrained openai --class_0 "vacuum cleaner"
        --class_1 cat \\ --mlp_layers 8 9 10 --neurons_num 100 --text_descriptions 30k --dataset_path PICTURES

In the demo's world, without any other model:  --text_model template --similarity_model clip \\
        --image_model demo.world:draw_description --image_options '{"opacity": 0.5}'

Reads first components and descriptions from --output_dir (or --input_dir), and the classifier if it is there.
The classes are any two texts. Writes to DATASET_PATH/CLASS0_CLASS1_SOURCE_seedSEED/
    candidates.json   the neurons, and their words by score      words.json    the words taken; those dropped, and why
    prompts.json      the descriptions (generations.json: the language model's answers)
    images.json       which file shows which description         images/*.png
    files.csv         every image, and how CLIP takes it         results.json  the rates
A step whose file exists is not repeated. No description names class_0. To leave a picture out, set its "keep"
in files.csv to 0 and repeat the command with --recount. The language, sentence and drawing models need:
    pip install -r requirements-adversarial.txt
"""

import os
import sys
from functools import partial

from huggingface_hub.utils import disable_progress_bars

from applications.attack import adversarial
from applications.attack.generators import (
    LanguageModel,
    load_image_model,
    load_similarity,
    parse_options,
    require_packages,
)
from utils.data.images import train_set_of
from utils.model.clip import load_clip
from utils.model.preprocessing import describe
from utils.model.texts import text_vectors
from utils.runtime import flags
from utils.runtime.layers import parse_layers
from utils.runtime.records import Digest
from utils.runtime.results import Results

SOURCES = ("second_order", "weighted", "random", "similar", "random_words", "file")
CLIP_THRESHOLD = 0.9  # CLIP's cosines of any two words are large
SENTENCE_THRESHOLD = 0.6
CLIP_BATCH = 64  # texts or images in one forward pass


def main(args):
    class_0, class_1 = (" ".join(name.split()) for name in (args.class_0, args.class_1))
    blocked = adversarial.load_block_list(args.block_list, class_0)
    adversarial.check_classes(class_0, class_1, blocked)
    run = adversarial.Run(args.dataset_path, (class_0, class_1, args.word_source), args.seed)
    if args.recount:
        columns, keep = adversarial.read_table(run.folder / "files.csv")
        return adversarial.report(run, adversarial.rates(columns, class_1, keep), class_0, class_1)
    options = parse_options(args.image_options)
    with run.lock():
        attack_with(args, run, options, class_0, class_1, blocked)


def attack_with(args, run, options, class_0, class_1, blocked):
    """The five steps, in the folder of a `Run`."""
    run.prepare(args.overwrite)
    clip, names = (
        load_clip(args.model, args.pretrained, args.device),
        {"model": args.model, "pretrained": args.pretrained},
    )
    results = Results(args.input_dir, **names, also=args.dataset_path, descriptions_dir=args.descriptions_dir)
    texts = text_vectors(clip, [class_0, class_1], 2)
    mining = mining_settings(args, clip, {"class_0": class_0, "class_1": class_1, "seed": args.seed})
    sources = load_sources(args, clip, results, mining)
    mining |= {"inputs": Digest(" ".join(of.digest() for of in sources.values()), None)} if sources else {}
    mined = run.step("candidates.json", mining, lambda: mine(args, sources, mining, v=texts[0] - texts[1]))

    threshold = CLIP_THRESHOLD if args.similarity_model == "clip" else SENTENCE_THRESHOLD
    threshold = threshold if args.cosim_similarity is None else args.cosim_similarity
    filtering = {**mining, "overall_words": args.overall_words, "similarity_model": args.similarity_model}
    filtering |= {"cosim_similarity": threshold, "block_list": blocked}

    def filtered():
        require_packages(args.similarity_model, args.text_model, args.image_model)
        encode = load_similarity(args.similarity_model, clip, CLIP_BATCH)
        return adversarial.filter_words(
            mined["words"], class_0, args.overall_words, encode, threshold=threshold, blocked=blocked
        )

    words = [entry["word"] for entry in run.step("words.json", filtering, filtered)["words"]]
    print(f"words: {', '.join(words)}")
    writing = {
        **filtering,
        "text_model": args.text_model,
        "results_per_generation": args.results_per_generation,
    }
    prompts = run.step("prompts.json", writing, lambda: write(args, run, writing, words))
    described = prompts["descriptions"]
    print(f"{len(described)} descriptions, {len(prompts['dropped'])} dropped; {described[0]!r}, ...")

    drawing = {
        **writing,
        "image_model": args.image_model,
        "image_options": options,
        "batch_size": args.batch_size,
    }
    plan = partial(adversarial.plan_drawings, run.folder, described, each=args.batch_size, seed=args.seed)
    drawings = run.step("images.json", drawing, plan)["images"]
    adversarial.draw(
        run.folder, drawings, lambda: load_image_model(args.image_model, args.device, options, args.offload)
    )
    classifiers = Results(args.classifier_dir or args.input_dir, **names, also=args.dataset_path)
    classifier = adversarial.find_classifier(classifiers, args.dataset, clip, (class_0, class_1))
    print(describe(clip.transform))
    vectors = adversarial.representations(run.folder, drawings, clip, CLIP_BATCH)
    columns = {
        "black": adversarial.blacked_out(run.folder, drawings),
        **adversarial.judge(vectors, texts, (class_0, class_1), *classifier),
    }
    keep = adversarial.write_table(run.folder / "files.csv", drawings, columns)
    adversarial.report(run, adversarial.rates(columns, class_1, keep), class_0, class_1)


def mining_settings(args, clip, chosen):
    """What the words are made from. Each later step adds its own settings to those of the step before."""
    settings = {**clip.record, "dataset": args.dataset, **chosen}
    settings |= {"word_source": args.word_source, "text_descriptions": args.text_descriptions}
    settings |= {"words": adversarial.read_words(args.words)} if args.word_source == "file" else {}
    if args.word_source in ("second_order", "weighted", "random"):
        train = args.train_dataset or train_set_of(args.dataset)
        settings |= {"train_dataset": train, "mlp_layers": parse_layers(args.mlp_layers, clip.vit)}
        settings |= {
            name: getattr(args, name)
            for name in ("neurons_num", "components", "transform_alpha", "top_k_pca")
        }
    return settings


def load_sources(args, clip, results, settings):
    """Where words come from: {"pool": `PoolWords`, "neurons": `NeuronWords`}, those that the word source
    needs.
    """
    found = {}
    if args.word_source in ("weighted", "similar", "random_words"):
        found["pool"] = adversarial.PoolWords(results, args.text_descriptions, args.descriptions_dir, clip)
    if args.word_source in ("second_order", "weighted", "random"):
        names = {"dataset": settings["train_dataset"], "texts": args.text_descriptions, "k": args.top_k_pca}
        names |= {"components": args.components, "alpha": args.transform_alpha}
        found["neurons"] = adversarial.NeuronWords.load(results, clip, settings["mlp_layers"], **names)
    return found


def mine(args, sources, settings, v):
    """Words by score and, where they come from neurons, the neurons. v: [D], the difference of the classes'
    text vectors.
    """
    if args.word_source == "file":
        return {"words": settings["words"]}
    if args.word_source in ("similar", "random_words"):
        pool = sources["pool"]
        return pool.similar(v) if args.word_source == "similar" else pool.random(args.seed)
    shares = sources["pool"].shares(v) if args.word_source == "weighted" else None
    seed = args.seed if args.word_source == "random" else None
    return sources["neurons"].mine(v, args.neurons_num, seed=seed, shares=shares)


def write(args, run, settings, words):
    """Descriptions from the template or a language model."""
    require_packages(text_model=args.text_model, image_model=args.image_model)
    if args.text_model != "template":
        return adversarial.write_descriptions(
            run, settings, LanguageModel(args.text_model, args.device), words
        )
    class_0, class_1 = settings["class_0"], settings["class_1"]
    descriptions = adversarial.template_descriptions(words, class_1, args.results_per_generation, args.seed)
    good, bad = adversarial.usable(descriptions, class_0, class_1, settings["block_list"])
    return {"descriptions": good, "dropped": bad}


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where --image_model MODULE:FUNCTION may be
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    disable_progress_bars()
    parser = flags.stage_parser(__doc__)
    parser.add_argument("--dataset_path", default="dataset", help="where the pictures go")
    parser.add_argument(
        "--class_0", default="dog", help="the class that CLIP should see; no description names it"
    )
    parser.add_argument("--class_1", default="cat", help="the class that is drawn")
    parser.add_argument("--seed", type=int, default=0, help="of words, descriptions and images")
    parser.add_argument("--recount", action="store_true", help="only count again, after an edit of files.csv")
    flags.add_dataset(parser)
    parser.add_argument(
        "--train_dataset", choices=flags.DATASETS, help="whose neurons' words are taken; default: --dataset"
    )
    words = parser.add_argument_group("words")
    help = "words of neurons along v, the classes' difference; weighted by their share of v; of random neurons; or other texts"
    words.add_argument("--word_source", default="second_order", choices=SOURCES, help=help)
    words.add_argument("--words", help="for --word_source file: a json [[word, score], ...], best first")
    words.add_argument(
        "--mlp_layers", nargs="+", default=["8", "9", "10"], help="zero-based MLP layers, or 'all'"
    )
    words.add_argument(
        "--neurons_num",
        type=flags.positive_int,
        default=50,
        help="neurons, of all layers together; paper: 100",
    )
    words.add_argument(
        "--overall_words", type=flags.positive_int, default=20, help="words to describe with; paper: 25"
    )
    flags.add_texts(words, components=128, also=["--neurons_texts"])
    flags.add_top_k(words)
    help = "sentence-transformers id or folder, or 'clip': the model's own text tower"
    words.add_argument("--similarity_model", default="sentence-transformers/all-distilroberta-v1", help=help)
    words.add_argument(
        "--cosim_similarity",
        type=float,
        help="largest cosine of a word with class_0; default: 0.6, with clip 0.9",
    )
    words.add_argument(
        "--block_list", default=adversarial.BLOCK_LIST, help="a json {class: [more words to drop]}"
    )
    group = parser.add_argument_group("descriptions and images")
    help = "Hugging Face id, folder or .gguf file of an instruct model, or 'template', which needs no model"
    group.add_argument("--text_model", default="meta-llama/Meta-Llama-3-8B-Instruct", help=help)
    group.add_argument(
        "--results_per_generation", type=flags.positive_int, default=10, help="descriptions that are drawn"
    )
    group.add_argument(
        "--batch_size", type=flags.positive_int, default=4, help="pictures of each description"
    )
    help = "FLUX, DeepFloyd, a diffusers id or folder, or package.module:function, which draws a description"
    group.add_argument("--image_model", default="FLUX", help=help)
    group.add_argument("--image_options", default="{}", help="a json of keyword arguments for the drawing")
    group.add_argument(
        "--offload", action="store_true", help="keep only the active part of the drawing model on the GPU"
    )
    flags.add_device(parser)
    parser.add_argument("--classifier_dir", help="where the classifier is; default: --input_dir")
    flags.add_unused(parser, "--num_workers", "--coefficient", "--input_file")
    flags.run(main, parser, written="dataset_path")
