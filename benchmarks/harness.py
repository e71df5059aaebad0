"""Measure several ways to do one thing side by side, in turns, and write down on what machine.

Each *variant* lives in a process of its own, so that its peak of memory is its own, and stays there
for all rounds. A round is the same work for every variant, done one after the other (A B C, A B C):
what else runs on the machine then meets all of them alike, and ratios are taken within a round. The
first round warms up and is not counted.

A variant is a function at the top level of a script. It sets up, then works once for each pass:

    def run_ours(meter, *, size):
        model = build(size)
        for _ in meter:
            model.step()

CPU time is the measure to read on a machine that does other work too; wall time is given beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil

PEER = "peer"
"""Name of a variant that needs sentence-transformers."""

PEER_PACKAGE = "sentence-transformers"
PACKAGES = ("torch", "transformers", "accelerate", PEER_PACKAGE)

_PRELOADED = [
    "torch",
    "transformers.models.bert.modeling_bert",
    "vembed.training.run",
    "vembed.inference",
    "sentence_transformers",
]
"""Imported once by the process that variants are forked from."""


@dataclass(frozen=True)
class Variant:
    """A way to do the work.

    Attributes:
        name: As the table shows it.
        run: `run(meter, **settings)`, at the top level of a module.
        settings: Its keyword arguments.
    """

    name: str
    run: Callable[..., None]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """One round of one variant.

    Attributes:
        cpu_s: CPU time of the process, of its children that ended, and what it told of others.
        wall_s: Time on the clock.
        peak_mib: Peak of memory above what was in use before the first round: of the accelerator
            where there is one, else resident memory.
        tokens: What the encoder was given, padding and repetition included.
    """

    cpu_s: float
    wall_s: float
    peak_mib: float
    tokens: int


class Meter:
    """In a variant's process: gives out rounds and measures them."""

    def __init__(self, pipe: Connection, folder: Path, name: str, device: str) -> None:
        self._pipe = pipe
        self._folder = folder
        self._name = name
        self._device = device
        self._base: int | None = None
        self._started: tuple[float, float] | None = None
        self._other_cpu_s = 0.0
        self.tokens = 0

    def __iter__(self) -> Iterator[None]:
        """One pass for each round, and one before them to warm up."""
        while True:
            self.start()
            yield
            self.stop()

    def start(self) -> None:
        """Wait for this variant's turn; then a round begins. At the end of all, end the program."""
        gc.collect()
        self._pipe.send(("ready", None))
        try:
            self._pipe.recv()
        except EOFError:
            raise SystemExit from None
        if self._base is None:
            self._base = _used_bytes(self._device)
        _reset_peak(self._device)
        self.tokens, self._other_cpu_s = 0, 0.0
        self._started = time.perf_counter(), _cpu_seconds()

    def stop(self) -> None:
        """End the round, if one has begun."""
        if self._started is None or self._base is None:
            return
        _synchronize(self._device)
        wall, cpu = self._started
        spent = _cpu_seconds() - cpu + self._other_cpu_s
        wall = time.perf_counter() - wall
        peak = (_peak_bytes(self._device) - self._base) / 2**20
        self._started = None
        self._pipe.send(("round", Round(spent, wall, peak, self.tokens)))

    def tell(self, **facts: float | str) -> None:
        """A fact about the variant, to be shown or compared."""
        self._pipe.send(("facts", facts))

    def show(self, what: str, values: Any) -> None:
        """Numbers that must be the same for every variant that shows them."""
        np.save(self._folder / f"{what}@{self._name}.npy", np.asarray(values, np.float32).ravel())

    def add_cpu(self, seconds: float) -> None:
        """CPU time that other processes spent on this round."""
        self._other_cpu_s += seconds

    def count_tokens(self, model: Any) -> None:
        """Count what a transformers model is given from now on."""
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        self.tokens += inputs[0].numel()


