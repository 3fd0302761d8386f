"""Graphs learned in one training, against the graphs of a ledger: `learn.py --help`.

Every part writes `<part>.json` into its folder, and does not do again what is there.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from task import EPOCHS, FREE, Task

import ktg_jax as ktg
from ktg_jax.cpu.convolution import formulation
from ktg_jax.losses import cross_entropy

LABEL_GATES = ("through", "cutoff", "linear", "negative_linear")
TEACHER_GATES = (*LABEL_GATES, "correct")
BEGIN = np.array([[0.5, 0.0, 0, 0]] * 3, np.float32)
"""Where learning begins: half of the label and of each teacher, all the time."""

TRAININGS = 12
"""What a method may spend: a tenth of a search's node-epochs."""

TRUNCATED, NOISE = 3, 0.2
"""How many of a population are replaced, and how their coefficients change."""

SIGMA, STEP = 0.3, 0.6
"""Evolution: how far graphs are tried, and how far each of two generations goes."""

FRESH = range(10_000, 10_005)


def theta_of(row: tuple[str, ...]) -> np.ndarray:
    """The coefficients of named gates."""
    return np.array([ktg.gates.named_coefficients(gate) for gate in row], np.float32)


def discrete() -> Iterator[tuple[str, ...]]:
    """All rows of gates but the one that is cut altogether."""
    for row in itertools.product(LABEL_GATES, TEACHER_GATES, TEACHER_GATES):
        if set(row) != {"cutoff"}:
            yield row


# --- the ledger


def ledger(task: Task, seed: int) -> dict[str, list[float]]:
    """The validation accuracy after each epoch of every graph, by its gates."""
    found = {}
    for row in discrete():
        state, curve = task.begin(seed), []
        for epoch in range(EPOCHS):
            first = epoch * task.per_epoch
            state = task.run(state, theta_of(row), first, first + task.per_epoch)
            curve.append(task.scores(state).accuracy)
        found[" ".join(row)] = curve
    return found


# --- a population


def population(task: Task, seed: int, every: int) -> dict[str, Any]:
    """Targets that train together; every so many epochs the worst continue from the best.

    A member that is replaced takes weights and coefficients of one of the best, and changes the
    coefficients (Jaderberg et al., 2017). The graph is what the best one's coefficients were, epoch
    by epoch.
    """
    rng = np.random.default_rng(seed)
    rows = list(discrete())
    thetas = [theta_of(rows[i]) for i in rng.choice(len(rows), TRAININGS, replace=False)]
    states = [task.begin(1000 * seed + i) for i in range(TRAININGS)]
    past: list[list[Any]] = [[] for _ in states]
    for epoch in range(EPOCHS):
        first = epoch * task.per_epoch
        for i, theta in enumerate(thetas):
            states[i] = task.run(states[i], theta, first, first + task.per_epoch)
            past[i] = [*past[i], theta.tolist()]
        if (epoch + 1) % every and epoch + 1 < EPOCHS:
            continue
        order = np.argsort([task.scores(state).accuracy for state in states])
        if epoch + 1 == EPOCHS:
            break
        for worst in order[:TRUNCATED]:
            best = rng.choice(order[-TRUNCATED:])
            states[worst], past[worst] = states[best], past[best]
            noise = NOISE * rng.standard_normal(FREE.shape).astype(np.float32)
            thetas[worst] = thetas[best] + FREE * noise
    best = int(order[-1])
    return {
        "graph": past[best],
        "node_epochs": TRAININGS * EPOCHS,
        "network": task.scores(states[best], "test").accuracy,
    }


# --- evolution


