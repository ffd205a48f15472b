"""No module of the package unpickles or evaluates what it reads, as far as its source shows; each exception is named here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("extract", "store", "heads", "pipelines") for path in (REPO / folder).rglob("*.py")
)

UNPICKLERS = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "joblib", "marshal", "numcodecs.pickles", "pandas",
}  # fmt: skip
"""Modules that unpickle; pandas by read_pickle."""

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load",
    "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.utils.model_zoo.load_url", "open_clip.load_checkpoint",
    "numpy.lib.format.read_array", "os.system", "torch.serialization.add_safe_globals",
}  # fmt: skip
"""torch.jit.load runs code of the archive; open_clip.load_checkpoint and torch.hub decide for themselves how they load."""

EXCEPTIONS = {
    # Between a decode process and the parent that started it, over a socket pair that nobody else has an end of.
    "extract/messages.py": {"dumps", "loads"},
    # Whether an error of its own survives that way.
    "extract/worker_main.py": {"dumps", "loads"},
    # A task for dask's workers, which unpickle tasks anyway: scheduler and workers trust each other (clusters.md).
    "pipelines/cluster_task.py": {"dumps", "loads"},
    # The name of the error that torch's restricted unpickler raises.
    "pipelines/checkpoint_file.py": {"UnpicklingError"},
    # An unpickler that finds no class of Python's.
    "extract/torchscript.py": {"Unpickler"},
}
"""By module, all that it may use of pickle."""

NO_PICKLE = {"numpy.load": False, "numpy.save": False, "numpy.savez": False, "numpy.savez_compressed": False}
"""Calls that must say allow_pickle=False: NumPy writes arrays of objects as pickles by default."""

FROM_PRETRAINED = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
"""What calls of transformers must say; the last those of models. Of a folder without .safetensors they would unpickle."""


def names_in(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: {"np": "numpy", "load": "torch.load"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of an expression like np.lib.load; empty for any other."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (base := dotted(node.value, names)):
        return f"{base}.{node.attr}"
    return ""


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def keyword(call: ast.Call, name: str) -> object:
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def faults(source: str, allowed: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """What a module does that could run code of a file, in a few words each."""
    tree = ast.parse(source)
    names = names_in(tree)
    found = [
        f"imports {name}"
        for name in imported(tree)
        if any(name == module or name.startswith(f"{module}.") for module in UNPICKLERS)
        and not (name == "pickle" and allowed)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node.value, names) == "pickle" and node.attr not in allowed:
            found.append(f"uses pickle.{node.attr}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and not is_constant(node.value, False):
            found.append("allow_pickle")
        if isinstance(node, ast.keyword) and node.arg == "weights_only" and not is_constant(node.value, True):
            found.append("weights_only")
        if isinstance(node, ast.Call):
            found += call_faults(node, dotted(node.func, names))
    return found


def is_constant(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def call_faults(call: ast.Call, name: str) -> Iterator[str]:
    if name in FORBIDDEN:
        yield f"calls {name}"
    if name == "torch.load" and keyword(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name.endswith(".from_pretrained"):  # of transformers
        yield from (
            f"from_pretrained without {option}={value}"
            for option, value in FROM_PRETRAINED.items()
            if keyword(call, option) is not value and (option != "use_safetensors" or "AutoModel" in name)
        )
    if name in NO_PICKLE and keyword(call, "allow_pickle") is not False:
        yield f"{name} without allow_pickle=False"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_no_module_unpickles_what_it_reads(path: Path) -> None:
    assert faults(path.read_text(), EXCEPTIONS.get(str(path.relative_to(REPO)), set())) == []


def test_the_exceptions_are_used() -> None:
    for name, allowed in EXCEPTIONS.items():
        unused = {use for use in allowed if f"uses pickle.{use}" not in faults((REPO / name).read_text(), {"-"})}
        assert not unused, name


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import pickle", "imports pickle"),
        ("from pickle import loads", "imports pickle"),
        ("import joblib.externals", "imports joblib.externals"),
        ("from numcodecs.pickles import Pickle", "imports numcodecs.pickles"),
        ("from numcodecs import pickles", "imports numcodecs.pickles"),
        ("def f(x):\n  import dill\n  return dill", "imports dill"),
        ("eval('1')", "calls eval"),
        ("import yaml as y\ny.load(x)", "calls yaml.load"),
        ("import torch\ntorch.load(x)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(x, weights_only=safe)", "torch.load without weights_only=True"),
        ("from torch import load as l\nl(x, weights_only=False)", "torch.load without weights_only=True"),
        ("import torch\ntorch.jit.load(x)", "calls torch.jit.load"),
        ("import numpy as np\nnp.load(x)", "numpy.load without allow_pickle=False"),
        ("import numpy as np\nnp.load(x, allow_pickle=True)", "allow_pickle"),
        ("f(x, allow_pickle=True)", "allow_pickle"),
        ("f(x, **{'a': 1}, weights_only=False)", "weights_only"),
        (
            "import transformers\ntransformers.AutoModel.from_pretrained(x)",
            "from_pretrained without use_safetensors=True",
        ),
        (
            "from transformers import AutoModel as A\nA.from_pretrained(x)",
            "from_pretrained without use_safetensors=True",
        ),
        ("f.AutoTokenizer.from_pretrained(x)", "from_pretrained without trust_remote_code=False"),
        ("from numpy import savez\nsavez(x, a=y)", "numpy.savez without allow_pickle=False"),
    ],
)
def test_the_check_finds_each_fault(source: str, fault: str) -> None:
    assert fault in faults(source)


def test_an_exception_allows_what_it_names_and_no_more() -> None:
    source = "import pickle\npickle.loads(x)\npickle.Unpickler(x)"
    assert faults(source, {"loads"}) == ["uses pickle.Unpickler"]
    assert faults("import torch\ntorch.load(x, weights_only=True)") == []
