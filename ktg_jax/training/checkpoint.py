"""Checkpoints of a graph's training, one an epoch (Orbax).

Each holds two items: `nodes` (params and model state of every node by name, so that one can be
read without the others) and `training` (optimiser states and the step), beside the checksums of
both in `meta`. Kept are the last two and the best. The first that a process writes is read back.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ktg_jax.errors import RunError
from ktg_jax.io.plain_path import PlainFolder
from ktg_jax.io.trees import FlatTree, flatten, unflatten
from ktg_jax.training.checkpoint_reading import (
    alone,
    checkpoint_epochs,
    digest_of,
    meta_of,
    read_items,
    reason_of,
    score_of,
    system_reason,
)
from ktg_jax.training.state import GraphState


class Checkpoints:
    """The checkpoints in a folder, by epoch (1, 2, ...).

    Args:
        folder: made if it is not there.

    Raises:
        InputError: its path has characters that Orbax cannot be given, nor a link to it be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._kept = _Kept(
            {epoch: score_of(self._folder, epoch) for epoch in checkpoint_epochs(self._folder)}
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=alone(),
        )
        self._plain = PlainFolder(self._folder)
        self._manager = ocp.CheckpointManager(self._plain.path, options=options)
        # Orbax waits for ever for what a signal cuts off within `save`; signals reach only the
        # main thread.
        self._saver = ThreadPoolExecutor(1, "checkpoints")
        self._has_read_back = False

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs of which a checkpoint is there, in order."""
        self._manager.wait_until_finished()
        return checkpoint_epochs(self._folder)

    def save(
        self,
        epoch: int,
        state: GraphState,
        names: Sequence[str],
        score: float | None,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a checkpoint. The state may be donated as soon as this returns.

        Writing goes on in the background; a checkpoint appears under its name when it is whole.
        A signal that interrupts this does not interrupt the saving, which `close` waits for.

        Args:
            epoch: greater than those saved before.
            state: the state of the graph.
            names: the nodes' names, in the state's order.
            score: the checkpoint with the highest score (of several, the first) is kept; None:
                not a candidate.
            beside: JSON to be kept with it, for `beside`.

        Raises:
            RunError: this or the one before cannot be written, or the first not be read back.
        """
        nodes, training = _to_items(state, names)
        digests = {"nodes": digest_of(nodes), "training": digest_of(training)}
        self._kept.scores[epoch] = score
        with self._writing():
            _ = self._plain.path
            args = ocp.args.Composite(
                nodes=ocp.args.PyTreeSave(nodes),
                training=ocp.args.PyTreeSave(training),
                meta=ocp.args.JsonSave({"digests": digests, "score": score, "beside": beside}),
            )
            self._saver.submit(self._manager.save, epoch, args=args).result()
        if not self._has_read_back:
            self._read_back(epoch)
            self._has_read_back = True

    def restore(self, template: GraphState, names: Sequence[str], epoch: int) -> GraphState:
        """Reads the checkpoint of an epoch.

        Args:
            template: a state of the same graph, for structure, shapes and dtypes.
            names: the nodes' names, in the state's order.
            epoch: one of `epochs`.

        Raises:
            RunError: the checkpoint is damaged.
        """
        items = read_items(self._plain, epoch, ("nodes", "training"))
        return _from_items(template, names, items["nodes"], items["training"])

    def restore_latest(
        self, template: GraphState, names: Sequence[str]
    ) -> tuple[int, GraphState, list[str]]:
        """Reads the newest checkpoint that is whole.

        A damaged one is set aside, beside the folder, as `damaged-checkpoint-<epoch>`.

        Returns:
            The epoch (0 if there is no checkpoint: then the state is the template), the state, and
            a message for each damaged checkpoint.

        Raises:
            RunError: there are checkpoints, and all are damaged.
        """
        messages: list[str] = []
        for epoch in reversed(self.epochs):
            try:
                return epoch, self.restore(template, names, epoch), messages
            except RunError as error:
                messages.append(str(error))
                self._set_aside(epoch)
        if messages:
            reasons = "; ".join(messages)
            raise RunError(f"{reasons}; none is left: the same command again starts over")
        return 0, template, messages

    def beside(self, epoch: int) -> Any:
        """The JSON that was saved with a checkpoint; None: nothing that can be read."""
        return meta_of(self._folder, epoch).get("beside")

    def wait(self) -> None:
        """Waits until everything saved is on disk.

        Raises:
            RunError: a checkpoint cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background work; raises as `wait`."""
        with self._writing():
            self._saver.shutdown()
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        """The checkpoints, closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes; what ended the block is not hidden by what closing then stumbles over."""
        try:
            self.close()
        except Exception:
            if error is None:
                raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What fails in writing, now or since it was last looked after, is a RunError."""
        try:
            yield
        # What the writing libraries make of a full disk has no type of its own.
        except Exception as error:
            reason = self._plain.told(system_reason(error) or reason_of(error))
            raise RunError(
                f"a checkpoint in {self._folder} cannot be written ({reason}); "
                "the last whole one is kept"
            ) from None

    def _read_back(self, epoch: int) -> None:
        """Raises RunError where what was written cannot be read: better now than in the end."""
        self.wait()
        try:
            read_items(self._plain, epoch, ("nodes", "training"))
        except RunError as error:
            raise RunError(f"{error}, though just written: no checkpoint would be kept") from None

    def _set_aside(self, epoch: int) -> None:
        aside = self._folder.parent / f"damaged-checkpoint-{epoch}"
        shutil.rmtree(aside, ignore_errors=True)
        (self._folder / str(epoch)).rename(aside)
        self._kept.scores.pop(epoch, None)
        self._manager.reload()


class _Kept(policies.PreservationPolicy):
    """Keeps the last two checkpoints and the first of those with the highest score."""

    def __init__(self, scores: dict[int, float | None]) -> None:
        self.scores = scores

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: Any
    ) -> Sequence[bool]:
        del context
        scored = [c.step for c in checkpoints if self.scores.get(c.step) is not None]
        best = max(scored, key=lambda epoch: (self.scores[epoch], -epoch), default=None)
        last_two = [c.step for c in checkpoints][-2:]
        return [c.step == best or c.step in last_two for c in checkpoints]


def _to_items(state: GraphState, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    nodes = {
        name: {"params": flatten(params), "model_state": flatten(model_state)}
        for name, params, model_state in zip(names, state.params, state.model_state, strict=True)
    }
    opt_states = zip(names, state.opt_state, strict=True)
    opt_state = {name: flatten(opt_state) for name, opt_state in opt_states}
    training = {"step": flatten({"step": state.step}), "opt_state": opt_state}
    return nodes, training | ({"stale": flatten(state.stale)} if state.stale else {})


def _from_items(
    template: GraphState,
    names: Sequence[str],
    nodes: Mapping[str, Any],
    training: Mapping[str, Any],
) -> GraphState:
    def per_node(part: tuple[Any, ...], flat_of: Mapping[str, FlatTree]) -> tuple[Any, ...]:
        return tuple(
            unflatten(tree, flat_of.get(name) or {}, f"checkpoint of {name}")
            for name, tree in zip(names, part, strict=True)
        )

    return GraphState(
        params=per_node(template.params, {n: node["params"] for n, node in nodes.items()}),
        model_state=per_node(
            template.model_state, {n: node["model_state"] for n, node in nodes.items()}
        ),
        opt_state=per_node(template.opt_state, training["opt_state"]),
        step=unflatten({"step": template.step}, training["step"], "checkpoint")["step"],
        stale=unflatten(template.stale, training.get("stale") or {}, "stale of the checkpoint"),
    )
