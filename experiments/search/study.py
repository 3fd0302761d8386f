"""The study of a search: what it is of, which trials it has, and what is known of each."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import ktg_jax as ktg
from ktg_jax.errors import InputError

from ..runs.identity import differences
from .baselines import baselines
from .config import SearchConfig
from .extra import optuna
from .pruners import make_pruner
from .race import Entrant, Race, key_of, race
from .records import TrialRecord, values_of
from .samplers import make_sampler
from .storage import Storage, enqueue_again

State = optuna.trial.TrialState
Trials = Sequence[optuna.trial.FrozenTrial]

SETTING = "setting"
"""Attribute of the study: what determines it."""

RACE = "race-"
"""Attributes of the study: who takes part in the race of so many trials, `race-50`."""

MOST_KILLED = 3
"""Workers that die in the midst of one trial; then it is the trial that kills them."""


def begin_study(
    storage: optuna.storages.BaseStorage,
    name: str,
    config: SearchConfig,
    space: ktg.SearchSpace,
    setting: Mapping[str, Any],
) -> optuna.Study:
    """Makes the study, with its baselines enqueued, or checks that it is the one there.

    To be called in the study's turn.

    Raises:
        InputError: there is one of this name with another setting; names the fields.
    """
    study = optuna.create_study(
        study_name=name, storage=storage, direction="maximize", load_if_exists=True
    )
    found = study.user_attrs.get(SETTING)
    if found is None:
        # What was enqueued by a process that died before it could say so is not enqueued again.
        enqueued = {trial.user_attrs.get("baseline") for trial in study.get_trials(deepcopy=False)}
        for name, parameters in baselines(space).items() if config.baselines else ():
            if name not in enqueued:
                study.enqueue_trial(parameters, user_attrs={"baseline": name})
        study.set_user_attr(SETTING, dict(setting))
    else:
        check_setting(name, found, setting)
    return study


def open_study(
    storage: optuna.storages.BaseStorage,
    name: str,
    config: SearchConfig,
    space: ktg.SearchSpace,
) -> optuna.Study:
    """The study, with its sampler and its pruner."""
    return optuna.load_study(
        study_name=name,
        storage=storage,
        sampler=make_sampler(config.sampler, space, config.seed, config.draw),
        pruner=make_pruner(config.pruner, config.epochs, config.min_epochs, config.patience),
    )


def check_study(
    storage: optuna.storages.BaseStorage, name: str, setting: Mapping[str, Any]
) -> None:
    """Raises InputError where there is a study of this name with another setting."""
    if name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        check_setting(name, study.user_attrs.get(SETTING, setting), setting)


def check_setting(name: str, found: Mapping[str, Any], setting: Mapping[str, Any]) -> None:
    """Raises InputError where the study was made with another setting; names the fields."""
    differing = differences(found, setting)
    if differing:
        raise InputError("study", name, f"a study of the same search (differing: {differing})")


def races(study: optuna.Study) -> dict[int, list[Entrant]]:
    """Who takes part in the races, by the number of trials that each is of."""
    return {
        int(name.removeprefix(RACE)): [Entrant.from_json(fields) for fields in listed]
        for name, listed in study.user_attrs.items()
        if name.startswith(RACE)
    }


def race_of(study: optuna.Study, known: Sequence[TrialRecord]) -> Race | None:
    """The newest race as it stands; None: there was none.

    Args:
        study: of a search.
        known: of its trials.
    """
    begun = races(study)
    if not begun:
        return None
    setting = study.user_attrs[SETTING]
    first, in_turn = setting["training"]["seed"], setting.get("trial_seeds", 1)
    return race(begun[max(begun)], values_of(known), first, in_turn)


def is_counted(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether it is one of the trials asked for: it has come to an end of its own."""
    return trial.state in (State.COMPLETE, State.PRUNED) or is_failure(trial)


