"""What a report says beside its best graph: what gates do, and the race."""

import re
from pathlib import Path

import pytest
from made_up_studies import ALONE, HEARING, MUTUAL, complete, make_study, small_study

from experiments.report.findings import (
    effects_of,
    effects_picture,
    race_picture,
    runners,
)
from experiments.report.page import write_report
from experiments.search.race import Entrant, race
from experiments.search.records import StudyRecord, TrialRecord, values_of
from ktg_jax import Graph
from ktg_jax.graph import named as graphs

LINEAR = Graph(["cnn"], [["linear"]])
ALL = (HEARING, MUTUAL, graphs.independent(["cnn", "resnet8"]), ALONE)


def raced_study() -> StudyRecord:
    """Four graphs with three seeds each; two go on to five, and the second of them wins."""
    trials: list[TrialRecord] = []
    for i, graph in enumerate(ALL):
        for seed in range(5 if i < 2 else 3):
            value = 0.7 - 0.05 * i + (0.25 * i if seed > 2 else 0.01 * seed)
            known = {"seed": seed, "race": None if seed == 0 else 1 if seed < 3 else 2}
            trials.append(complete(len(trials), graph, value, **known))
    entrants = [Entrant(graph, "trials" if i else "model", 0.65) for i, graph in enumerate(ALL)]
    return make_study(*trials, race=race(entrants, values_of(trials), 0))


def text_of(path: Path) -> str:
    return " ".join(re.sub("<.*?>", " ", path.read_text(encoding="utf-8")).split())


def test_the_runners_are_told_best_first() -> None:
    first, second, *others = runners(raced_study())
    assert (first.graph, first.is_winner, first.by) == (MUTUAL, True, "trials")
    # 0.65, 0.66 and 0.67, and 0.9 twice.
    assert first.means == pytest.approx([0.66, 0.756])
    assert list(first.values) == [0, 1, 2, 3, 4]
    assert (second.graph, second.by, second.is_winner) == (HEARING, "model", False)
    assert second.trial == 0
    assert [len(other.means) for other in others] == [1, 1]


def test_the_page_shows_the_race_and_its_winner(tmp_path: Path) -> None:
    path = write_report(raced_study(), tmp_path / "report.html")
    text = text_of(path)
    assert "The best validation accuracy is 75.60 % ( trial 5 ; mean of 5 seeds)" in text
    assert "The race One score of many picks luck" in text
    assert "66.00 %, 75.60 %" in text
    assert "race, round 2, seed 4" in text
    assert "75.60 % (5 seeds)" in text


def test_the_picture_of_the_race_has_a_line_a_graph() -> None:
    picture = race_picture(raced_study().race)
    assert picture is not None
    assert sorted(set(re.findall(r'id="(race-\d)"', picture.svg))) == [
        f"race-{i}" for i in range(4)
    ]


def test_effects_are_told_by_kind_and_size(tmp_path: Path) -> None:
    study = raced_study()
    effects = effects_of(study)
    groups = [effect.group for effect in effects]
    assert groups == sorted(groups, key=["label", "sender", "partner"].index)
    names = {effect.name for effect in effects}
    assert {"label linear", "learning resnet8 through", "learning resnet8 linear"} <= names
    for group in set(groups):
        means = [effect.mean for effect in effects if effect.group == group]
        assert means == sorted(means, reverse=True)
    text = text_of(write_report(study, tmp_path / "report.html"))
    assert "What gates do A linear model of effects" in text
    for effect in effects:
        assert f"{effect.name} {100 * effect.mean:+.2f}".replace("-", "−") in text  # noqa: RUF001
    picture = effects_picture(effects)
    assert picture is not None
    assert set(re.findall(r'id="effects-(\w+)"', picture.svg)) == set(groups)


def test_without_a_race_or_with_few_trials_the_page_leaves_them_out(tmp_path: Path) -> None:
    study = make_study(complete(0, MUTUAL, 0.5), complete(1, LINEAR, 0.6))
    assert effects_of(study) == []
    assert effects_picture([]) is None
    assert race_picture(None) is None
    assert runners(small_study()) == []
    text = text_of(write_report(study, tmp_path / "report.html"))
    assert "What gates do" not in text
    assert "The race" not in text
