"""What is installed: versions, extras, and parts that do not belong together.

Read from metadata and files: importing torch takes seconds, and importing what is broken may end
this process.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from vembed.config import TrainConfig
from vembed.errors import shorten
from vembed.training.environment.finding import Finding

_TIMEOUT_S = 60
_TRACKERS = {"wandb": "wandb", "swanlab": "swanlab", "tensorboard": "tensorboard"}

VersionOf = Callable[[str], str | None]
"""The installed version of a distribution; None where it is not installed."""


def installed_version(distribution: str) -> str | None:
    """The version of an installed package, by its metadata."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_python(version: tuple[int, ...] = sys.version_info[:3], *, bits: int = 64) -> Finding:
    """Whether this Python is one that vembed is written for.

    Args:
        version: Its version.
        bits: Of its addresses.
    """
    shown = ".".join(map(str, version))
    if version < (3, 11) or bits < 64:
        found = f"Python {shown}, {bits} bits"
        return Finding("Python", "problem", found, "vembed needs Python 3.11 or later, 64 bits")
    return Finding("Python", "ok", f"{shown}, {platform.system()} {platform.machine()}")


def check_versions(
    version_of: VersionOf = installed_version, requirements: list[str] | None = None
) -> Finding:
    """Whether every package that vembed needs is there, in a version that it works with.

    Args:
        version_of: What is installed.
        requirements: As `pyproject.toml` has them; None for those of the installed vembed.
    """
    name = "packages"
    if requirements is None:
        requirements = metadata.requires("vembed") or []
    wanted = [r for r in map(Requirement, requirements) if _applies(r)]
    wrong = []
    for requirement in wanted:
        version = version_of(requirement.name)
        if version is None:
            wrong.append(f"{requirement} is not installed")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} is needed, {version} is installed")
    if wrong:
        missing = " ".join(f"'{line.split(' is ')[0]}'" for line in wrong)
        return Finding(name, "problem", "; ".join(wrong), f"pip install {missing}")
    return Finding(name, "ok", f"{len(wanted)} of {len(wanted)} in versions that fit")


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def check_extras(config: TrainConfig, version_of: VersionOf = installed_version) -> Finding:
    """Packages that only some settings need.

    Args:
        config: Reads `report_to`, `lora_quantization`, `attn_implementation`.
        version_of: What is installed.
    """
    name = "extras"
    needed = {_TRACKERS[tracker]: f"report_to: {tracker}" for tracker in config.report_to}
    if config.lora_quantization is not None:
        needed["bitsandbytes"] = f"lora_quantization: {config.lora_quantization}"
    if config.attn_implementation == "flash_attention_2":
        needed["flash-attn"] = "attn_implementation: flash_attention_2"
    if missing := {package: why for package, why in needed.items() if version_of(package) is None}:
        found = "; ".join(f"{why} needs {package}" for package, why in missing.items())
        return Finding(name, "problem", found, f"pip install {' '.join(missing)}")
    absent = [package for package in _TRACKERS.values() if version_of(package) is None]
    if absent:
        remedy = "For trackers: pip install 'vembed[trackers]'"
        return Finding(name, "warning", f"not installed: {', '.join(absent)}", remedy)
    return Finding(name, "ok", ", ".join(_TRACKERS))


def check_torchvision(
    version_of: VersionOf = installed_version, command: list[str] | None = None
) -> Finding:
    """Whether torchvision fits torch: a wheel of another build breaks transformers' models too.

    vembed does without it.

    Args:
        version_of: What is installed.
        command: What imports it, in a process of its own; None for this Python.
    """
    name, version = "torchvision", version_of("torchvision")
    if version is None:
        return Finding(name, "ok", "not installed; vembed does not need it")
    remedy = "pip uninstall torchvision, which vembed does not need; or install the build for torch"
    torch, found = version_of("torch") or "none", f"{version} beside torch {version_of('torch')}"
    builds = [build for _, _, build in (v.partition("+") for v in (version, torch))]
    if all(builds) and builds[0] != builds[1]:
        return Finding(name, "problem", f"{found}: built for another one", remedy)
    done = _run(command or [sys.executable, "-c", "import torchvision"])
    if done.status:
        return Finding(name, "problem", f"{found} cannot be imported: {done.last_line}", remedy)
    return Finding(name, "ok", f"{found} can be imported")


class TorchBuild(NamedTuple):
    """What torch was built for, by its `version.py`; None where it was not."""

    version: str
    cuda: str | None
    hip: str | None


def torch_build() -> TorchBuild | None:
    """What the installed torch was built for; None where there is none."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(__version__|cuda|hip)\b[^=]*= '([^']*)'", text, re.MULTILINE))
    return TorchBuild(found.get("__version__", ""), found.get("cuda"), found.get("hip"))


def check_gpu(
    config: TrainConfig,
    build: TorchBuild | None = None,
    *,
    smi: list[str] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Finding:
    """Whether there is a GPU, and its driver and torch fit each other.

    Args:
        config: Reads `device`.
        build: What torch was built for; None looks.
        smi: The command that tells of the driver; None for `nvidia-smi` where it is installed.
        environment: Reads `CUDA_VISIBLE_DEVICES`.
    """
    name, build = "GPU", build or torch_build()
    if build is None:
        return Finding(name, "problem", "torch is not installed", "pip install torch")
    program = shutil.which("nvidia-smi")
    command = smi or ([program] if program else None)
    if command is None:
        return Finding(name, "ok", f"none by NVIDIA; torch {build.version}")
    done = _run(command)
    if done.status:
        found = f"nvidia-smi fails: {done.last_line}"
        return Finding(
            name, "problem", found, "Install or reload the driver; reboot if it was updated"
        )
    return _judge_driver(done.text, config, build, environment)


def _judge_driver(
    text: str, config: TrainConfig, build: TorchBuild, environment: Mapping[str, str]
) -> Finding:
    name = "GPU"
    version = re.search(r"CUDA(?: UMD)? Version:\s*(\d+)\.(\d+)", text)
    driver = re.search(r"Driver Version:\s*([\d.]+)", text)
    shown = f"driver {driver[1] if driver else 'unknown'}, torch {build.version}"
    if config.device == "cpu":
        return Finding(name, "ok", f"{shown}; device: cpu leaves it alone")
    if build.cuda is None:
        found = f"{shown}, which is built without CUDA: runs would use the CPU"
        return Finding(
            name, "problem", found, "Install torch for CUDA, see pytorch.org/get-started"
        )
    if version and int(version[1]) < int(build.cuda.partition(".")[0]):
        found = (
            f"{shown} for CUDA {build.cuda}, but the driver is for CUDA {version[1]}.{version[2]}"
        )
        remedy = f"Update the driver, or install torch for CUDA {version[1]}"
        return Finding(name, "problem", found, remedy)
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "none", "NoDevFiles"):
        found = f"{shown}; CUDA_VISIBLE_DEVICES hides it"
        return Finding(name, "warning", found, "unset CUDA_VISIBLE_DEVICES")
    return Finding(name, "ok", shown)


class _Done(NamedTuple):
    """A command that has ended; status 1 also where it could not be run or did not end."""

    status: int
    text: str

    @property
    def last_line(self) -> str:
        return shorten(next(self._lines(), "it says nothing"), most=200)

    def _lines(self) -> Iterator[str]:
        return (line for line in reversed(self.text.splitlines()) if line.strip())


def _run(command: list[str]) -> _Done:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _Done(1, f"it does not end within {_TIMEOUT_S} seconds")
    except OSError as error:
        return _Done(1, str(error))
    return _Done(done.returncode, done.stdout.decode("utf-8", "replace"))
