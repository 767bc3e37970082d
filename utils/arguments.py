"""The flags that the scripts share, and the frame in which every script runs."""

import argparse
import os
import sys
import time

import torch

from utils import distributed
from utils.artifacts import model_name, pretrained_name
from utils.clip import PRECISIONS
from utils.errors import UserError
from utils.prs import COEFFICIENT

DATASETS = ("imagenet", "imagenet_r", "CIFAR10", "CIFAR100", "folder")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the usage of the script's docstring as it is written, and every default."""


def stage_parser(description):
    """The parser of a stage script; description is the script's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=_Formatter)


def add_model(parser):
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="ViT-B-32",
        help="open_clip name, hf-hub:ORG/NAME, local-dir:PATH, or the path of a model-config json",
    )
    group.add_argument(
        "--pretrained",
        default="openai",
        help="open_clip tag, path of a .safetensors or .pt file (the activation is then --model's), or 'random'",
    )


def add_compute(parser, batch_size=16):
    group = parser.add_argument_group("computation")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; default: the GPU if there is one, else the CPU")
    group.add_argument("--batch_size", type=positive_int, default=batch_size, help="images (or texts) in one forward pass")


def add_precision(parser):
    parser.add_argument("--precision", default="float32", choices=PRECISIONS, help="of the image tower's forward pass")


def add_memory(parser):
    parser.add_argument(
        "--memory", type=float, default=4, help="GB for the weights of the layers that are worked on in one pass over the images"
    )


def add_data(parser, split="val", required=True):
    group = parser.add_argument_group("data")
    add_dataset(group)
    group.add_argument("--data_path", required=required, help="the data set's root folder")
    group.add_argument("--split", default=split, help="train, val, or for --dataset folder the name of a folder in the root")
    group.add_argument("--subsample", type=positive_int, help="take every Nth image; default: imagenet train 250, val 10, -R 10")
    group.add_argument("--num_workers", type=count, default=min(4, os.cpu_count() or 1), help="processes that load images")


def add_dataset(parser):
    parser.add_argument("--dataset", default="imagenet", choices=DATASETS, help="which images; also in the names of the files")


def add_directories(parser, reads=True, streams=False):
    group = parser.add_argument_group("files")
    group.add_argument("--output_dir", default="./output_dir", help="where results are written")
    if reads:
        group.add_argument("--input_dir", help="where results of earlier stages are; default: --output_dir")
    if streams:
        group.add_argument("--overwrite", action="store_true", help="drop what a broken run left instead of going on from it")


def add_layers(parser):
    parser.add_argument("--mlp_layer", nargs="+", default=["9"], help="zero-based MLP layer, several of them, or 'all'")


def add_coefficient(parser):
    parser.add_argument("--coefficient", type=float, default=COEFFICIENT, help="norm that a representation is scaled to")


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def count(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def repeated_flags(args):
    """The flags of the model as a user types them, for messages that name the next or the missing command."""
    return f"--model {args.model} --pretrained {args.pretrained} --output_dir {args.output_dir}"


def clip_record(args):
    """What every record says about the model: its name and its weights' name."""
    record = {"model": model_name(args.model), "pretrained": pretrained_name(args.model, args.pretrained)}
    if getattr(args, "precision", "float32") != "float32":
        record["precision"] = args.precision
    return record


def passing(args):
    """How to go through images: keyword arguments of `utils.datasets.batches`."""
    return {"num_workers": args.num_workers, "device": args.device}


def choose_device(name):
    """The device of `--device`, or the best one that is there. Raises UserError for one that is not."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda", distributed.local_rank() % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; use cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA GPUs; use --device cpu or another")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here; use --device cpu") from error
    return device


def run(main, parser, parallel=False):
    """Parse the flags, run a stage, and turn a user's mistake into one line on stderr and exit code 1.

    parallel: whether the processes of torchrun share this stage's work; else the first of them does it, and the others leave.
    """
    args = parser.parse_args()
    if not distributed.first():
        if not parallel:
            return
        sys.stdout = open(os.devnull, "w")
    try:
        if parallel:
            distributed.start()
        if getattr(args, "output_dir", None):
            os.makedirs(args.output_dir, exist_ok=True)
            if not os.access(args.output_dir, os.W_OK):
                raise UserError(f"{args.output_dir} cannot be written to; choose another --output_dir")
        if getattr(args, "input_dir", "") is None:
            args.input_dir = args.output_dir
        if hasattr(args, "device"):
            args.device = choose_device(args.device)
        main(args)
        distributed.stop()
    except UserError as error:
        _leave(f"error: {error}")
    except torch.cuda.OutOfMemoryError:
        _leave("error: the device has not enough memory; use a smaller --batch_size")
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        _leave(f"error: {error.strerror or error}{place}; see --output_dir, --data_path and the disk")
    except KeyboardInterrupt:
        _leave("interrupted; the same command goes on from here where the stage can")


def _leave(message):
    if distributed.size() == 1:
        sys.exit(message)
    if not distributed.first():
        time.sleep(3)  # what all ranks meet is said by the first one, with which torchrun ends the others
    print(message, file=sys.stderr, flush=True)
    os._exit(1)  # gloo would wait for ranks that wait in a barrier
