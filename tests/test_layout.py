import ast
import builtins
import dis
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType

import pytest

import jvae
from jvae import data, distributions, estimators, evaluation

ROOT = Path(jvae.__file__).parent
ARCHITECTURE = Path(__file__).parents[1] / "ARCHITECTURE.md"
# The rows of its table: a module imports only what stands above it.
ORDER = re.findall(r"^\| `(\w+)/?` \|", ARCHITECTURE.read_text("utf-8"), flags=re.MULTILINE)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}
PUBLIC_FUNCTIONS = [
    name for name in jvae.__all__ if not isinstance(getattr(jvae, name), ModuleType | type)
]
BOUNDS = [
    name
    for name in PUBLIC_FUNCTIONS
    if getattr(jvae, name).__module__.startswith(("jvae.estimators", "jvae.evaluation.importance"))
]
EVALUATION_FUNCTIONS = [
    name for name in evaluation.__all__ if inspect.isfunction(getattr(evaluation, name))
]
# Those that estimate something of p(x) or of the latents, in nats.
LIKELIHOODS = ["ais", "app_d", "bdmc", "importance_sampling", "inference_gap", "kl_decomposition"]


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of jvae that a file imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *parts = name.split(".")
            if root == "jvae":
                # The longest prefix that is a module: what follows is a name in it.
                prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
                modules = [m for p in prefixes for m in (p, f"{p}.__init__") if m in MODULES]
                yield (modules or ["__init__"])[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    room = module.split(".")[0]
    assert room in ORDER, "a new module has its row in ARCHITECTURE.md"
    for name in imported(MODULES[module]):
        other = name.split(".")[0]
        inside_a_package = other == room and "." in module
        assert ORDER.index(other) < ORDER.index(room) or inside_a_package, f"{module} → {name}"


def test_the_order_names_every_module_once() -> None:
    assert sorted(ORDER) == sorted({module.split(".")[0] for module in MODULES})


def test_the_architecture_has_a_place_for_every_module() -> None:
    places, _, _ = ARCHITECTURE.read_text("utf-8").partition("## Protocols")
    names = {module.rpartition(".")[2] for module in MODULES if "." in module}
    assert not {name for name in names if f"`{name}`" not in places} - {"__init__"}


def test_no_imports_go_round() -> None:
    graph = {module: set(imported(tree)) - {module} for module, tree in MODULES.items()}
    assert graph["models"] == {"checks", "networks", "priors"}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_package_of_experiments_imports_nothing() -> None:
    (docstring,) = MODULES["experiments.__init__"].body
    assert isinstance(docstring, ast.Expr)


def test_importing_jvae_imports_nothing_heavy() -> None:
    optional = ("tensorflow", "torch", "matplotlib", "tyro", "orbax", "numpyro", "grain")
    # Required, and for all that imported only by the data that needs them.
    later = (
        "tensorflow_datasets",
        "array_record",
        "PIL",
        "pyarrow",
        "requests",
        "scipy.io",
        "blackjax",
    )
    heavy = (*optional, *later, "jvae.experiments")
    code = f"import sys, jvae.forensics; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["bundle", "checkpoint", "distributed", "forensics", "plotting"])
def test_what_jvae_does_not_import_is_there_when_it_is_asked_for(name: str) -> None:
    code = f"import jvae; print({name!r} in dir(jvae), jvae.{name}.__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == f"True jvae.{name}\n"
    with pytest.raises(AttributeError, match="module 'jvae' has no attribute 'checkpoints'"):
        jvae.__getattr__("checkpoints")


def test_no_module_is_named_like_a_public_function() -> None:
    """With jvae/elbo.py, `import jvae.elbo as m` would give the function."""
    packages: tuple[ModuleType, ...] = (jvae, data, estimators, evaluation)
    names = {n for p in packages for n in p.__all__ if not isinstance(getattr(p, n), ModuleType)}
    assert {"elbo", "from_array", "ais"} <= names
    assert not names & {part for module in MODULES for part in module.split(".")}


def test_the_public_surface_is_what_the_package_imports() -> None:
    nodes = [node for node in MODULES["__init__"].body if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in nodes for alias in node.names]
    assert sorted(jvae.__all__) == sorted(names)


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module: str) -> None:
    tree = MODULES[module]
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
        for part in node.body if isinstance(node, ast.Module | ast.ClassDef) else []:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                assert ast.get_docstring(part), part.name


@pytest.mark.parametrize("name", PUBLIC_FUNCTIONS)
def test_docstrings_of_public_functions_give_shapes(name: str) -> None:
    function = inspect.unwrap(getattr(jvae, name))
    arrays = [a for a in function.__annotations__.values() if hasattr(a, "array_type")]
    docstring = inspect.getdoc(function) or ""
    assert "Raises:" in docstring
    assert not arrays or re.search(r"\[[\w*, ]*\]", docstring)


@pytest.mark.parametrize("name", BOUNDS)
def test_docstrings_of_bounds_give_unit_and_source(name: str) -> None:
    docstring = inspect.getdoc(getattr(jvae, name)) or ""
    assert "nats" in docstring
    assert re.search(r"\((19|20)\d\d\)", docstring)


@pytest.mark.parametrize("name", EVALUATION_FUNCTIONS)
def test_docstrings_of_evaluation_give_shapes(name: str) -> None:
    function = inspect.unwrap(getattr(evaluation, name))
    arrays = [a for a in function.__annotations__.values() if hasattr(a, "array_type")]
    assert not arrays or re.search(r"\[[\w*, +]*\]", inspect.getdoc(function) or "")


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_docstrings_of_likelihoods_give_unit_and_source(name: str) -> None:
    docstring = inspect.getdoc(getattr(evaluation, name)) or ""
    assert "nats" in docstring
    assert "Raises:" in docstring
    assert re.search(r"\((19|20)\d\d\)", docstring)


@pytest.mark.parametrize("family", [distributions.Bernoulli, distributions.DiagonalGaussian])
@pytest.mark.parametrize("method", ["log_prob", "sample_and_log_prob", "kl"])
def test_docstrings_of_densities_give_unit_and_shape(family: type, method: str) -> None:
    docstring = inspect.getdoc(getattr(family, method)) or ""
    assert "nats" in docstring
    assert "[*batch]" in docstring


def loaded_globals(code: CodeType) -> Iterator[str]:
    """The names that code looks up in its module."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from loaded_globals(constant)


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__init__")])
def test_every_name_is_defined(module: str) -> None:
    """Which the linters cannot tell: to them the shapes in annotations are unknown names."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    code = compile(path.read_text("utf-8"), path, "exec")
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    looked_up = {name for part in inner for name in loaded_globals(part)}
    known = vars(importlib.import_module(f"jvae.{module}")).keys() | vars(builtins).keys()
    assert {n for n in looked_up if not (n[:2] == "__" or is_local(n, inner))} <= known


def is_local(name: str, codes: list[CodeType]) -> bool:
    """Whether a class's body defines the name, which it looks up as if it were global."""
    return any(
        name in {i.argval for i in dis.get_instructions(c) if i.opname == "STORE_NAME"}
        or is_local(name, [part for part in c.co_consts if isinstance(part, CodeType)])
        for c in codes
    )
