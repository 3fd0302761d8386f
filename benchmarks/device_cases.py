"""One graph and batch size on a device: our variants and PyTorch's, timed in turns."""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import jax
import numpy as np

from benchmarks.device_peaks import occupation
from benchmarks.device_steps import initial_state, make_ready
from benchmarks.flops import train_step_flops
from benchmarks.measure import interleaved, spread, start
from benchmarks.task import Ready, Task, Variant, turn
from experiments.runs.console import Table
from ktg_jax.errors import RunError
from ktg_jax.io.trees import flatten

OURS = (
    Variant("fused", "tf32"),
    Variant("fused", "bfloat16"),
    Variant("fused", "tf32", 20),
    Variant("fused", "bfloat16", 20),
    Variant("fused_captured", "tf32"),
    Variant("fused_captured", "bfloat16"),
    Variant("per_node", "tf32"),
    Variant("batched", "tf32"),
    Variant("batched_captured", "tf32"),
    Variant("batched", "tf32", 20),
    Variant("batched", "bfloat16", 20),
    Variant("fused", "float32"),
)
"""In this order they are compiled: what the compiler has tried once it need not try again."""
THEIRS = (
    Variant("eager", "tf32"),
    Variant("graph", "tf32"),
    Variant("eager", "bfloat16"),
    Variant("graph", "bfloat16"),
    Variant("eager", "float32"),
    Variant("compile_graph", "tf32"),
    Variant("compile_graph", "bfloat16"),
    Variant("compile", "tf32"),
)
ON_CPU = (
    Variant("eager"),
    Variant("fused"),
    Variant("per_node"),
    Variant("eager", "bfloat16"),
    Variant("fused", "bfloat16"),
)
TOLERANCES = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 5e-2}
"""Relative; of the losses of the first step, by precision."""

_TURN_SECONDS = 0.2
_LONGEST_TURN = 60.0
_SPARE_SECONDS = 25.0
"""What taking turns is left when time ends making variants ready."""

Figures = dict[str, Any]
LeaveOut = Callable[[str, str], None]
"""Called with what is left out, and why."""


