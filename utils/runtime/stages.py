"""Run the project's stages in this process, one after the other, for scripts that need what they leave."""

import os
import runpy
import shlex
import sys

from utils.runtime.errors import UserError
from utils.runtime.files import ROOT


class Stages:
    """Stages run scripts of the project: what is loaded already is not loaded again.

    Parameters
    args: the flags model, pretrained, output_dir, device, overwrite; dataset, data_path, held_out, split,
        subsample, train_data_path, train_subsample, class_names; batch_size, num_workers, precision, memory;
        descriptions_dir, components; perhaps unit_set, site.
    train_set: the data set of the training images.
    k: how many of a neuron's effects its component is of.
    input_dir: a folder that is read besides --output_dir.

    Attribute: commands, those that were run, as one types them.
    """

    def __init__(self, args, train_set, k, input_dir=None):
        self.args = args
        self.train_set = train_set
        self.k = ["--top_k_pca", k]
        self.reading = given("--input_dir", input_dir)
        self.units = given("--units", getattr(args, "unit_set", None))
        self.units += given("--site", getattr(args, "site", None))
        self.commands = []
        self._ran = set()

    def run(self, script, *words):
        """Run a stage with some flags and those of all stages, unless it was run before.

        Raises UserError when it fails, and KeyboardInterrupt when it is interrupted.
        """
        args = self.args
        command = [script, *words, "--model", args.model, "--pretrained", args.pretrained]
        command += ["--output_dir", args.output_dir, "--device", args.device]
        command = list(map(str, command))
        readable = as_typed(command)
        if readable not in self.commands:
            self.commands.append(readable)
        if readable in self._ran:
            return
        print(f"\n$ {readable}", flush=True)
        run_script([*command, *["--overwrite"] * args.overwrite])
        self._ran.add(readable)

    def images(self, split, dataset=None, data_path=None):
        """Return the flags of a data set, as the stages take them. dataset, data_path: in place of ours."""
        args = self.args
        training = split == "train"
        where = args.train_data_path if training and args.train_data_path else args.data_path
        words = ["--dataset", dataset or args.dataset, "--data_path", data_path or where]
        words += ["--batch_size", args.batch_size, "--num_workers", args.num_workers]
        words += ["--precision", args.precision, *given("--held_out", args.held_out)]
        words += given("--subsample", args.train_subsample if training else args.subsample)
        return [*words, "--split", split]

    def classifier(self):
        """Make the zero-shot classifier."""
        words = ["--dataset", self.args.dataset, *given("--class_names", self.args.class_names)]
        if self.args.dataset not in ("imagenet", "imagenet_r"):
            words += ["--data_path", self.args.data_path]
        self.run("compute_classifier_projection.py", *words)

    def effects(self, layers, keep=None):
        """Make the effects of some layers on the training images. keep: 'full' or 'top'."""
        words = [*self.images("train"), *self._of(layers), "--memory", self.args.memory]
        words += given("--keep", keep)
        self.run("compute_second_order_neuron_prs.py", *words, "--representations", *self.k)

    def components(self, layers):
        """Make the components and the other statistics of some layers' effects."""
        words = ["--dataset", self.train_set, *self._of(layers), *self.k]
        self.run("compute_pcas.py", *words, *self.reading)

    def texts(self, texts):
        """Make the vectors of a text set. texts: its name or path."""
        self.run("compute_text_set_projection.py", *self._texts(texts))

    def descriptions(self, texts, layers, components=None):
        """Make the descriptions of some layers by a text set. components: in place of --components."""
        words = ["--dataset", self.args.dataset, *self._of(layers), *self._texts(texts)]
        words += ["--components", components or self.args.components, *self.k]
        self.run("compute_sparse_decomposition.py", *words, *self.reading)

    def total_order(self, texts, layers, components=None):
        """Make the descriptions of deletions on the training images. Parameters: as in `descriptions`."""
        args = self.args
        words = [*self.images(args.split), "--order", "total", *self._of(layers), *self._texts(texts)]
        words += given("--train_data_path", args.train_data_path)
        words += given("--train_subsample", args.train_subsample)
        words += ["--components", components or args.components, *self.k]
        self.run("compute_sparse_decomposition.py", *words, *self.reading)

    def grades(self, texts, layers, components=None):
        """Make the texts that neurons fire on, and the grades. Parameters: as in `descriptions`."""
        args = self.args
        words = [*self.images(args.split), *self._of(layers), "--memory", args.memory]
        words += given("--train_data_path", args.train_data_path)
        words += given("--train_subsample", args.train_subsample)
        words += [*self._texts(texts), "--components", components or args.components, *self.k]
        self.run("evaluate_descriptions.py", *words, *self.reading)

    def _of(self, layers):
        return ["--mlp_layer", *layers, *self.units]

    def _texts(self, texts):
        return ["--text_descriptions", texts, "--descriptions_dir", self.args.descriptions_dir]


def given(flag, value):
    """Return the words of a flag; none where it has no value."""
    return [] if value is None else [flag, value]


def as_typed(command):
    """Return a command as one types it in the working directory. command: the script and its flags."""
    return shlex.join(["python", *map(here, command)])


def here(path):
    """Return a path as one types it in the working directory."""
    return str(path).removeprefix(f"{os.getcwd()}{os.sep}")


def run_script(command):
    """Run a script of the project in this process: modules that are loaded are not loaded again.

    command: the script and its flags.

    Raises UserError, with the script's own line, when it fails, and KeyboardInterrupt when it is interrupted.
    """
    before = sys.argv
    sys.argv = command
    try:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as leaving:
        said = str(leaving.code)
        if said.startswith("interrupted"):
            raise KeyboardInterrupt from leaving
        if leaving.code:
            raise UserError(f"{command[0]}: {said.removeprefix('error: ')}") from leaving
    finally:
        sys.argv = before
