"""The rules of the house: which module may import which, and how long, wide and dense code may get.

All of it is read from the files.
"""

import ast
import io
import re
import tokenize

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
UTILS = sorted(ROOT.glob("utils/**/*.py"))
APPLICATIONS = sorted(ROOT.glob("applications/**/*.py"))
BESIDE = [path for folder in ("benchmarks", "demo", "docs") for path in sorted(ROOT.glob(f"{folder}/*.py"))]
TREES = {path: ast.parse(path.read_text(), str(path)) for path in (*SCRIPTS, *UTILS, *APPLICATIONS, *BESIDE)}
OWN_APPLICATION = {
    "explain_image": "applications.explain",
    "generate_adversarial_images": "applications.attack",
    "make_gallery": "applications.gallery",
    "reproduce_paper": "applications.paper",
}
NOT_TOKENS = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# Imports


def name_of(path):
    """Return the dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): tree for path, tree in TREES.items()}


def imports_of(tree, modules):
    """Return the dotted names that a module imports, at its top or inside a function.

    `from package import name` is package.name where that is one of `modules`, else package.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules else node.module)
    return found


def circles(arrows):
    """Return the modules that can be reached from themselves. arrows: {module: modules that it imports}."""
    found = []
    for start in arrows:
        reached, left = set(), list(arrows[start])
        while left:
            module = left.pop()
            if module not in reached:
                reached.add(module)
                left += arrows.get(module, ())
        if start in reached:
            found.append(start)
    return found


ARROWS = {name: imports_of(tree, MODULES) for name, tree in MODULES.items()}
OURS = {"applications", "benchmarks", "demo", "docs", "tests", "utils", *(path.stem for path in SCRIPTS)}


def within(name, *packages):
    """Return whether a module is one of the packages or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def arrows_that_leave(package, *allowed):
    """Return the imports by which a package uses modules of the project outside of the allowed packages."""
    modules = [name for name in ARROWS if within(name, package)]
    assert len(modules) > 1, f"{package} is empty"
    targets = [(name, target) for name in modules for target in sorted(ARROWS[name])]
    ours = [(name, target) for name, target in targets if target.split(".")[0] in OURS]
    return [f"{name} imports {target}" for name, target in ours if not within(target, *allowed)]


def test_imports_inside_of_functions_and_of_submodules_are_seen():
    source = "import os\nfrom a import b, c\ndef f():\n    from a.d import e\n    import g.h\n"
    assert imports_of(ast.parse(source), {"a.b", "a.d"}) == {"os", "a.b", "a", "a.d", "g.h"}


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circles({"a": {"a"}}) == ["a"]


def test_utils_imports_nothing_but_itself():
    assert arrows_that_leave("utils", "utils") == []


def test_the_runtime_imports_no_other_part_of_utils():
    assert arrows_that_leave("utils.runtime", "utils.runtime") == []


def test_the_model_imports_nothing_of_utils_but_the_runtime():
    assert arrows_that_leave("utils.model", "utils.model", "utils.runtime") == []


def test_the_data_imports_nothing_of_utils_but_the_model_and_the_runtime():
    assert arrows_that_leave("utils.data", "utils.data", "utils.model", "utils.runtime") == []


@pytest.mark.parametrize("application", sorted(OWN_APPLICATION.values()))
def test_an_application_imports_utils_and_only_the_paper_imports_another_one(application):
    others = ["applications"] if application == "applications.paper" else [application]
    assert arrows_that_leave(application, "utils", *others) == []


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS])
def test_a_script_imports_utils_and_at_most_its_own_application(script):
    allowed = ["utils"]
    if script in OWN_APPLICATION:
        allowed.append(OWN_APPLICATION[script])
        assert any(within(target, OWN_APPLICATION[script]) for target in ARROWS[script])
    ours = [target for target in ARROWS[script] if target.split(".")[0] in OURS]
    assert ours and [target for target in ours if not within(target, *allowed)] == []


def test_nobody_imports_a_script():
    scripts = {path.stem for path in SCRIPTS}
    assert [(name, target) for name, arrows in ARROWS.items() for target in arrows & scripts] == []


def test_there_is_no_circle_of_imports():
    assert circles(ARROWS) == []


def test_the_second_order_effects_need_torch_alone():
    roots = {target.split(".")[0] for target in ARROWS["utils.prs"]}
    assert "torch" in roots and roots <= {"torch", "typing"}


# Budgets


def place(path, node):
    """Return FILE:LINE of a node."""
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def nodes(paths, *types):
    """Yield (file, node) for the nodes of some types in some files."""
    for path in paths:
        for node in ast.walk(TREES[path]):
            if isinstance(node, types):
                yield path, node


def binds_unrelated_things(node):
    """Return whether an assignment is `a, b = f(x), g(y)`: two values or more are no names or constants."""
    if not isinstance(node.value, ast.Tuple) or not any(isinstance(to, ast.Tuple) for to in node.targets):
        return False
    return sum(not isinstance(value, ast.Name | ast.Constant) for value in node.value.elts) >= 2


def parameters(node):
    """Count the parameters of a function, without self and cls."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def is_about_pooling(node):
    """Return whether a comparison asks which kind of pooling a tower has, by the name of the kind."""
    sides = [node.left, *node.comparators]
    return any(getattr(side, "attr", getattr(side, "id", None)) == "pooling" for side in sides)


