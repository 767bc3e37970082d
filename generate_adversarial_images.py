"""Semantic adversarial images: pictures of class_1, drawn from neurons' words, that CLIP takes for class_0.

    python generate_adversarial_images.py --model ViT-B-32 --pretrained openai --dataset imagenet --mlp_layers 8 9 10 \\
        --class_0 "vacuum cleaner" --class_1 "Egyptian cat" --text_descriptions 30k --components 128 --image_model FLUX

Without any other model, on the demo's world:  --text_model template --similarity_model clip \\
        --image_model demo.world:draw_description --image_options '{"opacity": 0.5}'

Reads the first components, the descriptions, and the classifier. Writes to OUTPUT_DIR/CLASS0_CLASS1_SOURCE_seedSEED/
    candidates.json   the neurons, and their words by score      words.json    the words taken, and those dropped and why
    prompts.json      the descriptions (a language model's answers as they are: generations.json)
    images.json       which description is in which file         images/*.png
    files.csv         every image with its predicted class       results.json  the success rate
A step whose file is there is not done again. class_0 never stands in a description. The packages of the language, sentence and
drawing models:  pip install -r requirements-adversarial.txt
"""

import json

from utils import arguments
from utils.adversarial import (
    NeuronWords,
    PoolWords,
    Run,
    check_classes,
    class_difference,
    classify,
    draw,
    filter_words,
    find_class,
    load_block_list,
    load_named_classifier,
    plan_drawings,
    template_descriptions,
    usable,
    write_descriptions,
)
from utils.artifacts import Names
from utils.clip import load_clip
from utils.errors import UserError
from utils.generators import LanguageModel, load_image_model, load_similarity, require_packages
from utils.prs import parse_layers

CLIP_THRESHOLD = 0.9  # CLIP's cosines of any two words are large
SENTENCE_THRESHOLD = 0.6


def main(args):
    options = parse_options(args.image_options)
    clip = load_clip(args.model, args.pretrained, args.device)
    flags = arguments.repeated_flags(args)
    classifier_names = Names(args.classifier_dir or args.input_dir, args.model, args.pretrained)
    classifier, class_names = load_named_classifier(classifier_names, args.dataset, clip, flags)
    class_0 = find_class("--class_0", args.class_0, class_names)
    class_1 = find_class("--class_1", args.class_1, class_names)
    blocked = load_block_list(args.block_list, class_0)
    check_classes(class_0, class_1, blocked)
    run = Run(args.output_dir, class_0, class_1, args.word_source, args.seed, args.overwrite)

    settings, mined = mine(args, run, clip, class_0, class_1, flags)

    threshold = args.cosim_similarity
    if threshold is None:
        threshold = CLIP_THRESHOLD if args.similarity_model == "clip" else SENTENCE_THRESHOLD
    settings |= {"overall_words": args.overall_words, "similarity_model": args.similarity_model}
    settings |= {"cosim_similarity": threshold, "block_list": blocked}

    def filtered():
        require_packages(similarity_model=args.similarity_model, text_model=args.text_model, image_model=args.image_model)
        encode = load_similarity(args.similarity_model, clip, args.batch_size)
        return filter_words(mined["words"], class_0, args.overall_words, encode, threshold, blocked)

    words = [entry["word"] for entry in run.step("words.json", dict(settings), filtered)["words"]]
    print(f"words: {', '.join(words)}")

    settings |= {"text_model": args.text_model, "results_per_generation": args.results_per_generation}

    def written():
        require_packages(text_model=args.text_model, image_model=args.image_model)
        count = args.results_per_generation
        if args.text_model == "template":
            good, bad = usable(template_descriptions(words, class_1, count, args.seed), class_0, class_1, blocked)
            return {"descriptions": good, "dropped": bad}
        ask = LanguageModel(args.text_model, args.device)
        return write_descriptions(run, dict(settings), args.text_model, ask, words, class_0, class_1, count, blocked, args.seed)

    prompts = run.step("prompts.json", dict(settings), written)
    print(f"{len(prompts['descriptions'])} descriptions, {len(prompts['dropped'])} dropped; {prompts['descriptions'][0]!r}, ...")

    settings |= {"image_model": args.image_model, "image_options": options, "images": args.images}
    planned = run.step(
        "images.json", dict(settings), lambda: plan_drawings(run.folder, prompts["descriptions"], args.images, args.seed)
    )["images"]

    def image_model():
        require_packages(image_model=args.image_model)
        return load_image_model(args.image_model, args.device, options, args.offload)

    draw(run.folder, planned, image_model)

    results = run.step(
        "results.json",
        dict(settings),
        lambda: classify(run.folder, planned, clip, classifier, class_names, class_0, class_1, args.batch_size),
        beside=("files.csv",),
    )
    print(
        f"{results['success_rate']:.1f} % of {results['images']} images of {class_1} are taken for {class_0} (among these two "
        f"{results['success_rate_of_two']:.1f} %), {results['class_1_rate']:.1f} % for {class_1}"
    )
    print(f"see {run.folder / 'files.csv'}")


