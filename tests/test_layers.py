"""Imports go one way: from scripts through training and evaluation to networks and data, to the maths, to boxes."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

PACKAGE = "detection"

# The import rule of docs/contract.md in one line, lowest layer first; a directory stands for all files in it.
RULE = (
    "errors contract ops < config checkpoints foreign_files drawing < runtime < models data"
    " < inference evaluation dataset_checks < visualization training tuning < classification"
)
LAYERS = [set(layer.split()) for layer in RULE.split("<")]
HIGHEST_SHARED = 1  # layers up to here hold single files and may look at each other
OPTIONAL = "mlflow determined habana_frameworks onnx onnxruntime onnxscript onnx_ir timm safetensors simplejpeg "
OPTIONAL += "openvino optuna psutil"
OPTIONAL_PACKAGES = frozenset(OPTIONAL.split(" "))
REQUIRED = set(re.findall(r"^[\w-]+", (REPOSITORY / "requirements.txt").read_text().lower(), re.MULTILINE))
DISTRIBUTIONS = packages_distributions()  # module -> packages that bring it
PRINTERS = ("detection/errors.py", "detection/runtime/signals.py", "detection/training/loggers/terminal.py")
PATH_OWNER = "yolo-v3/main.py"  # the only file that may touch sys.path


@functools.cache
def read_sources(root: Path) -> dict[str, str]:
    """Path below the root -> text, for the package, the scripts and the tests."""
    # A directory that is run, never imported, has a hyphen in its name, or holds defaults beside its script.
    experiments = [path for path in root.iterdir() if "-" in path.name or (path / "args.yaml").is_file()]
    directories = [root / PACKAGE, root / "tests", root / "benchmarks", *experiments]
    files = [*root.glob("*.py"), *(file for directory in directories for file in directory.rglob("*.py"))]
    return {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for file in sorted(files)}


@functools.cache
def parse(source: str) -> list[ast.AST]:
    """Every node; several tests look at the same files."""
    return [*ast.walk(ast.parse(source))]


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_names(path: str, source: str, known: set[str]) -> Iterator[tuple[str, int, bool]]:
    """Every imported module as (absolute name, line, whether at module level); of our package only modules that exist.

    `from detection import boxes` is an import of detection.boxes; relative imports are resolved.
    """
    tree = parse(source)
    in_functions = {
        id(inner)
        for function in tree
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(function)
        if isinstance(inner, ast.Import | ast.ImportFrom | ast.Call)
    }
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    for node in tree:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{parent}.{alias.name}" for alias in node.names]
            names = [name if name in known else parent for name in names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [word.value for word in node.args[:1] if isinstance(word, ast.Constant)]
        else:
            continue
        for name in dict.fromkeys(names):
            yield name, node.lineno, id(node) not in in_functions


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    if len(parts) < 2:
        return -1  # the package itself: may import nothing
    return next((number for number, names in enumerate(LAYERS) if parts[1] in names), None)


def find_violations(sources: Mapping[str, str]) -> list[str]:
    """Every breach of the rules of design.md and style.md that imports show, one line each."""
    found = []
    known = {module_name(path) for path in sources}
    scripts = {path for path in sources if not path.startswith((f"{PACKAGE}/", "tests/"))}
    script_modules = {module_name(path).rpartition(".")[2] for path in scripts}
    script_modules |= {path.split("/")[0] for path in scripts if "/" in path}
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        module = module_name(path)
        in_package = path.startswith(f"{PACKAGE}/")
        layer = layer_of(module) if in_package else None
        if in_package and layer is None:
            found.append(f"{path}: has no layer; add it to RULE")
        graph[module] = set()
        for name, line, top_level in imported_names(path, source, known):
            where = f"{path}:{line}: imports {name}"
            if in_package and name.split(".")[0] == PACKAGE:
                graph[module].add(name)
                target = layer_of(name)
                lazy = module == PACKAGE and not top_level  # its __getattr__: the package offers what is above
                if layer is not None and target is not None and target > layer and not lazy:
                    found.append(f"{where} of the higher layer {target}")
                if layer == target and layer > HIGHEST_SHARED and module.split(".")[1] != name.split(".")[1]:
                    found.append(f"{where} of another package of its own layer")
            if path.startswith("tests/") and name.rpartition(".")[2].startswith("test_"):
                found.append(f"{where}, a test; what tests share stands in tests/support")
            if path.startswith("tests/") and name.rpartition(".")[2] == "conftest":
                found.append(f"{where}; pytest hands out its fixtures")
            if path not in scripts and not in_package:
                continue  # tests may look at everything
            package = name.split(".")[0]
            if package == "tests":
                found.append(f"{where}, of the tests")
            if path.startswith("detection/config/") and package == "torch":
                found.append(f"{where}; settings are read without it")
            ours = package in {PACKAGE, "tests"} | script_modules | sys.stdlib_module_names | OPTIONAL_PACKAGES
            if not ours and not REQUIRED & {other.lower() for other in DISTRIBUTIONS.get(package, ())}:
                found.append(f"{where}, which is neither in requirements.txt nor optional")
            if path.startswith("benchmarks/") and name.startswith("benchmarks.support"):
                continue
            if name.split(".")[0] in script_modules - {PACKAGE}:
                found.append(f"{where}, a script")
            if in_package and top_level and name.split(".")[0] in OPTIONAL_PACKAGES:
                found.append(f"{where}, an optional package, outside the function that needs it")
        if path not in PRINTERS and not path.startswith(("tests/", "benchmarks/")):
            found += [f"{path}:{line}: prints without errors.escape" for line in lines_that_print(source)]
        if path != PATH_OWNER:
            found += [f"{path}:{line}: touches sys.path" for line in lines_with_sys_path(source)]
    return found + [f"imports in a circle: {' -> '.join(circle)}" for circle in find_circles(graph)]


def lines_with_sys_path(source: str) -> list[int]:
    nodes = parse(source)
    imported = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names = {"sys", *(alias.asname for alias in imported if alias.name == "sys")}
    return [
        node.lineno
        for node in nodes
        if (
            (isinstance(node, ast.Attribute) and node.attr == "path" and isinstance(node.value, ast.Name))
            and node.value.id in names
        )
        or (isinstance(node, ast.ImportFrom) and node.module == "sys" and any(a.name == "path" for a in node.names))
    ]


def lines_that_print(source: str) -> list[int]:
    """Lines with `print`, or with a `tqdm.write` without `escape`: names from files may forge lines."""
    return [
        node.lineno
        for node in parse(source)
        if (isinstance(node, ast.Name) and node.id == "print")
        or (
            (isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm.write")
            and not ast.unparse(node.args[0]).startswith("escape(")
        )
    ]


def find_circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Circles of imports, each once, beginning at its first name."""
    circles = []

    def visit(module: str, trail: list[str]) -> None:
        for name in sorted(graph.get(module, ())):
            if name == trail[0]:
                circles.append([*trail, name])
            elif name > trail[0] and name not in trail:  # smaller names start their own search
                visit(name, [*trail, name])

    for module in sorted(graph):
        visit(module, [module])
    return circles


