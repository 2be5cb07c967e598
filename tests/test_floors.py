"""What the floors of the house promise and import-linter cannot see: private names, and what an import really loads.

Which room may import which is in pyproject.toml under `tool.importlinter`; `make lint` checks it.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MODEL_LIBRARIES = {"transformers", "trl", "peft", "datasets", "accelerate"}
# Modules that import torch at most, and of the libraries for arrays what they compute with.
PLUGIN = ("renyi.vllm.mixing", "renyi.vllm.admission", "renyi.vllm.records")
LIGHT = ("renyi", "renyi.errors", "renyi.objectives", "renyi.measures", *PLUGIN, "renyi.evaluation.metrics")


def private_uses(module: str, code: str) -> Iterator[str]:
    """Names with an underscore that a module takes from another module of ours, by import or as an attribute."""
    tree = ast.parse(code)
    ours: dict[str, str] = {}  # what a name in this file stands for, if it may be a module of ours
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "renyi":
            for name in node.names:
                ours[name.asname or name.name] = f"{node.module}.{name.name}"
                if is_private(name.name) or any(is_private(part) for part in (node.module or "").split(".")):
                    yield f"{module}:{node.lineno} imports {node.module}.{name.name}"
        elif isinstance(node, ast.Import):
            ours |= {n.asname or n.name: n.name for n in node.names if n.name.split(".")[0] == "renyi"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in ours:
            yield f"{module}:{node.lineno} reads {ours[ast.unparse(node.value)]}.{node.attr}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_private_names_stay_in_their_module():
    found = [
        use
        for file in sorted(SOURCE.rglob("*.py"))
        for use in private_uses(str(file.relative_to(SOURCE)), file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "from renyi.cli.sft import _SFT",
        "from renyi.cli import sft\nsft._SFT",
        "import renyi.cli.sft as other\nother._SFT",
        "import renyi.cli.sft\nrenyi.cli.sft._SFT",
        "def f():\n    from renyi._cli import name",
    ],
)
def test_private_names_are_found(code):
    assert len(list(private_uses("here", code))) == 1


def test_public_names_are_not_taken_for_private():
    code = "from renyi import __version__\nfrom renyi.cli import sft\nsft.run._x\nself._x\nimport os\nos._exit"
    assert list(private_uses("here", code)) == []


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Of each light module, which libraries are loaded once it has been imported after those before it."""
    code = (
        "import importlib, json, sys\n"
        f"found = {{}}\nfor name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        "    found[name] = sorted({module.split('.')[0] for module in sys.modules})\n"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SOURCE)
    return {name: set(libraries) for name, libraries in json.loads(ended.stdout).items()}


def test_errors_and_the_package_itself_need_no_library(loaded):
    assert not loaded["renyi.errors"] & {"torch", "numpy", *MODEL_LIBRARIES}


@pytest.mark.parametrize("module", ["renyi.objectives", "renyi.measures"])
def test_objectives_and_measures_need_torch_only(loaded, module):
    assert "torch" in loaded[module]
    assert not loaded[module] & {"scipy", "sklearn", "torchmetrics", "matplotlib", "rich", *MODEL_LIBRARIES}


def test_metrics_need_no_model_library(loaded):
    assert "sklearn" in loaded["renyi.evaluation.metrics"]
    assert not loaded["renyi.evaluation.metrics"] & {"torchmetrics", *MODEL_LIBRARIES}
