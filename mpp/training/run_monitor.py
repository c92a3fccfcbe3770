"""What a person sees of any training run: rows of figures, lines on the terminal, bad files."""

from mpp.system.files import set_aside
from mpp.training.bad_files import BadFiles
from mpp.training.earlier_run import MODEL
from mpp.training.log import RunLog, Terminal
from mpp.training.loop import State, read_figures
from mpp.training.training_run import TrainingRun


class RunMonitor:
    """Follows a run while it trains. Only rank 0 writes; a dry run writes nothing.

    The state may have been resumed; `score` is the figure shown beside the loss, "accuracy" or "mse".
    """

    def __init__(self, run: TrainingRun, score: str, dry: bool = False) -> None:
        self.run, self.score, self.dry = run, score, dry
        config, world, state = run.config, run.world, run.state
        resumed = run.schedule.step(state.images_seen)
        self.terminal = Terminal(run.schedule.total_steps, resumed, on=world.main)
        self.log = RunLog(run.folder if world.main and not dry else None, resumed, config.log.to, config)
        # Each rank reads its own share of the images, so it has its own list and judges by its own share.
        name = "bad_files.csv" if world.main else f"bad_files.rank{world.rank}.csv"
        read = state.images_seen // world.size
        self.bad_files = BadFiles(None if dry else run.folder / name, config.data.max_bad_share, read)

    def step(self, state: State) -> int:
        """Return the number of finished updates."""
        return self.run.schedule.step(state.images_seen)

    def say(self, text: str) -> None:
        self.terminal.say(text)

    def set_model_aside(self) -> None:
        """Rename the model of the run's earlier end, which would pass for the model of this run."""
        if self.run.world.main and (before := set_aside(self.run.folder / MODEL)):
            self.say(f"the model of the run's earlier end is {before}, until there is a new one")

    def close(self) -> None:
        self.terminal.close()
        self.log.close()

    def advance(self, state: State) -> None:
        """Move the progress bar; for every step."""
        self.terminal.advance(self.step(state))

    def row(self, state: State) -> None:
        """Write and print the figures since the last row."""
        run, step = self.run, self.step(state)
        figures = read_figures(state, run.schedule)
        if len(self.bad_files):
            figures["time/bad_files"] = len(self.bad_files)
        self.log.row(step, state.images_seen, figures)
        self.terminal.row(step, figures, self.score)
