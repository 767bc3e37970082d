"""Semantic adversarial images: pictures of class_1, drawn from the words of neurons, that CLIP takes for class_0.

    python generate_adversarial_images.py --model ViT-B-32 --pretrained openai --dataset imagenet --mlp_layers 8 9 10 \\
        --class_0 "vacuum cleaner" --class_1 "Egyptian cat" --text_descriptions 30k --components 128 --image_model FLUX

In the demo's world, without any other model:  --text_model template --similarity_model clip \\
        --image_model demo.world:draw_description --image_options '{"opacity": 0.5}'

Reads the first components, the descriptions, and the classifier. Writes to OUTPUT_DIR/CLASS0_CLASS1_SOURCE_seedSEED/
    candidates.json   the neurons, and their words by score      words.json    the words taken; those dropped, and why
    prompts.json      the descriptions (generations.json: the language model's answers)
    images.json       which file shows which description         images/*.png
    files.csv         every image with its predicted class       results.json  the success rate
A step whose file exists is not repeated. No description names class_0. The language, sentence and drawing models need:
    pip install -r requirements-adversarial.txt
"""

import os
import sys

from huggingface_hub.utils import disable_progress_bars

from utils import adversarial as attack
from utils.clip import load_clip, text_vectors
from utils.generators import LanguageModel, load_image_model, load_similarity, parse_options, require_packages
from utils.runtime import flags
from utils.runtime.layers import parse_layers
from utils.runtime.results import Results

CLIP_THRESHOLD = 0.9  # CLIP's cosines of any two words are large
SENTENCE_THRESHOLD = 0.6


def main(args):
    options = parse_options(args.image_options)
    clip = load_clip(args.model, args.pretrained, args.device)
    folders = (args.input_dir, args.classifier_dir or args.input_dir)
    known = {"descriptions_dir": args.descriptions_dir}
    results, classifiers = (Results(folder, args.model, args.pretrained, **known) for folder in folders)
    classifier, class_names = attack.load_named_classifier(classifiers, args.dataset, clip)
    class_0 = attack.find_class("--class_0", args.class_0, class_names)
    class_1 = attack.find_class("--class_1", args.class_1, class_names)
    blocked = attack.load_block_list(args.block_list, class_0)
    attack.check_classes(class_0, class_1, blocked)
    run = attack.Run(args.output_dir, (class_0, class_1, args.word_source), args.seed, args.overwrite)
    mining = mining_settings(args, clip, {"class_0": class_0, "class_1": class_1, "seed": args.seed})
    mined = run.step("candidates.json", mining, lambda: mine(args, clip, results, mining))

    threshold = CLIP_THRESHOLD if args.similarity_model == "clip" else SENTENCE_THRESHOLD
    threshold = threshold if args.cosim_similarity is None else args.cosim_similarity
    filtering = {**mining, "overall_words": args.overall_words, "similarity_model": args.similarity_model}
    filtering |= {"cosim_similarity": threshold, "block_list": blocked}

    def filtered():
        require_packages(args.similarity_model, args.text_model, args.image_model)
        encode = load_similarity(args.similarity_model, clip, args.batch_size)
        return attack.filter_words(mined["words"], class_0, args.overall_words, encode, threshold=threshold, blocked=blocked)

    words = [entry["word"] for entry in run.step("words.json", filtering, filtered)["words"]]
    print(f"words: {', '.join(words)}")
    writing = {**filtering, "text_model": args.text_model, "results_per_generation": args.results_per_generation}
    prompts = run.step("prompts.json", writing, lambda: write(args, run, writing, words))
    texts = prompts["descriptions"]
    print(f"{len(texts)} descriptions, {len(prompts['dropped'])} dropped; {texts[0]!r}, ...")

    drawing = {**writing, "image_model": args.image_model, "image_options": options, "images": args.images}
    planned = run.step("images.json", drawing, lambda: attack.plan_drawings(run.folder, texts, args.images, args.seed))["images"]
    attack.draw(run.folder, planned, lambda: load_image_model(args.image_model, args.device, options, args.offload))

    def classified():
        names = {"classes": class_names, "class_0": class_0, "class_1": class_1}
        return attack.classify(run.folder, planned, clip, classifier, names=names, batch_size=args.batch_size)

    rates = run.step("results.json", drawing, classified, beside=("files.csv",))
    print(
        f"{rates['success_rate']:.1f} % of {rates['images']} images of {class_1} are taken for {class_0} (among these two "
        f"{rates['success_rate_of_two']:.1f} %), {rates['class_1_rate']:.1f} % for {class_1}; see {run.folder / 'files.csv'}"
    )


