"""Which MLP layers a flag names, and which of them share one pass over the images."""

from utils.runtime.errors import UserError


def parse_layers(layers, vit):
    """The MLP layers that `--mlp_layer` names, ascending.

    layers: a list of numbers as strings or ints, or ["all"].

    Raises UserError for a layer that does not exist or has no attention after it.
    """
    last = vit.last
    if last < 0:
        raise UserError(
            "this model has one layer, and no attention comes after its MLP; there are no second-order effects"
        )
    if [str(l) for l in layers] == ["all"]:
        return list(range(last + 1))
    for l in layers:
        if not str(l).isdecimal() or int(l) > last:
            reason = " has no attention after it, so it" if str(l) == str(last + 1) == str(vit.L - 1) else ""
            raise UserError(
                f"--mlp_layer {l}:{reason} has no second-order effects; this model's layers with effects are 0 to {last} "
                "(or 'all')"
            )
    return sorted({int(l) for l in layers})


def stored_layers(results, kinds, layers, **names):
    """The layers that `--mlp_layer` names where no model is loaded: numbers as they are, 'all' by the files
    in the folder.

    results: `Results` of the folder.
    kinds: of artifacts; a layer counts with any of them. names: the other fields of their names.

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
        files = (file.name for folder in results.folders if folder.is_dir() for file in folder.iterdir())
        names_of_kind = (name for name in files if name.startswith(prefix) and name.endswith(suffix))
        middles = (name.removeprefix(prefix).removesuffix(suffix) for name in names_of_kind)
        found |= {
            int(middle) for middle in middles if middle.isdecimal()
        }  # others are of weights with a longer name
    if not found:
        command = results.command(kinds[0], layer="all", **names)
        raise UserError(
            f"{results.directory} has no {' or '.join(kinds)} of {names['dataset']}; make them with: {command}"
        )
    return sorted(found)


def groups_of_layers(vit, layers, memory):
    """Divide layers into lists that share one pass over the images.

    memory: bytes that the folded weights [K, N, e] and the Gram matrices (half of [N, K, K]) of a list may
        take. A list has at least one layer.
    """
    groups, used = [], memory
    for layer in layers:
        K = vit.K(layer)
        needed = 4 * vit.N * K * (vit.sizes["e"] + (K + 16) // 2)  # half a Gram matrix, in strips of 16
        if used + needed > memory:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += needed
    return groups
