"""Sums up the runs of this study: `python docs/cifar10-recorded/summary.py FOLDER_OF_RUNS`."""

import json
import sys
from pathlib import Path

import ktg_jax as ktg
from experiments.comparison import Contender, compare

ARMS: dict[str, tuple[str, ...]] = {
    "alone": (),
    "one": ("alone",),
    "three": ("alone", "one"),
    "standardised": ("alone", "one"),
    "seen": ("alone", "one"),
    "unseen": ("alone", "one", "seen"),
}
SEEDS = range(5)
folder = Path(sys.argv[1])
accuracies, contenders = {}, []
for arm, baselines in ARMS.items():
    if not (folder / f"{arm}-0").is_dir():
        continue
    runs = [json.loads((folder / f"{arm}-{seed}" / "result.json").read_text()) for seed in SEEDS]
    accuracies[arm] = [run["target"]["test_accuracy"] for run in runs]
    graph = ktg.Graph.load(folder / f"{arm}-0" / "graph.json")
    contenders.append(Contender(arm, "arm", graph, None, None, baselines))
found = compare(contenders, accuracies, SEEDS)
for entry in found["entries"]:
    each = ", ".join(f"{100 * accuracy:.2f}" for accuracy in entry["accuracies"])
    print(f"{entry['name']}: {100 * entry['mean']:.2f} ± {100 * entry['std']:.2f} % ({each})")
for pair in found["comparisons"]:
    low, high = 100 * pair["low"], 100 * pair["high"]
    print(
        f"{pair['entry']} against {pair['baseline']}: {100 * pair['difference']:+.2f} points "
        f"({low:+.2f} to {high:+.2f}), p = {pair['p']:.1e} (Holm: {pair['p_holm']:.1e})"
    )
