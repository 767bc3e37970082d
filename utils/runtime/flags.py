"""Define the flags that the scripts share, and the frame in which every script runs."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from functools import partial

import torch

from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.files import ADVICE
from utils.runtime.results import PAIRS, Results

LAYERS = ["9"]  # the paper's
DATASETS = ("imagenet", "imagenet_r", "CIFAR10", "CIFAR100", "folder", "images")
DELETE = 24  # images on which a neuron is taken away
SITES = ("mlp.out", "attn.out", "resid.post")  # what units of a dictionary may write
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """_Formatter shows the usage in the script's docstring as it is written, and every default."""


def stage_parser(description, reads=True):
    """Return the parser of a stage script, with the flags of every stage.

    description: the script's docstring.
    reads: whether the stage reads results of earlier ones.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=_Formatter)
    add = parser.add_argument_group("model").add_argument
    help = "open_clip name, hf-hub:ORG/NAME, local-dir:PATH, or the path of a model-config json"
    add("--model", default="ViT-B-32", help=help)
    help = "open_clip tag, path of a weights file (its activation is --model's; FILE::KEY for one of "
    add("--pretrained", default="openai", help=help + "several), or 'random'")
    add = parser.add_argument_group("files").add_argument
    add("--output_dir", default="./output_dir", help="where results are written")
    if reads:
        add("--input_dir", help="where results of earlier stages are; default: --output_dir")
    help = "start from scratch: replace results, discard earlier progress"
    add("--overwrite", action="store_true", help=help)
    return parser


def add_device(parser):
    """Add --device."""
    help = "cpu, cuda, cuda:1, mps, ...; default: the GPU if there is one, else the CPU"
    parser.add_argument("--device", help=help)


def add_compute(parser, batch_size=16, precision=False, memory=False):
    """Add --device and --batch_size.

    batch_size: the default.
    precision: also --precision, for stages that run the image tower.
    memory: also --memory, for stages that fold layers.
    """
    group = parser.add_argument_group("computation")
    add_device(group)
    add = group.add_argument
    add("--batch_size", type=positive_int, default=batch_size, help="images (or texts) in one forward pass")
    if precision:
        add("--precision", default="float32", choices=PRECISIONS, help="of the image tower's forward pass")
    if memory:
        help = "GB for the folded weights of layers that share one pass over the images"
        add("--memory", type=float, default=4, help=help)


def add_unused(parser, *names):
    """Add published flags that have no meaning here, so that published commands run unchanged."""
    help = "no meaning here; accepted as a flag of the published code"
    for name in names:
        parser.add_argument(name, dest="unused", default=argparse.SUPPRESS, help=help)


def add_data(parser, split="val", required=True):
    """Add the flags of a data set. split: the default. required: whether --data_path is."""
    group = parser.add_argument_group("data")
    add_dataset(group)
    group.add_argument("--data_path", required=required, help="the data set's root folder")
    help = "train, val, or for --dataset folder the name of a folder in the root"
    group.add_argument("--split", default=split, help=help)
    help = "take every Nth image; default: imagenet train 250, val 10, -R 10"
    group.add_argument("--subsample", type=positive_int, help=help)
    help = "share of the pictures that --dataset images holds out as --split val; default: 0.2"
    group.add_argument("--held_out", type=share, help=help)
    add_workers(group)


def add_described(parser, several=False):
    """Add the flags of the stages that look at descriptions: images of both splits, layers, descriptions.

    several: whether the stage takes several text sets.
    """
    add_data(parser)
    add_training(parser)
    add_layers(parser)
    add_top_k(parser)
    add_texts(parser, components=128, several=several)
    add_normalise(parser)


def add_training(parser):
    """Add the flags of the training images, for stages that look at those of another split, too."""
    help = "root folder of the training images; default: --data_path, or the folder they were first read from"
    parser.add_argument("--train_data_path", help=help)
    parser.add_argument("--train_subsample", type=positive_int, help="--subsample of the training images")


def add_workers(parser):
    """Add --num_workers."""
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument("--num_workers", type=count, default=workers, help="processes that load images")


def add_dataset(parser):
    """Add --dataset."""
    help = "which images; also in the names of the files"
    parser.add_argument("--dataset", default="imagenet", choices=DATASETS, help=help)


def add_layers(parser):
    """Add --mlp_layer."""
    help = "zero-based MLP layer, several of them, or 'all'"
    parser.add_argument("--mlp_layer", nargs="+", default=LAYERS, help=help)


def add_units(parser):
    """Add --units and --site."""
    help = "what is looked at in place of neurons: PATH of a dictionary or of directions (docs/units.md), "
    help += "random:PATH for its control, or pairs of neurons and heads"
    parser.add_argument("--units", dest="unit_set", metavar="PATH", help=help)
    help = "what the units write, where their file does not say"
    parser.add_argument("--site", choices=SITES, help=help)


def add_top_k(parser, help="as in compute_pcas.py"):
    """Add --top_k_pca."""
    usual = "the smaller of 100 and a tenth of the training images, 100 on ImageNet"
    parser.add_argument("--top_k_pca", type=positive_int, help=f"{help}; default: {usual}")


def add_coefficient(parser):
    """Add --coefficient."""
    help = "norm that a representation is scaled to"
    parser.add_argument("--coefficient", type=float, default=100.0, help=help)


def add_normalise(parser):
    """Add --normalise."""
    help = "axis: every dimension of the text vectors has norm 100 over the text set, as published; "
    help += "text: every text vector has norm 100"
    parser.add_argument("--normalise", choices=("axis", "text"), default="axis", help=help)


def add_deletion(parser):
    """Add --delete."""
    help = "images on which a neuron is taken away in the running model, those where it acts most; 0: none"
    parser.add_argument("--delete", type=count, default=DELETE, help=help)


def add_texts(parser, components=32, also=(), several=False):
    """Add the flags that name descriptions.

    components: the default.
    also: other names of --components.
    several: whether --text_descriptions takes several text sets.
    """
    add = parser.add_argument
    help = "name of the text set, as in compute_text_set_projection.py"
    if several:
        add("--text_descriptions", nargs="+", default=["30k"], help=f"{help}; several are compared")
    else:
        add("--text_descriptions", default="30k", help=help)
    help = "where NAME.txt is, if not beside the vectors"
    add("--descriptions_dir", default="text_descriptions", help=help)
    add("--components", *also, type=positive_int, default=components, help="texts per neuron")
    add("--transform_alpha", type=float, default=1, help="only part of the file names")


def count(text, least=0):
    """Return an int of `least` or more, as the type of a flag."""
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return int(text)


positive_int = partial(count, least=1)
positive_int.__name__ = "positive int"  # in argparse's messages


def share(text):
    """Return a float between 0 and 1, as the type of a flag."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def choose_device(name):
    """Return the device of `--device`.

    name: None, or a CUDA GPU on a machine without one, stands for the best device there is.

    Raises UserError when it cannot be used.
    """
    if name and name.startswith("cuda") and not torch.cuda.is_available():
        print(f"note: --device {name}: there is no CUDA GPU, so another device is used")
        name = None
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda", distributed.local_rank() % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; use cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        has = f"this machine has {torch.cuda.device_count()} CUDA GPUs"
        raise UserError(f"--device {name}: {has}; use --device cpu or another")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here; use --device cpu") from error
    return device


