"""Checkpoints: what is kept, that it comes back bit for bit, and what damage does."""

import asyncio
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from made_up_states import NAMES, OPTIMIZER, TEMPLATE, state_of
from runs import compiled_once
from tiny_models import dropping

import ktg_jax as ktg
from ktg_jax import GraphState
from ktg_jax.errors import RunError
from ktg_jax.io.trees import flatten
from ktg_jax.training.checkpoint import Checkpoints
from ktg_jax.training.checkpoint_reading import read_nodes


def save_all(folder: Path, scores: list[float | None]) -> tuple[int, ...]:
    """Saves epochs 1, 2, ... with these scores; returns those that are kept."""
    checkpoints = Checkpoints(folder)
    for epoch, score in enumerate(scores, start=1):
        checkpoints.save(epoch, state_of(epoch), NAMES, score)
    checkpoints.close()
    return epochs_in(folder)


def epochs_in(folder: Path) -> tuple[int, ...]:
    checkpoints = Checkpoints(folder)
    checkpoints.close()
    return checkpoints.epochs


def read_latest(folder: Path) -> tuple[int, GraphState, list[str]]:
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore_latest(TEMPLATE, NAMES)
    finally:
        checkpoints.close()


def assert_is_state_of(epoch: int, state: GraphState) -> None:
    expected = state_of(epoch)
    chex.assert_trees_all_equal_structs(state, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    chex.assert_trees_all_equal(state, expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture(scope="module")
def three_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Epochs 1 (the best), 3 and 4."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    assert save_all(folder, [0.9, 0.1, 0.2, 0.3]) == (1, 3, 4)
    return folder


@pytest.fixture
def copied(three_saved: Path, folder: Path) -> Path:
    return Path(shutil.copytree(three_saved, folder))


# --- what is saved


def test_a_state_comes_back_bit_for_bit(folder: Path) -> None:
    save_all(folder, [0.5])
    checkpoints = Checkpoints(folder)
    assert_is_state_of(1, checkpoints.restore(TEMPLATE, NAMES, 1))
    checkpoints.close()


def test_a_state_may_be_deleted_as_soon_as_save_returns(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    reuse = jax.jit(lambda state: jax.tree.map(lambda x: 0 * x, state), donate_argnums=0)
    for epoch in (1, 2):
        state = state_of(epoch)
        checkpoints.save(epoch, state, NAMES, 0.5)
        jax.block_until_ready(reuse(state))
        assert state.params[0]["dense"]["kernel"].is_deleted()
    checkpoints.wait()
    for epoch in (1, 2):
        assert_is_state_of(epoch, checkpoints.restore(TEMPLATE, NAMES, epoch))
    checkpoints.close()


@pytest.mark.slow
def test_random_streams_of_nnx_modules_go_on_where_they_were(folder: Path) -> None:
    fns = dropping(10)
    graph = ktg.graphs.independent(["dropping"])
    images, labels = jnp.ones((4, 8, 8, 1)), jnp.arange(4)
    gates = jnp.asarray(graph.gate_codes)

    @jax.jit
    def step(state: GraphState) -> tuple[GraphState, Any]:
        fixed = {"node_fns": (fns,), "optimizer": OPTIMIZER}
        return ktg.train_step(state, images, labels, gates, 0.5, **fixed)

    with compiled_once():
        first = ktg.init_state(graph, (fns,), OPTIMIZER, jax.random.key(0), images)
        saved, _ = step(first)
        checkpoints = Checkpoints(folder)
        checkpoints.save(1, saved, ("dropping-0",), None)
        epoch, back, _ = checkpoints.restore_latest(first, ("dropping-0",))
        checkpoints.close()
        assert epoch == 1
        chex.assert_trees_all_equal_structs(back, saved)
        chex.assert_trees_all_equal(step(back), step(saved))
        with pytest.raises(AssertionError):
            chex.assert_trees_all_equal(step(first)[1], step(saved)[1])


def test_nodes_can_be_read_without_the_rest(three_saved: Path) -> None:
    for wanted, expected in ((None, 4), (1, 1), (3, 3)):
        epoch, nodes = read_nodes(three_saved, wanted)
        assert epoch == expected
        assert tuple(nodes) == NAMES
        for i, node in enumerate(nodes.values()):
            chex.assert_trees_all_equal(node["params"], flatten(state_of(expected).params[i]))
            stored = flatten(state_of(expected).model_state[i])
            chex.assert_trees_all_equal(node["model_state"] or {}, stored)


# --- which are kept


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([0.1], (1,)),
        ([0.1, 0.2, 0.3, 0.4], (3, 4)),
        ([0.2, 0.9, 0.3, 0.4, 0.5], (2, 4, 5)),
        ([0.2, 0.9, 0.3, 0.9, 0.5, 0.9, 0.1], (2, 6, 7)),
        ([0.5, 0.5, 0.5, 0.5], (1, 3, 4)),
        ([0.0, 0.0, 0.0, 0.0], (1, 3, 4)),
        ([None, None, None, None], (3, 4)),
    ],
    ids=str,
)
def test_the_last_two_and_the_first_of_the_best_are_kept(
    folder: Path, scores: list[float | None], kept: tuple[int, ...]
) -> None:
    assert save_all(folder, scores) == kept


def test_the_best_is_still_known_after_a_restart(copied: Path) -> None:
    for epoch in (5, 6):
        checkpoints = Checkpoints(copied)
        checkpoints.save(epoch, state_of(epoch), NAMES, 0.5)
        checkpoints.close()
    assert epochs_in(copied) == (1, 5, 6)


# --- what is read


def test_an_empty_folder_gives_the_template(folder: Path) -> None:
    epoch, state, messages = read_latest(folder)
    assert (epoch, messages) == (0, [])
    assert state is TEMPLATE


def test_the_newest_is_read(three_saved: Path) -> None:
    epoch, state, messages = read_latest(three_saved)
    assert (epoch, messages) == (4, [])
    assert_is_state_of(4, state)


def test_a_folder_that_is_not_there_holds_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^\S*missing holds no checkpoint$"):
        read_nodes(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_an_epoch_that_is_not_there_is_an_error(three_saved: Path) -> None:
    with pytest.raises(RunError, match="checkpoint 2"):
        read_nodes(three_saved, 2)


def test_what_another_process_is_just_writing_is_ignored_and_left_alone(copied: Path) -> None:
    """Evaluation and a teacher's weights are read from runs that may be going on."""
    unfinished = copied / "5.orbax-checkpoint-tmp"
    shutil.copytree(copied / "4", unfinished)
    assert read_nodes(copied)[0] == 4
    assert (unfinished / "nodes").is_dir()


def test_an_unfinished_checkpoint_is_not_read_and_can_be_written_again(copied: Path) -> None:
    unfinished = copied / "5.orbax-checkpoint-tmp"
    shutil.copytree(copied / "4", unfinished)
    (unfinished / "nodes" / "_METADATA").unlink()
    checkpoints = Checkpoints(copied)
    assert checkpoints.restore_latest(TEMPLATE, NAMES)[0] == 4
    checkpoints.save(5, state_of(5), NAMES, 0.5)
    checkpoints.close()
    epoch, state, messages = read_latest(copied)
    assert (epoch, messages) == (5, [])
    assert_is_state_of(5, state)


def test_a_signal_does_not_cut_off_a_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_signal(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    saved, main = ocp.PyTreeCheckpointHandler.async_save, threading.get_ident()

    async def signalled(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()  # one signal is enough
        signal.pthread_kill(main, signal.SIGTERM)
        await asyncio.sleep(0.3)
        return await saved(*args, **kwargs)

    def save_two() -> None:
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, state_of(1), NAMES, 0.5)
            monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", signalled)
            checkpoints.save(2, state_of(2), NAMES, 0.5)

    before = signal.signal(signal.SIGTERM, on_signal)
    with pytest.raises(KeyboardInterrupt):
        save_two()
    signal.signal(signal.SIGTERM, before)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    assert_is_state_of(2, read_latest(folder)[1])


# --- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "a bit flipped": flip_a_bit,
    "emptied": empty,
    "deleted": Path.unlink,
}


def files_of(checkpoint: Path) -> Iterator[Path]:
    return (path for path in sorted(checkpoint.rglob("*")) if path.is_file())


def data_file(item: Path) -> Path:
    """The file that holds the arrays of a checkpoint's item."""
    return max((item / "d").iterdir(), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("item", ["nodes", "training"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_read(
    copied: Path, item: str, damage: Callable[[Path], None]
) -> None:
    damage(data_file(copied / "4" / item))
    epoch, state, messages = read_latest(copied)
    assert epoch == 3
    assert_is_state_of(3, state)
    assert len(messages) == 1
    assert messages[0].startswith("checkpoint 4 is damaged (")
    assert "\n" not in messages[0]
    assert epochs_in(copied) == (1, 3)
    assert (copied.parent / "damaged-checkpoint-4" / item).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_no_damage_to_any_file_gives_other_values_or_another_error(
    three_saved: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for number, file in enumerate(files_of(three_saved / "4")):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(three_saved, folder)
        path = folder / file.relative_to(three_saved)
        damage(path)
        epoch, state, messages = read_latest(folder)
        assert epoch in (3, 4), path
        assert_is_state_of(epoch, state)
        assert len(messages) == 4 - epoch, path


def test_a_checkpoint_whose_values_were_replaced_is_damaged(folder: Path) -> None:
    save_all(folder, [0.1, 0.2])
    shutil.rmtree(folder / "2" / "nodes")
    shutil.copytree(folder / "1" / "nodes", folder / "2" / "nodes")
    epoch, state, messages = read_latest(folder)
    assert (epoch, len(messages)) == (1, 1)
    assert "checksum" in messages[0]
    assert_is_state_of(1, state)


def test_an_old_checkpoint_that_was_half_deleted_does_no_harm(copied: Path) -> None:
    for file in files_of(copied / "3"):
        if "nodes" not in file.parts:
            file.unlink()
    checkpoints = Checkpoints(copied)
    epoch, state, messages = checkpoints.restore_latest(TEMPLATE, NAMES)
    assert (epoch, messages) == (4, [])
    assert_is_state_of(4, state)
    for epoch in (5, 6):
        checkpoints.save(epoch, state_of(epoch), NAMES, 0.5)
    checkpoints.close()
    assert epochs_in(copied) == (1, 5, 6)


@pytest.mark.slow
def test_all_damaged_is_an_error_that_names_each(copied: Path) -> None:
    for epoch in (1, 3, 4):
        truncate(data_file(copied / str(epoch) / "nodes"))
    with pytest.raises(RunError, match="none is left") as error:
        read_latest(copied)
    for epoch in (1, 3, 4):
        assert f"checkpoint {epoch} is damaged" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_reading_nodes_goes_back_past_damage_and_leaves_it(copied: Path) -> None:
    truncate(data_file(copied / "4" / "nodes"))
    assert read_nodes(copied)[0] == 3
    assert (copied / "4").is_dir()
    with pytest.raises(RunError, match="checkpoint 4 is damaged"):
        read_nodes(copied, 4)


def test_training_goes_on_after_a_damaged_checkpoint_was_set_aside(copied: Path) -> None:
    truncate(data_file(copied / "4" / "nodes"))
    checkpoints = Checkpoints(copied)
    assert checkpoints.restore_latest(TEMPLATE, NAMES)[0] == 3
    for epoch in (4, 5):
        checkpoints.save(epoch, state_of(epoch), NAMES, 0.5)
    checkpoints.close()
    assert epochs_in(copied) == (1, 4, 5)
    assert_is_state_of(5, read_latest(copied)[1])
