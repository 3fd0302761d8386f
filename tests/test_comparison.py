"""The fair ending of a search: which graphs are trained again, and the test of their accuracies."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from experiments.comparison import Contender, compare, holm
from experiments.runs.graphs import with_pretrained
from experiments.search.contenders import contenders
from experiments.search.records import Standing, TrialRecord
from experiments.search.tables import markdown, tables
from ktg_jax import Graph, InputError, Node
from ktg_jax.graph import named as graphs

LABEL = (("through", "cutoff"), ("cutoff", "through"))
# The target hears node 1, node 1 its label; node 2 is heard by nobody.
FIRST_TWO = (
    ("through", "linear", "cutoff"),
    ("cutoff", "through", "cutoff"),
    ("through", "through", "through"),
)
# The target hears node 2, which is frozen; node 1 is heard by nobody.
FROZEN_LAST = (
    ("through", "cutoff", "linear"),
    ("cutoff", "through", "cutoff"),
    ("cutoff", "cutoff", "cutoff"),
)


def make(nodes: Any, gates: Any, temperature: float = 1.0) -> Graph:
    return Graph(nodes, gates, temperature)


def trial(number: int, graph: Graph, value: float = 0.5, **known: Any) -> Standing:
    return Standing(TrialRecord(number, "complete", graph, value, **known), value, 1)


def by_name(best: list[Standing], **more: Any) -> dict[str, Contender]:
    listed = contenders(best, **more)
    assert len({c.name for c in listed}) == len(listed)
    return {c.name: c for c in listed}


def names(graph: Graph) -> list[str | None]:
    return [node.name for node in graph.nodes]


def paired(*entries: tuple[str, list[float]], seeds: list[int] | None = None) -> dict[str, Any]:
    """Results of a found graph, `found-0`, against baselines with these accuracies."""
    graph = graphs.independent(["cnn"])
    others = tuple(name for name, _ in entries[1:])
    listed = [Contender("found-0", "found", graph, 0, 0.75, others)]
    listed += [Contender(name, name.split("-")[0], graph) for name in others]
    accuracies = dict(entries)
    return compare(listed, accuracies, seeds or list(range(len(entries[0][1]))))


def test_contenders_of_a_found_graph_are_its_own_nodes() -> None:
    found = by_name([trial(7, make(["cnn", "resnet8", "wrn10_2"], FIRST_TWO, 4.0), 0.625)])
    assert list(found) == ["found-7", "independent", "mutual-7", "distillation-7"]
    best = found["found-7"]
    assert (best.kind, best.trial, best.val_accuracy, best.stands_for) == ("found", 7, 0.625, None)
    assert best.graph.gates == (("through", "linear"), ("cutoff", "through"))
    assert best.baselines == ("independent", "mutual-7", "distillation-7")
    assert found["independent"].graph == make(["cnn"], [["through"]])
    pair = [Node("cnn", "cnn-0"), Node("resnet8", "resnet8-1")]
    assert found["mutual-7"].graph == make(pair, [["through"] * 2] * 2, 4.0)
    teacher = Node("resnet8", "resnet8-1", "pretrained")
    assert found["distillation-7"].graph == make(
        [pair[0], teacher], [["through", "through"], ["cutoff", "cutoff"]], 4.0
    )
    assert all(c.trial is None and c.baselines == () for c in found.values() if c.kind != "found")


def test_contenders_keep_the_names_drawn_and_give_frozen_nodes_weights() -> None:
    found = by_name([trial(2, make(["cnn", "wrn10_2", "resnet8"], FROZEN_LAST))])
    nodes = (Node("cnn", "cnn-0"), Node("resnet8", "resnet8-2", "pretrained"))
    assert found["found-2"].graph.nodes == nodes
    assert found["distillation-2"].graph.nodes == nodes
    assert found["mutual-2"].graph.nodes == (nodes[0], Node("resnet8", "resnet8-2"))


def test_baselines_are_shared_by_found_graphs_of_the_same_nodes() -> None:
    swapped = make(["cnn", "wrn10_2", "resnet8"], FROZEN_LAST)  # keeps cnn and resnet8, as `first`
    first = make(["cnn", "resnet8", "wrn10_2"], FIRST_TWO)
    other = make(["cnn", "wrn10_2", "wrn10_2"], FIRST_TWO)
    warmer = replace(first, temperature=4.0)
    found = by_name([trial(9, swapped), trial(4, first), trial(5, other), trial(6, warmer)])
    assert [c.kind for c in found.values()].count("independent") == 1
    assert found["found-9"].baselines == ("independent", "mutual-9", "distillation-9")
    assert found["found-4"].baselines == found["found-9"].baselines
    assert found["found-5"].baselines == ("independent", "mutual-5", "distillation-5")
    assert found["found-6"].baselines == ("independent", "mutual-6", "distillation-6")
    assert len(found) == 4 + 1 + 3 * 2
    # Paired by seed, the target begins with the same weights everywhere.
    assert {c.graph.nodes[0] for c in found.values()} == {Node("cnn", "cnn-0")}


def test_nodes_are_all_drawn_where_only_the_target_is_left() -> None:
    alone = make(["cnn", "resnet8", "cnn"], [["linear", "cutoff", "cutoff"], *FIRST_TWO[1:]])
    found = by_name([trial(3, alone)])
    assert found["found-3"].graph == make(["cnn"], [["linear"]])
    assert names(found["mutual-3"].graph) == ["cnn-0", "resnet8-1", "cnn-2"]
    assert found["distillation-3"].graph.frozen == (1, 2)


def test_one_node_has_only_the_independent_baseline() -> None:
    found = by_name([trial(0, make(["cnn"], [["linear"]]))])
    assert list(found) == ["found-0", "independent"]


@pytest.mark.parametrize(
    ("kind", "gates"),
    [
        ("independent", LABEL),
        ("mutual", (("correct", "through"), ("through", "through"))),
        ("distillation", (("through", "through"), ("cutoff", "cutoff"))),
    ],
)
def test_a_found_graph_stands_for_the_baseline_that_it_is(kind: str, gates: Any) -> None:
    pair = ["cnn", "resnet8"]
    linear = make(pair, [["linear", "linear"], ["cutoff", "linear"]])
    found = by_name([trial(8, linear), trial(1, make(pair, gates))])
    others = {"independent": "independent", "mutual": "mutual-8", "distillation": "distillation-8"}
    del others[kind]
    assert found["found-1"].stands_for == kind
    assert found["found-1"].baselines == tuple(others.values())
    assert found["found-8"].stands_for is None
    assert set(found["found-8"].baselines) == {"found-1", *others.values()}
    assert len(found) == 4  # none is trained twice
    results = compare(list(found.values()), {name: [0.5, 0.75] for name in found}, [0, 1])
    kinds = {(c["entry"], c["baseline"]): c["baseline_kind"] for c in results["comparisons"]}
    assert kinds["found-8", "found-1"] == kind
    assert ("found-1", "found-1") not in kinds
    assert f"found-1 (is {kind})" in markdown(results)


def test_with_pretrained_leaves_weights_that_are_there() -> None:
    gates = [["through"] * 3, ["cutoff"] * 3, ["cutoff"] * 3]
    graph = with_pretrained(make([Node("cnn"), Node("cnn", weights="runs/a"), "cnn"], gates))
    assert [node.weights for node in graph.nodes] == [None, "runs/a", "pretrained"]
    assert with_pretrained(graph) == graph
    assert with_pretrained(graphs.mutual(["cnn", "cnn"])) == graphs.mutual(["cnn", "cnn"])


def test_compare_gives_what_is_known_of_an_entry() -> None:
    found = by_name([trial(7, make(["cnn", "resnet8", "cnn"], FIRST_TWO), 0.625)])
    values = {name: [0.5, 0.75, 0.25] for name in found}
    results = json.loads(json.dumps(compare(list(found.values()), values, [3, 1, 2])))
    assert results["seeds"] == [3, 1, 2]
    entry = results["entries"][0]
    assert (entry["name"], entry["kind"], entry["trial"]) == ("found-7", "found", 7)
    assert Graph.from_json(entry["graph"]) == found["found-7"].graph
    assert entry["accuracies"] == [0.5, 0.75, 0.25]
    # Deviations 0, 0.25 and -0.25: their squares add to 0.125, over n - 1 = 2 are 0.0625.
    assert (entry["val_accuracy"], entry["mean"], entry["std"]) == (0.625, 0.5, 0.25)
    assert results["entries"][1]["val_accuracy"] is None


def test_compare_pairs_by_seed() -> None:
    # Differences 0.125, 0.25 and 0.375: mean 0.25, standard deviation 0.125, standard error
    # 0.125 / sqrt(3), t = 2 sqrt(3). With 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2), here
    # 1 - sqrt(12 / 14), and 95 % lie within 4.302653 standard errors.
    results = paired(("found-0", [0.5, 0.75, 0.875]), ("mutual-0", [0.375, 0.5, 0.5]))
    (comparison,) = results["comparisons"]
    half = 4.302653 * 0.125 / math.sqrt(3)
    assert comparison["difference"] == 0.25
    assert comparison["p"] == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-9)
    assert comparison["low"] == pytest.approx(0.25 - half, rel=1e-6)
    assert comparison["high"] == pytest.approx(0.25 + half, rel=1e-6)
    assert comparison["p_holm"] == comparison["p"]
    assert (comparison["entry"], comparison["baseline"]) == ("found-0", "mutual-0")
    # The same accuracies for other seeds are other pairs: 0, 0.375 and 0.375, of the same mean.
    other = paired(("found-0", [0.5, 0.75, 0.875]), ("mutual-0", [0.5, 0.375, 0.5]))
    assert other["comparisons"][0]["difference"] == 0.25
    assert other["comparisons"][0]["p"] != pytest.approx(comparison["p"], rel=0.1)


def test_p_values_are_corrected_for_the_tests_that_were_made() -> None:
    results = paired(
        ("found-0", [0.5, 0.75, 0.875]),
        ("independent", [0.375, 0.5, 0.5]),  # p = 1 - sqrt(12 / 14) = 0.0742, as above
        ("mutual-0", [0.5, 0.25, 0.625]),  # differences 0, 0.5, 0.25: t = sqrt(3), p = 0.2254
        ("distillation-0", [0.25, 0.5, 0.625]),  # 0.25 with each seed: no test
    )
    assert (results["num_comparisons"], results["num_tests"]) == (3, 2)
    first, second, none = results["comparisons"]
    assert first["p_holm"] == pytest.approx(2 * (1 - math.sqrt(12 / 14)))
    assert second["p_holm"] == second["p"] == pytest.approx(1 - math.sqrt(3 / 5))
    assert none["p_holm"] is None


@pytest.mark.parametrize(
    ("found", "baseline"),
    [
        ([0.5], [0.25]),  # one seed
        ([0.5, 0.5], [0.25, 0.25]),
        ([0.25, 0.5], [0.25, 0.5]),
        ([0.9, 0.5, 0.3], [0.8, 0.4, 0.2]),  # 0.1 each, but for rounding
        ([0.8999999762, 0.5], [0.8, 0.4]),  # 0.9 in single precision
    ],
)
def test_nothing_is_tested_without_a_spread(found: list[float], baseline: list[float]) -> None:
    results = paired(("found-0", found), ("mutual-0", baseline))
    (comparison,) = results["comparisons"]
    assert comparison["difference"] == pytest.approx(found[0] - baseline[0])
    assert [comparison[key] for key in ("low", "high", "p", "p_holm")] == [None] * 4
    assert results["num_tests"] == 0
    assert "| - | - | - |" in markdown(results)


def test_one_seed_has_no_standard_deviation() -> None:
    results = paired(("found-0", [0.5]), ("mutual-0", [0.25]), seeds=[5])
    assert results["entries"][0]["std"] is None
    text = markdown(results)
    assert "| found-0 | 75.00 | 50.00 | 50.00 |" in text
    assert "With one seed nothing is tested" in text


def test_one_image_of_ten_thousand_is_a_spread() -> None:
    results = paired(("found-0", [0.5001, 0.5]), ("mutual-0", [0.4, 0.4]))
    assert results["num_tests"] == 1


def test_holm() -> None:
    # Sorted 0.01, 0.03, 0.04: times 3, 2 and 1 are 0.03, 0.06 and 0.04, which may not be less.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.75, 0.625]) == [1.0, 1.0]
    assert holm([]) == []


def test_markdown() -> None:
    results = paired(
        ("found-0", [0.5, 0.75, 0.875]), ("mutual-0", [0.375, 0.5, 0.5]), seeds=[0, 4, 5]
    )
    lines = markdown(results).splitlines()
    assert "| graph | validation | test | seed 0 | seed 4 | seed 5 |" in lines
    # 17 / 24 is the mean; deviations -5, 1 and 4 over 24: sqrt(42 / 2) / 24 = 0.1909.
    assert "| found-0 | 75.00 | 70.83 ± 19.09 | 50.00 | 75.00 | 87.50 |" in lines
    assert "| mutual-0 | - | 45.83 ± 7.22 | 37.50 | 50.00 | 50.00 |" in lines
    assert "| found-0 | mutual-0 | +25.00 | -6.05 to +56.05 | 0.074 | 0.074 |" in lines
    # 4.302653 / sqrt(3)
    assert "3 paired seeds" in lines[-1]
    assert "less than 2.5 times" in lines[-1]
    tables = [line for line in lines if line.startswith("|")]
    assert [line.count("|") for line in tables] == [7] * 7
    rules = [line for line in tables if line.startswith("| --- |")]
    assert rules == [f"| --- | {kind} | ---: | ---: | ---: | ---: |" for kind in ("---:", "---")]


def test_small_p_values_are_bounded() -> None:
    # Differences 0.5, 0.5 and 0.501.
    results = paired(("found-0", [0.5, 0.5, 0.501]), ("mutual-0", [0.0, 0.0, 0.0]))
    assert "| < 0.001 | < 0.001 |" in markdown(results)


def test_markdown_without_comparisons_has_one_table() -> None:
    found = contenders([trial(0, make(["cnn"], [["correct"]]))])
    assert [(c.name, c.stands_for) for c in found] == [("found-0", "independent")]
    text = markdown(compare(found, {"found-0": [0.5, 0.75]}, [0, 1]))
    assert text.count("| --- |") == 1
    assert "interval" not in text


def test_tables() -> None:
    results = paired(
        ("found-0", [0.5, 0.75, 0.875]),
        ("independent", [0.5, 0.25, 0.625]),
        ("mutual-0", [0.375, 0.5, 0.5]),
        ("distillation-0", [0.25, 0.5, 0.625]),  # 0.25 with each seed: no test
    )
    lines = [" ".join(line.split()) for line in printed(results, 100)]
    assert lines[0] == "graph validation test"
    assert lines[1] == "found-0 75.00 70.83 ± 19.09"
    assert lines[2] == "independent - 45.83 ± 19.09"
    assert lines[6] == "graph baseline difference 95 % interval p"
    # The larger p, 0.225, is corrected by 1; the smaller, 0.0742, by 2.
    assert lines[7] == "found-0 independent +25.00 -37.10 to +87.10 0.225"
    assert lines[8] == "found-0 mutual-0 +25.00 -6.05 to +56.05 0.148"
    assert lines[9] == "found-0 distillation-0 +25.00 - -"


def test_the_tables_fit_eighty_columns() -> None:
    found = by_name([trial(1041, graphs.distillation("cnn", "resnet8"), 0.875)])
    results = compare(list(found.values()), {name: [0.5, 0.75] for name in found}, [0, 1])
    for comparison in results["comparisons"]:
        comparison |= {"difference": -0.125, "low": -0.5, "high": 0.25, "p_holm": 0.0001}
    lines = printed(results, 80)
    # A head, a line each, and a line below.
    assert len(lines) == (1 + len(found) + 1) + (1 + len(results["comparisons"]) + 1)


def printed(results: dict[str, Any], width: int) -> list[str]:
    """The lines of the tables in so wide a terminal."""
    console = Console(width=width)
    with console.capture() as capture:
        for table in tables(results):
            console.print(table)
    return capture.get().splitlines()


LINEAR_ALONE = (("linear",),)


def test_the_control_and_the_best_designed_graph_take_part() -> None:
    pair = ["cnn", "resnet8"]
    found = trial(9, make(pair, [["linear", "linear"], ["cutoff", "cutoff"]], 4.0))
    best = graphs.distillation("cnn", "resnet8")  # at another temperature than the found one
    designed = [
        trial(3, best, baseline="distillation resnet8"),
        trial(2, graphs.mutual(pair), baseline="mutual"),
    ]
    listed = by_name([found], gates=("through", "linear"), designed=designed)
    own = ("independent", "mutual-9", "distillation-9")
    assert listed["found-9"].baselines == (*own, "control", "designed")
    assert listed["control"].graph.gates == LINEAR_ALONE
    assert listed["designed"].graph == with_pretrained(best)
    without = by_name([found], gates=("through", "correct"))
    assert without["found-9"].baselines == own


def test_a_designed_graph_that_is_found_stands_for_it() -> None:
    found = trial(4, graphs.distillation("cnn", "resnet8", 4.0), baseline="distillation resnet8")
    other = trial(8, make(["cnn", "resnet8"], [["linear"] * 2, ["cutoff"] * 2], 4.0))
    listed = by_name([found, other], designed=[found])
    assert listed["found-4"].stands_for == "distillation"
    assert "designed" not in listed
    assert listed["found-8"].baselines == ("independent", "mutual-4", "found-4")


def test_teachers_that_were_given_do_not_learn() -> None:
    teacher = Node("resnet20", "teacher-1", weights="runs/teacher")
    found = trial(5, graphs.distillation("cnn", teacher, 4.0))
    alone = by_name([found])
    assert alone["found-5"].baselines == ("independent",)
    assert alone["found-5"].stands_for == "distillation"
    mutual = trial(2, graphs.mutual(["cnn", "cnn"]), baseline="mutual")
    listed = by_name([found], designed=[found, mutual])
    assert listed["mutual-5"].graph == mutual.graph
    assert listed["found-5"].baselines == ("independent", "mutual-5")


def test_bad_trials_are_refused() -> None:
    first = make(["cnn", "resnet8"], LABEL)
    other = make(["resnet8", "cnn"], LABEL)
    equivalent = make(["cnn", "cnn"], LABEL)
    with pytest.raises(InputError, match="at least one trial"):
        contenders([])
    with pytest.raises(InputError, match=r"\['cnn-0', 'resnet8-0'\]; allowed: .* same target"):
        contenders([trial(0, first), trial(1, other)])
    with pytest.raises(InputError, match=r"best: got \[0, 1\]; .*not equivalent"):
        contenders([trial(0, first), trial(1, equivalent)])


def test_bad_accuracies_are_refused() -> None:
    listed = contenders([trial(0, make(["cnn"], [["linear"]]))])
    good = {"found-0": [0.5, 0.75], "independent": [0.25, 0.5]}
    bad: list[tuple[dict[str, list[float]], list[int], str]] = [
        (good, [], "seeds: "),
        (good, [1, 1], "seeds: "),
        (good, [0, 1, 2], r"accuracies\[found-0\]: got \[0.5, 0.75\]; allowed: 3 accuracies"),
        (good | {"independent": [0.5]}, [0, 1], r"accuracies\[independent\]: .* 2 accuracies"),
        (good | {"independent": [0.5, math.nan]}, [0, 1], r"accuracies\[independent\]: .* 0 to 1"),
        (good | {"independent": [50.0, 60.0]}, [0, 1], r"accuracies\[independent\]: .* 0 to 1"),
        ({"found-0": [0.5, 0.75]}, [0, 1], "accuracies: got 'no independent'"),
        (good | {"mutual-0": [0.5, 0.5]}, [0, 1], "accuracies: got 'mutual-0'"),
    ]
    for accuracies, seeds, message in bad:
        with pytest.raises(InputError, match=message):
            compare(listed, accuracies, seeds)
    with pytest.raises(InputError, match="independent, which found-0 is compared with"):
        compare(listed[:1], good, [0, 1])
    with pytest.raises(InputError, match=r"contenders: .* each name once"):
        compare([*listed, listed[0]], good, [0, 1])
