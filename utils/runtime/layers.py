"""Find the MLP layers that a flag names."""

from utils.runtime.errors import UserError


def parse_layers(layers, vit):
    """Return the MLP layers that `--mlp_layer` names, ascending.

    layers: a list of numbers as strings or ints, or ["all"].

    Raises UserError for a layer that does not exist or has no attention after it.
    """
    last = vit.last
    if last < 0:
        why = "this model has one layer, and no attention comes after its MLP"
        raise UserError(f"{why}; there are no second-order effects")
    if [str(l) for l in layers] == ["all"]:
        return list(range(last + 1))
    for l in layers:
        if not str(l).isdecimal() or int(l) > last:
            reason = " has no attention after it, so it" if str(l) == str(last + 1) == str(vit.L - 1) else ""
            there_are = f"this model's layers with effects are 0 to {last} (or 'all')"
            if vit.pooling.one_layer:
                there_are = f"{vit.pooling.one_layer}: --mlp_layer 0"
            raise UserError(f"--mlp_layer {l}:{reason} has no second-order effects; {there_are}")
    return sorted({int(l) for l in layers})


def stored_layers(results, kinds, layers, **names):
    """Return the layers that `--mlp_layer` names where no model is loaded: for 'all', those with files.

    results: `Results` of the folder.
    kinds: of artifacts; a layer counts with any of them.
    layers: a list of numbers as strings, or ["all"].
    names: the other fields of the files' names.

    Raises UserError when a layer is no number, or none is stored.
    """
    if layers != ["all"]:
        wrong = [layer for layer in layers if not layer.isdecimal()]
        if wrong:
            raise UserError(f"--mlp_layer {wrong[0]} is no layer; give numbers, or 'all'")
        return sorted({int(layer) for layer in layers})
    found = set()
    for kind in kinds:
        prefix, suffix = results.path(kind, layer="\0", **names).name.split("\0")  # no name has this letter
        files = [file.name for folder in results.folders if folder.is_dir() for file in folder.iterdir()]
        of_kind = [name for name in files if name.startswith(prefix) and name.endswith(suffix)]
        middles = [name.removeprefix(prefix).removesuffix(suffix) for name in of_kind]
        # others are of weights with a longer name
        found |= {int(middle) for middle in middles if middle.isdecimal()}
    if not found:
        command = results.command(kinds[0], layer="all", **names)
        what = f"{results.directory} has no {' or '.join(kinds)} of {names['dataset']}"
        raise UserError(f"{what}; make them with: {command}")
    return sorted(found)