# The repository


def test_repository_keeps_the_rules() -> None:
    sources = read_sources(REPOSITORY)
    assert {"detection/ops/boxes.py", "detection/data/coco.py", PATH_OWNER, "tests/test_layers.py"} <= set(sources)
    assert find_violations(sources) == []


def test_the_rules_see_the_real_imports() -> None:
    # A checker that overlooked imports would find no violation either.
    sources = read_sources(REPOSITORY)
    known = {module_name(path) for path in sources}
    imports = {name for name, _, _ in imported_names(PATH_OWNER, sources[PATH_OWNER], known)}
    assert {"detection.training.run", "detection.config.command_line", "detection.runtime.habana"} <= imports
    assert lines_with_sys_path(sources[PATH_OWNER])


def test_every_layer_name_is_a_file() -> None:
    for name in set().union(*LAYERS):
        assert (REPOSITORY / PACKAGE / f"{name}.py").is_file() or (
            REPOSITORY / PACKAGE / name / "__init__.py"
        ).is_file(), name


# The checker itself

CLEAN = {
    "detection/__init__.py": "",
    "detection/contract.py": "from detection.ops import boxes",
    "detection/ops/__init__.py": "",
    "detection/ops/boxes.py": "import torch",
    "detection/models/__init__.py": "from detection.models.yolo import x",
    "detection/models/yolo/__init__.py": "from detection.models.yolo.loss import x",
    "detection/models/yolo/loss.py": "from detection.ops.boxes import x",
    "detection/data/__init__.py": "",
    "detection/data/coco.py": "from detection.ops import boxes\nfrom ..ops import boxes\nfrom . import loaders",
    "detection/data/loaders.py": "import detection.ops.boxes\ndef f():\n    import timm",
    "detection/training/__init__.py": "",
    "detection/training/run.py": "from detection.data.coco import x\nfrom detection.models import y",
    "yolo-v3/main.py": "import sys\nsys.path.insert(0, '')\nfrom detection.training.run import x",
    "detect.py": "from detection.training import run\nimport os.path\nos.path.join('a')",
    "benchmarks/speed.py": "from benchmarks.support import clock\nfrom detection.training import run",
    "benchmarks/support/clock.py": "",
    "tests/test_detect.py": "import detect\nfrom detection.training import run",
}


