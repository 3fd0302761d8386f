"""Checkpoints of a graph's training, one an epoch (Orbax).

Each holds two items: `nodes` (params and model state of every node by name, so that one can be
read without the others) and `training` (optimiser states and the step), beside the checksums of
both in `meta`. Kept are the last two and the best. The first that a process writes is read back.
"""

import gc
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ktg_jax.connectors import network_arrays
from ktg_jax.errors import RunError
from ktg_jax.io.plain_path import PlainFolder
from ktg_jax.io.trees import FlatTree, digest, flatten, unflatten
from ktg_jax.training.state import GraphState

_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
"""How TensorStore says which error of the operating system it met."""


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
            {epoch: _score(self._folder, epoch) for epoch in checkpoint_epochs(self._folder)}
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=_alone(),
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
        digests = {"nodes": _digest(nodes), "training": _digest(training)}
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
        items = _read(self._plain, epoch, ("nodes", "training"))
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
        return _meta(self._folder, epoch).get("beside")

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
            reason = self._plain.told(_system_reason(error) or _reason(error))
            raise RunError(
                f"a checkpoint in {self._folder} cannot be written ({reason}); "
                "the last whole one is kept"
            ) from None

    def _read_back(self, epoch: int) -> None:
        """Raises RunError where what was written cannot be read: better now than in the end."""
        self.wait()
        try:
            _read(self._plain, epoch, ("nodes", "training"))
        except RunError as error:
            raise RunError(f"{error}, though just written: no checkpoint would be kept") from None

    def _set_aside(self, epoch: int) -> None:
        aside = self._folder.parent / f"damaged-checkpoint-{epoch}"
        shutil.rmtree(aside, ignore_errors=True)
        (self._folder / str(epoch)).rename(aside)
        self._kept.scores.pop(epoch, None)
        self._manager.reload()


def read_nodes(
    folder: str | os.PathLike[str], epoch: int | None = None
) -> tuple[int, dict[str, dict[str, FlatTree]]]:
    """Reads every network's weights from the newest whole checkpoint, or from that of an epoch.

    Connectors are left out. Nothing in the folder is changed: a run may be training in it.

    Returns:
        The epoch, and `{name: {"params": flat, "model_state": flat}}`.

    Raises:
        RunError: there is no checkpoint (of that epoch) that can be read.
    """
    folder = Path(folder).absolute()
    plain = PlainFolder(folder)
    reasons: list[str] = []
    for each in reversed(checkpoint_epochs(folder)) if epoch is None else [epoch]:
        try:
            nodes = _read(plain, each, ("nodes",))["nodes"]
            return each, {
                name: {**node, "params": network_arrays(node["params"])}
                for name, node in nodes.items()
            }
        except RunError as error:
            reasons.append(str(error))
    raise RunError("; ".join(reasons) or f"{folder} holds no checkpoint")


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


def checkpoint_epochs(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """The epochs of which a checkpoint is in the folder, in order; none if it does not exist."""
    folder = Path(folder)
    if not folder.is_dir():
        return ()
    return tuple(sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()))


def best_checkpoint(folder: str | os.PathLike[str]) -> int | None:
    """The first of the epochs whose checkpoints have the highest score; None: none has a score."""
    scores = {epoch: _score(Path(folder), epoch) for epoch in checkpoint_epochs(folder)}
    known = {epoch: score for epoch, score in scores.items() if score is not None}
    return max(known, key=lambda epoch: (known[epoch], -epoch), default=None)


def _score(folder: Path, epoch: int) -> float | None:
    score = _meta(folder, epoch).get("score")  # where it is damaged: no candidate for the best
    return score if isinstance(score, float) else None


def _meta(folder: Path, epoch: int) -> dict[str, Any]:
    """What is kept beside the arrays of a checkpoint; nothing where it is damaged."""
    try:
        meta = json.loads((folder / str(epoch) / "meta" / "metadata").read_text())
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


@contextmanager
def _quiet_reads() -> Iterator[None]:
    """Orbax leaves unfinished reads behind a failed one; they complain when they end."""
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    was_disabled = logger.disabled
    sys.unraisablehook = lambda unraisable: None
    logger.disabled = True
    try:
        yield
    finally:
        if sys.exc_info()[0] is not None:
            time.sleep(0.3)
            gc.collect()
        sys.unraisablehook, logger.disabled = hook, was_disabled


def _read(folder: PlainFolder, epoch: int, wanted: Sequence[str]) -> dict[str, Any]:
    try:
        with _quiet_reads():
            return _read_checked(folder.path / str(epoch), wanted)
    # A damaged file can make the reading libraries raise anything at all.
    except Exception as error:
        reason = folder.told(_reason(error))[:200]
        raise RunError(f"checkpoint {epoch} is damaged ({reason})") from None


def _alone() -> ocp.options.MultiprocessingOptions:
    """Of several processes this one does it all: Orbax is not to wait for the others."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )


def _system_reason(error: Exception) -> str:
    """What the operating system said, where that can be told from the error; else nothing."""
    number = error.errno if isinstance(error, OSError) else None
    if found := _SYSTEM_ERROR.search(str(error)):
        number = int(found[1])
    return "" if number is None else os.strerror(number)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _read_checked(path: Path, wanted: Sequence[str]) -> dict[str, Any]:
    alone = _alone()
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        items = checkpointer.restore(
            path,
            args=ocp.args.Composite(
                meta=ocp.args.JsonRestore(),
                **{item: ocp.args.PyTreeRestore() for item in wanted},
            ),
        )
    for item in wanted:
        if _digest(items[item]) != items["meta"]["digests"][item]:
            raise ValueError(f"the checksum of {item} does not agree")
    return {item: items[item] for item in wanted}


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


def _digest(item: Mapping[str, Any]) -> int:
    return digest(flatten(item))