def names_of_descriptions(args, dataset):
    """Return the fields of the names of descriptions. dataset: of the components."""
    return {
        "dataset": dataset,
        "k": args.top_k_pca,
        "texts": args.text_descriptions,
        "components": args.components,
        "alpha": args.transform_alpha,
        "normalise": args.normalise,
        "order": getattr(args, "order", "second"),
    }


def outputs_of(args, clip=None, **known):
    """Return the `Results` that a stage writes.

    args: the flags. Commands in messages repeat them.
    clip: the loaded `Clip`.
    known: {name: value} in place of some flags.
    """
    known = {**vars(args), **known}
    return Results(args.output_dir, known.pop("model"), known.pop("pretrained"), clip=clip, **known)


def results_of(args, clip=None, **known):
    """Return the `Results` that a stage reads, and those that it writes. Parameters: as in `outputs_of`."""
    flags = {**vars(args), **known, "also": args.output_dir}
    inputs = Results(args.input_dir, flags.pop("model"), flags.pop("pretrained"), clip=clip, **flags)
    return inputs, outputs_of(args, clip, **known)


def run(main, parser, parallel=False, written="output_dir"):
    """Parse the flags, run a stage, and turn a user's mistake into one line on stderr and exit code 1.

    parallel: whether the processes of torchrun share this stage's work. If not, rank 0 does it and the others
        leave.
    written: the flag of the folder that the stage writes into.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names may have letters that a terminal has not
    args = parser.parse_args()
    if not distributed.is_rank_zero():
        if not parallel:
            return
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    logging.getLogger().setLevel(logging.CRITICAL)  # open_clip's notes; what matters is raised
    try:
        if parallel:
            distributed.start()
        _prepare(args, written)
        main(args)
        distributed.stop()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads our lines has seen enough, as head has
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        _leave(f"error: {error}")
    except torch.cuda.OutOfMemoryError:
        _leave("error: the device has not enough memory; use a smaller --batch_size")
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        fix = ADVICE.get(error.errno, "check --output_dir, --data_path and the disk")
        _leave(f"error: {error.strerror or error}{place}; {fix}")
    except KeyboardInterrupt:
        _leave("interrupted; run the same command again to resume")


def _prepare(args, written):
    """Make the folder that is written, and fill in the flags that depend on others or on the machine."""
    if folder := getattr(args, written, None):
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise UserError(f"{folder} cannot be written to; choose another --{written}")
    if getattr(args, "input_dir", "") is None:
        args.input_dir = args.output_dir
    of_file = getattr(args, "unit_set", None) not in (None, PAIRS)
    # the file says which, or the user is asked
    if of_file and (args.mlp_layer is None or args.mlp_layer is LAYERS):
        args.mlp_layer = ["all"]
    if hasattr(args, "device"):
        args.device = choose_device(args.device)


def _leave(message):
    """Print a message on stderr and end the process with exit code 1."""
    if distributed.world_size() == 1:
        sys.exit(message)
    if not distributed.is_rank_zero():
        time.sleep(3)  # give rank 0 time to report an error that all ranks hit; torchrun then ends the others
    print(message, file=sys.stderr, flush=True)
    os._exit(1)  # gloo would wait for ranks that wait in a barrier