def public_definitions(tree, prefix=""):
    """Yield (name, node) for the public functions and classes of a module, and of the public methods."""
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node, f"{node.name}.")


def density(source):
    """Count the tokens of a source, without comments, and its lines that are not blank."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = [line for line in source.splitlines() if line.strip()]
    return sum(token.type not in NOT_TOKENS for token in tokens), len(lines)


def test_the_measures_measure():
    unrelated = "a, b = f(x), g(y)"
    for source in (unrelated, "a, b = b, a", "a, b = f(x)", "a, b = 0, f(x)", "a = f(x), g(y)"):
        assert binds_unrelated_things(ast.parse(source).body[0]) == (source == unrelated), source
    method = ast.parse("def f(self, a, /, b, *c, d, **e): pass").body[0]
    assert parameters(method) == 3
    for source in ("vit.pooling == 'x'", "'x' != pooling", "pooling in ('x', 'y')", "pool == 'x'"):
        assert is_about_pooling(ast.parse(source).body[0].value) == (source != "pool == 'x'"), source
    assert density("x = 1  # one\n\n\nif x:\n    y = f(x)\n") == (12, 3)
    names = [name for name, _ in public_definitions(ast.parse("class A:\n def f(x): 0\n def _g(x): 0"))]
    assert names == ["A", "A.f"]


def test_the_method_is_at_most_22_modules():
    flat = [path.stem for path in (ROOT / "utils").glob("*.py") if path.stem != "__init__"]
    assert 10 < len(flat) <= 22, sorted(flat)


def test_no_function_is_over_40_lines():
    found = []
    for path, node in nodes((*SCRIPTS, *UTILS, *APPLICATIONS), *FUNCTIONS):
        lines = node.end_lineno - node.lineno + 1
        if lines > 40:
            found.append(f"{place(path, node)} {node.name}: {lines} lines")
    assert found == [], "\n".join(found)


def test_no_function_has_over_7_parameters():
    found = []
    for path, node in nodes((*SCRIPTS, *UTILS, *APPLICATIONS), *FUNCTIONS):
        if parameters(node) > 7:
            found.append(f"{place(path, node)} {node.name}: {parameters(node)} parameters")
    assert found == [], "\n".join(found)


def test_at_most_30_assignments_bind_unrelated_things():
    assignments = nodes((*SCRIPTS, *UTILS), ast.Assign)
    found = [place(path, node) for path, node in assignments if binds_unrelated_things(node)]
    assert len(found) <= 30, "\n".join([f"{len(found)} of them", *found])


@pytest.mark.parametrize("name, paths", [("utils", UTILS), ("applications", APPLICATIONS), ("root", SCRIPTS)])
def test_a_line_has_at_most_9_tokens_on_average(name, paths):
    counts = [density(path.read_text()) for path in paths]
    tokens = sum(count for count, _ in counts)
    lines = sum(count for _, count in counts)
    assert tokens / lines <= 9.0, f"{name}: {tokens} tokens in {lines} lines"


def test_only_the_model_asks_for_the_kind_of_pooling():
    outside = [path for path in TREES if not path.is_relative_to(ROOT / "utils" / "model")]
    comparisons = nodes(outside, ast.Compare)
    assert [place(path, node) for path, node in comparisons if is_about_pooling(node)] == []


# Docstrings


def first_sentence(docstring):
    """Return a docstring up to its first full stop, colon or blank line, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.:;])\s", paragraph)[0]


