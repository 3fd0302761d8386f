"""What a worker does next: a trial that waits, a new graph, or a training of the race."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

import ktg_jax as ktg

from .baselines import baselines
from .config import SearchConfig
from .effects import EffectsModel
from .extra import optuna
from .race import Entrant, Race, key_of, race, trainings
from .records import TrialRecord, values_of
from .samplers import is_trained, model_of, pool_of
from .study import RACE, State, Trials, is_counted, races, records

_LEAST_TRIALS = 2
"""Complete trials of different graphs without which there is no race."""


class Reserved(NamedTuple):
    """What is kept for the race."""

    graphs: int
    """That take part; 0: there is no race."""
    trials: int
    """Trainings that it takes."""


def reserved(config: SearchConfig, space: ktg.SearchSpace) -> Reserved:
    """The race that half of the trials after the baselines suffice for; as large as was asked."""
    designed = len(baselines(space)) if config.baselines else 0
    for graphs in range(config.race, 1, -1):
        wanted = trainings(graphs, _by_effects(config, graphs), config.trial_seeds)
        if wanted <= (config.trials - designed) // 2:
            return Reserved(graphs, wanted)
    return Reserved(0, 0)


def _by_effects(config: SearchConfig, graphs: int) -> int:
    """How many of so many graphs the effects choose; these may have no trial yet."""
    return graphs // 2 if config.sampler == "effects" else 0


def is_next(
    study: optuna.Study,
    config: SearchConfig,
    space: ktg.SearchSpace,
    trials: Trials,
    kept: Reserved,
) -> bool:
    """Whether there is a trial to begin now; else one that runs has to come to its end first.

    Where the race is on, its next training is enqueued. To be called in the study's turn.

    Args:
        study: of the search.
        config: of the search.
        space: of graphs.
        trials: all trials of the study.
        kept: for the race.
    """
    if any(trial.state == State.WAITING for trial in trials):
        return True
    others = [trial for trial in trials if not _is_of_race(trial, config)]
    running = sum(trial.state == State.RUNNING for trial in others)
    begun = running + sum(map(is_counted, others))
    if not kept.graphs or begun < config.trials - kept.trials:
        return True
    if running:
        return False
    stands = _race(study, config, space, trials, kept.graphs)
    if stands is None:
        return True
    at_work = {
        (trial.user_attrs["race"]["entrant"], trial.user_attrs["seed"])
        for trial in trials
        if _is_of_race(trial, config) and trial.state == State.RUNNING
    }
    left = [each for each in stands.wanted if each not in at_work]
    if not left:
        return False
    entrant, seed = left[0]
    attributes = {
        "seed": seed,
        "race": {"of": config.trials, "round": len(stands.rounds) + 1, "entrant": entrant},
    }
    study.enqueue_trial(space.parameters(stands.entrants[entrant].graph), user_attrs=attributes)
    return True


def _is_of_race(trial: optuna.trial.FrozenTrial, config: SearchConfig) -> bool:
    return trial.user_attrs.get("race", {}).get("of") == config.trials


def _race(
    study: optuna.Study,
    config: SearchConfig,
    space: ktg.SearchSpace,
    trials: Trials,
    graphs: int,
) -> Race | None:
    """The race as it stands, begun if it was not; None: too few graphs for one."""
    known = races(study).get(config.trials)
    if known is None:
        known = _entrants(config, space, trials, graphs)
        if len(known) < _LEAST_TRIALS:
            return None
        listed = [entrant.to_json() for entrant in known]
        study.set_user_attr(f"{RACE}{config.trials}", listed)
    return race(known, values_of(records(trials)), config.seed, config.trial_seeds)


def _entrants(
    config: SearchConfig, space: ktg.SearchSpace, trials: Trials, graphs: int
) -> list[Entrant]:
    """The best graphs, each once: by the effects, tried or not, and by their trials."""
    complete = [trial for trial in trials if is_trained(trial)]
    if len(complete) < _LEAST_TRIALS:
        return []
    model = model_of(space, complete)
    observed = _by_trials(records(complete), model)
    by_model = _by_effects(config, graphs)
    chosen = {key_of(e.graph): e for e in observed[: graphs - by_model]}
    if by_model:
        rng = np.random.default_rng([config.seed, len(trials)])
        pool = [space.graph(p) for p in pool_of(space, complete, rng, config.draw)]
        pool += [entrant.graph for entrant in observed]
        chosen |= _by_model(pool, model, chosen, by_model)
    for entrant in observed:  # where the space has no others
        if len(chosen) < graphs:
            chosen.setdefault(key_of(entrant.graph), entrant)
    return list(chosen.values())


def _by_trials(complete: Sequence[TrialRecord], model: EffectsModel) -> list[Entrant]:
    """Graphs by the mean accuracy of their trials, best first; the effects of seeds taken off."""
    of_graph: dict[str, list[TrialRecord]] = {}
    for record in complete:
        if record.graph is not None:
            of_graph.setdefault(key_of(record.graph), []).append(record)

    def reached(trials: Sequence[TrialRecord]) -> float:
        return float(np.mean([(t.value or 0.0) - model.of_seed(t.seed or 0) for t in trials]))

    ordered = sorted(of_graph.values(), key=lambda some: (-reached(some), some[0].number))
    graphs = [some[0].graph for some in ordered if some[0].graph is not None]
    expected = model.predict(graphs)[0]
    return [Entrant(g, "trials", float(e)) for g, e in zip(graphs, expected, strict=True)]


def _by_model(
    pool: Sequence[ktg.Graph], model: EffectsModel, taken: Collection[str], count: int
) -> dict[str, Entrant]:
    """So many graphs of the pool of which the effects expect most, by key; none that was taken."""
    expected = model.predict(pool)[0]
    found: dict[str, Entrant] = {}
    for i in np.argsort(-expected, kind="stable"):
        if len(found) == count:
            break
        if (key := key_of(pool[i])) not in taken:
            found.setdefault(key, Entrant(pool[i], "model", float(expected[i])))
    return found