@dataclass(frozen=True)
class Comparison:
    """What was measured of some variants.

    Attributes:
        title: What the work was.
        unit: What is counted.
        units: How many of it are in a round.
        rounds: By variant; the first variant is what others are compared with.
        facts: What variants told, by variant.
        differences: How far each variant's numbers are from those of the first, relative: by
            variant, what was compared.
    """

    title: str
    unit: str
    units: int
    rounds: dict[str, list[Round]]
    facts: dict[str, dict[str, Any]]
    differences: dict[str, dict[str, float]]

    def median(self, name: str, what: str) -> float:
        return statistics.median(getattr(r, what) for r in self.rounds[name])

    def ratios(self, name: str, what: str = "cpu_s") -> list[float]:
        """A variant's time for each round, over that of the first variant."""
        own, first = self.rounds[name], next(iter(self.rounds.values()))
        return [getattr(a, what) / getattr(b, what) for a, b in zip(own, first, strict=True)]

    def markdown(self) -> str:
        """A table; `times` is how much longer a variant takes than the first, by CPU time."""
        first = next(iter(self.rounds))
        real = [facts["real_tokens"] for facts in self.facts.values() if "real_tokens" in facts]
        extra = sorted({key for f in self.facts.values() for key in f} - {"real_tokens"})
        shown = sorted({key for d in self.differences.values() for key in d})
        rates = ["CPU s", "s"]
        if self.units > 1:
            rates = [f"{self.unit} per CPU-s", f"{self.unit} per s"]
        head = [self.title, *rates, f"CPU time / {first}"]
        head += ["wall time", "peak MiB", *(["tokens / real"] if real else []), *extra]
        head += [f"difference of {what}" for what in shown]
        lines = [_row(head), _row(["---"] * len(head))]
        for name in self.rounds:
            cells = [name, *(_number(self._rate(name, what)) for what in ("cpu_s", "wall_s"))]
            cells.append(_spread(self.ratios(name)) if name != first else "1")
            cells.append(_spread(self.ratios(name, "wall_s")) if name != first else "1")
            peak = self.median(name, "peak_mib")
            cells.append(f"{peak:,.0f}" if peak >= 1 else "")
            if real:
                tokens = self.median(name, "tokens")
                cells.append(f"{tokens / real[0]:.2f}" if tokens else "")
            cells += [_number(self.facts.get(name, {}).get(key, "")) for key in extra]
            found = self.differences.get(name, {})
            cells += [f"{found[what]:.1e}" if what in found else "" for what in shown]
            lines.append(_row(cells))
        return "\n".join(lines)

    def _rate(self, name: str, what: str) -> float:
        median = max(self.median(name, what), 1e-9)
        return self.units / median if self.units > 1 else median


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


@dataclass(frozen=True)
class Bench:
    """How this run measures.

    Attributes:
        rounds: That count.
        threads: Of each variant.
        device: Where models run.
        only: Names of variants to measure; empty for all.
        results: Where rows of JSON are added; None for nowhere.
    """

    rounds: int = 5
    threads: int = 1
    device: str = "cpu"
    only: tuple[str, ...] = ()
    results: Path | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Bench:
        rounds = arguments.rounds or (1 if arguments.quick else 5)
        variants = tuple(arguments.variants or ())
        return cls(rounds, arguments.threads, arguments.device, variants, arguments.json)

    def compare(
        self,
        title: str,
        variants: Sequence[Variant],
        *,
        units: int,
        unit: str,
        tolerance: float = 1e-4,
        warm_up: bool = True,
    ) -> Comparison:
        """Measure variants in turns, print their table and return it.

        Args:
            title: What the work is.
            variants: Those named in `only` are measured.
            units: How many of `unit` a round has.
            unit: What is counted, such as pairs.
            tolerance: Largest relative difference of what variants show.
            warm_up: Whether the first round is left out.

        Raises:
            RuntimeError: if a variant fails, or shows other numbers than the first.
        """
        chosen = self._choose(variants)
        with tempfile.TemporaryDirectory(prefix="vembed-bench-") as folder:
            workers = [_Worker(v, self, Path(folder)) for v in chosen]
            try:
                for worker in workers:
                    worker.wait_until_ready()
                differences = _differences(Path(folder), [v.name for v in chosen])
                _check_differences(title, differences, tolerance)
                for number in range(self.rounds + warm_up):
                    for worker in workers:
                        worker.do_round(counts=number >= warm_up)
            finally:
                for worker in workers:
                    worker.end()
        found = Comparison(
            title,
            unit,
            units,
            {w.name: w.rounds for w in workers},
            {w.name: w.facts for w in workers},
            differences,
        )
        print(f"\n{found.markdown()}", flush=True)
        if self.results is not None:
            self._write(found)
        return found

    def _choose(self, variants: Sequence[Variant]) -> list[Variant]:
        chosen = [v for v in variants if not self.only or v.name in self.only]
        if _version(PEER_PACKAGE) == "absent":
            print(f"{PEER_PACKAGE} is not installed: nothing to compare with")
            chosen = [v for v in chosen if v.name != PEER]
        if not chosen:
            raise SystemExit(f"--variants: there are {', '.join(v.name for v in variants)}")
        return chosen

    def _write(self, found: Comparison) -> None:
        assert self.results is not None
        self.results.parent.mkdir(parents=True, exist_ok=True)
        row = {"machine": describe_machine(self), **asdict(found)}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class _Worker:
    """A variant's process, seen from outside."""

    def __init__(self, variant: Variant, bench: Bench, folder: Path) -> None:
        self.name = variant.name
        self.rounds: list[Round] = []
        self.facts: dict[str, Any] = {}
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, variant, folder, bench.threads, bench.device)
        )
        self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        while (message := self._receive())[0] != "ready":
            self.facts |= message[1] if message[0] == "facts" else {}

    def do_round(self, *, counts: bool) -> None:
        self._pipe.send("go")
        while (message := self._receive())[0] != "ready":
            if message[0] == "facts":
                self.facts |= message[1]
            elif counts:
                self.rounds.append(message[1])

    def end(self) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        self._process.kill()
        self._process.join()

    def _receive(self) -> tuple[str, Any]:
        try:
            kind, content = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}: the process died without a word") from None
        if kind == "failed":
            raise RuntimeError(f"{self.name} failed:\n{content}")
        return kind, content