def is_property(node):
    """Return whether a function is read as an attribute."""
    decorators = [ast.unparse(decorator).split(".")[-1] for decorator in getattr(node, "decorator_list", ())]
    return bool({"property", "cached_property"} & set(decorators))


CLASSES = {node.name: node for _, node in nodes(TREES, ast.ClassDef)}


def has_docstring(name, node):
    """Return whether a definition is explained: by itself, by a base class, or by its decorator's title.

    A script's `main` is explained by the script, and a module's `forward` by torch.
    """
    if ast.get_docstring(node) or name == "main" or name.endswith(".forward"):
        return True
    if any(isinstance(decorator, ast.Call) for decorator in node.decorator_list):
        return True
    owner, _, method = name.rpartition(".")
    bases = CLASSES[owner].bases if owner in CLASSES else ()
    names = [base.id for base in bases if isinstance(base, ast.Name) and base.id in CLASSES]
    above = [(base, item) for base in names for item in CLASSES[base].body]
    return any(has_docstring(f"{base}.{method}", item) for base, item in above if is_named(item, method))


def is_named(node, name):
    """Return whether a statement is the definition of a name."""
    return isinstance(node, FUNCTIONS) and node.name == name


def test_every_public_function_and_class_has_a_docstring():
    found = []
    for path in (*SCRIPTS, *UTILS, *APPLICATIONS):
        if path.read_text().strip() and not ast.get_docstring(TREES[path]):
            found.append(f"{path.relative_to(ROOT)} itself")
        for name, node in public_definitions(TREES[path]):
            if not has_docstring(name, node):
                found.append(f"{place(path, node)} {name}")
    assert found == [], "\n".join(found)


def opens_badly(node, docstring):
    """Return whether the first sentence needs another one, or is a relative clause or a noun alone."""
    sentence = first_sentence(docstring)
    if re.match(r"(The same|As|What|Which|Whether|How|Where)\b", sentence):
        return True
    noun = re.match(r"(The|A|An|All|Both|Every|Each|Its|Two|Several|Some)\b", sentence)
    verb = re.search(r"\b(is|are|was|were|has|have|can|may|must|\w+s)\b", sentence.partition(" ")[2])
    return bool(noun) and isinstance(node, FUNCTIONS) and not is_property(node) and not verb


def test_openings_are_told_apart():
    function = ast.parse("def f(): pass").body[0]
    bad = (
        "The same for texts.",
        "What it gives.",
        "A batch on one device.",
        "As `f`.",
        "Whether it is there.",
    )
    good = (
        "Return the labels.",
        "A `Row` is a line.",
        "Ascending layers.",
        "The device is where weights go.",
    )
    assert [text for text in bad if not opens_badly(function, text)] == []
    assert [text for text in good if opens_badly(function, text)] == []


def test_the_first_sentence_of_a_docstring_has_a_verb_and_stands_alone():
    found = []
    for path, node in nodes((*UTILS, *APPLICATIONS), *FUNCTIONS, ast.ClassDef):
        docstring = ast.get_docstring(node)
        if docstring and opens_badly(node, docstring):
            found.append(f"{place(path, node)} {node.name}: {first_sentence(docstring)}")
    assert found == [], "\n".join(found)
