"""One implementation in a process of its own, which makes steps when it is told to.

It prints a JSON line when it is ready: `losses` of the first step, and `figures` of `Session`, with
the seconds that importing took (`import_s`) and those from the start of tracing to the end of the
first step (`ready_s`). Then it answers each line that it reads with one of JSON:

==========  ==============================================================================
`steps K`   makes K steps: `seconds` of each, `host_seconds` of each or None, `losses`
`loop K`    makes K steps without waiting in between: `seconds` of all
`peak`      `flops_per_second` of the best float32 matrix product
`memory`    `peak_bytes` of resident memory so far
`quit`      no answer: it ends, as it does at the end of its input
==========  ==============================================================================

Waiting for a command it uses no processor.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import tyro

from benchmarks.task import (
    IMPLEMENTATIONS,
    Figures,
    Implementation,
    Session,
    Task,
    Unavailable,
    prepare_process,
)


def main() -> None:
    """Serves the task of the command line; exit code 2: the implementation is not available."""
    task = tyro.cli(Task, prog="python -m benchmarks.worker", description=__doc__)
    # Answers go to what is standard output now; whatever a library prints goes to the errors.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        try:
            serve(task, sys.stdin, answers)
        except Unavailable as error:
            print(error, file=sys.stderr)
            sys.exit(2)


def serve(task: Task, commands: TextIO, answers: TextIO) -> None:
    """Sets the task up and obeys commands to their end."""

    def answer(content: Figures) -> None:
        print(json.dumps(content), file=answers, flush=True)

    session, import_seconds = start(task)
    parts = ("trace_s", "compile_s", "first_step_s")
    figures = {"import_s": import_seconds, **session.figures}
    figures["ready_s"] = sum(figures[part] or 0.0 for part in parts)
    answer({"losses": session.losses, "figures": figures})
    for line in commands:
        command, *number = line.split()
        if command == "quit":
            return
        answer(obey(session, command, *map(int, number)))


def start(task: Task) -> tuple[Session, float]:
    """The task's session, and the seconds that it took to import its library."""
    if task.implementation not in IMPLEMENTATIONS:
        raise Unavailable(f"no implementation {task.implementation}")
    implementation = IMPLEMENTATIONS[task.implementation]
    prepare_process(implementation, task.threads)
    begin = time.perf_counter()
    make = _session_class(implementation.framework)
    import_seconds = time.perf_counter() - begin
    return make(task, implementation), import_seconds


def _session_class(framework: str) -> Callable[[Task, Implementation], Session]:
    """Imports the framework, and only that one: the memory of a process is measured, too."""
    if framework == "torch":
        from benchmarks.torch_baseline import TorchSession

        return TorchSession
    from benchmarks.ours import JaxSession

    return JaxSession


def obey(session: Session, command: str, steps: int = 1) -> Figures:
    """Does what a command says; returns the answer."""
    if command == "steps":
        seconds, host_seconds = [], []
        for _ in range(steps):
            begin = time.perf_counter()
            host_seconds.append(session.step())
            seconds.append(time.perf_counter() - begin)
        return {"seconds": seconds, "host_seconds": host_seconds, "losses": session.losses}
    if command == "loop":
        begin = time.perf_counter()
        session.loop(steps)
        return {"seconds": time.perf_counter() - begin}
    if command == "peak":
        return {"flops_per_second": session.matmul_peak()}
    if command == "memory":
        return {"peak_bytes": _peak_memory()}
    raise ValueError(f"no command {command}")


def _peak_memory() -> int:
    """Bytes; not from getrusage, where a process inherits what its parent had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    main()
