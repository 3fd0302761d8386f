"""What gates do to the target: a Bayesian linear model of effects over the trials so far.

The accuracy of a trial is the sum of the effects of what is in its graph, of its seed, and noise,
as in Bayesian optimisation of combinatorial structures (BOCS, Baptista and Poloczek, ICML 2018).
Effects are normal around 0, so what was never seen to matter is not believed to.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import ktg_jax as ktg

_RELATIVE = {"main": 1.0, "with": 0.6, "seed": 0.5}
"""The standard deviations of effects before anything is known, relative to each other: of parts, of
two parts together, of seeds."""

_SIGNALS = tuple(2.0**k for k in range(-5, 2))
_NOISES = tuple(2.0**k for k in range(-6, 1))
"""Standard deviations of the effects of parts and of the noise, in those of the values."""

_ROUNDS, _FAR = 4, 3.0
"""Fits, before each of which values are brought to within so many deviations of what is expected:
one training that went wrong is no effect of its graph."""

_WIDE = 100.0
"""That of the mean over all graphs, of which nothing is known before."""

Term = tuple[str, ...]
"""What an effect is of, from the general to the special."""

MEAN: Term = ("mean",)


@dataclass(frozen=True)
class Effect:
    """What a part of a graph does to the target's accuracy, as the trials tell.

    Attributes:
        group: what kind of part: `label`, `sender` or `partner`.
        name: the part, in words.
        mean: the change of the accuracy, 0 to 1.
        std: its standard deviation: how much of it is not known.
        trials: in how many trials it was seen.
    """

    group: str
    name: str
    mean: float
    std: float
    trials: int


def terms_of(graph: ktg.Graph) -> Counter[Term]:
    """What of the graph has an effect, and how often: each is a column of the linear model.

    Only nodes count that the target needs. A sender is told by what it is: its role, and its model
    or, of a given teacher, its name.

    >>> graph = ktg.graphs.distillation("cnn", ["resnet8", "resnet8"])
    >>> terms = terms_of(graph)
    >>> terms["sender", "frozen resnet8"], terms["sender", "frozen resnet8", "through"]
    (2, 2)
    >>> terms["label", "through"]
    1
    """
    needed, frozen = graph.needed_nodes(), set(graph.frozen)
    kinds = {i: kind_of(graph, i, i in frozen) for i in needed if i != 0}
    label = _of_label(graph.edges[0][0].gate)
    terms: Counter[Term] = Counter({MEAN: 1, ("label", label): 1})
    heard = [i for i in kinds if graph.edges[0][i].carries]
    for i in heard:
        edge, kind = graph.edges[0][i], kinds[i]
        temperature = edge.temperature or graph.temperature
        terms["sender", kind] += 1
        terms["sender", kind, edge.gate] += 1
        terms["sender", kind, "with", f"T {temperature:g}"] += 1
        if label != "through":
            terms["sender", kind, "with", f"label {label}"] += 1
        if carried := dataclasses.replace(edge, temperature=None).says:
            terms["sender", kind, "with", carried] += 1
    if len(heard) > 1:
        terms["sender", "more than one"] = len(heard) - 1
    for i in kinds:
        if i not in frozen:
            terms.update(_of_partner(graph, i, kinds))
    return terms


def _of_partner(graph: ktg.Graph, partner: int, kinds: Mapping[int, str]) -> Counter[Term]:
    """What a node that learns hears itself."""
    kind, row = kinds[partner], graph.edges[partner]
    terms: Counter[Term] = Counter()
    terms["partner", kind, f"label {_of_label(row[partner].gate)}"] += 1
    terms["partner", kind, f"target {row[0].gate}"] += 1
    for i, other in kinds.items():
        if i != partner and row[i].carries:
            terms["partner", kind, f"hears {other}"] += 1
    return terms


def _of_label(gate: str) -> str:
    """A label edge's gate; the label is always right."""
    return "through" if gate == "correct" else gate


def kind_of(graph: ktg.Graph, index: int, is_frozen: bool) -> str:
    """What a node is to those that hear it: `learning cnn`, `frozen cnn`, or a teacher's name."""
    node = graph.nodes[index]
    if node.outputs is not None or node.weights not in (None, "pretrained"):
        return f"teacher {str(node.name).removesuffix(f'-{index}')}"
    return f"{'frozen' if is_frozen else 'learning'} {node.model}"


