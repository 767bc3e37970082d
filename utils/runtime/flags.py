"""The flags that the scripts share, and the frame in which every script runs."""

import argparse
import contextlib
import logging
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from utils.runtime import distributed, memory
from utils.runtime.errors import UserError
from utils.runtime.files import ADVICE
from utils.runtime.results import Results

DATASETS = ("imagenet", "imagenet_r", "CIFAR10", "CIFAR100", "folder")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the usage in the script's docstring as it is written, and every default."""


def stage_parser(description, reads=True):
    """The parser of a stage script, with the flags of every stage; `reads`: whether it reads results of
    earlier ones.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=_Formatter)
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        default="ViT-B-32",
        help="open_clip name, hf-hub:ORG/NAME, local-dir:PATH, or the path of a model-config json",
    )
    help = "open_clip tag, path of a weights file (its activation is --model's; FILE::KEY for one of several), or 'random'"
    add("--pretrained", default="openai", help=help)
    add = parser.add_argument_group("files").add_argument
    add("--output_dir", default="./output_dir", help="where results are written")
    if reads:
        add("--input_dir", help="where results of earlier stages are; default: --output_dir")
    add(
        "--overwrite",
        action="store_true",
        help="start from scratch: replace results, discard earlier progress",
    )
    return parser


def add_device(parser):
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, mps, ...; default: the GPU if there is one, else the CPU"
    )


def add_compute(parser, batch_size=16, precision=False, memory=False):
    """--device and --batch_size; for stages that run the image tower --precision, for those that fold layers
    --memory.
    """
    group = parser.add_argument_group("computation")
    add_device(group)
    add = group.add_argument
    add("--batch_size", type=positive_int, default=batch_size, help="images (or texts) in one forward pass")
    if precision:
        add("--precision", default="float32", choices=PRECISIONS, help="of the image tower's forward pass")
    if memory:
        add(
            "--memory",
            type=float,
            default=4,
            help="GB for the folded weights of layers that share one pass over the images",
        )


def add_unused(parser, *names):
    """Published flags that have no meaning here, and are accepted so that published commands run
    unchanged.
    """
    help = "no meaning here; accepted as a flag of the published code"
    for name in names:
        parser.add_argument(name, dest="unused", default=argparse.SUPPRESS, help=help)


def add_data(parser, split="val", required=True):
    """The flags of a data set."""
    group = parser.add_argument_group("data")
    add_dataset(group)
    group.add_argument("--data_path", required=required, help="the data set's root folder")
    group.add_argument(
        "--split", default=split, help="train, val, or for --dataset folder the name of a folder in the root"
    )
    group.add_argument(
        "--subsample",
        type=positive_int,
        help="take every Nth image; default: imagenet train 250, val 10, -R 10",
    )
    add_workers(group)


def add_training_images(parser):
    """The flags of the images that texts are fitted to."""
    parser.add_argument(
        "--train_data_path",
        help="root folder of the training images; default: --data_path, or where they lay",
    )
    parser.add_argument("--train_subsample", type=positive_int, help="--subsample of the training images")


def add_described(parser):
    """The flags of the stages that look at descriptions: images of both splits, layers, and which
    descriptions.
    """
    add_data(parser)
    add_training_images(parser)
    add_layers(parser)
    add_top_k(parser)
    add_texts(parser, components=128)
    parser.add_argument("--normalise", choices=("axis", "text"), default="axis", help="of the decomposition")


def add_workers(parser):
    parser.add_argument(
        "--num_workers", type=count, default=min(4, os.cpu_count() or 1), help="processes that load images"
    )


def add_dataset(parser):
    parser.add_argument(
        "--dataset", default="imagenet", choices=DATASETS, help="which images; also in the names of the files"
    )


def add_layers(parser):
    parser.add_argument(
        "--mlp_layer", nargs="+", default=["9"], help="zero-based MLP layer, several of them, or 'all'"
    )


def add_top_k(parser, help="as in compute_pcas.py"):
    parser.add_argument("--top_k_pca", type=positive_int, default=100, help=help)


def add_coefficient(parser):
    parser.add_argument(
        "--coefficient", type=float, default=100.0, help="norm that a representation is scaled to"
    )


def add_texts(parser, components=32, also=()):
    """The flags that name descriptions. also: other names of --components."""
    parser.add_argument(
        "--text_descriptions",
        default="30k",
        help="name of the text set, as in compute_text_set_projection.py",
    )
    parser.add_argument(
        "--descriptions_dir", default="text_descriptions", help="where NAME.txt is, if not beside the vectors"
    )
    parser.add_argument("--components", *also, type=positive_int, default=components, help="texts per neuron")
    parser.add_argument("--transform_alpha", type=float, default=1, help="only part of the file names")


def count(text, least=0):
    """An int of `least` or more, as the type of a flag."""
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return int(text)


positive_int = partial(count, least=1)
positive_int.__name__ = "positive int"  # in argparse's messages


def choose_device(name):
    """The device of `--device`; for None, and for a CUDA GPU on a machine without one, the best there is.

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
        raise UserError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA GPUs; use --device cpu or another"
        )
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here; use --device cpu") from error
    return device


def results_of(args, **known):
    """Two `Results` of a stage: what it reads (from --input_dir, else from --output_dir), and what it
    writes.
    """
    of_model = partial(Results, model=args.model, pretrained=args.pretrained, **known)
    return of_model(args.input_dir, also=args.output_dir), of_model(args.output_dir)


def same_command(**changes):
    """The running command with some flags changed, as one types it in a shell."""
    words = sys.argv[1:]
    for flag, value in changes.items():
        if f"--{flag}" in words:
            at = words.index(f"--{flag}")
            del words[at : at + 2]
        words += [f"--{flag}", str(value)]
    return shlex.join(["python", Path(sys.argv[0]).name, *words])


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
    memory.manage()
    try:
        if parallel:
            distributed.start()
        if folder := getattr(args, written, None):
            os.makedirs(folder, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise UserError(f"{folder} cannot be written to; choose another --{written}")
        if getattr(args, "input_dir", "") is None:
            args.input_dir = args.output_dir
        if hasattr(args, "device"):
            args.device = choose_device(args.device)
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


def _leave(message):
    if distributed.world_size() == 1:
        sys.exit(message)
    if not distributed.is_rank_zero():
        time.sleep(3)  # give rank 0 time to report an error that all ranks hit; torchrun then ends the others
    print(message, file=sys.stderr, flush=True)
    os._exit(1)  # gloo would wait for ranks that wait in a barrier