def test_made_up_clean_repository_is_clean() -> None:
    assert find_violations(CLEAN) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        (
            "detection/ops/boxes.py",
            "def f():\n    import detection.data.coco",
            "boxes.py:2: imports detection.data.coco",
        ),
        ("detection/ops/boxes.py", "from detection.training import run", "training.run of the higher layer 5"),
        ("detection/ops/boxes.py", "from ..training import run", "detection.training.run of the higher layer 5"),
        ("detection/data/coco.py", "from ..training.run import x", "detection.training.run of the higher layer 5"),
        (
            "detect.py",
            "import functools\nshow = functools.partial(print, end='')",
            "detect.py:2: prints without errors.escape",
        ),
        ("detect.py", "from tqdm import tqdm\ntqdm.write('left out: ' + name)", "detect.py:2: prints without"),
        ("detection/data/coco.py", "from detection.models import x", "detection.models of another package of its"),
        ("detection/__init__.py", "from detection import ops", "imports detection.ops of the higher layer 0"),
        ("detection/brand_new.py", "", "detection/brand_new.py: has no layer"),
        ("detection/brand/new.py", "", "detection/brand/new.py: has no layer"),
        ("detection/data/loaders.py", "def f():\n    from . import coco", "circle: detection.data.coco -> detection"),
        ("detect.py", "import validation", "detect.py:1: imports validation, a script"),
        ("detection/training/run.py", "from validation import x", "run.py:1: imports validation, a script"),
        ("benchmarks/speed.py", "from benchmarks.other import x", "imports benchmarks.other, a script"),
        ("detection/training/run.py", "from benchmarks.support import x", "imports benchmarks.support, a script"),
        ("detection/training/run.py", "import timm", "imports timm, an optional package"),
        ("detect.py", "import sys\nsys.path.append('')", "detect.py:2: touches sys.path"),
        ("tests/test_detect.py", "from sys import path", "tests/test_detect.py:1: touches sys.path"),
        ("tests/test_detect.py", "from tests.data.test_other import x", "imports tests.data.test_other, a test"),
        ("tests/test_detect.py", "import sys as s\ns.path", "tests/test_detect.py:2: touches sys.path"),
        ("tests/support/runs.py", "from tests.conftest import x", "imports tests.conftest; pytest"),
        ("tests/test_detect.py", "from tests.data import conftest", "imports tests.data.conftest; pytest"),
        ("detection/data/coco.py", "from tests.support.runs import x", "imports tests.support.runs, of the tests"),
        ("benchmarks/speed.py", "import tests.support.runs", "imports tests.support.runs, of the tests"),
        ("detection/config/fields.py", "def f():\n    import torch", "fields.py:2: imports torch; settings"),
        ("detect.py", "import requests.sessions", "imports requests.sessions, which is neither in requirements.txt"),
        ("detection/ops/boxes.py", "import_module('detection.data.coco')", "imports detection.data.coco of the higher"),
        ("detection/ops/boxes.py", "__import__('detection.training')", "imports detection.training of the higher"),
    ],
)
def test_made_up_violation_is_found(path: str, source: str, message: str) -> None:
    sources = (
        CLEAN | {"validation.py": "", "tests/data/conftest.py": "", "tests/data/test_other.py": ""} | {path: source}
    )
    # An import of a higher layer may close a circle too; then both are found.
    assert any(message in violation for violation in find_violations(sources))


# Importing

IMPORT_EACH = r"""
import importlib, os, sys

events = []
def watch(event, arguments):
    # the loopback device is a network too: nothing here has a reason to open a socket
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"):
        events.append(f"{event} {arguments}")
sys.addaudithook(watch)

import detection, detection.config.settings, detection.config.command_line
assert "torch" not in sys.modules and "numpy" not in sys.modules, "settings import torch or numpy"
before = {name for name in sys.modules if name.startswith("detection")}

# Other packages once; each of our modules then first in a process of its own, so no order hides a circle.
others, modules = sys.argv[1].split(), sys.argv[2:]
for name in others:
    importlib.import_module(name)
assert {name for name in sys.modules if name.startswith("detection")} == before, "other packages import ours"
failed = False
for name in modules:
    child = os.fork()
    if child == 0:
        importlib.import_module(name)
        os.write(3, "".join(f"{name}: {event}\n" for event in events).encode())
        os._exit(0)
    failed |= os.waitpid(child, 0)[1] != 0
sys.exit(failed)
"""


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_importing_is_silent_offline_and_possible_in_any_order(tmp_path: Path, every: int) -> None:
    sources = {path: text for path, text in read_sources(REPOSITORY).items() if path.startswith(f"{PACKAGE}/")}
    modules = [module_name(path) for path in sources]
    imported = {
        name
        for path, source in sources.items()
        for name, _, top_level in imported_names(path, source, set(modules))
        if top_level and name.split(".")[0] != PACKAGE
    }
    others = " ".join(sorted(imported))
    program = tmp_path / "program.py"
    program.write_text(IMPORT_EACH)
    # shows that the watch would see something
    (tmp_path / "made_up.py").write_text("import socket\nsocket.getaddrinfo('localhost', 1)")
    run = subprocess.run(
        ["bash", "-c", 'exec "$0" "$@" 3> events', sys.executable, str(program), others, "made_up", *modules[::every]],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        # albumentations asks the package index when it is imported; scripts set this in `prepare_process`
        env={
            **{"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            "NO_ALBUMENTATIONS_UPDATE": "1",
        },
    )
    assert (run.stdout, run.stderr, run.returncode) == ("", "", 0)
    events = (tmp_path / "events").read_text().splitlines()
    assert len(events) >= 1 and all(event.startswith("made_up: socket.") for event in events)


def test_the_package_is_imported_and_never_run() -> None:
    for path, source in read_sources(REPOSITORY).items():
        if path.startswith(f"{PACKAGE}/"):
            assert "__main__" not in source, path
