"""Private and undocumented names of other libraries: each has a row in intern/upstream.py and is what the row says."""

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT

from intern.upstream import TABLE

DISTRIBUTIONS = {  # by the name that is imported
    "hydra": "hydra-core",
    "huggingface_hub": "transformers",  # bounded through it
}
LIBRARIES = {
    *("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "huggingface_hub", "hydra", "omegaconf"),
    *("liger_kernel", "lm_eval", "wandb", "safetensors", "submitit", "optuna", "cudnn"),
}  # fmt: skip
# Import paths below the top level that the libraries document.
DOCUMENTED = {
    *("torch.distributed", "torch.distributed.elastic.multiprocessing", "torch.distributed.elastic.multiprocessing.errors"),
    *("torch.utils.data", "torch.utils.hooks", "torch.utils.tensorboard", "torch.nn.attention.varlen", "safetensors.torch"),
    *("transformers.trainer_callback", "transformers.trainer_utils", "transformers.training_args", "transformers.utils"),
    "huggingface_hub.utils",
    *("huggingface_hub.errors", "datasets.exceptions", "omegaconf.errors", "optuna.distributions", "submitit.helpers"),
    *("hydra.conf", "hydra.errors", "hydra.types", "hydra.core.plugins", "hydra.experimental.callback"),
    *("hydra.plugins.launcher", "hydra.plugins.sweeper", "lm_eval.models.huggingface", "lm_eval.tasks", "accelerate.utils.DynamoBackend"),
}  # fmt: skip
# Private by their name only.
PUBLIC = {
    "_asdict": "documented method of typing.NamedTuple",
    "_replace": "documented method of typing.NamedTuple",
    "_fields": "documented attribute of typing.NamedTuple",
}


# --- the table against the installed libraries


def version(row):
    library = row.name.partition(":")[0].partition(".")[0]
    return f"{library} {importlib.metadata.version({'hydra': 'hydra-core'}.get(library, library))}"


def complaint(row, found):
    places = ", ".join(row.used_in)
    return (
        f"{version(row)}: {row.name}: {found}. {places} relies on it: {row.relies_on}. If it changed: {row.if_changed}."
    )


def resolve(row):
    """The object; a syntax tree if its module can only be imported on a GPU; the class for an attribute of its instances."""
    module, _, path = row.name.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        pytest.fail(complaint(row, f"no module {error.name}"))
    except (AttributeError, OSError, RuntimeError):
        spec = importlib.util.find_spec(module)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        named = [node for node in tree.body if getattr(node, "name", None) == path]
        return named[0] if named else pytest.fail(complaint(row, "is gone"))
    for name in path.split(".") if path else []:
        if not hasattr(found, name):
            if inspect.isclass(found) and any(f"self.{name}" in line for line in row.source):
                return found
            pytest.fail(complaint(row, "is gone"))
        found = getattr(found, name)
    return found


def parameters(found):
    """As the table writes them: names and kinds, without defaults and annotations."""
    if isinstance(found, ast.FunctionDef):
        return [one.arg for one in found.args.args]
    if hasattr(found, "overloadpacket") or hasattr(found, "default"):  # an operator of torch
        return [one.name for one in found.default._schema.arguments]
    if hasattr(found, "arg_names"):  # a kernel that Triton compiles
        return list(found.arg_names)
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [marks.get(one.kind, "") + one.name for one in inspect.signature(found).parameters.values()]


@functools.cache
def source(found):
    tree = found if isinstance(found, ast.AST) else ast.parse(textwrap.dedent(inspect.getsource(found)))
    return ast.unparse(tree)


@pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
def test_the_installed_libraries_are_what_the_table_says(row):
    found = resolve(row)
    if row.signature is not None:
        wanted = re.findall(r"[*\w.]+", row.signature)
        has = parameters(found)
        if wanted[-1:] == ["..."]:
            wanted, has = wanted[:-1], has[: len(wanted) - 1]
        if wanted != has:
            pytest.fail(complaint(row, f"takes ({', '.join(has)}), not {row.signature}"))
    if row.value is not None and found != row.value:
        pytest.fail(complaint(row, f"is {found!r}, not {row.value!r}"))
    rest = source(found) if row.source else ""
    for line in row.source:
        _, there, rest = rest.partition(line)
        if not there:
            pytest.fail(complaint(row, f"its source no longer contains `{line}` (in the table's order)"))


def test_a_sum_saves_nothing_for_its_backward_pass():
    """Of intern.kernels.recompute and intern.kernels.rms_norm, which free or change such a sum."""
    import torch

    node = (torch.ones(2, requires_grad=True) + torch.ones(2)).grad_fn
    assert node.name() == "AddBackward0" and not [name for name in dir(node) if name.startswith("_saved_result")]
    assert not [name for name in dir(node) if name in ("_saved_self", "_saved_other")]


# --- the table against our own source


@functools.cache
def modules():
    """Each module's syntax tree, by its dotted name."""
    files = [*(ROOT / "intern").rglob("*.py"), *(ROOT / "hydra_plugins").glob("*.py")]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(file.read_text())
        for file in files
    }


