"""Searches and priors in folders that were moved or damaged, and of data that was moved."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models  # noqa: F401  (registers its models)
from runs import in_process, options
from searches import STUDY, begin, small_search, study_url, trials_of, work

import experiments.report.command
import experiments.search.command
from experiments.represent.folder import PriorFolder, StudentFolder
from experiments.search.config import default_name, default_workdir, resolved
from experiments.search.extra import optuna
from experiments.search.folder import SearchFolder, load_search
from experiments.search.storage import open_storage, open_to_read
from ktg_jax.errors import InputError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]
FACTS = {"train_crc32": 1, "val_crc32": 2}


def fields_of(data: str, **facts: int) -> dict[str, Any]:
    config = small_search(data=data)
    return resolved(config, config.space()) | {"data_facts": FACTS | facts}


@pytest.fixture
def searched(tmp_path: Path) -> Path:
    """The folder of a search that only pretended to train."""
    path, config = tmp_path / "search", small_search(trials=4, pruner="none")
    with SearchFolder(path).begun_search(fields_of("npz:a.npz"), STUDY, None, None, ["--a"]):
        work(study_url(path), config, lambda graph, seed: [0.25, 0.5, 0.75])
    return path


# --- searches


def begun(path: Path, fields: dict[str, Any], storage: str | None = None) -> None:
    with SearchFolder(path).begun_search(fields, STUDY, storage, None, ["--a"]):
        pass


def test_a_search_whose_data_was_moved_goes_on_and_remembers_the_place(searched: Path) -> None:
    begun(searched, fields_of("npz:/there/b.npz"))
    assert load_search(searched).config["training"]["data"] == "npz:/there/b.npz"
    with pytest.raises(InputError, match=r"data_facts\.train_crc32: 1, now 5"):
        begun(searched, fields_of("npz:/there/b.npz", train_crc32=5))
    with pytest.raises(InputError, match=r"training\.data: 'npz', now 'folder'"):
        begun(searched, fields_of("folder:/there/b"))


def test_a_study_is_that_of_its_data_wherever_that_is(tmp_path: Path) -> None:
    url, config = study_url(tmp_path), small_search()
    begin(url, config, fields_of("npz:a.npz"))
    begin(url, config, fields_of("npz:b.npz"))
    with pytest.raises(InputError, match=r"data_facts\.val_crc32: 2, now 3"):
        begin(url, config, fields_of("npz:b.npz", val_crc32=3))


def test_default_names_are_those_of_contents() -> None:
    config, other = small_search(data="npz:a.npz"), small_search(data="npz:b.npz")
    a, b = fields_of("npz:a.npz"), fields_of("npz:b.npz")
    assert default_name(config, a) == default_name(other, b)
    assert default_workdir(config, a) == default_workdir(other, b)
    assert default_name(config, a) != default_name(config, fields_of("npz:a.npz", train_crc32=5))


def test_a_database_may_be_moved_with_its_search(searched: Path, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/own.db"
    shutil.move(searched / "study.db", tmp_path / "own.db")
    path = tmp_path / "another"
    begun(path, fields_of("npz:a.npz"), storage)
    there = tmp_path / "there"
    there.mkdir()
    moved = f"sqlite:///{there}/own.db"
    with pytest.raises(InputError, match="storage: got "):
        begun(path, fields_of("npz:a.npz"), moved)  # where nothing is
    shutil.move(tmp_path / "own.db", there / "own.db")
    begun(path, fields_of("npz:a.npz"), moved)
    assert len(load_search(path).trials) == 4


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"study": 3}', "\ufffd"])
def test_what_a_search_can_write_again_it_does(searched: Path, text: str) -> None:
    for name in ("search.json", "results.json"):
        (searched / name).write_text(text)
        ended = in_process(experiments.report.command.main, searched)
        assert ended.code == 2
        assert ended.err.count("\n") == 1
        assert name in ended.err
        assert "the command that made it writes it again" in ended.err
        begun(searched, fields_of("npz:a.npz"))
        assert in_process(experiments.report.command.main, searched).code == 0


@pytest.mark.parametrize("text", ["", "{}", '{"config": 3}', '{"config": {"space": {"a": 1}}}'])
def test_a_damaged_config_of_a_search_is_one_line(searched: Path, text: str) -> None:
    (searched / "config.json").write_text(text)
    for main, arguments in (
        (experiments.report.command.main, [searched]),
        (experiments.search.command.main, options(small_search(searched))),
    ):
        ended = in_process(main, *arguments)
        assert ended.code == 2
        assert ended.err.count("\n") == 1
        assert "config.json" in ended.err


DIES_WRITING = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("PRAGMA cache_size = 1")  # so that the file is changed before it is committed
connection.execute("BEGIN IMMEDIATE")
row = "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (1, ?, ?)"
for i in range(2000):
    connection.execute(row, (f"key {i}", "x" * 500))
os._exit(0)
"""


def test_a_database_whose_writer_was_killed_is_put_right_when_it_is_read(searched: Path) -> None:
    url = study_url(searched)
    before = trials_of(url)
    subprocess.run([sys.executable, "-c", DIES_WRITING, searched / "study.db"])
    assert (searched / "study.db-journal").exists()
    study = optuna.load_study(study_name=STUDY, storage=open_to_read(url))
    assert len(study.get_trials()) == len(before)
    assert trials_of(url) == before


def test_a_database_that_is_not_there_is_not_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unable to open database file"):
        open_to_read(f"sqlite:///{tmp_path}/study.db")
    assert list(tmp_path.iterdir()) == []
    open_storage(f"sqlite:///{tmp_path}/study.db")
    assert optuna.get_all_study_names(open_to_read(f"sqlite:///{tmp_path}/study.db")) == []


# --- priors


def test_a_prior_without_a_config_is_nobodys(tmp_path: Path) -> None:
    folder = StudentFolder(tmp_path / "run")
    folder.prior.path.mkdir(parents=True)
    folder.prior.file.write_bytes(b"some prior")
    with pytest.raises(InputError, match=r"prior\.safetensors belongs to; represent --no-resume"):
        folder.prior.check({"student": "tiny"})
    aside = folder.set_aside()
    assert aside == tmp_path / "run.old1"
    assert (aside / "prior" / "prior.safetensors").read_bytes() == b"some prior"
    folder.prior.check({"student": "tiny"})


def test_a_prior_is_that_of_its_data_wherever_that_is(tmp_path: Path) -> None:
    def fields(data: str, checksum: int) -> dict[str, Any]:
        return {"data": data, "data_facts": {"train_crc32": checksum}}

    folder = PriorFolder(tmp_path / "prior")
    with folder.begun(fields("npz:a.npz", 1)):
        pass
    folder.check(fields("npz:b.npz", 1))
    folder.check({"data": "npz:b.npz"})
    with pytest.raises(InputError, match=r"data_facts\.train_crc32: 1, now 2"):
        folder.check(fields("npz:a.npz", 2))
    content = json.loads((folder.path / "config.json").read_text())
    del content["config"]["data_facts"]
    (folder.path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"data: 'npz:a\.npz', now 'npz:b\.npz'"):
        folder.check({"data": "npz:b.npz"})
