"""Trains a knowledge transfer graph: `python -m experiments.train --help`.

Without arguments: three small networks learn from each other on scikit-learn's digits, in under a
minute on two CPU cores.
"""

import time
from collections.abc import Callable, Sequence

import jax
from rich.console import Console

import ktg_jax as ktg
from experiments import cli
from experiments.assemble import Run, assemble, data_facts, load, prior_facts
from experiments.config import (
    TrainConfig,
    build_graph,
    check,
    default_workdir,
    parse,
    resolved,
)
from experiments.options import import_modules
from experiments.pretrained import locate_pretrained
from experiments.process import prepare
from experiments.progress import Display
from experiments.results import Best, Record, best_epoch, make_result, result_table
from experiments.tensorboard import event_writer, require_tensorboard
from experiments.workdir import Workdir
from ktg_jax.checkpoint import Checkpoints
from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import RunError
from ktg_jax.loop import train_epochs
from ktg_jax.state import GraphState

_REDRAW_SECONDS = 60


def main() -> None:
    """Trains what the command line describes."""
    config = parse()
    check(config)
    prepare(config.compile_cache, config.cpu_devices)
    train(config, Console())


def train(
    config: TrainConfig,
    console: Console,
    dataset: Dataset | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> None:
    """Trains, or goes on training, the run that the configuration describes.

    Args:
        config: of the run.
        console: where to say what is done.
        dataset: that the configuration describes, where it is loaded already; without test images
            the result has none of their numbers.
        devices: to train on (default: all of this process's).

    Raises:
        InputError: bad input, found before anything is computed or written.
        RunError: training cannot go on.
    """
    check(config)
    import_modules(config.imports)
    graph = build_graph(config)
    with console.status("Preparing convolutions"):  # which may be chosen wrongly, or built now
        ktg.cpu_convolution()
    fields = resolved(config, graph)
    workdir = Workdir(config.workdir or default_workdir(config, fields))
    if config.resume:
        workdir.check(fields)
        if workdir.result is not None:
            cli.say(console, f"{workdir.path} is finished; nothing to do.")
            console.print(result_table(workdir.result))
            return

    dataset = dataset or load(config)

    def train_alone(alone: TrainConfig, dataset: Dataset) -> None:
        cli.say(console, f"The frozen {alone.models[0]} is trained first.")
        train(alone, console, dataset, devices)

    located = locate_pretrained(graph, config, dataset, train_alone)
    run = assemble(config, located, dataset, devices)
    if config.tensorboard:
        require_tensorboard()
    if not config.resume and (aside := workdir.set_aside()):
        cli.say(console, f"The former run is kept in {aside}.")
    facts = {"data_facts": data_facts(dataset), **prior_facts(graph)}
    workdir.begin(fields | facts, config.data_dir, {"graph.json": fields["graph"]})
    with workdir.locked(), Checkpoints(workdir.checkpoints) as checkpoints:
        _Training(run, workdir, checkpoints, console, config.tensorboard).go()


class _Training:
    """A run in its folder: resumed, trained to the end, and summed up."""

    def __init__(
        self,
        run: Run,
        workdir: Workdir,
        checkpoints: Checkpoints,
        console: Console,
        tensorboard: bool,
    ) -> None:
        self._run = run
        self._workdir = workdir
        self._checkpoints = checkpoints
        self._console = console
        self._tensorboard = tensorboard
        self._names = [str(node.name) for node in run.graph.nodes]

    def go(self) -> None:
        """Does it all."""
        cli.say(self._console, f"Training in {self._workdir.path}: {self._run.summary}.")
        cli.say(self._console, f"Convolutions: {ktg.cpu_convolution()}.")
        state, records = self._resume()
        state = self._train(state, records)
        result = self._finish(state, records)
        self._console.print(result_table(result))
        cli.say(
            self._console,
            f"Trained {len(records)} epochs in {result['seconds']:.1f} s "
            f"({records[-1]['images_per_second']:.0f} images/s in the last); metrics, pictures and "
            f"checkpoints are in {self._workdir.path}.",
        )

    def _resume(self) -> tuple[GraphState, list[Record]]:
        """The state to go on from, and the records of the epochs that led to it."""
        epoch, state, messages = self._checkpoints.restore_latest(self._run.state, self._names)
        for message in messages:
            cli.say(self._console, f"{message}; going back to epoch {epoch}.")
        if epoch:
            cli.say(self._console, f"Resuming after epoch {epoch} of {self._run.epochs}.")
        records = self._workdir.records(up_to_epoch=epoch)
        self._workdir.keep_records(records)
        return self._run.engine.place(state), records

    def _train(self, state: GraphState, records: list[Record]) -> GraphState:
        """Trains the epochs that are left; each is recorded, then saved."""
        run, graph = self._run, self._run.graph
        marks = [
            "target" if i == 0 else "frozen" if i in graph.frozen else ""
            for i in range(len(graph.nodes))
        ]
        display = Display(
            [(str(n.name), n.model, mark) for n, mark in zip(graph.nodes, marks, strict=True)],
            first_step=int(state.step),
            total_steps=run.epochs * run.steps_per_epoch,
            batch_size=run.batch_size,
            console=self._console,
        )
        epochs = train_epochs(
            state,
            run.step,
            self._names,
            epochs=run.epochs,
            steps_per_epoch=run.steps_per_epoch,
            batch_size=run.batch_size,
            steps_per_call=run.steps_per_call,
            validate=run.evaluate_val,
            on_step=display.step,
        )
        events = event_writer(self._workdir.path / "tensorboard", records, self._tensorboard)
        with display, events as write_events:
            observers = (display.epoch, self._curves_drawer(records), write_events)
            for record, state in epochs:
                records.append(record)
                self._workdir.append_record(record)
                score = record["nodes"][0]["val_accuracy"]
                self._checkpoints.save(record["epoch"], state, self._names, score)
                for observe in observers:
                    observe(record)
        self._checkpoints.wait()
        return state

    def _curves_drawer(self, records: list[Record]) -> Callable[[Record], None]:
        """A function to call after each epoch, which redraws the curves now and then."""
        drawn = time.monotonic()

        def draw(record: Record) -> None:
            nonlocal drawn
            del record
            if time.monotonic() - drawn > _REDRAW_SECONDS:
                from ktg_jax.draw import draw_curves

                draw_curves(records, self._workdir.path / "curves.png")
                drawn = time.monotonic()

        return draw

    def _finish(self, state: GraphState, records: list[Record]) -> Record:
        """Evaluates, draws the pictures, and writes the result, which marks the run as finished."""
        from ktg_jax.draw import draw_curves, draw_graph  # matplotlib: not before the first step

        run, path = self._run, self._workdir.path
        last = run.evaluate_val_and_test(state)
        result = make_result(run.graph, records, last=last, best=self._best(state, records))
        draw_curves(records, path / "curves.png")
        shown = {
            node["name"]: node["test_accuracy"] if run.test else node["val_accuracy"]
            for node in result["nodes"]
        }
        accuracies = {name: value for name, value in shown.items() if value is not None}
        draw_graph(run.graph, [path / "graph.svg", path / "graph.png"], accuracies)
        self._workdir.write("result.json", result)
        return result

    def _best(self, state: GraphState, records: list[Record]) -> Best | None:
        """The target's best epoch on validation, with all means then."""
        epoch = best_epoch(records)
        if epoch is None:
            return None
        if epoch < len(records):
            try:
                state = self._checkpoints.restore(state, self._names, epoch)
            except RunError as error:
                cli.say(self._console, f"{error}; the best epoch is left out of the result.")
                return None
        return epoch, *self._run.evaluate_val_and_test(self._run.engine.place(state))


if __name__ == "__main__":
    cli.run(main)
