"""Measures whatever device JAX finds: `python -m benchmarks.accelerator --help`.

First whether it computes what the CPU does; then its peaks; then training steps of graphs in
variants, ours and PyTorch's, in turns. It needs no more than the library itself does to be
imported, makes its own data, and ends in time: what does not fit is left out, and said.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks.agreement import checks
from benchmarks.device_cases import Case, table, variants_of
from benchmarks.device_peaks import peaks
from benchmarks.machine import cores, machine
from benchmarks.task import Task, Variant
from experiments.runs.console import make_console
from ktg_jax.errors import InputError, RunError
from ktg_jax.io.files import write_text
from ktg_jax.models import check_model

PAPERS = "resnet32+resnet110+wrn28_2"
GRAPHS = ("resnet32+resnet32", PAPERS, "+".join(["resnet32"] * 7))
CPU_GRAPHS = ("resnet8+resnet14+wrn10_1", "resnet8+resnet8")
QUICK_GRAPHS = ("resnet8+resnet8",)

_MEMORY_SHARE = "0.5"
"""Of the device's memory, what JAX takes at once; PyTorch needs the rest."""
_FILE_WIDTH = 160
_CASE_SECONDS = 30
"""What a graph needs at least."""
_EXAMPLES = """examples:
  python -m benchmarks.accelerator
  python -m benchmarks.accelerator --quick --json device.json
  python -m benchmarks.accelerator --parts steps --graphs resnet32+resnet32 --batch-sizes 512"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    quick: bool
    json: str | None
    minutes: float
    parts: list[str]
    graphs: list[str]
    batch_sizes: list[int]
    variants: list[str] | None
    image_size: int
    rounds: int
    compilers: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the command line asks for; returns the exit code."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _MEMORY_SHARE)
    try:
        options = _parsed(arguments)
        content = Measurement(
            options, make_console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
        ).run()
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return _exit_code(content)


def _parsed(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description="Measure the device that JAX finds: does it compute what the CPU does, and "
        "how fast are training steps, beside PyTorch's where that is installed?",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    on_cpu = jax.default_backend() == "cpu"
    add = parser.add_argument
    add("--quick", action="store_true", help="one small graph, few rounds")
    add("--json", metavar="FILE", help="file for the figures, written again after every result")
    add("--minutes", type=float, default=8.0, help="what is not done by then is left out (8)")
    add(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="what to do, in that order (all)",
    )
    add("--graphs", nargs="+", metavar="GRAPH", help="models joined by +, all learning mutually")
    add("--batch-sizes", nargs="+", type=int, metavar="B", help="images a step (64 and 512)")
    add("--variants", nargs="+", metavar="V", help="what to measure, as 'fused tf32 x20' (all)")
    add("--image-size", type=int, default=32, metavar="PIXELS", help="pixels a side (32)")
    add("--rounds", type=int, help="turns of each variant that count (7; quick: 3)")
    default = max(cores() // 2, 1)
    add("--compilers", type=int, default=default, help=f"variants compiled at once ({default})")
    given = vars(parser.parse_args(arguments))
    few = QUICK_GRAPHS if given["quick"] else CPU_GRAPHS if on_cpu else GRAPHS
    given["graphs"] = given["graphs"] or list(few)
    default_sizes = [64] if given["quick"] or on_cpu else [64, 512]
    given["batch_sizes"] = given["batch_sizes"] or default_sizes
    given["rounds"] = given["rounds"] or (3 if given["quick"] else 7)
    options = Options(**given)
    _check(options)
    return options


def _check(options: Options) -> None:
    """Raises InputError for the first option that is out of range."""
    for graph in options.graphs:
        for model in graph.split("+"):
            check_model(model)
    for size in options.batch_sizes:
        if size < 1:
            raise InputError("batch_sizes", size, "at least 1")
    for graph in options.graphs:
        known = [str(v) for v in variants_of(graph.split("+"), jax.default_backend())]
        for name in options.variants or ():
            if name not in known:
                raise InputError("variants", name, ", ".join(known))
    for field in ("image_size", "rounds", "compilers"):
        if getattr(options, field) < 1:
            raise InputError(field, getattr(options, field), "at least 1")
    if not options.minutes > 0:
        raise InputError("minutes", options.minutes, "above 0")
    if options.json is not None and not os.access(Path(options.json).absolute().parent, os.W_OK):
        raise InputError("json", options.json, "a file in a folder that can be written")


class Measurement:
    """All that is measured on the first device.

    Args:
        options: what is asked for.
        console: where it is said.
    """

    def __init__(self, options: Options, console: Console) -> None:
        self._options, self._console = options, console
        self._end = time.monotonic() + 60 * options.minutes
        self._device = jax.devices()[0]
        self._content: dict[str, Any] = {
            "device": f"{self._device.device_kind} ({self._device.platform})",
            "machine": machine(),
            "checks": [],
            "peaks": {},
            "cases": [],
            "left_out": [],
            "failed": False,
        }

    def run(self) -> dict[str, Any]:
        """Does all parts; returns what is written to the file."""
        self._say(f"Device: {self._content['device']}; jax {jax.__version__}")
        timer = threading.Timer(self._left(), self._end_now)
        timer.daemon = True
        timer.start()
        try:
            for part in self._options.parts:
                PARTS[part](self)
        finally:
            timer.cancel()
        return self._content

    def _end_now(self) -> None:
        """Ends the process, whatever the compiler or the device are doing."""
        self._leave_out("all that was not measured", "no time left")
        sys.stdout.flush()
        os._exit(_exit_code(self._content))

    def agreement(self) -> None:
        """Compares the device with the CPU."""
        for check in checks(self._device, self._options.compilers):
            self._content["checks"].append(check._asdict() | {"passed": check.passed})
            self._save()
            verdict = "agrees" if check.passed else "DIFFERS"
            error = f"error {check.error:.2g} (allowed {check.allowed:.2g})"
            self._say(f"{verdict}: {check.what}, {check.precision}: {error}")

    def peaks(self) -> None:
        """Measures products and copies."""
        self._content["peaks"] = found = peaks(self._device)
        self._save()
        products = ", ".join(f"{k} {v / 1e12:.3g}" for k, v in found.items() if k != "memory")
        self._say(f"Peaks: {products} TFLOP/s; memory {found['memory'] / 1e9:.0f} GB/s")

    def steps(self) -> None:
        """Measures training steps, one graph and batch size after the other."""
        shape = (self._options.image_size, self._options.image_size, 3)
        cases = [(g, b) for b in self._options.batch_sizes for g in self._options.graphs]
        for i, (graph, batch_size) in enumerate(cases):
            name = f"{graph}, batch {batch_size}"
            if self._left() < _CASE_SECONDS:
                self._leave_out(name, "no time left")
                continue
            share = max(1.5 * self._left() / (len(cases) - i), _CASE_SECONDS)
            end = min(time.monotonic() + share, self._end)
            task = Task("xla", tuple(graph.split("+")), 1, batch_size, shape)
            try:
                self._case(name, task, end)
            except Exception as error:  # the other cases are measured all the same
                self._leave_out(name, f"it failed: {error!r}")
                self._content["failed"] = True

    def _case(self, name: str, task: Task, end: float) -> None:
        self._say(f"{name}: compiling")
        options = self._options
        case = Case(
            name,
            task,
            [v for v in variants_of(task.models, self._device.platform) if self._is_wanted(v)],
            self._device,
            end,
            options.rounds,
            options.compilers,
            self._leave_out,
        )
        entries = case.measured(self._content["peaks"])
        self._content["cases"] += entries
        self._save()
        if entries:
            self._console.print(table(name, entries))

    def _is_wanted(self, variant: Variant) -> bool:
        wanted = self._options.variants
        return not wanted or str(variant) in wanted

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _say(self, text: str) -> None:
        passed = 60 * self._options.minutes - self._left()
        self._console.print(f"[{passed:5.0f} s] {text}")

    def _leave_out(self, what: str, why: str) -> None:
        self._content["left_out"].append({"what": what, "why": why})
        self._save()
        self._say(f"Left out: {what}: {why}")

    def _save(self) -> None:
        if self._options.json is not None:
            write_text(self._options.json, json.dumps(self._content, indent=1) + "\n")


PARTS = {
    "agreement": Measurement.agreement,
    "peaks": Measurement.peaks,
    "steps": Measurement.steps,
}


def _exit_code(content: dict[str, Any]) -> int:
    """1 where the device does not compute what the CPU does, or a case failed."""
    return int(content["failed"] or not all(check["passed"] for check in content["checks"]))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a compilation that was left out may still run
