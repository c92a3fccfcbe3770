"""The fine-tuning recipe: mpp/downstream/finetune.py trains and tests, and a page tells of it."""

from mpp.downstream.finetune import run as tune
from mpp.downstream.labelled import Labelled
from mpp.recipes import FinetuneConfig
from mpp.restore import notes_on_pretraining
from mpp.views.page import tell_of_run


def run(config: FinetuneConfig) -> int:
    """Fine-tunes, or resumes, as `config` says, and writes report.html. Returns the exit status (see `tune`).

    Raises:
        UserError: bad input, before anything is written.
        RunError: a run that had to stop.
    """
    status = tune(config, _notes)
    if not status and config.log.report:
        tell_of_run(config.run_dir, config.train.device)
    return status


def _notes(config: FinetuneConfig, labelled: Labelled) -> list[str]:
    return notes_on_pretraining(config.init, labelled.test, labelled.test_indices)