class EffectsModel:
    """The effects, given trials; their sizes and the noise are those that explain the trials best.

    Args:
        graphs: of complete trials, at least one.
        seeds: with which each was trained.
        values: the target's validation accuracy of each. One that is far from what all the others
            make one expect counts as nearer.

    Attributes:
        noise: standard deviation of the values of one graph with one seed.
    """

    def __init__(
        self, graphs: Sequence[ktg.Graph], seeds: Sequence[int], values: Sequence[float]
    ) -> None:
        terms = [terms_of(graph) for graph in graphs]
        for of_trial, seed in zip(terms, seeds, strict=True):
            of_trial["seed", str(seed)] = 1
        self._names = _told_apart(terms)
        self._seen = Counter(name for of_trial in terms for name in of_trial)
        design = self._columns(terms, self._names)
        reached = np.asarray(values, float)
        spread = float(reached.std()) or 1e-3
        settings = [(s * spread, n * spread) for s in _SIGNALS for n in _NOISES]
        relative = np.array([_relative(name) for name in self._names])
        self._centre, kept = float(reached.mean()), reached
        for _ in range(_ROUNDS):
            known = kept - self._centre
            self._scale, self.noise = max(
                settings, key=lambda s: _log_evidence(design, known, s[0] * relative, s[1])
            )
            self._mean, self._covariance = _posterior(
                design, known, self._scale * relative, self.noise
            )
            fitted = self._centre + design @ self._mean
            kept = np.clip(reached, fitted - _FAR * self.noise, fitted + _FAR * self.noise)

    def thompson(self, graphs: Sequence[ktg.Graph], rng: np.random.Generator) -> np.ndarray:
        """What the graphs would reach if effects that are drawn from what is believed were true.

        Effects that were never seen are drawn as before anything was known; those of seeds and the
        noise are left out.

        Args:
            graphs: G graphs of the space.
            rng: a NumPy generator, which is advanced.

        Returns:
            float64 `[G]`.
        """
        effects = rng.multivariate_normal(self._mean, self._covariance, method="eigh")
        terms = [terms_of(graph) for graph in graphs]
        unseen = self._unseen(terms)
        drawn = rng.normal(size=len(unseen)) * self._prior(unseen)
        known = self._columns(terms, self._names) @ effects
        return self._centre + known + self._columns(terms, unseen) @ drawn

    def predict(self, graphs: Sequence[ktg.Graph]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the graphs' accuracies, without noise: `[G]` each."""
        terms = [terms_of(graph) for graph in graphs]
        columns, unseen = self._columns(terms, self._names), self._unseen(terms)
        variances = np.einsum("gi,ij,gj->g", columns, self._covariance, columns)
        variances += self._columns(terms, unseen) ** 2 @ self._prior(unseen) ** 2
        return self._centre + columns @ self._mean, np.sqrt(np.maximum(variances, 0))

    def of_seed(self, seed: int) -> float:
        """What a seed adds to all graphs; 0 for one that was not seen."""
        name = ("seed", str(seed))
        return float(self._mean[self._names.index(name)]) if name in self._names else 0.0

    def effects(self) -> list[Effect]:
        """The effects in words, those of seeds left out.

        Of a label's gate: in place of `through`. Of a sender: what one more does, heard through a
        gate; then how that changes with a temperature, or with the label's gate.
        """
        found = []
        for name in self._names:
            group, *rest = name
            if group in ("mean", "seed") or (group == "sender" and len(name) == 2):
                continue
            parts = {name: 1.0}
            if group == "label":
                if rest == ["through"]:
                    continue
                parts[("label", "through")] = -1.0
            elif len(name) == 3 and group == "sender":
                parts[name[:2]] = 1.0
            vector = np.array([parts.get(each, 0.0) for each in self._names])
            std = float(np.sqrt(max(vector @ self._covariance @ vector, 0.0)))
            mean = float(vector @ self._mean)
            found.append(Effect(group, _in_words(name), mean, std, self._seen[name]))
        return found

    def _unseen(self, terms: Sequence[Mapping[Term, int]]) -> list[Term]:
        known = {*self._names, *self._seen}
        return sorted(set(itertools.chain(*terms)) - known)

    def _prior(self, names: Sequence[Term]) -> np.ndarray:
        """The standard deviation of each effect before anything is known: `[D]`."""
        return self._scale * np.array([_relative(name) for name in names])

    @staticmethod
    def _columns(terms: Sequence[Mapping[Term, int]], names: Sequence[Term]) -> np.ndarray:
        """How often each of D parts is in each of G graphs: float64 `[G, D]`."""
        return np.array([[t.get(name, 0) for name in names] for t in terms], float).reshape(
            len(terms), len(names)
        )


def _in_words(name: Term) -> str:
    group, *rest = name
    if group == "label":
        return f"label {rest[0]}"
    if group == "partner":
        return ": ".join(rest)
    return " ".join(rest).replace(" with ", ", with ")


def _relative(name: Term) -> float:
    if name == MEAN:
        return _WIDE
    return _RELATIVE["seed" if name[0] == "seed" else "with" if "with" in name else "main"]


def _told_apart(terms: Sequence[Mapping[Term, int]]) -> list[Term]:
    """The parts of the trials' graphs, sorted.

    The lowest temperature, with which the others are compared, is none.
    """
    names = sorted(set(itertools.chain(*terms)))
    found = {float(name[-1][2:]) for name in names if name[-1].startswith("T ")}
    lowest = f"T {min(found, default=0.0):g}"
    return [name for name in names if name[-1] != lowest]


def _posterior(
    design: np.ndarray, values: np.ndarray, prior: np.ndarray, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[D]` and covariance `[D, D]` of effects of these standard deviations, given values."""
    precision = design.T @ design / noise**2 + np.diag(prior**-2.0)
    covariance = np.linalg.inv(precision)
    return covariance @ design.T @ values / noise**2, covariance


def _log_evidence(design: np.ndarray, values: np.ndarray, prior: np.ndarray, noise: float) -> float:
    """The logarithm of the values' probability, up to a constant; effects are left open."""
    weighted = design * prior / noise  # effects in units of what is believed, values in noise's
    whitened = values / noise
    precision = np.eye(len(prior)) + weighted.T @ weighted
    projected = weighted.T @ whitened
    explained = projected @ np.linalg.solve(precision, projected)
    _, log_determinant = np.linalg.slogdet(precision)
    unexplained = whitened @ whitened - explained
    return float(-0.5 * (unexplained + log_determinant) - len(values) * np.log(noise))
