"""What one sees of a search: a live table on a terminal, and a line for each finished trial."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress

import ktg_jax as ktg

from ..runs import cli
from ..runs.console import Table, Verbatim, is_watched, text_column
from ..runs.progress import Countdown
from ..runs.texts import per_cent
from .race import Race
from .records import STATES, Standing, TrialRecord, standings


class SearchDisplay:
    """Shows the trials done, pruned, running and equivalent, the best so far, and the time left.

    Args:
        trials: so many in all.
        epochs: the epochs of a whole trial.
        console: where to; the table is shown only on a terminal.
    """

    def __init__(self, trials: int, epochs: int, console: Console) -> None:
        self._total = trials
        self._epochs = epochs
        self._console = console
        self._records: Sequence[TrialRecord] = ()
        self._race: Race | None = None
        self._said: set[int] | None = None
        self._countdown = Countdown(trials)
        self._is_watched = is_watched(console)
        self._bar = Progress(
            text_column("trials"),
            BarColumn(),
            MofNCompleteColumn(),
            text_column("{task.fields[left]}"),
            console=console,
        )
        self._task = self._bar.add_task("", total=trials, left="")
        self._live = Live(
            console=console, refresh_per_second=2, get_renderable=self._render, transient=True
        )

    def __enter__(self) -> "SearchDisplay":
        """Begins to show."""
        if self._is_watched:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Clears the table."""
        if self._is_watched:
            self._live.stop()

    def update(self, records: Sequence[TrialRecord], race: Race | None = None) -> None:
        """Takes note of how the trials and the race stand, and says which trials ended since."""
        self._records, self._race = records, race
        ended = {trial.number: trial for trial in records if _is_ended(trial)}
        if self._said is None:
            self._said = set(ended)
            self._countdown = Countdown(self._total, len(ended))
        left = self._countdown.left(len(ended))
        stands = "" if self._is_watched else f"; {len(ended)} of {self._total} trials, {left}"
        for number in sorted(set(ended) - self._said):
            cli.say(self._console, _line(ended[number]) + stands)
        self._said |= set(ended)
        self._bar.update(self._task, completed=len(ended), left=left)

    def _render(self) -> Group:
        counts = Table(*COUNTS, box=None)
        counts.add_row(*(str(number) for number in count(self._records).values()))
        running = Table("running", "graph", "epoch", "val. accuracy", box=None)
        for trial in self._records:
            if trial.state == "running" and trial.graph is not None:
                epoch = max(trial.curve, default=0)
                value = per_cent(trial.curve[epoch] if epoch else None, " %")
                graph = short(trial.graph.pruned())
                running.add_row(str(trial.number), graph, f"{epoch}/{self._epochs}", value)
        best = next(iter(standings(self._records, self._race)), None)
        text = "-" if best is None else _told_standing(best)
        return Group(self._bar, counts, running, Verbatim(f"best: {text}"))


COUNTS = (*STATES, "equivalent")


def count(records: Sequence[TrialRecord]) -> dict[str, int]:
    """How many trials are in each state, and how many had the values of an equivalent one.

    A failed trial is one whose training failed; one whose worker died is run again instead.
    """
    counted = [trial for trial in records if not trial.is_interrupted]
    states = [trial.state for trial in counted]
    numbers = {state: states.count(state) for state in STATES}
    return numbers | {"equivalent": sum(trial.equivalent is not None for trial in counted)}


def told(race: Race) -> str:
    """How a race went, in a line: the rounds, and the mean accuracy of the best of each."""
    rounds = [
        f"{len(each.means)} graphs with {len(each.seeds)} seeds each "
        f"(the best {per_cent(max(each.means.values()), ' %')})"
        for each in race.rounds
    ]
    winner = race.entrants[race.ranking[0][0]].graph
    return f"Race: {', then '.join(rounds)}: {short(winner.pruned())} is ahead."


def _told_standing(best: Standing) -> str:
    of = "" if best.seeds == 1 else f", mean of {best.seeds} seeds"
    value = f"{per_cent(best.value, ' %')}{of}"
    return f"trial {best.trial.number}: {value}; {short(best.graph.pruned())}"


def short(graph: ktg.Graph) -> str:
    """A graph in a line: its models, and for each receiver the gates, and what edges carry.

    >>> short(ktg.graphs.mutual(["cnn", "resnet8"]))
    'cnn, resnet8: through through | through through'
    >>> short(ktg.Graph(["cnn", "cnn"], [["through", {"loss": "attention"}], ["cutoff", "linear"]]))
    'cnn, cnn: through through [attention] | cutoff linear'
    """
    models = ", ".join(node.model for node in graph.nodes)
    rows = (" ".join(map(_edge, row)) for row in graph.edges)
    return f"{models}: {' | '.join(rows)}"


def _edge(edge: ktg.Edge) -> str:
    return f"{edge.gate} [{edge.says}]" if edge.carries and edge.says else edge.gate


def _is_ended(trial: TrialRecord) -> bool:
    return trial.state != "running" and not trial.is_interrupted


def _line(trial: TrialRecord) -> str:
    graph = "" if trial.graph is None else f"; {short(trial.graph.pruned())}"
    name = f"trial {trial.number}" + (f" ({trial.baseline})" if trial.baseline else "")
    if trial.race is not None:
        name += f" (race, round {trial.race}, seed {trial.seed})"
    elif trial.equivalent is not None:
        name += f" (equivalent to trial {trial.equivalent})"
    last = max(trial.curve, default=0)
    reached = per_cent(trial.curve[last], " %") if last else ""
    outcome = {
        "complete": reached,
        "pruned": f"{reached}, pruned after epoch {last}",
        "failed": f"failed: {trial.reason}",
        "running": "running",
    }[trial.state]
    return f"{name}: {outcome}{graph}"
