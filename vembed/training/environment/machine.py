"""The machine: processors, memory that processes share, disks, limits, language."""

from __future__ import annotations

import locale
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from vembed.config import TrainConfig
from vembed.training.environment.finding import Finding, Level

_MB, _GB = 2**20, 2**30

_LEAST_SHARED = 512 * _MB
_LEAST_FILES = 1024
_LEAST_SPACE, _SOME_SPACE = 1 * _GB, 10 * _GB
_WRITTEN = 16 * _MB
_SLOW_MB_PER_S = 20
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_SHARED = Path("/dev/shm")  # noqa: S108 - it is looked at, not written


def check_threads(
    config: TrainConfig,
    environment: Mapping[str, str] = os.environ,
    *,
    cores: int | None = None,
    quota: float | None = None,
) -> Finding:
    """Whether more threads compute than processors may be used.

    Args:
        config: Reads `num_processes`.
        environment: Reads `OMP_NUM_THREADS`.
        cores: Processors that this process may run on; None looks.
        quota: Processors' worth of time that a container may use; None looks.
    """
    name = "threads"
    cores = cores or usable_cores()
    quota = cpu_quota() if quota is None else quota
    processes = config.num_processes or 1
    asked = environment.get("OMP_NUM_THREADS", "")
    # Of several processes, vembed's own launcher gives each its share.
    threads = int(asked) if asked.isdecimal() else max(1, cores // processes)
    usable = min(cores, quota)
    fair = max(1, int(usable / processes))
    found = f"{processes} x {threads} on {usable:g} processors"
    if asked and not asked.isdecimal():
        found = f"OMP_NUM_THREADS is {asked!r}, no number"
        return Finding(name, "problem", found, f"export OMP_NUM_THREADS={fair}")
    if processes * threads > max(1.0, usable) * 1.25:
        if quota < cores:
            found += f" ({cores} are seen, the container may use {quota:g})"
        return Finding(name, "warning", found, f"export OMP_NUM_THREADS={fair}")
    if asked and threads * processes * 4 <= usable:
        remedy = f"export OMP_NUM_THREADS={fair}, unless a GPU computes"
        return Finding(name, "warning", found, remedy)
    return Finding(name, "ok", found)


def usable_cores() -> int:
    """Processors that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(file: Path = _QUOTA) -> float:
    """Processors' worth of time that the container may use; infinite without a limit."""
    try:
        quota, period = file.read_text(encoding="ascii").split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")


def check_tokenizers(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> Finding:
    """Whether texts are tokenised by all processors; vembed sees to it unless told otherwise.

    Args:
        config: Reads `num_workers`: workers are processes already.
        environment: Reads `TOKENIZERS_PARALLELISM`, `RAYON_NUM_THREADS`.
    """
    name = "tokenizers"
    switch = environment.get("TOKENIZERS_PARALLELISM")
    off = switch is not None and switch.lower() in ("", "off", "false", "f", "no", "n", "0")
    keys = ["TOKENIZERS_PARALLELISM"] if off else []
    keys += ["RAYON_NUM_THREADS"] if environment.get("RAYON_NUM_THREADS") == "1" else []
    if keys and not config.num_workers:
        shown = ", ".join(f"{key}={environment[key]}" for key in keys)
        remedy = f"unset {' '.join(keys)}, or set num_workers"
        return Finding(name, "warning", f"{shown}: one thread tokenises", remedy)
    where = f"{config.num_workers} workers" if config.num_workers else "several threads"
    return Finding(name, "ok", f"{where} tokenise")


def check_shared_memory(config: TrainConfig, folder: Path = _SHARED) -> Finding:
    """Whether loader's workers can hand batches over; containers have 64 MB unless told.

    Args:
        config: Reads `num_workers`.
        folder: Where the memory is.
    """
    name = "shared memory"
    if sys.platform != "linux":
        return Finding(name, "ok", f"not by {folder} on {sys.platform}")
    remedy = "Start the container with --shm-size=8g or --ipc=host, or set num_workers: 0"
    level: Level = "problem" if config.num_workers else "warning"
    try:
        stat = os.statvfs(folder)
    except OSError as error:
        return Finding(name, level, f"{folder}: {error.strerror}", remedy)
    free = stat.f_bavail * stat.f_frsize
    found = f"{free / _MB:,.0f} MB free in {folder}"
    if free < _LEAST_SHARED or not os.access(folder, os.W_OK):
        return Finding(name, level, f"{found}; workers use it", remedy)
    return Finding(name, "ok", found)


def check_files(config: TrainConfig, limit: int | None = None) -> Finding:
    """Whether enough files may be open at once for workers, shards and stored rows.

    Args:
        config: Reads `num_workers`.
        limit: How many; None looks.
    """
    name = "open files"
    if limit is None:
        limit = _file_limit()
    needed = _LEAST_FILES + 64 * config.num_workers
    if limit < needed:
        level: Level = "problem" if limit < 256 else "warning"
        return Finding(name, level, f"at most {limit:,}", f"ulimit -n {max(4096, needed)}")
    return Finding(name, "ok", f"at most {limit:,}")


def _file_limit() -> int:
    if sys.platform == "win32":
        return 8192
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def check_output_dir(config: TrainConfig, *, free: int | None = None) -> Finding:
    """Whether `output_dir` can be written, has room, and is not slow.

    Writes 16 MB into the nearest folder that exists, and removes them.

    Args:
        config: Reads `output_dir`.
        free: Bytes that are free; None looks.
    """
    name = "disk of output_dir"
    target = Path(config.output_dir).absolute()
    folder = next(path for path in (target, *target.parents) if path.exists())
    try:
        stat = os.statvfs(folder)
        free = stat.f_bavail * stat.f_frsize if free is None else free
        found = f"{folder}: {free / _GB:,.1f} GB free"
        if free < _LEAST_SPACE or (stat.f_files and not stat.f_favail):
            return Finding(name, "problem", found, "Make room, or name another output_dir")
        speed = _write_speed(folder)
    except OSError as error:
        found = f"{folder} cannot be written: {error.strerror}"
        return Finding(name, "problem", found, "Name an output_dir that can be written")
    found = f"{found}, {speed:,.0f} MB/s"
    if speed < _SLOW_MB_PER_S:
        remedy = "Checkpoints will take long: name an output_dir on a local disk"
        return Finding(name, "warning", found, remedy)
    if free < _SOME_SPACE:
        remedy = (
            "Checkpoints may not fit: a model in float32 and its optimizer are 12 bytes a number"
        )
        return Finding(name, "warning", found, remedy)
    return Finding(name, "ok", found)


def _write_speed(folder: Path) -> float:
    """MB per second that reach the disk."""
    block = os.urandom(_MB)
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_WRITTEN // _MB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return _WRITTEN / _MB / (time.perf_counter() - started)


def check_locale(encodings: Mapping[str, str] | None = None) -> Finding:
    """Whether texts and names of files are UTF-8 everywhere.

    Args:
        encodings: By what they are for; None looks.
    """
    name = "locale"
    if encodings is None:
        encodings = {
            "files": locale.getpreferredencoding(do_setlocale=False),
            "names": sys.getfilesystemencoding(),
            "output": sys.stdout.encoding or "utf-8",
        }
    wrong = {k: v for k, v in encodings.items() if v.lower().replace("-", "") != "utf8"}
    if wrong:
        found = ", ".join(f"{kind} are {encoding}" for kind, encoding in wrong.items())
        return Finding(name, "warning", found, "export LANG=C.UTF-8, or PYTHONUTF8=1")
    return Finding(name, "ok", "UTF-8")