_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",  # more threads than were asked for
}


def _context() -> Any:
    os.environ.update(_QUIET)
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(_PRELOADED)
    return context


def call_apart(function: Callable[..., Any], *arguments: Any) -> None:
    """Call it in a process that has torch loaded already, which this one need not have."""
    process = _context().Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} failed; see above")


def _work(pipe: Connection, variant: Variant, folder: Path, threads: int, device: str) -> None:
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    gc.freeze()  # or each collection before a round looks at all that was imported
    try:
        variant.run(Meter(pipe, folder, variant.name, device), **variant.settings)
    except Exception:
        pipe.send(("failed", traceback.format_exc()))


def _end_with_parent() -> None:
    """Or a long step would go on after Ctrl-C."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)


def _differences(folder: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Relative distance of what each variant showed from what the first one did."""
    found: dict[str, dict[str, float]] = {}
    for name in names[1:]:
        for file in sorted(folder.glob(f"*@{name}.npy")):
            what = file.name.partition("@")[0]
            other = folder / f"{what}@{names[0]}.npy"
            if other.is_file():
                own, first = np.load(file), np.load(other)
                distance = np.linalg.norm(own - first) / np.linalg.norm(first)
                found.setdefault(name, {})[what] = float(distance)
    return found


def _check_differences(
    title: str, differences: dict[str, dict[str, float]], tolerance: float
) -> None:
    for name, found in differences.items():
        for what, distance in found.items():
            # Not-a-number must fail too.
            if not distance <= tolerance:
                raise RuntimeError(
                    f"{title}: {what} of {name!r} differs by {distance:.1e}, more than "
                    f"{tolerance:.0e}: these do not do the same work"
                )


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _used_bytes(device: str) -> int:
    if device != "cpu":
        import torch

        return int(torch.accelerator.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def _reset_peak(device: str) -> None:
    if device != "cpu":
        import torch

        torch.accelerator.reset_peak_memory_stats(device)
        return
    # Linux; elsewhere the peak is that of the process so far.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak_bytes(device: str) -> int:
    if device != "cpu":
        import torch

        return int(torch.accelerator.max_memory_allocated(device))
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024


def _synchronize(device: str) -> None:
    if device != "cpu":
        import torch

        torch.accelerator.synchronize(device)


def describe_machine(bench: Bench) -> dict[str, Any]:
    """Where and with what a measurement was taken."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load": os.getloadavg()[0],
        "threads": bench.threads,
        "device": bench.device if bench.device == "cpu" else _accelerator(bench.device),
        "rounds": bench.rounds,
        "python": sys.version.split()[0],
        **{name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    """Its name, and which of the instructions that matter here it has."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = facts.get("flags", "").split()
    return f"{facts.get('model name', '?')} ({' '.join(w for w in wanted if w in flags)})"


def _accelerator(device: str) -> str:
    import torch

    driver = Path("/proc/driver/nvidia/version")
    words = driver.read_text().split() if driver.is_file() else []
    number = next((w for w in words if w.count(".") == 2 and w[0].isdigit()), "?")
    return f"{torch.cuda.get_device_name(device)}, driver {number}, CUDA {torch.version.cuda}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def show_machine(bench: Bench) -> None:
    print("  ".join(f"{name} {value}" for name, value in describe_machine(bench).items()))


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of little work")
    parser.add_argument("--rounds", type=int, help="that count (default 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--variants", nargs="+", help="measure these only")
    parser.add_argument("--json", type=Path, help="file that a line is added to for each table")
    parser.add_argument("--model", help="folder of a text encoder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--tokens", type=int, help="most of a text, where a case has more")
    parser.add_argument("--pairs", type=Path, help="JSONL of query and positive to take instead")
    return parser
