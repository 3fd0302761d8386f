"""Hurts a training in many ways, and looks how it ends: `python -m tests.faults --rounds 100`.

After each fault the same command is given again. It must end bit for bit where a training that
nobody disturbed ends (but for the numbers of the best epoch, where its checkpoint alone is damaged,
which is said), or say in one line what is wrong. Anything else is a failure, and is shown.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
for place in (ROOT, ROOT / "tests" / "support"):
    sys.path.insert(0, str(place))

from runs import (  # noqa: E402
    Ended,
    assert_same_arrays,
    assert_same_end,
    end_of,
    in_process,
    metrics,
    options,
    saved_state,
    small,
    start,
)

from experiments import train as train_module  # noqa: E402

EPOCHS = 12
OPTIONS: dict[str, Any] = {"models": ("tiny", "dropping"), "epochs": EPOCHS, "batch_size": 16}
"""A run with batch statistics, momentum and a random stream."""

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


@dataclass
class Faults:
    """A series of faults to the same training.

    Attributes:
        folder: to work in.
        seed: of all that is random.
        counts: how many rounds of each kind ended in which way.
        failures: what was neither the undisturbed end nor one clear line.
    """

    folder: Path
    seed: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.whole = self.folder / "whole"
        ended = self._again(self.whole)
        assert ended.code == 0, ended.err

    def round(self, number: int, kind: str) -> None:
        """One fault of a kind, and what comes of it."""
        rng, workdir = random.Random(f"{self.seed} {number} {kind}"), self.folder / f"run{number}"
        try:
            how = KINDS[kind](self, rng, workdir)
        except AssertionError as error:
            how = "failure"
            self.failures.append(f"round {number}, {kind}: {error}")
        self.counts[kind, how] += 1
        shutil.rmtree(workdir, ignore_errors=True)

    def _again(self, workdir: Path) -> Ended:
        """The same command, in this process."""
        return in_process(train_module.main, *options(small(workdir, **OPTIONS)))

    def _end(self, workdir: Path) -> str:
        """Gives the command again: how that ends."""
        ended = self._again(workdir)
        if ended.code in (1, 2):
            assert ended.err.count("\n") == 1, f"not one line: {ended.err!r}"
            assert ended.err.startswith(("failed: ", "error: ")), ended.err
            return "one clear error"
        assert ended.code == 0, f"code {ended.code}: {ended.err}"
        if "the best epoch is left out of the result" in ended.out:
            assert metrics(workdir) == metrics(self.whole)
            last = (saved_state(each, EPOCHS) for each in (workdir, self.whole))
            assert_same_arrays(*last)
            return "the same, but for the best epoch"
        assert_same_end(workdir, self.whole)
        return "the undisturbed end"

    def _started(self, rng: random.Random, workdir: Path) -> subprocess.Popen[str]:
        """A process that trains, at some moment after its first epoch."""
        process = self._start(workdir)
        lines = rng.randrange(1, EPOCHS)
        path, until = workdir / "metrics.jsonl", time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            if path.exists() and path.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        return process

    def _start(self, workdir: Path) -> subprocess.Popen[str]:
        command = options(small(workdir, **OPTIONS))
        cache = self.folder / "cache"
        return start("experiments.train", *command, cwd=self.folder, cache=cache)

    def kill(self, rng: random.Random, workdir: Path) -> str:
        """kill -9 at random moments, up to three times."""
        for _ in range(rng.randrange(1, 4)):
            process = self._started(rng, workdir)
            process.kill()
            end_of(process)
        return self._end(workdir)

    def kill_in_a_save(self, rng: random.Random, workdir: Path) -> str:
        """kill -9 while a checkpoint is being written."""
        process, after = self._start(workdir), rng.randrange(0, EPOCHS - 1)
        while process.poll() is None:
            names = [path.name for path in (workdir / "checkpoints").glob("*")]
            if sum(name.isdigit() for name in names) >= min(after, 2) and any(
                "tmp" in name for name in names
            ):
                break
        time.sleep(rng.random() * 0.01)
        process.kill()
        end_of(process)
        return self._end(workdir)

    def ask(self, rng: random.Random, workdir: Path) -> str:
        """A signal that asks it to end, at a random moment."""
        number = rng.choice(list(SIGNALS))
        process = self._started(rng, workdir)
        process.send_signal(number)
        ended = end_of(process)
        assert ended.code in (0, SIGNALS[number]), f"{number.name}: {ended}"
        return self._end(workdir)

    def full_disk(self, rng: random.Random, workdir: Path) -> str:
        """From a random moment on no file can grow beyond a random size."""
        process, size = self._started(rng, workdir), rng.randrange(1, 100_000)
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
        ended = end_of(process)
        assert ended.code in (0, 1, 2), ended
        assert ended.err.count("\n") <= 1, f"not one line: {ended.err!r}"
        return self._end(workdir)

    def two_at_once(self, rng: random.Random, workdir: Path) -> str:
        """Two of the same command at the same time, in one folder."""
        both = [self._start(workdir)]
        time.sleep(rng.random() * 2)
        both.append(self._start(workdir))
        ends = [end_of(process) for process in both]
        assert sorted(each.code for each in ends) in ([0, 0], [0, 2]), ends
        for each in ends:
            assert each.code == 0 or "no other process trains" in each.err, each.err
        return self._end(workdir)

    def truncate(self, rng: random.Random, workdir: Path) -> str:
        """A random file of a run that was killed before its result is cut off somewhere."""
        path = self._stopped(rng, workdir)
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.truncate(rng.randrange(size) if size else 0)
        return self._end(workdir)

    def flip(self, rng: random.Random, workdir: Path) -> str:
        """A random bit of a checkpoint is turned over."""
        path = self._stopped(rng, workdir, "checkpoints")
        data = bytearray(path.read_bytes())
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        return self._end(workdir)

    def lose(self, rng: random.Random, workdir: Path) -> str:
        """A random file of a checkpoint is gone."""
        self._stopped(rng, workdir, "checkpoints").unlink()
        return self._end(workdir)

    def _stopped(self, rng: random.Random, workdir: Path, within: str = "") -> Path:
        """The whole run as it is when it is killed before its result; a random file of it."""
        shutil.copytree(self.whole, workdir)
        (workdir / "result.json").unlink()
        files = [path for path in (workdir / within).rglob("*") if path.is_file()]
        return rng.choice(sorted(path for path in files if path.name != ".lock"))


KINDS: dict[str, Callable[[Faults, random.Random, Path], str]] = {
    "kill -9": Faults.kill,
    "kill -9 within a save": Faults.kill_in_a_save,
    "SIGTERM, SIGINT or SIGHUP": Faults.ask,
    "disk full": Faults.full_disk,
    "two runs on one folder": Faults.two_at_once,
    "a file cut off": Faults.truncate,
    "a bit of a checkpoint turned over": Faults.flip,
    "a file of a checkpoint gone": Faults.lose,
}


def main() -> None:
    """Does the rounds, and prints how they ended."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=len(KINDS), help="faults, kind after kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), given.seed)
        for number in range(given.rounds):
            kind = list(KINDS)[number % len(KINDS)]
            faults.round(number, kind)
            print(f"{number + 1} of {given.rounds}, {kind}", flush=True)
    rows = [{"kind": k, "end": e, "rounds": n} for (k, e), n in sorted(faults.counts.items())]
    for row in rows:
        print(f"{row['kind']:35} {row['end']:33} {row['rounds']:5}")
    for failure in faults.failures:
        print(failure, file=sys.stderr)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(1 if faults.failures else 0)


if __name__ == "__main__":
    main()
