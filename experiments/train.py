"""Trains a knowledge transfer graph: `python -m experiments.train --help`.

Without arguments: three small networks learn from each other on scikit-learn's digits, in half a
minute of processor time.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import jax
from rich.console import Console

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import InputError, RunError
from ktg_jax.training import hosts
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.loop import Interrupted, train_epochs
from ktg_jax.training.state import GraphState
from ktg_jax.training.streaming import close_streams

from .runs import cli, signals
from .runs.assemble import Run, assemble, load
from .runs.command_line import parse
from .runs.config import (
    TrainConfig,
    check,
    default_workdir,
    resolved,
)
from .runs.console import busy, make_console
from .runs.facts import data_facts, facts_of, graph_facts, graph_files
from .runs.frozen import FrozenRecordings
from .runs.graphs import as_given, build_graph
from .runs.identity import is_own
from .runs.networks import check_networks
from .runs.observers import event_writer, require_tensorboard
from .runs.options import import_modules
from .runs.pictures import draw_curves, draw_missing, draw_result
from .runs.pretrained import locate_pretrained
from .runs.process import check_platform, hosts_kept_together, join_others, prepare
from .runs.progress import Display
from .runs.results import Best, best_epoch, make_result, result_table
from .runs.saved import Found, SavedStates, saved_states
from .runs.shapes import Record
from .runs.workdir import Workdir

_REDRAW_SECONDS = 60


def main() -> None:
    """Trains what the command line describes."""
    config = parse(TrainConfig)
    check(config)
    prepare(config.compile_cache, config.cpu_devices)
    console = make_console()
    console.quiet = join_others(config) and not hosts.is_first()
    train(config, console)


def train(
    config: TrainConfig,
    console: Console,
    dataset: Dataset | None = None,
    devices: Sequence[jax.Device] | None = None,
    frozen: FrozenRecordings | None = None,
) -> None:
    """Trains, or goes on training, the run that the configuration describes.

    Args:
        config: the configuration of the run.
        console: where to say what is done.
        dataset: that the configuration describes, where it is loaded already; without test images
            the result has none of their numbers.
        devices: to train on (default: all of this process's).
        frozen: as for `assemble`.

    Raises:
        InputError: bad input, found before anything is computed or written.
        RunError: training cannot go on.
    """
    with hosts_kept_together():
        _train(config, console, dataset, devices, frozen)


def _train(
    config: TrainConfig,
    console: Console,
    dataset: Dataset | None,
    devices: Sequence[jax.Device] | None,
    frozen: FrozenRecordings | None,
) -> None:
    """See `train`."""
    check(config)
    import_modules(config.imports)
    check_platform()
    graph = build_graph(config)
    with busy(console, "Preparing convolutions"):  # which may be chosen wrongly, or built now
        ktg.cpu_convolution()
    fields = resolved(config, graph)
    if config.workdir is None and (is_own(config.data) or graph_files(graph)):
        dataset = dataset or load(config, streaming=config)  # for the folder's name
        fields |= facts_of(graph, dataset)
    workdir = Workdir(config.workdir or default_workdir(config, fields))
    if hosts.by_first(lambda: config.resume and _is_finished(workdir, fields)):
        if hosts.is_first():
            _say_finished(workdir, config, graph, dataset, console)
        return

    dataset = dataset or load(config, streaming=config)
    check_networks(config, graph, dataset, devices)

    def train_alone(alone: TrainConfig, dataset: Dataset) -> None:
        cli.say(console, f"The frozen {alone.models[0]} is trained first.")
        train(alone, console, dataset, devices)

    located = locate_pretrained(graph, config, dataset, train_alone)
    with as_given(config, pruned=True):
        run = assemble(config, located, dataset, devices, frozen)
        fields |= facts_of(graph, dataset)
    if config.tensorboard:
        require_tensorboard()
    files = {"graph.json": fields["graph"]}
    names = [str(node.name) for node in run.graph.nodes]
    with ExitStack() as kept:
        kept.callback(close_streams)

        def begin() -> None:
            if not config.resume and (aside := workdir.set_aside()):
                cli.say(console, f"The former run is kept in {aside}.")
            kept.enter_context(workdir.begun(fields, config.data_dir, files))

        hosts.by_first(begin)
        saved = kept.enter_context(saved_states(workdir, names, run.steps_per_epoch))
        if hosts.is_first() and workdir.is_damaged("result.json"):
            cli.say(console, "result.json is damaged; it is made again.")
        _Training(run, workdir, saved, console, config.tensorboard).go()


def _is_finished(workdir: Workdir, fields: Mapping[str, Any]) -> bool:
    """Whether the run of these fields is finished.

    Raises:
        InputError: the folder holds another run.
    """
    workdir.check(fields)
    return workdir.result is not None


def _say_finished(
    workdir: Workdir,
    config: TrainConfig,
    graph: ktg.Graph,
    dataset: Dataset | None,
    console: Console,
) -> None:
    """Says what came of a finished run, if it is of the user's own files as they are now.

    Files that are not there any more, where the run knows them, are not asked for.

    Raises:
        InputError: the files are others, or those that are given now cannot be read.
    """
    fields = resolved(config, graph)
    known = workdir.config
    are_where_they_were = all(known[field] == fields[field] for field in ("data", "graph"))
    facts: dict[str, Any] = {}
    with suppress(InputError) if are_where_they_were else nullcontext():
        facts |= graph_facts(graph)
        if dataset is not None or is_own(config.data):
            facts |= {"data_facts": data_facts(dataset or load(config, streaming=config))}
    workdir.check(fields | facts)
    result = workdir.result
    assert result is not None
    if not are_where_they_were:
        with suppress(InputError), workdir.locked():  # as far as it can be written
            workdir.begin(fields | facts, config.data_dir, {"graph.json": fields["graph"]})
    cli.say(console, f"{workdir.path} is finished; nothing to do.")
    draw_missing(workdir, result, console)
    console.print(result_table(result))


class _Training:
    """A run in its folder: resumed, trained to the end, and summed up."""

    def __init__(
        self,
        run: Run,
        workdir: Workdir,
        saved: SavedStates,
        console: Console,
        tensorboard: bool,
    ) -> None:
        self._run = run
        self._workdir = workdir
        self._saved = saved
        self._console = console
        self._tensorboard = tensorboard and hosts.is_first()
        self._names = [str(node.name) for node in run.graph.nodes]

    def go(self) -> None:
        """Does it all."""
        cli.say(self._console, f"Training in {self._workdir.path}: {self._run.summary}.")
        cli.say(self._console, f"Convolutions: {ktg.cpu_convolution()}.")
        for name in self._run.static:
            text = f"{name} is recorded image by image: it does not see the augmentation."
            cli.say(self._console, text)
        found = self._resume()
        state, records = self._train(found), found.records
        result = self._finish(state, records)
        self._console.print(result_table(result))
        cli.say(
            self._console,
            f"Trained {len(records)} epochs in {result['seconds']:.1f} s "
            f"({records[-1]['images_per_second']:.0f} images/s in the last); metrics, pictures and "
            f"checkpoints are in {self._workdir.path}.",
        )

    def _resume(self) -> Found:
        """Where to go on, the state as the engine wants it."""
        found = self._saved.find(self._run.state)
        epoch, step = len(found.records), int(found.state.step)
        for message in found.messages:
            cli.say(self._console, f"{message}; going back to epoch {epoch}.")
        if found.so_far is not None:
            within = step - epoch * self._run.steps_per_epoch
            cli.say(
                self._console,
                f"Resuming within epoch {epoch + 1} of {self._run.epochs}, after {within} of its "
                f"{self._run.steps_per_epoch} updates.",
            )
        elif epoch:
            cli.say(self._console, f"Resuming after epoch {epoch} of {self._run.epochs}.")
        return found._replace(state=self._run.engine.place(found.state))

    def _train(self, found: Found) -> GraphState:
        """Trains the epochs that are left; each is recorded, then saved."""
        state, records = found.state, found.records
        run, graph = self._run, self._run.graph
        marks = [
            "target" if i == 0 else "frozen" if i in graph.frozen and node.kind == "network" else ""
            for i, node in enumerate(graph.nodes)
        ]
        display = Display(
            [(str(n.name), n.model, mark) for n, mark in zip(graph.nodes, marks, strict=True)],
            first_step=int(state.step),
            total_steps=run.epochs * run.steps_per_epoch,
            epochs=run.epochs,
            batch_size=run.batch_size,
            console=self._console,
        )
        run.engine.wants_to_stop = signals.is_waiting
        events = event_writer(
            self._workdir.path / "tensorboard", records, self._tensorboard, self._console
        )
        with ExitStack() as held, display, events as write_events:
            are_held = False

            def on_step(number: int, metrics: Metrics) -> None:
                nonlocal are_held
                if not are_held:  # what was being compiled until now is not worth waiting for
                    held.enter_context(signals.held())
                    are_held = True
                display.step(number, metrics)

            epochs = train_epochs(
                state,
                run.step,
                self._names,
                epochs=run.epochs,
                steps_per_epoch=run.steps_per_epoch,
                batch_size=run.batch_size,
                steps_per_call=run.steps_per_call,
                validate=run.evaluate_val,
                on_step=on_step,
                so_far=found.so_far,
                should_stop=_is_to_stop,
            )
            observers = (display.epoch, self._curves_drawer(records), write_events)
            try:
                for record, state in epochs:
                    self._keep(records, record, state)
                    for observe in observers:
                        observe(record)
                    if hosts.any_of(signals.is_waiting()):
                        raise signals.StoppedElsewhere("stopped between epochs")
            except InputError as error:  # a picture that cannot be read
                if jax.process_count() == 1:
                    raise
                # The others wait for this process, which must not wait for them at its end.
                raise RunError(str(error)) from None
            except Interrupted as stopped:
                whole = run.engine.gathered(stopped.state)
                self._saved.save_interrupted(whole, stopped.so_far)
                raise signals.StoppedElsewhere(str(stopped)) from None
        self._saved.wait()
        return state

    def _keep(self, records: list[Record], record: Record, state: GraphState) -> None:
        """Keeps what an epoch led to: its record on disk before its checkpoint."""
        records.append(record)
        if hosts.is_first():
            self._workdir.append_record(record)
        whole = self._run.engine.gathered(state)
        self._saved.save(record["epoch"], whole, record["nodes"][0]["val_accuracy"])

    def _curves_drawer(self, records: list[Record]) -> Callable[[Record], None]:
        """A function to call after each epoch, which redraws the curves now and then."""
        is_possible, at = True, time.monotonic()

        def draw(record: Record) -> None:
            nonlocal is_possible, at
            del record
            if is_possible and hosts.is_first() and time.monotonic() - at > _REDRAW_SECONDS:
                is_possible = draw_curves(self._workdir, records, self._console)
                at = time.monotonic()

        return draw

    def _finish(self, state: GraphState, records: list[Record]) -> Record:
        """Evaluates, writes the result, which marks the run as finished, and draws the pictures."""
        graph = self._run.graph
        try:
            last, best = self._run.evaluate_val_and_test(state), self._best(state, records)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(
                f"the trained networks cannot be evaluated ({reason}); they are kept, and the same "
                "command evaluates them again"
            ) from None
        result = make_result(graph, records, last=last, best=best)
        if hosts.is_first():
            self._workdir.write("result.json", result)
            draw_result(self._workdir, graph, records, result, self._console)
        return result

    def _best(self, state: GraphState, records: list[Record]) -> Best | None:
        """The target's best epoch on validation, with all means then."""
        epoch = best_epoch(records)
        if epoch is None:
            return None
        if epoch < len(records):
            try:
                state = self._saved.restore(self._run.state, epoch)
            except RunError as error:
                cli.say(self._console, f"{error}; the best epoch is left out of the result.")
                return None
        return epoch, *self._run.evaluate_val_and_test(self._run.engine.place(state))


def _is_to_stop(metrics: Metrics) -> bool:
    """Whether this process, or one of several, was asked to stop."""
    return bool(metrics.get("stop", signals.is_waiting()))


if __name__ == "__main__":
    cli.run(main)
