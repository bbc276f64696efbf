"""The C++ module has the interface that the stub file describes; a module with another one is rejected."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, get_args

import pytest

from cemg_kernels.constrained import softmax
from cemg_kernels.runtime import dispatch
from cemg_kernels.runtime.interface import STUB, check_interface, interface
from cemg_kernels.trie import arrays, filter_tensors

pytestmark = pytest.mark.skipif(not dispatch.native_available(), reason="the C++ is not built")
TREE = ast.parse(STUB.read_text())
ONLY_WITH_CUDA = {"launch_trie_kernel"}


def declared_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The declarations of a module or class by name."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


def public_names(value: Any) -> set[str]:
    return {name for name in vars(value) if not name.startswith("_")}


def declared_signature(function: ast.FunctionDef) -> list[str]:
    """The parameters of a stub's function: names, "*" before keyword-only ones, "=" after defaults."""
    arguments = function.args
    optional = len(arguments.args) - len(arguments.defaults)
    names = [a.arg + ("=" if i >= optional else "") for i, a in enumerate(arguments.args)]
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    only = [a.arg + ("" if default is None else "=") for a, default in keywords]
    return [*names, *(["*"] if only else []), *only]


def built_signature(function: Any) -> list[str]:
    """The same of a pybind11 function, from the first line of its docstring."""
    line = function.__doc__.splitlines()[0]
    inside = line[line.index("(") + 1 : line.rindex(") ->")]
    while "[" in inside:  # types such as Sequence[Linear] hold commas
        inside = re.sub(r"\[[^\[\]]*\]", "", inside)
    parts = [part.strip() for part in inside.split(",")] if inside else []
    return [part.split(":")[0].strip() + ("=" if "=" in part else "") for part in parts]


def functions() -> Iterator[tuple[str, ast.FunctionDef, Any]]:
    module = dispatch.native()
    for name, node in declared_in(TREE.body).items():
        if isinstance(node, ast.FunctionDef) and hasattr(module, name):
            yield name, node, getattr(module, name)
        if isinstance(node, ast.ClassDef):
            for method, declared in declared_in(node.body).items():
                if isinstance(declared, ast.FunctionDef) and not declared.decorator_list:
                    yield f"{name}.{method}", declared, getattr(getattr(module, name), method)


def test_the_stub_declares_exactly_the_members_of_the_module():
    module, declared = dispatch.native(), declared_in(TREE.body)
    optional = set() if module.build_info()["cuda"] else ONLY_WITH_CUDA
    assert public_names(module) == set(declared) - optional
    for name, node in declared.items():
        if isinstance(node, ast.ClassDef):
            members = {member for member in declared_in(node.body) if member != "__init__"}
            assert public_names(getattr(module, name)) == members, name


def test_the_stub_declares_the_parameters_of_every_function():
    checked = dict((name, (declared_signature(node), built_signature(f))) for name, node, f in functions())
    assert len(checked) > 30
    for name, (declared, built) in checked.items():
        assert declared == built, name


def test_the_enums_of_the_stub_have_the_values_of_the_module():
    module = dispatch.native()
    for name in ("Normalize", "Activation"):
        node = declared_in(TREE.body)[name]
        assert isinstance(node, ast.ClassDef)
        members = {m: ast.literal_eval(v.value) for m, v in declared_in(node.body).items()}  # type: ignore[attr-defined]
        assert {m.name: m.value for m in getattr(module, name)} == members


def test_the_constants_of_python_are_those_of_the_module():
    """Python keeps its own, because it also runs where the module is not built."""
    module = dispatch.native()
    assert module.MAX_LEVELS == arrays.MAX_LEVELS
    assert module.MAX_CODEBOOK_SIZE == arrays.MAX_CODEBOOK_SIZE
    assert module.MAX_NODES == arrays.MAX_NODES
    assert module.NO_NODE == filter_tensors.NO_NODE
    assert [name.upper() for name in get_args(softmax.Normalize)] == [m.name for m in module.Normalize]


def test_the_built_module_has_the_interface_of_the_stub():
    assert interface() == dispatch.native().INTERFACE
    check_interface(dispatch.native())


def test_importing_the_package_with_a_stale_module_says_to_build_it_again():
    program = (
        "import sys, types; stale = types.ModuleType('cemg_kernels._native'); stale.__file__ = 'old.so'; "
        "stale.INTERFACE = '0123'; sys.modules['cemg_kernels._native'] = stale; import cemg_kernels"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    last = ran.stderr.splitlines()[-1]
    assert last.startswith(
        "ImportError: the native module old.so was built for another version of cemg_kernels"
    )
    assert f"its interface is 0123, expected {interface()}" in last
    assert last.endswith("run pip install -e . again")


def test_a_command_with_a_stale_module_prints_the_fix_without_a_traceback():
    program = (
        "import sys, types; stale = types.ModuleType('cemg_kernels._native'); stale.__file__ = 'old.so'; "
        "stale.INTERFACE = '0123'; sys.modules['cemg_kernels._native'] = stale; "
        "from cemg.commands.doctor import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert ran.stderr.splitlines()[-1] == "  fix:   run pip install -e . again"


def test_a_module_without_an_interface_is_stale():
    old = ModuleType("cemg_kernels._native")
    old.__file__ = "old.so"
    with pytest.raises(ImportError, match="its interface is None"):
        check_interface(old)
