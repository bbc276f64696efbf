"""Presets, and the explanation of every setting.

A field of a configuration is explained by the string below it, where it is defined.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cemg.errors import UserError

PRESETS, CONFIGS = (Path(__file__).parent / name for name in ("presets", "configs"))


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset, as sections of plain values. UserError for an unknown name."""
    if name not in preset_names():
        raise UserError(f"unknown preset {name!r}", fix=f"--preset {' or '.join(preset_names())}")
    settings: dict[str, Any] = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    return settings


def config_file(path: Path) -> Path:
    """``path``, or where there is no such file, the installed configuration of that name: beauty, ml-100k."""
    named = str(path.parent) in (".", "configs") and path.suffix in ("", ".yaml")
    installed = CONFIGS / f"{path.stem}.yaml"
    return installed if named and not path.exists() and installed.is_file() else path


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Both trees; where both have a setting, that of ``over``."""
    both = under | over
    for name in under.keys() & over.keys():
        if isinstance(under[name], dict) and isinstance(over[name], dict):
            both[name] = merged(under[name], over[name])
    return both


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; a tuple is the list that JSON makes of it."""
    parts: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            parts |= flat(value, f"{prefix}{name}.")
        else:
            parts[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return parts


def explanations(kind: type) -> dict[str, str]:
    """Field name to the string that stands below the field in the source of dataclass ``kind``."""
    source = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(source, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(source.body, source.body[1:], strict=False):
        named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if named and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
    return found


def explained(config: Any) -> str:
    """Every setting of a configuration with its value and its explanation, as YAML of the same."""
    tree, about = config.to_dict(), explanations(type(config))
    lines = ["# All settings of a run, as cemg-train --config reads them."]
    sections = [name for name in tree if dataclasses.is_dataclass(getattr(config, name))]
    lines += [_line(name, value, about[name]) for name, value in tree.items() if name not in sections]
    for name in sections:
        lines += ["", f"{name}:  # {about[name]}"]
        inner = explanations(type(getattr(config, name)))
        lines += [f"  {_line(field, setting, inner[field])}" for field, setting in tree[name].items()]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any, text: str) -> str:
    flow = isinstance(value, list)
    written = yaml.safe_dump(value if flow else {name: value}, default_flow_style=flow, width=10**6).strip()
    return f"{name}: {written}  # {text}" if flow else f"{written}  # {text}"
