"""The command line is light, and calls the public package and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import surgery
from tests.test_public import loaded_by

FILES = sorted(Path(surgery.__file__).parent.glob("cli/*.py"))


VERBS = [
    *("models", "inspect", "widen", "deepen", "shorten", "slim", "distill", "evolve", "export", "bench"),
    *("compress", "tradeoff", "sensitivity", "verify"),
]


def test_help_the_version_and_the_list_of_models_load_no_torch():
    calls = [
        ["--help"],
        ["--version"],
        *([verb, "--help"] for verb in VERBS),
        ["models", "resnet*"],
        ["models", "--json"],
    ]
    code = f"from surgery.cli import main\nfor words in {calls}: assert main(words) == 0"
    assert loaded_by(code, "torch", "onnx", "matplotlib", "scipy") == set()


def test_every_verb_is_among_those(run):
    listed = re.findall(r"^\W*(\w+)  ", run("--help")[1].partition("Commands")[2], flags=re.MULTILINE)
    assert set(listed) == set(VERBS)


def test_models_are_listed_without_torch():
    assert loaded_by("import surgery; surgery.models.list_models('vgg*')", "torch", "torchvision") == set()
    assert loaded_by("import surgery; surgery.models.parse('resnet18?num_classes=10')", "torch") == set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_command_line_uses_public_names_alone(file):
    tree = ast.parse(file.read_text())
    assert [name for name in used(tree) if not is_public(name)] == []


def used(tree: ast.AST) -> Iterator[str]:
    """What a file uses of the package: ``surgery.slim``, ``surgery.models.build``, ``surgery.cli.options.Model``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "surgery":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("surgery."))
        if isinstance(node, ast.Attribute) and re.fullmatch(r"surgery(\.\w+)+", ast.unparse(node)):
            yield ast.unparse(node)


def is_public(name: str) -> bool:
    _, *parts = name.split(".")
    if parts[0] == "cli":
        return True
    if parts[0] == "models" and len(parts) > 1:
        return parts[1] in surgery.models.__all__
    if parts[0] == "storage":
        return parts[1:2] in ([], ["folders"])
    return parts[0] in surgery.__all__


def test_names_of_other_modules_are_seen_as_not_public():
    tree = ast.parse(
        "import surgery\nimport surgery.axes.groups\nfrom surgery.edit.apply import apply\nsurgery.slim(x)"
    )
    assert [(name, is_public(name)) for name in used(tree)] == [
        ("surgery.axes.groups", False),
        ("surgery.edit.apply.apply", False),
        ("surgery.slim", True),
    ]


def test_errors_speak_of_options(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "'mine:net' would import and run code: pass --trust if you trust it"
    assert run("inspect", "mine:net")[2] == f"error: {message}\n"


def test_help_shows_no_type_for_options_without_a_value(run):
    assert "<bool>" not in run("slim", "--help")[1]
    assert "<bool>" not in run("--help")[1]


def test_the_shell_completes_names_of_models(run):
    from surgery.cli.options import complete_model

    assert [name for name, _ in complete_model("resnet1")] == ["resnet18", "resnet101", "resnet152"]
