"""A search as one writes it first: `python -m benchmarks.plain_search`, with a search's options.

For every graph that is drawn it compiles one program with all N nodes and trains the graph whole.
Nothing is pruned, no program is used twice, in this process or in another; only the networks of
frozen nodes are kept, each trained alone when it is first needed. The graphs, the data, the
training and the convolutions are those of `experiments.search`, and so are the target's accuracies,
but for rounding. It prints a line of JSON, as `found` describes.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import ktg_jax as ktg
from benchmarks.task import Figures
from experiments.runs import cli
from experiments.runs.assemble import load
from experiments.runs.command_line import parse
from experiments.runs.config import TrainConfig
from experiments.runs.options import import_modules
from experiments.runs.process import Programs, prepare
from experiments.search.config import SearchConfig, check
from experiments.search.extra import optuna
from experiments.search.samplers import make_sampler, suggest_graph
from experiments.search.study import State
from ktg_jax.data.dataset import Dataset, Split
from ktg_jax.errors import RunError
from ktg_jax.training.batches import Arrays, plan_batch, steps_per_epoch, take_batch
from ktg_jax.training.evaluation import evaluation_batch_size, make_evaluator
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.loop import train_epochs
from ktg_jax.training.state import GraphState

Trained = tuple[Any, Any]
"""A network's parameters and model state."""


def main() -> None:
    """Searches as the command line says."""
    config = parse(SearchConfig)
    prepare(compile_cache=False)
    import_modules(config.imports)
    check(config)
    ktg.cpu_convolution()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    programs = Programs()
    study = search(config, load(config, with_test=False))
    print(json.dumps(found(study.get_trials()) | {"programs_compiled": programs.compiled}))


def search(config: SearchConfig, dataset: Dataset) -> optuna.Study:
    """Trains as many graphs as asked for, every one to the end."""
    space = config.space()
    trainer = PlainTrainer(config.training(), dataset)

    def objective(trial: optuna.Trial) -> float:
        graph = suggest_graph(trial, space)
        trial.set_user_attr("graph", json.loads(graph.to_json()))
        value = 0.0
        for value in trainer.accuracies(graph):  # noqa: B007 - the last one counts
            pass
        return value

    sampler = make_sampler(config.sampler, space, config.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=config.trials)
    return study


def found(trials: Sequence[optuna.trial.FrozenTrial]) -> Figures:
    """What a search has found, and how long it took.

    Returns:
        `graphs` and `values` by the trials' numbers, and the `seconds` from the start of the first
        trial to the end of the last.

    Raises:
        RunError: a trial that was not trained to the end.
    """
    for trial in trials:
        if trial.state != State.COMPLETE:
            reason = trial.user_attrs.get("reason", trial.state.name.lower())
            raise RunError(f"trial {trial.number} is not complete: {reason}")
    starts = [trial.datetime_start for trial in trials if trial.datetime_start is not None]
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete is not None]
    return {
        "graphs": [trial.user_attrs["graph"] for trial in trials],
        "values": [trial.value for trial in trials],
        "seconds": (max(ends) - min(starts)).total_seconds(),
    }


class PlainTrainer:
    """Trains whole graphs, each with a program of its own.

    Args:
        config: the configuration of the training; its graph does not count.
        dataset: with validation images.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        assert dataset.val is not None
        self._config = config
        self._dataset = dataset
        self._devices = jax.local_devices()[:1]
        self._train, self._val = _on_device(dataset.train), _on_device(dataset.val)
        self._per_epoch = steps_per_epoch(len(dataset.train), config.batch_size)
        self._alone: dict[str, Trained] = {}

    def accuracies(self, graph: ktg.Graph) -> Iterator[float]:
        """Trains the graph, and gives the target's validation accuracy after each epoch."""
        fns = self._functions(graph)
        evaluate = self._target_evaluator(fns)
        for state in self._epochs(graph, fns):
            yield evaluate(state)

    def _epochs(self, graph: ktg.Graph, fns: Sequence[ktg.NodeFns]) -> Iterator[GraphState]:
        """The state after each epoch, to be read before the next is asked for."""
        config = self._config
        total = config.epochs * self._per_epoch
        optimizer = ktg.sgd(
            ktg.step_schedule(config.learning_rate, total_steps=total), config.weight_decay
        )
        init_key, data_key = jax.random.split(jax.random.key(config.seed))
        sample = jnp.zeros((1, *self._dataset.image_shape))
        state = ktg.init_state(graph, fns, optimizer, init_key, sample)
        for i in graph.frozen:
            state = _replaced(state, i, self._trained_alone(graph.nodes[i].model))
        max_offset = min(self._dataset.image_shape[:2]) // 8
        gates = graph.gate_codes  # constants of the program

        # A function of this graph alone: compiled anew for each.
        def step(state: GraphState, data: Arrays, key: jax.Array) -> tuple[GraphState, Metrics]:
            plan = plan_batch(
                key,
                state.step,
                num_images=len(self._dataset.train),
                batch_size=config.batch_size,
                max_offset=max_offset,
                flip=self._dataset.flip,
            )
            return ktg.train_step(
                state,
                *take_batch(data.images, data.labels, plan),
                gates,
                (state.step + 1) / total,
                node_fns=fns,
                optimizer=optimizer,
                temperature=graph.temperature,
            )

        compiled = jax.jit(step, donate_argnums=0)
        epochs = train_epochs(
            state,
            lambda state, count: compiled(state, self._train, data_key),
            [str(node.name) for node in graph.nodes],
            epochs=config.epochs,
            steps_per_epoch=self._per_epoch,
            batch_size=config.batch_size,
        )
        for _, state in epochs:
            yield state

    def _functions(self, graph: ktg.Graph) -> tuple[ktg.NodeFns, ...]:
        classes = self._dataset.num_classes
        return tuple(ktg.build_model(node.model, classes) for node in graph.nodes)

    def _trained_alone(self, model: str) -> Trained:
        """The network trained alone; it is trained when it is first asked for."""
        if model not in self._alone:
            graph = ktg.graphs.independent([model])
            *_, state = self._epochs(graph, self._functions(graph))
            self._alone[model] = jax.device_get((state.params[0], state.model_state[0]))
        return self._alone[model]

    def _target_evaluator(self, fns: Sequence[ktg.NodeFns]) -> Callable[[GraphState], float]:
        size = evaluation_batch_size(self._dataset.image_shape, self._devices[0].platform)
        evaluate = make_evaluator(fns[:1], ktg.Parallel("jit", self._devices), size)

        def of_target(state: GraphState) -> float:
            target = GraphState(
                state.params[:1], state.model_state[:1], state.opt_state[:1], state.step
            )
            return float(evaluate(target, self._val)["accuracy"][0])

        return of_target


def _on_device(split: Split) -> Arrays:
    return Arrays(jnp.asarray(split.images), jnp.asarray(split.labels))


def _replaced(state: GraphState, node: int, trained: Trained) -> GraphState:
    """The state with a node as it was trained alone."""
    params, model_state = list(state.params), list(state.model_state)
    params[node], model_state[node] = jax.tree.map(jnp.array, trained)  # copies: steps consume them
    return dataclasses.replace(state, params=tuple(params), model_state=tuple(model_state))


if __name__ == "__main__":
    cli.run(main)
