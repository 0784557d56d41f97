"""`_native.pyi` against the module that was built: the same names, arguments and defaults."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import zerofl

_native = pytest.importorskip("zerofl._native", reason="zerofl is installed without its native kernels")
STUB = ast.parse((Path(zerofl.__file__).parent / "_native.pyi").read_text())
TYPES = {"int", "float", "bool", "str", "Tensor", "None", "TopK", "AtLeast", "Geometry"}


def arguments(function: ast.FunctionDef) -> list[tuple[str, set[str], str | None]]:
    """Each argument's name, the plain types in its annotation, and its default."""
    given = function.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + [ast.unparse(d) for d in given.defaults]
    return [
        (arg.arg, set(re.findall(r"\w+", ast.unparse(arg.annotation or ast.Constant("")))) & TYPES, default)
        for arg, default in zip(given.args, defaults, strict=True)
    ]


def built(function: Any) -> ast.FunctionDef:
    """nanobind's own signature of a function that it made; its defaults stand beside it."""
    signature, _, defaults = function.__nb_signature__[0]
    signature = re.sub(r"(ndarray|Tensor)\[.*?\]", r"\1", signature)
    for i, default in enumerate(defaults or ()):
        signature = signature.replace(f"\\{i}", repr(default))
    (definition,) = ast.parse(f"{signature}: ...").body
    assert isinstance(definition, ast.FunctionDef)
    return definition


def compare(stub: ast.FunctionDef, function: Any) -> None:
    actual = built(function)
    assert arguments(actual) == arguments(stub)
    returned = [set(re.findall(r"\w+", ast.unparse(f.returns))) & TYPES for f in (actual, stub) if f.returns]
    assert returned[0] <= returned[1] | {"Tensor"}


FUNCTIONS = [node for node in STUB.body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_a_function_is_as_built(function: ast.FunctionDef) -> None:
    compare(function, getattr(_native, function.name))


@pytest.mark.parametrize("of", [node for node in STUB.body if isinstance(node, ast.ClassDef)], ids=lambda c: c.name)
def test_a_class_is_as_built(of: ast.ClassDef) -> None:
    made = getattr(_native, of.name)
    members = {node.name: node for node in of.body if isinstance(node, ast.FunctionDef)}
    assert members.keys() == {"__init__"} | {name for name in vars(made) if not name.startswith("__")}
    for name, member in members.items():
        if member.decorator_list:
            assert isinstance(getattr(made, name), property)
        else:
            compare(member, getattr(made, name))


def test_nothing_is_missing() -> None:
    listed = {node.name for node in STUB.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert listed == {name for name in vars(_native) if not name.startswith("__")}
