"""Reading checkpoints: what is there, and what is in it, checked by its checksums."""

import gc
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ktg_jax.connectors import network_arrays
from ktg_jax.errors import RunError
from ktg_jax.io.plain_path import PlainFolder
from ktg_jax.io.trees import FlatTree, digest, flatten

_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
"""How TensorStore says which error of the operating system it met."""


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
            nodes = read_items(plain, each, ("nodes",))["nodes"]
            return each, {
                name: {**node, "params": network_arrays(node["params"])}
                for name, node in nodes.items()
            }
        except RunError as error:
            reasons.append(str(error))
    raise RunError("; ".join(reasons) or f"{folder} holds no checkpoint")


def checkpoint_epochs(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """The epochs of which a checkpoint is in the folder, in order; none if it does not exist."""
    folder = Path(folder)
    if not folder.is_dir():
        return ()
    return tuple(sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()))


def best_checkpoint(folder: str | os.PathLike[str]) -> int | None:
    """The first of the epochs whose checkpoints have the highest score; None: none has a score."""
    scores = {epoch: score_of(Path(folder), epoch) for epoch in checkpoint_epochs(folder)}
    known = {epoch: score for epoch, score in scores.items() if score is not None}
    return max(known, key=lambda epoch: (known[epoch], -epoch), default=None)


def score_of(folder: Path, epoch: int) -> float | None:
    """The score of a checkpoint; None: it has none, or is damaged."""
    score = meta_of(folder, epoch).get("score")  # where it is damaged: no candidate for the best
    return score if isinstance(score, float) else None


def meta_of(folder: Path, epoch: int) -> dict[str, Any]:
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


def read_items(folder: PlainFolder, epoch: int, wanted: Sequence[str]) -> dict[str, Any]:
    """These items of a checkpoint, whose checksums agree; raises RunError where it is damaged."""
    try:
        with _quiet_reads():
            return _read_checked(folder.path / str(epoch), wanted)
    # A damaged file can make the reading libraries raise anything at all.
    except Exception as error:
        reason = folder.told(reason_of(error))[:200]
        raise RunError(f"checkpoint {epoch} is damaged ({reason})") from None


def alone() -> ocp.options.MultiprocessingOptions:
    """Of several processes this one does it all: Orbax is not to wait for the others."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )


def system_reason(error: Exception) -> str:
    """What the operating system said, where that can be told from the error; else nothing."""
    number = error.errno if isinstance(error, OSError) else None
    if found := _SYSTEM_ERROR.search(str(error)):
        number = int(found[1])
    return "" if number is None else os.strerror(number)


def reason_of(error: Exception) -> str:
    """An error's type, and the first line of its text."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _read_checked(path: Path, wanted: Sequence[str]) -> dict[str, Any]:
    options = ocp.CompositeOptions(multiprocessing_options=alone())
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=alone()) as checkpointer:
        items = checkpointer.restore(
            path,
            args=ocp.args.Composite(
                meta=ocp.args.JsonRestore(),
                **{item: ocp.args.PyTreeRestore() for item in wanted},
            ),
        )
    for item in wanted:
        if digest_of(items[item]) != items["meta"]["digests"][item]:
            raise ValueError(f"the checksum of {item} does not agree")
    return {item: items[item] for item in wanted}


def digest_of(item: Mapping[str, Any]) -> int:
    """The checksum of an item."""
    return digest(flatten(item))