def is_failure(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether its training failed; a trial whose worker died did not, and is run again."""
    return trial.state == State.FAIL and trial.user_attrs.get("reason") is not None


def run_again(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Gives up a trial that nobody runs any more, and enqueues its graph anew."""
    study.tell(trial.number, state=State.FAIL)
    enqueue_again(study, trial)


def run_all_again(study: optuna.Study, owner: str) -> None:
    """Runs the trials again that all workers of a folder were at, which are gone.

    To be called in the study's turn.
    """
    for trial in study.get_trials(deepcopy=False, states=(State.RUNNING,)):
        if is_orphan(trial) or trial.user_attrs["worker"].startswith(f"{owner}/"):
            run_again(study, trial)


def is_orphan(trial: optuna.trial.FrozenTrial) -> bool:
    """In the study's turn: whether its worker died between asking for it and noting its graph.

    For the turn of a worker that lives ends only when it has noted it.
    """
    return trial.state == State.RUNNING and "worker" not in trial.user_attrs


def note_death(study: optuna.Study, storage: Storage, worker: str, signal: int) -> int:
    """Runs the trial again in whose midst its worker was killed, unless it has killed too many.

    With `MOST_KILLED` it failed, as one whose training fails. To be called in the study's turn, and
    only where the worker alone was killed, not with the whole search.

    Returns:
        How many trials the worker has brought to an end, in this way or any other.
    """
    trials = [t for t in study.get_trials() if t.user_attrs.get("worker") == worker]
    killed = [trial for trial in trials if trial.state == State.RUNNING]
    ended = sum(map(is_counted, trials))
    for trial in killed:
        deaths = trial.user_attrs.get("deaths", 0) + 1
        if deaths < MOST_KILLED:
            trial.set_user_attr("deaths", deaths)  # of what is enqueued
            run_again(study, trial)
        else:
            reason = f"killed its worker {deaths} times (signal {signal})"
            storage.set_trial_user_attr(storage.trial_id(study, trial), "reason", reason)
            study.tell(trial.number, state=State.FAIL)
            ended += 1
    return ended


def records(trials: Trials) -> list[TrialRecord]:
    """What is known of the trials, without those that wait."""
    return [_record(trial) for trial in trials if trial.state != State.WAITING]


def _record(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    known = trial.user_attrs
    graph = known.get("graph")
    return TrialRecord(
        number=trial.number,
        state={State.COMPLETE: "complete", State.PRUNED: "pruned", State.FAIL: "failed"}.get(
            trial.state, "running"
        ),
        graph=None if graph is None else ktg.Graph.from_json(graph),
        value=trial.value if trial.state == State.COMPLETE else None,
        curve=dict(sorted(trial.intermediate_values.items())),
        duplicate_of=known.get("duplicate_of"),
        equivalent_to=known.get("equivalent_to"),
        baseline=known.get("baseline"),
        seed=known.get("seed"),
        race=known.get("race", {}).get("round"),
        reason=known.get("reason"),
        **{name: known[name] for name in _COSTS if name in known},
    )


_COSTS = (
    *("node_epochs", "recorded_epochs", "read_epochs"),
    *("seconds", "programs_compiled", "programs_loaded"),
)


def begin_trial(trial: optuna.Trial, graph: ktg.Graph, worker: str) -> None:
    """Notes what the trial is, and forgets what an earlier run of it left behind."""
    for name in ("duplicate_of", "reason"):
        if trial.user_attrs.get(name) is not None:
            trial.set_user_attr(name, None)
    trial.set_user_attr("graph", json.loads(graph.to_json()))
    trial.set_user_attr("key", key_of(graph))
    trial.set_user_attr("worker", worker)


def original_of(trials: Trials, number: int, key: str) -> optuna.trial.FrozenTrial | None:
    """The trial whose values a trial of this number and graph can use; None: it must be trained.

    It is a finished one, or else one that runs and was drawn before.
    """
    same = [
        trial
        for trial in trials
        if trial.user_attrs.get("key") == key
        and trial.number != number
        and trial.user_attrs.get("duplicate_of") is None
    ]
    finished = [trial for trial in same if is_counted(trial)]
    earlier = [t for t in same if t.state == State.RUNNING and t.number < number]
    return next(iter(finished or earlier), None)


def take_seed(study: optuna.Study, trial: optuna.Trial, first: int) -> int:
    """The seed to train a trial with that has equivalents: of all from `first` on, one of its own.

    It is noted in the trial as `seed`, and stays when the trial is run again; of those that have
    equivalents already, `equivalent_to` is the number of the first. To be called in the study's
    turn, after `begin_trial`.
    """
    known = trial.user_attrs
    if known.get("seed") is not None:
        return known["seed"]
    others = [
        other
        for other in study.get_trials(deepcopy=False)
        if other.user_attrs.get("key") == known["key"]
        and other.number != trial.number
        and (other.state != State.FAIL or is_failure(other))  # else it is enqueued anew
    ]
    taken = {other.user_attrs.get("seed") for other in others}
    seed = next(seed for seed in itertools.count(first) if seed not in taken)
    if others:
        trial.set_user_attr("equivalent_to", min(other.number for other in others))
    trial.set_user_attr("seed", seed)
    return seed
