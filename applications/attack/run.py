"""A `Run` keeps the results of an attack's steps in one folder, so that a later run goes on from there."""

import re
from pathlib import Path

from utils.runtime.errors import UserError
from utils.runtime.files import read_json, save_json
from utils.runtime.locks import Lock
from utils.runtime.records import agrees, like_json

FILES = (
    "candidates.json",
    "words.json",
    "generations.json",
    "prompts.json",
    "images.json",
    "files.csv",
    "results.json",
)
SCRATCH = "add --overwrite to start from scratch"


class Run:
    """A Run is the folder of one attack. Each step saves its result and settings there; a later run keeps it.

    place: where the folder is made.
    parts: class_0, class_1 and the word source, after which the folder is named.
    seed: of words, descriptions and images.
    """

    def __init__(self, place, parts, seed):
        self.class_0, self.class_1, _ = parts
        self.settings = {}  # of all steps so far
        name = "_".join(re.sub(r"[^\w-]+", "-", part) for part in parts)
        self.folder = Path(place) / f"{name}_seed{seed}"

    def lock(self):
        """Keep other runs from the folder, inside a `with`."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return Lock(self.folder)

    def prepare(self, overwrite=False):
        """Make the folder. overwrite: delete all earlier results."""
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        if overwrite:
            for path in self.folder.glob("images/*.png"):
                path.unlink()
            for file in FILES:
                (self.folder / file).unlink(missing_ok=True)

    def step(self, file, settings, make):
        """Return the content of a result file. Make and save it, unless an earlier run did.

        file: its name, one of `FILES`.
        settings: {name: value} that this step adds to the settings of the steps before it.
        make: () -> the content, a dict.

        Raises UserError for a file that is damaged or was made with other settings.
        """
        self.settings = self.settings | settings
        path = self.folder / file
        if path.is_file():
            content = self._read(path)
            print(f"kept {path}")
        else:
            content = {"settings": self.settings, **make()}
            save_json(path, content)
            print(f"wrote {path}")
        return content

    def _read(self, path):
        """Read a result of an earlier run. Raise UserError unless it was made with the current settings."""
        content = read_json(path, "", f"remove it, or {SCRATCH}")
        if not isinstance(content, dict) or "settings" not in content:
            raise UserError(f"{path} is damaged (it has no settings); remove it, or {SCRATCH}")
        earlier = content["settings"]
        settings = like_json(self.settings)
        differing = [key for key in settings | earlier if not agrees(earlier.get(key), settings.get(key))]
        if differing:
            how = f"with other {', '.join(differing)}"
            raise UserError(f"{path} was made {how}; {SCRATCH}, or choose another --dataset_path")
        return content