def mining_settings(args, clip, chosen):
    """What the words are made from. Each later step adds its own settings to those of the step before."""
    settings = {**clip.record, "dataset": args.dataset, **chosen}
    settings |= {"word_source": args.word_source, "text_descriptions": args.text_descriptions}
    if args.word_source == "second_order":
        settings |= {"train_dataset": args.train_dataset or args.dataset, "mlp_layers": parse_layers(args.mlp_layers, clip.vit)}
        own = ("neurons_num", "neurons_texts", "components", "transform_alpha", "top_k_pca")
        settings |= {name: getattr(args, name) for name in own}
    return settings


def mine(args, clip, results, settings):
    """Words by score and, for `second_order`, the neurons that they come from."""
    text_0, text_1 = text_vectors(clip, [settings["class_0"], settings["class_1"]], 2)
    if args.word_source != "second_order":
        pool = attack.PoolWords(results, args.text_descriptions, args.descriptions_dir, clip)
        return pool.random(args.seed) if args.word_source == "random" else pool.similar(text_0)
    names = {"dataset": settings["train_dataset"], "texts": args.text_descriptions, "k": args.top_k_pca}
    names |= {"components": args.components, "alpha": args.transform_alpha}
    neurons = attack.NeuronWords(results, clip, settings["mlp_layers"], **names)
    return neurons.mine(text_0 - text_1, args.neurons_num, args.neurons_texts)


def write(args, run, settings, words):
    """Descriptions from the template or a language model."""
    require_packages(text_model=args.text_model, image_model=args.image_model)
    if args.text_model != "template":
        return attack.write_descriptions(run, settings, LanguageModel(args.text_model, args.device), words)
    class_0, class_1 = settings["class_0"], settings["class_1"]
    descriptions = attack.template_descriptions(words, class_1, args.results_per_generation, args.seed)
    good, bad = attack.usable(descriptions, class_0, class_1, settings["block_list"])
    return {"descriptions": good, "dropped": bad}


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where --image_model MODULE:FUNCTION may be
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    disable_progress_bars()
    parser = flags.stage_parser(__doc__)
    flags.add_dataset(parser)
    parser.add_argument("--train_dataset", choices=flags.DATASETS, help="whose neurons' words are taken; default: --dataset")
    parser.add_argument("--class_0", required=True, help="the class that CLIP should see; no description names it")
    parser.add_argument("--class_1", required=True, help="the class that is drawn")
    parser.add_argument("--seed", type=int, default=0, help="of words, descriptions and images")
    words = parser.add_argument_group("words")
    help = "words of neurons, words of the text set that are similar to class_0, or random ones"
    words.add_argument("--word_source", default="second_order", choices=("second_order", "similar", "random"), help=help)
    words.add_argument("--mlp_layers", nargs="+", default=["8", "9", "10"], help="zero-based MLP layers, or 'all'")
    words.add_argument("--neurons_num", type=flags.positive_int, default=100, help="neurons, of all layers together")
    words.add_argument("--neurons_texts", type=flags.positive_int, help="words of a neuron's description; default: all")
    words.add_argument("--overall_words", type=flags.positive_int, default=25, help="words to make descriptions of")
    flags.add_texts(words)
    flags.add_top_k(words)
    help = "sentence-transformers id or folder, or 'clip': the model's own text tower"
    words.add_argument("--similarity_model", default="sentence-transformers/all-MiniLM-L6-v2", help=help)
    help = f"largest cosine of a word with class_0; default: {SENTENCE_THRESHOLD}, with clip {CLIP_THRESHOLD}"
    words.add_argument("--cosim_similarity", type=float, help=help)
    words.add_argument("--block_list", help="a json {class: [more words to drop]}")
    group = parser.add_argument_group("descriptions and images")
    help = "Hugging Face id, folder or .gguf file of an instruct model, or 'template', which needs no model"
    group.add_argument("--text_model", default="meta-llama/Meta-Llama-3-8B-Instruct", help=help)
    group.add_argument("--results_per_generation", type=flags.positive_int, default=50, help="descriptions in one answer")
    help = "FLUX, DeepFloyd, a diffusers id or folder, or package.module:function, which draws a description"
    group.add_argument("--image_model", default="FLUX", help=help)
    group.add_argument("--image_options", default="{}", help="a json of keyword arguments for the drawing")
    group.add_argument("--images", type=flags.positive_int, default=100, help="images; the descriptions take turns")
    group.add_argument("--offload", action="store_true", help="keep only the active part of the drawing model on the GPU")
    flags.add_compute(parser, batch_size=64)
    parser.add_argument("--classifier_dir", help="where the classifier is; default: --input_dir")
    flags.run(main, parser)
