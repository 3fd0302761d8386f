"""Optuna samplers that draw whole, valid graphs (extra: search).

A trial's random numbers depend on the seed and the trial's number alone. So worker processes that
share a study and a seed never draw by the same numbers, and together draw what one would.
"""

import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ktg_jax.checks import is_whole
from ktg_jax.errors import InputError
from ktg_jax.graph.graph import Graph
from ktg_jax.space.draws import drawn, mutated, repaired
from ktg_jax.space.space import SearchSpace

from .effects import EffectsModel
from .extra import optuna
from .race import key_of

Distributions = dict[str, optuna.distributions.BaseDistribution]


def make_sampler(name: str, space: SearchSpace, seed: int, draw: str = "uniform") -> "GraphSampler":
    """A sampler by name.

    Args:
        name: `effects` (Thompson sampling on the effects of gates), `random` or `tpe`.
        space: what the study's trials choose from, by `suggest_graph`.
        seed: 0 or above.
        draw: how graphs are drawn by which no trial is followed, as of `SearchSpace.sample`; the
            papers draw uniformly.

    Raises:
        InputError: no such sampler, or a bad seed.

    >>> sampler = make_sampler("random", SearchSpace(2, "cnn", ("resnet8", "cnn")), seed=0)
    >>> isinstance(sampler, optuna.samplers.BaseSampler)
    True
    """
    if name not in _SAMPLERS:
        raise InputError("sampler", name, ", ".join(_SAMPLERS))
    if not is_whole(seed):
        raise InputError("seed", seed, "an integer, 0 or above")
    return _SAMPLERS[name](space, seed, draw)


def suggest_graph(trial: optuna.trial.BaseTrial, space: SearchSpace) -> Graph:
    """The trial's graph: each choice of the space is one of the trial's categorical parameters.

    A graph is enqueued as `study.enqueue_trial(space.parameters(graph))`.

    Args:
        trial: the trial of a study with a sampler of `make_sampler`; another sampler may draw
            invalid graphs.
        space: the space of that sampler.

    Raises:
        InputError: the trial's parameters, enqueued or drawn by another sampler, make no valid
            graph.

    >>> space = SearchSpace(1, "cnn", (), gates=("linear",))
    >>> trial = optuna.trial.FixedTrial({"gate.0.0": "linear", "temperature": 1.0})
    >>> suggest_graph(trial, space).gates
    (('linear',),)
    """
    choices = space.choices()
    return space.graph({name: trial.suggest_categorical(name, choices[name]) for name in choices})


class GraphSampler(optuna.samplers.BaseSampler):
    """Draws all of a graph's parameters together, so that it is valid, whatever was drawn before.

    Parameters that a trial was enqueued with stay; the rest is drawn so that the graph is valid.
    """

    def __init__(self, space: SearchSpace, seed: int, draw: str = "uniform") -> None:
        self._space = space
        self._seed = seed
        self._how = draw

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> Distributions:
        """The choices of the space that are choices: those of more than one value."""
        return {
            name: optuna.distributions.CategoricalDistribution(allowed)
            for name, allowed in self._space.choices().items()
            if len(allowed) > 1
        }

    def sample_relative(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: Distributions
    ) -> dict[str, Any]:
        """A graph's parameters, those that the search space asks for."""
        given = trial.params | trial.system_attrs.get("fixed_params", {})
        if given.keys() >= search_space.keys():
            return {name: given[name] for name in search_space}
        rng = np.random.default_rng([self._seed, trial.number])
        made = self._draw(study, trial, rng)
        parameters = repaired(self._space, made, given, rng)
        return {name: parameters[name] for name in search_space}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        param_name: str,
        param_distribution: optuna.distributions.BaseDistribution,
    ) -> Any:
        """Draws a parameter that is none of the graph's uniformly."""
        rng = np.random.default_rng([self._seed, trial.number, zlib.crc32(param_name.encode())])
        return optuna.samplers.RandomSampler(seed=_legacy_seed(rng)).sample_independent(
            study, trial, param_name, param_distribution
        )

    def _draw(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, rng: np.random.Generator
    ) -> dict[str, Any]:
        return drawn(self._space, rng, self._how)