def mine(args, run, clip, class_0, class_1, flags):
    """The first step: what the words are made from, and candidates.json."""
    names = Names(args.input_dir, args.model, args.pretrained)
    train = args.train_dataset or args.dataset
    settings = {**arguments.clip_record(args), "fingerprint": clip.fingerprint, "dataset": args.dataset}
    settings |= {"class_0": class_0, "class_1": class_1, "word_source": args.word_source, "seed": args.seed}
    settings |= {"text_descriptions": args.text_descriptions}
    if args.word_source != "second_order":

        def from_pool():
            pool = PoolWords(names, args.text_descriptions, args.descriptions_dir, clip, flags)
            if args.word_source == "random":
                return pool.random(args.seed)
            return pool.similar(class_difference(clip, class_0, class_1)[1])

        return settings, run.step("candidates.json", dict(settings), from_pool)

    layers = parse_layers(args.mlp_layers, clip.hooked_vit())
    settings |= {"train_dataset": train, "mlp_layers": layers, "neurons_num": args.neurons_num}
    settings |= {"neurons_texts": args.neurons_texts, "components": args.components}
    settings |= {"transform_alpha": args.transform_alpha, "top_k_pca": args.top_k_pca}

    def from_neurons():
        neurons = NeuronWords(
            names,
            clip,
            train,
            layers,
            args.top_k_pca,
            args.text_descriptions,
            args.transform_alpha,
            args.components,
            flags,
        )
        return neurons.mine(class_difference(clip, class_0, class_1)[0], args.neurons_num, args.neurons_texts)

    return settings, run.step("candidates.json", dict(settings), from_neurons)


def parse_options(text):
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise UserError(f"--image_options {text} is no json object such as '{{\"num_inference_steps\": 20}}'")
    return options


if __name__ == "__main__":
    parser = arguments.stage_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_dataset(parser)
    parser.add_argument("--train_dataset", choices=arguments.DATASETS, help="whose neurons' words are taken; default: --dataset")
    parser.add_argument("--class_0", required=True, help="the class to be taken for; never named in a description")
    parser.add_argument("--class_1", required=True, help="the class that is drawn")
    parser.add_argument("--seed", type=int, default=0, help="of words, descriptions and images")

    words = parser.add_argument_group("words")
    words.add_argument(
        "--word_source",
        default="second_order",
        choices=("second_order", "similar", "random"),
        help="words of neurons, words of the text set that are similar to class_0, or any of it",
    )
    words.add_argument("--mlp_layers", nargs="+", default=["8", "9", "10"], help="zero-based MLP layers, or 'all'")
    words.add_argument("--neurons_num", type=arguments.positive_int, default=100, help="neurons, of all layers together")
    words.add_argument("--neurons_texts", type=arguments.positive_int, help="words of a neuron's description; default: all")
    words.add_argument("--overall_words", type=arguments.positive_int, default=25, help="words that descriptions are made of")
    words.add_argument("--text_descriptions", default="30k", help="name of the text set, as in compute_text_set_projection.py")
    words.add_argument("--descriptions_dir", default="text_descriptions", help="where NAME.txt is, if not beside the vectors")
    words.add_argument("--components", type=arguments.positive_int, default=128, help="as in compute_sparse_decomposition.py")
    words.add_argument("--transform_alpha", type=float, default=1, help="as in compute_sparse_decomposition.py")
    words.add_argument("--top_k_pca", type=arguments.positive_int, default=100, help="as in compute_pcas.py")
    words.add_argument(
        "--similarity_model",
        default="sentence-transformers/all-MiniLM-L6-v2",
        help="sentence-transformers id or folder, or 'clip': the model's own text tower",
    )
    words.add_argument(
        "--cosim_similarity",
        type=float,
        help=f"largest cosine of a word with class_0; default: {SENTENCE_THRESHOLD}, with clip {CLIP_THRESHOLD}",
    )
    words.add_argument("--block_list", help="a json file {class: [words that are dropped too]}")

    drawing = parser.add_argument_group("descriptions and images")
    drawing.add_argument(
        "--text_model",
        default="meta-llama/Meta-Llama-3-8B-Instruct",
        help="Hugging Face id, folder or .gguf file of an instruct model, or 'template', which needs no model",
    )
    drawing.add_argument(
        "--results_per_generation", type=arguments.positive_int, default=50, help="descriptions that are written at a time"
    )
    drawing.add_argument(
        "--image_model",
        default="FLUX",
        help="FLUX, DeepFloyd, a diffusers id or folder, or package.module:function, which draws one description",
    )
    drawing.add_argument("--image_options", default="{}", help="json of keyword arguments for the drawing")
    drawing.add_argument("--images", type=arguments.positive_int, default=100, help="images; the descriptions take turns")
    drawing.add_argument("--offload", action="store_true", help="keep on the GPU only the part of the drawing model that works")

    arguments.add_compute(parser, batch_size=64)
    parser.add_argument("--classifier_dir", help="where the classifier is; default: --input_dir")
    arguments.add_directories(parser, streams=True)
    arguments.run(main, parser)
