"""Presets, and the explanations of the settings.

The explanation of a setting is the string below the field of the dataclass that defines it.
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
    """List the names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_for(items: int) -> str:
    """The name of the preset for a catalog of this size."""
    return "small" if items <= 5_000 else "medium" if items < 100_000 else "large"


def preset(name: str) -> dict[str, Any]:
    """Read the settings of a preset, as sections of plain values.

    Raises:
        UserError: There is no preset of that name.
    """
    if name not in preset_names():
        raise UserError(f"unknown preset {name!r}", fix=f"use --preset {' or '.join(preset_names())}")
    settings: dict[str, Any] = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    return settings


def config_file(path: Path) -> Path:
    """Return ``path``, or the included configuration of that name if there is no such file."""
    is_name = str(path.parent) in (".", "configs") and path.suffix in ("", ".yaml")
    included = CONFIGS / f"{path.stem}.yaml"
    return included if is_name and not path.exists() and included.is_file() else path


def merged(defaults: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge two trees of settings. If both have a setting, ``overrides`` counts."""
    result = defaults | overrides
    for name in defaults.keys() & overrides.keys():
        if isinstance(defaults[name], dict) and isinstance(overrides[name], dict):
            result[name] = merged(defaults[name], overrides[name])
    return result


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
    """Map the fields of a dataclass to the strings below them in its source."""
    source = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(source, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, text in zip(source.body, source.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def explained(config: Any) -> str:
    """Format a configuration as YAML, with the explanation of every setting."""
    tree, texts = config.to_dict(), explanations(type(config))
    lines = ["# All settings of a run, for cemg-train --config."]
    sections = [name for name in tree if dataclasses.is_dataclass(getattr(config, name))]
    lines += [_line(name, value, texts[name]) for name, value in tree.items() if name not in sections]
    for name in sections:
        lines += ["", f"{name}:  # {texts[name]}"]
        section_texts = explanations(type(getattr(config, name)))
        lines += [f"  {_line(field, setting, section_texts[field])}" for field, setting in tree[name].items()]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any, text: str) -> str:
    flow = isinstance(value, list)
    dumped = yaml.safe_dump(value if flow else {name: value}, default_flow_style=flow, width=10**6).strip()
    return f"{name}: {dumped}  # {text}" if flow else f"{dumped}  # {text}"