def evolution(task: Task, seed: int, epochs: int) -> dict[str, Any]:
    """Two generations of pairs of graphs, moved apart by the same noise, from the same weights.

    All graphs of a generation see the same images from the same initial weights (common random
    numbers). The gradient is the least-squares one of the differences in validation loss.
    """
    rng = np.random.default_rng(seed)
    free = FREE > 0
    pairs = TRAININGS * EPOCHS // (2 * epochs)
    theta, gradients, spent = BEGIN.copy(), [], 0
    for generation, count in enumerate((pairs - pairs // 2, pairs // 2)):
        noise = rng.standard_normal((count, int(free.sum()))).astype(np.float32)
        changes = []
        for each in noise:
            apart = np.zeros_like(theta)
            apart[free] = SIGMA * each
            losses = []
            for side in (theta + apart, theta - apart):
                state = task.train(side, 1000 * seed + generation, epochs)
                losses.append(task.scores(state).loss)
                spent += epochs
            changes.append(losses[0] - losses[1])
        found = np.linalg.lstsq(2 * SIGMA * noise, np.array(changes), rcond=None)[0]
        gradients.append(_in_place(found))
        theta = theta - STEP * _normed(gradients[-1])
    scores = {"gradient": gradients[0].tolist()}
    return {"graph": theta.tolist(), "node_epochs": spent, **scores}


def _in_place(values: np.ndarray) -> np.ndarray:
    placed = np.zeros(FREE.shape, np.float32)
    placed[FREE > 0] = values
    return placed


def _normed(gradient: np.ndarray) -> np.ndarray:
    """The gradient at length 1; as it is where it is 0."""
    return gradient / max(float(np.linalg.norm(gradient)), 1e-12)


# --- gradients through K steps


def hypergradients(task: Task, seed: int, horizon: int) -> dict[str, Any]:
    """Coefficients that follow the gradient of the validation loss through so many steps.

    After each `horizon` steps the loss on 512 validation images is differentiated with respect to
    the coefficients in them, and these move; a second training goes on with them. A gradient
    through a step is counted as four steps.
    """
    rng = np.random.default_rng(seed)
    theta, gradients, spent = BEGIN.copy(), [], 0.0
    with formulation("chunked"):
        backward = jax.jit(_backward_of(task))
        final = jax.jit(jax.grad(_loss_of(task), allow_int=True))
        forward = jax.jit(task.step)
        for training in range(2):
            state = task.begin(1000 * seed + training)
            for first in range(0, task.steps, horizon):
                steps = range(first, min(first + horizon, task.steps))
                states = [state]
                for k in steps:
                    states.append(forward(states[-1], theta, *task.batch(k)))
                state = states.pop()
                picked = rng.choice(len(task.data.val), 512, replace=False)
                images = task.data.val.take(picked)
                cotangent = final(state, images.images / np.float32(255), images.labels)
                total = np.zeros_like(theta)
                for k in reversed(steps):
                    of_theta, cotangent = backward(cotangent, states.pop(), theta, *task.batch(k))
                    total += FREE * np.asarray(of_theta)
                spent += 5 * len(steps) / task.per_epoch
                gradients.append(total)
                share = len(steps) / task.steps
                theta = theta - STEP * share * _normed(total)
    mean = np.mean([_normed(each) for each in gradients], 0)
    return {"graph": theta.tolist(), "node_epochs": spent, "gradient": mean.tolist()}


def _loss_of(task: Task) -> Callable[..., jax.Array]:
    def loss(state: Any, images: Any, labels: Any) -> jax.Array:
        apply = task.node_fns[0].apply
        logits, _ = apply(state.params[0], state.model_state[0], images, False)
        return jnp.mean(cross_entropy(logits, labels))

    return loss


def _backward_of(task: Task) -> Callable[..., Any]:
    """One step back: from the gradient of what a step gives to that of what it is given."""

    def backward(cotangent: Any, state: Any, theta: Any, *batch: Any) -> Any:
        _, pull = jax.vjp(lambda state, theta: task.step(state, theta, *batch), state, theta)
        of_state, of_theta = pull(cotangent)
        return of_theta, of_state

    return backward


# --- the command


METHODS: dict[str, Callable[[Task, int], dict[str, Any]]] = {
    **{f"population-{n}": lambda task, seed, n=n: population(task, seed, n) for n in (1, 2, 3)},
    **{f"evolution-{n}": lambda task, seed, n=n: evolution(task, seed, n) for n in (2, 6)},
    **{
        f"hypergradients-{n}": lambda task, seed, n=n: hypergradients(task, seed, n)
        for n in (1, 50, 200)
    },
}


def tested(task: Task, graph: Any) -> list[float]:
    """Test accuracies of a graph, or of its coefficients epoch by epoch, with fresh seeds."""
    thetas = np.asarray(graph, np.float32)
    of_epoch = thetas if thetas.ndim == 2 else lambda epoch: thetas[epoch]
    return [task.scores(task.train(of_epoch, seed), "test").accuracy for seed in FRESH]


def main() -> None:
    """Does the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", help="where CIFAR-10 is")
    parser.add_argument("recordings", nargs=2, type=Path, help="of both teachers")
    parser.add_argument("--folder", type=Path, default=Path("runs/learned"))
    parts = [f"ledger-{s}" for s in range(2)]
    parts += [f"{method}-{seed}" for method in METHODS for seed in range(3)]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    task = Task(options.data_dir, options.recordings)
    options.folder.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        path = options.folder / f"{part}.json"
        if path.is_file():
            continue
        method, _, seed = part.rpartition("-")
        if method == "ledger":
            found: Any = ledger(task, int(seed))
        else:
            found = METHODS[method](task, int(seed))
            found["tested"] = tested(task, found["graph"])
        path.write_text(json.dumps(found))
        told = "" if method == "ledger" else f": {100 * np.mean(found['tested']):.2f} %"
        print(f"{part}{told}", flush=True)


if __name__ == "__main__":
    main()