class TPEGraphSampler(GraphSampler):
    """Optuna's tree-structured Parzen estimator, over all parameters jointly.

    Its first 10 graphs are drawn as by `GraphSampler`. What other workers are at counts as bad
    (`constant_liar`), so that they do not all try the same. Where the target would hear nobody, its
    gates are drawn anew, uniformly among the valid rows.
    """

    def _draw(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, rng: np.random.Generator
    ) -> dict[str, Any]:
        uniform = super()._draw(study, trial, rng)
        with warnings.catch_warnings():  # in Optuna 4 these options are still experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # The estimator is made of the study's trials; only random numbers would be kept in it.
            tpe = optuna.samplers.TPESampler(
                seed=_legacy_seed(rng), multivariate=True, constant_liar=True, n_startup_trials=10
            )
        choices = self.infer_relative_search_space(study, trial)
        return uniform | tpe.sample_relative(study, trial, choices)


class EffectsSampler(GraphSampler):
    """Thompson sampling on a linear model of the effects of what is in a graph (`EffectsModel`).

    Effects are drawn from what the complete trials leave possible; of many new graphs and of small
    changes of the best ones, the one that would then be best is trained. Graphs that are
    equivalent to one that was tried are passed over.
    """

    def __init__(self, space: SearchSpace, seed: int, draw: str = "uniform") -> None:
        super().__init__(space, seed, draw)
        self._keys: dict[int, str] = {}

    def _draw(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, rng: np.random.Generator
    ) -> dict[str, Any]:
        names = self._space.choices().keys()
        trials = [t for t in study.get_trials(deepcopy=False) if t.params.keys() == names]
        complete = [t for t in trials if is_trained(t)]
        if len(complete) < _LEAST:
            return super()._draw(study, trial, rng)
        model = model_of(self._space, complete)
        pool = pool_of(self._space, complete, rng, self._how)
        graphs = [self._space.graph(parameters) for parameters in pool]
        order = np.argsort(-model.thompson(graphs, rng), kind="stable")
        tried = {self._key(t) for t in trials}
        new = (i for i in order if key_of(graphs[i]) not in tried)
        return pool[next(new, order[0])]

    def _key(self, trial: optuna.trial.FrozenTrial) -> str:
        """The same for trials of equivalent graphs."""
        if trial.number not in self._keys:
            self._keys[trial.number] = key_of(self._space.graph(trial.params))
        return self._keys[trial.number]


def is_trained(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether it was trained to its end, and has not its values from an equivalent one."""
    return trial.value is not None and trial.user_attrs.get("duplicate_of") is None


def model_of(space: SearchSpace, complete: Sequence[optuna.trial.FrozenTrial]) -> EffectsModel:
    """The effects, as complete trials tell."""
    return EffectsModel(
        [space.graph(trial.params) for trial in complete],
        [trial.user_attrs.get("seed", 0) for trial in complete],
        [float(trial.value) for trial in complete if trial.value is not None],
    )


def pool_of(
    space: SearchSpace,
    complete: Sequence[optuna.trial.FrozenTrial],
    rng: np.random.Generator,
    draw: str,
) -> list[dict[str, Any]]:
    """Parameters of new graphs, and of small changes of the best ones."""
    best = sorted(complete, key=lambda t: (-(t.value or 0.0), t.number))[:_MUTATED]
    pool = [drawn(space, rng, draw) for _ in range(_NEW)]
    return pool + [mutated(space, t.params, rng) for t in best for _ in range(_CHANGES)]


_LEAST = 3
"""Complete trials from which effects can be told at all."""

_NEW, _MUTATED, _CHANGES = 200, 8, 12
"""How many new graphs are scored, and how many changes of each of how many of the best."""

_SAMPLERS: dict[str, type[GraphSampler]] = {
    "effects": EffectsSampler,
    "random": GraphSampler,
    "tpe": TPEGraphSampler,
}


def _legacy_seed(rng: np.random.Generator) -> int:
    """A seed as Optuna takes it, of 32 bits."""
    return int(rng.integers(2**32))