def defined(tree, prefix=""):
    """Functions, classes, methods and constants of a module, as "Class.method"."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield f"{prefix}{node.name}", node
            yield from defined(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((f"{prefix}{one.id}", node) for one in targets if isinstance(one, ast.Name))


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def private_names(node):
    """(name, whether it is `self`'s, line) of private attributes that a piece of source reads, sets or names in a call such as getattr."""
    for one in ast.walk(node):
        if isinstance(one, ast.Attribute) and is_private(one.attr):
            yield one.attr, is_self(one.value), one.lineno
        elif (
            isinstance(one, ast.Call) and len(one.args) > 1 and called(one) in ("getattr", "setattr", "hasattr", "set")
        ):
            name = one.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield name.value, is_self(one.args[0]), one.lineno


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def called(node):
    return getattr(node.func, "id", None) or getattr(node.func, "attr", None)


def rows_for(name, module):
    """The rows that name this attribute and this module."""
    return [
        row
        for row in TABLE
        if re.search(rf"\b{name}\b", " ".join((row.name, row.relies_on, *row.source)))
        and any(place.partition(":")[0] == module for place in row.used_in)
    ]


def test_every_place_in_the_table_exists():
    missing = []
    for row in TABLE:
        for place in row.used_in:
            module, _, name = place.partition(":")
            if module not in modules() or name not in dict(defined(modules()[module])):
                missing.append(f"{row.name}: {place}")
    assert not missing, "intern/upstream.py names places that are gone:\n" + "\n".join(missing)


def test_every_private_name_of_another_library_has_a_row():
    faults = []
    for module, tree in modules().items():
        own = {name for name, _ in defined(tree)}
        members = members_of_own_classes(tree, own)  # a module may use the private names of its own classes
        for name, of_self, line in private_names(tree):
            if not of_self and name not in PUBLIC | members and not rows_for(name, module):
                faults.append(f"{module}:{line}: {name}")
        for name, node in defined(tree):
            if isinstance(node, ast.ClassDef) and is_foreign(node, own):
                assigned = {one.rpartition(".")[2] for one, _ in defined(node)} | assigned_to_self(node)
                for private, of_self, line in private_names(node):
                    if of_self and private not in assigned and not rows_for(private, module):
                        faults.append(f"{module}:{line}: {name}: self.{private}")
    assert not faults, "private names of other libraries without a row in intern/upstream.py:\n" + "\n".join(faults)


def members_of_own_classes(tree, own):
    """Methods and attributes of the classes of a module that derive from nothing but each other, with the class that has them."""
    return {
        member: name
        for name, node in defined(tree)
        if isinstance(node, ast.ClassDef) and not is_foreign(node, own)
        for member in {one.rpartition(".")[2] for one, _ in defined(node)} | assigned_to_self(node)
    }


def is_foreign(node, own):
    return any(not (isinstance(base, ast.Name) and base.id in own) for base in node.bases)


def assigned_to_self(node):
    return {
        one.attr
        for one in ast.walk(node)
        if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store) and isinstance(one.value, ast.Name)
    }


def test_every_private_name_that_a_subclass_shares_with_its_base_has_a_row():
    """An override, or a name that a new release of the library happens to use as well."""
    faults = []
    for module, tree in modules().items():
        for name, node in defined(tree):
            if not isinstance(node, ast.ClassDef) or not node.bases:
                continue
            kind = importlib.import_module(module)
            for part in name.split("."):
                kind = getattr(kind, part)
            bases = [one for one in kind.__mro__ if one.__module__.partition(".")[0] in LIBRARIES - {"torch"}]
            theirs = {one for base in bases for one in vars(base)}
            theirs |= {
                one for base in bases for one in re.findall(r"self\.(_\w+)\b[^=\n]*=[^=]", inspect.getsource(base))
            }
            ours = {one.rpartition(".")[2] for one, _ in defined(node)} | assigned_to_self(node)
            faults += [
                f"{module}:{name}.{one}"
                for one in sorted(ours & theirs)
                if is_private(one) and not rows_for(one, module)
            ]
    assert not faults, "private names shared with a base class without a row in intern/upstream.py:\n" + "\n".join(
        faults
    )


def test_every_undocumented_import_path_has_a_row():
    paths = {row.name.partition(":")[0] for row in TABLE}
    faults = []
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            if node.module.partition(".")[0] not in LIBRARIES:
                continue
            whole = {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
            is_known = "." not in node.module or whole & (paths | DOCUMENTED)
            if not is_known or any(is_private(one.name) for one in node.names):
                faults.append(f"{module}:{node.lineno}: from {node.module} import ...")
    assert not faults, "import paths without a row in intern/upstream.py (or in DOCUMENTED, if the library documents it):\n" + "\n".join(faults)  # fmt: skip


def test_the_scan_finds_what_it_is_for():
    tree = ast.parse(
        "def f(x):\n    x._private = getattr(x, '_other')\n    patches.set(x, '_set', 1)\n    return self._own, x.__dict__\n"
    )
    assert sorted(private_names(tree)) == [
        ("_other", False, 2),
        ("_own", True, 4),
        ("_private", False, 2),
        ("_set", False, 3),
    ]
    assert len(TABLE) > 50 and len(modules()) > 60


def test_libraries_with_private_coupling_have_an_upper_bound_that_says_why():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = tomllib.loads(text)["project"]["dependencies"]
    names = {row.name.partition(":")[0].partition(".")[0] for row in TABLE}
    for name in {DISTRIBUTIONS.get(name, name) for name in names}:
        [bound] = [one for one in dependencies if re.match(rf"{name}\b", one)]
        assert "<" in bound, f"{name} has rows in intern/upstream.py and no upper bound in pyproject.toml"
        assert re.search(rf'^ *"{re.escape(bound)}", *# \w+', text, re.MULTILINE), f"{bound}: no comment says why"


def test_the_table_is_read_without_any_of_the_libraries():
    code = f"import sys, intern.upstream; print([name for name in {sorted(LIBRARIES)} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