class Torch:
    """PyTorch in a process of its own; to be used in a `with` statement."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = start("benchmarks.device_torch", errors=self._errors)
        self._lines: Queue[str] = Queue()
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """Takes all that the process says; an empty line at its end."""
        assert self._process.stdout is not None
        with suppress(ValueError):  # closed at the end
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put("")

    def ask(self, what: Mapping[str, Any]) -> None:
        """Asks for something; the process works on it while this one goes on."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of a process that has ended; `answer` says so
            print(json.dumps(what), file=self._process.stdin, flush=True)

    def answer(self, seconds: float) -> Figures:
        """The next answer.

        Raises:
            RunError: there is none in time, or it is an error.
        """
        try:
            line = self._lines.get(timeout=max(seconds, 0.0))
        except Empty:
            self._process.kill()
            raise RunError("no time left") from None
        if not line:
            self._lines.put("")
            self._errors.seek(0)
            last_words = self._errors.read().strip().splitlines()[-1:] or ["it ended"]
            raise RunError(last_words[0])
        answer: Figures = json.loads(line)
        if "error" in answer:
            raise RunError(answer["error"])
        return answer

    def __enter__(self) -> "Torch":
        """Gives itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph and a batch size, to be measured.

    Attributes:
        name: what it is called.
        task: models, batch and shapes.
        variants: what is measured.
        device: where ours is measured; PyTorch takes a GPU where it finds one.
        end: on the monotonic clock, when everything is to be done.
        rounds: turns of each variant that count.
        compilers: how many of our variants are compiled at once.
        left_out: called with what is left out, and why.
    """

    name: str
    task: Task
    variants: Sequence[Variant]
    device: jax.Device
    end: float
    rounds: int
    compilers: int
    left_out: LeaveOut

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def measured(self, peaks: Mapping[str, float]) -> list[Figures]:
        """The entries of all variants, in the order in which they are to be shown.

        Args:
            peaks: of `device_peaks.peaks`, or none.
        """
        state = initial_state(self.task)
        theirs = [variant for variant in self.variants if not variant.is_ours]
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            for i, (params, stats) in enumerate(zip(state.params, state.model_state, strict=True)):
                arrays: dict[str, Any] = flatten({"params": params, **stats})
                np.savez(Path(folder) / f"{i}.npz", **arrays)
            task = dataclasses.asdict(dataclasses.replace(self.task, weights=folder))
            # An error on the device ends all that a process has there, hence one for each.
            torch = {variant: stack.enter_context(Torch()) for variant in theirs}
            for variant, process in torch.items():
                process.ask({"prepare": variant, "task": task})
            ours = self._ours(state)
            ready = [*self._beside(torch, theirs), *ours]
            times = self._times(torch, list(self._agreeing(ready)))
        return [
            self._entry(each, times[each.variant], peaks) for each in ready if each.variant in times
        ]

    def _ours(self, state: Any) -> list[Ready]:
        """Our variants that are ready in time."""
        pool = ThreadPoolExecutor(self.compilers)
        futures = {
            pool.submit(make_ready, self.task, variant, state, self.device): variant
            for variant in self.variants
            if variant.is_ours
        }
        wait(futures, timeout=max(self.left - _SPARE_SECONDS, 0))
        pool.shutdown(wait=False, cancel_futures=True)
        ready = []
        for future, variant in futures.items():
            if future.cancelled() or not future.done():
                self._leave_out(variant, "no time left")
            elif (error := future.exception()) is not None:
                self._leave_out(variant, f"{type(error).__name__}: {error}".splitlines()[0])
            else:
                ready.append(future.result())
        return ready

    def _beside(
        self, torch: Mapping[Variant, Torch], variants: Sequence[Variant]
    ) -> Iterator[Ready]:
        """PyTorch's variants that are ready in time."""
        for variant in variants:
            try:
                answer = torch[variant].answer(self.left - _SPARE_SECONDS / 2)
            except RunError as error:
                self._leave_out(variant, f"PyTorch: {error}")
                continue
            yield Ready(variant, _nothing, _nothing, answer["losses"], answer["figures"])

    def _agreeing(self, ready: Sequence[Ready]) -> Iterator[Ready]:
        """Those whose first losses are the first one's."""
        for each in ready:
            expected = np.asarray(ready[0].losses)
            error = float(np.max(np.abs(each.losses - expected) / np.abs(expected)))
            if error <= TOLERANCES[each.variant.precision]:
                yield each
            else:
                self._leave_out(each.variant, f"its losses are off by {error:.2g}")

    def _times(
        self, torch: Mapping[Variant, Torch], ready: Sequence[Ready]
    ) -> dict[Variant, list[float]]:
        """The seconds a step, one number a round, of all variants that can take their turns."""
        failed: set[Variant] = set()

        def take_turn(each: Ready, calls: int) -> float:
            if each.variant not in failed:
                try:
                    return self._turn(torch, each, calls)
                except (RunError, jax.errors.JaxRuntimeError) as error:
                    failed.add(each.variant)
                    self._leave_out(each.variant, str(error))
            return math.nan

        turns = {}
        for each in ready:
            take_turn(each, 1)
            seconds = take_turn(each, 3) * each.variant.steps
            if each.variant not in failed:
                calls = max(round(_TURN_SECONDS / seconds), 1)
                turns[str(each.variant)] = partial(take_turn, each, calls)
        times = interleaved(turns, self.rounds, warm_up=1)
        return {
            each.variant: times[str(each.variant)] for each in ready if each.variant not in failed
        }

    def _turn(self, torch: Mapping[Variant, Torch], ready: Ready, calls: int) -> float:
        """A turn; returns the seconds a step."""
        if ready.variant.is_ours:
            return turn(ready, calls)
        process = torch[ready.variant]
        process.ask({"turn": ready.variant, "calls": calls})
        return float(process.answer(_LONGEST_TURN)["seconds"])

    def _entry(self, ready: Ready, times: Sequence[float], peaks: Mapping[str, float]) -> Figures:
        """What is written of a variant."""
        task, step = self.task, spread(times)
        flops = sum(
            train_step_flops(m, task.batch_size, task.image_shape, task.num_classes)
            for m in task.models
        )
        accessed = ready.figures.get("bytes_accessed")
        calls = max(20 // ready.variant.steps, 2)
        on_gpu = self.device.platform == "gpu"
        seen = None
        if ready.variant.is_ours and on_gpu and self.left > _SPARE_SECONDS / 2:
            seen = occupation(partial(turn, ready, calls))
        return {
            "case": self.name,
            **ready.variant._asdict(),
            "step_s": step.median,
            "step_quartiles_s": list(step.quartiles),
            "images_per_second_per_node": task.batch_size / step.median,
            "flops": flops,
            "share_of_product": _share(flops / step.median, peaks.get(ready.variant.precision)),
            "share_of_memory": _share(accessed and accessed / step.median, peaks.get("memory")),
            "busy": seen and seen.busy,
            "operations": seen and seen.operations / (calls * ready.variant.steps),
            "longest": seen and seen.longest,
            **ready.figures,
        }

    def _leave_out(self, variant: Variant, why: str) -> None:
        self.left_out(f"{self.name}, {variant}", why[:300])


def variants_of(models: Sequence[str], platform: str) -> tuple[Variant, ...]:
    """What is measured of a graph on a platform, `cpu` or another."""
    if platform == "cpu":
        return ON_CPU
    all_differ = len({*models}) == len(models)
    return tuple(v for v in (*THEIRS, *OURS) if not (all_differ and v.engine.startswith("batched")))


def _nothing() -> None:
    """What PyTorch's variants do in this process."""


def _share(rate: float | None, most: float | None) -> float | None:
    return rate / most if rate and most else None


def table(name: str, entries: Sequence[dict[str, Any]]) -> Table:
    """A case: times, and how many times as long PyTorch's eager step of that precision takes."""
    eager = {e["precision"]: e["step_s"] for e in entries if e["engine"] == "eager"}
    table = Table(title=name)
    for title in ("engine", "precision", "steps a call"):
        table.add_column(title)
    titles = ("step, ms", "eager / it", "images/s a node", "of product", "of memory", "busy")
    for title in (*titles, "operations", "memory, GB", "ready, s"):
        table.add_column(title, justify="right")
    for entry in entries:
        low, high = entry["step_quartiles_s"]
        beside = eager.get(entry["precision"])
        table.add_row(
            entry["engine"],
            entry["precision"],
            str(entry["steps"]),
            f"{1e3 * entry['step_s']:.2f} ({1e3 * low:.2f}-{1e3 * high:.2f})",
            _number(beside and beside / entry["step_s"], ".2f"),
            f"{entry['images_per_second_per_node']:.0f}",
            _number(entry["share_of_product"], ".1%"),
            _number(entry["share_of_memory"], ".1%"),
            _number(entry["busy"], ".0%"),
            _number(entry["operations"], ".0f"),
            _number(entry["memory_bytes"] and entry["memory_bytes"] / 2**30, ".2f"),
            _number(entry["ready_s"], ".1f"),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
