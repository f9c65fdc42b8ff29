"""Imports go one way: from scripts through training and evaluation to networks and data, to the maths, to boxes."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "detection"

# The table of design.md, lowest layer first. A directory stands for all files in it.
LAYERS = [
    {
        *("errors", "boxes", "settings", "devices", "distributed", "reproducibility", "schedules", "run_loggers"),
        *("drawing", "figures", "display", "stopping", "command_line", "html_report"),
        *("aliases", "habana_environment", "host_memory", "operation_trace"),
    },
    {
        *("anchors", "box_coder", "target_assignment", "grid_assignment", "criterion", "mmdetection_loss", "losses"),
        *("postprocessing", "suppression", "anchor_figure"),
    },
    {"models", "data"},
    {
        *("checkpoints", "weights", "pretrained", "evaluation", "training", "memory", "batch_size", "reports"),
        *("matching", "dataset_statistics", "dataset_figures", "image_ranking", "target_pictures", "dataset_pages"),
        *("detections", "coco_metric", "comparison", "error_analysis", "evaluation_figures"),
        *("coco_arrays", "coco_rows"),
        *("onnx_files", "onnx_export", "onnx_comparison"),
        *("skipped_steps", "run_state", "run", "run_reports", "checkpoint_writer", "preflight", "diagnosis", "resume"),
        *("throughput", "profiling", "prefetch", "measuring"),
    },
]
SCRIPTS = "scripts"  # above all layers
OPTIONAL_PACKAGES = {
    "mlflow",
    "determined",
    "habana_frameworks",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnx_ir",
    "timm",
    "simplejpeg",
    "msgspec",
}
PATH_OWNER = "yolo-v3/main.py"  # the only file that may touch sys.path


def read_sources(root: Path) -> dict[str, str]:
    """Path below the root -> text, for the package, the scripts and the tests."""
    experiments = [path for path in root.iterdir() if path.is_dir() and "-" in path.name]
    directories = [root / PACKAGE, root / "tests", root / "benchmarks", *experiments]
    files = [*root.glob("*.py"), *(file for directory in directories for file in directory.rglob("*.py"))]
    return {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for file in sorted(files)}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_names(path: str, source: str, known: set[str]) -> Iterator[tuple[str, int, bool]]:
    """Every imported module as (absolute name, line, whether at module level); of our package only modules that exist.

    `from detection import boxes` is an import of detection.boxes; relative imports are resolved.
    """
    tree = ast.parse(source)
    top_level = {id(node) for node in ast.walk(tree)} - {
        id(inner)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(function)
    }
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{parent}.{alias.name}" for alias in node.names]
            names = [name if name in known else parent for name in names]
        else:
            continue
        for name in dict.fromkeys(names):
            yield name, node.lineno, id(node) in top_level


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
            found.append(f"{path}: has no layer; add it to LAYERS and to design.md")
        graph[module] = set()
        for name, line, top_level in imported_names(path, source, known):
            where = f"{path}:{line}: imports {name}"
            if in_package and name.split(".")[0] == PACKAGE:
                graph[module].add(name)
                target = layer_of(name)
                if layer is not None and target is not None and target > layer:
                    found.append(f"{where} of the higher layer {target}")
            if path not in scripts and not in_package:
                continue  # tests may look at everything
            if name.split(".")[0] in script_modules - {PACKAGE}:
                found.append(f"{where}, a script")
            if in_package and top_level and name.split(".")[0] in OPTIONAL_PACKAGES:
                found.append(f"{where}, an optional package, outside the function that needs it")
        if path != PATH_OWNER:
            found += [f"{path}:{line}: touches sys.path" for line in lines_with_sys_path(source)]
    return found + [f"imports in a circle: {' -> '.join(circle)}" for circle in find_circles(graph)]


def lines_with_sys_path(source: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (
            (isinstance(node, ast.Attribute) and node.attr == "path" and isinstance(node.value, ast.Name))
            and node.value.id == "sys"
        )
        or (isinstance(node, ast.ImportFrom) and node.module == "sys" and any(a.name == "path" for a in node.names))
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
    sources = read_sources(ROOT)
    assert {"detection/boxes.py", "detection/data/coco.py", PATH_OWNER, "tests/test_layers.py"} <= set(sources)
    assert find_violations(sources) == []


def test_the_rules_see_the_real_imports() -> None:
    # A checker that overlooked imports would find no violation either.
    sources = read_sources(ROOT)
    known = {module_name(path) for path in sources}
    imports = {name for name, _, _ in imported_names(PATH_OWNER, sources[PATH_OWNER], known)}
    assert {"tqdm", "detection.training", "detection.evaluation", "detection.settings"} <= imports
    assert lines_with_sys_path(sources[PATH_OWNER])


def test_every_layer_name_is_a_file() -> None:
    for name in set().union(*LAYERS):
        assert (ROOT / PACKAGE / f"{name}.py").is_file() or (ROOT / PACKAGE / name / "__init__.py").is_file(), name


# The checker itself

CLEAN = {
    "detection/__init__.py": "",
    "detection/boxes.py": "import torch",
    "detection/anchors.py": "from detection.boxes import x",
    "detection/losses.py": "from detection.anchors import x",
    "detection/data/__init__.py": "from detection.data import coco",
    "detection/data/coco.py": "from detection import boxes\nfrom .. import losses\nfrom . import loaders",
    "detection/data/loaders.py": "import detection.boxes\ndef f():\n    import timm",
    "detection/training.py": "from detection.data.coco import x\nfrom detection.data import coco",
    "yolo-v3/main.py": "import sys\nsys.path.insert(0, '')\nfrom detection.training import x",
    "detect.py": "from detection import training\nimport os.path\nos.path.join('a')",
    "benchmarks/speed.py": "from detection import training",
    "tests/test_detect.py": "import detect\nfrom detection import training",
}


def test_made_up_clean_repository_is_clean() -> None:
    assert find_violations(CLEAN) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("detection/boxes.py", "from detection.losses import x", "detection/boxes.py:1: imports detection.losses of"),
        (
            "detection/boxes.py",
            "def f():\n    import detection.data.coco",
            "boxes.py:2: imports detection.data.coco of",
        ),
        ("detection/boxes.py", "from detection import training", "imports detection.training of the higher layer 3"),
        ("detection/boxes.py", "from . import training", "imports detection.training of the higher layer 3"),
        ("detection/boxes.py", "from .data.coco import x", "imports detection.data.coco of the higher layer 2"),
        ("detection/data/coco.py", "from ..training import x", "imports detection.training of the higher layer 3"),
        ("detection/__init__.py", "from detection import boxes", "imports detection.boxes of the higher layer 0"),
        ("detection/brand_new.py", "", "detection/brand_new.py: has no layer"),
        ("detection/brand/new.py", "", "detection/brand/new.py: has no layer"),
        (
            "detection/anchors.py",
            "def f():\n    from detection import losses",
            "circle: detection.anchors -> detection.losses -> detection.anchors",
        ),
        (
            "detection/data/loaders.py",
            "from detection import data",
            "circle: detection.data -> detection.data.coco -> detection.data.loaders -> detection.data",
        ),
        ("detect.py", "import validation", "detect.py:1: imports validation, a script"),
        ("detection/training.py", "from validation import x", "training.py:1: imports validation, a script"),
        ("benchmarks/speed.py", "from benchmarks.other import x", "imports benchmarks.other, a script"),
        ("detection/training.py", "import timm", "imports timm, an optional package"),
        ("detect.py", "import sys\nsys.path.append('')", "detect.py:2: touches sys.path"),
        ("tests/test_detect.py", "from sys import path", "tests/test_detect.py:1: touches sys.path"),
    ],
)
def test_made_up_violation_is_found(path: str, source: str, message: str) -> None:
    sources = CLEAN | {"validation.py": ""} | {path: source}
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

import detection.settings
assert "torch" not in sys.modules and "numpy" not in sys.modules, "settings import torch or numpy"

# The heavy packages once; each of our modules then first in a process of its own, so no order hides a circle.
import cv2, numpy, torch, torchvision, tqdm
failed = False
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        importlib.import_module(name)
        os.write(3, "".join(f"{name}: {event}\n" for event in events).encode())
        os._exit(0)
    failed |= os.waitpid(child, 0)[1] != 0
sys.exit(failed)
"""


def test_importing_is_silent_offline_and_possible_in_any_order(tmp_path: Path) -> None:
    modules = [module_name(path) for path in read_sources(ROOT) if path.startswith(f"{PACKAGE}/")]
    program = tmp_path / "program.py"
    program.write_text(IMPORT_EACH)
    # shows that the watch would see something
    (tmp_path / "made_up.py").write_text("import socket\nsocket.getaddrinfo('localhost', 1)")
    run = subprocess.run(
        ["bash", "-c", 'exec "$0" "$@" 3> events', sys.executable, str(program), "made_up", *modules],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert (run.stdout, run.stderr, run.returncode) == ("", "", 0)
    events = (tmp_path / "events").read_text().splitlines()
    assert len(events) >= 1 and all(event.startswith("made_up: socket.") for event in events)


def test_the_package_is_imported_and_never_run() -> None:
    for path, source in read_sources(ROOT).items():
        if path.startswith(f"{PACKAGE}/"):
            assert "__main__" not in source, path
