"""The command line of a tiny study."""

from pathlib import Path

from tests import runs

STUDY = runs.ROOT / "tools" / "study.py"
ARMS = ("default", "75 %")
SETTINGS = {
    "arms": "default,75 %: --objective.ratio 0.75 --log.no-report",
    "pretrain_seeds": "0,1",
    "labels": "50%,100%",
    "lengths": "4 steps,6 steps",
    "longer": "50%",
    "tune_at": "50%",
    "seeds": "0,1",
    "shots": "1,2",
    "layers": "-1,-2",
    "pretrain.model.name": "vit_tiny_patch16_224",
    "pretrain.model.img_size": "32",
    "pretrain.model.patch_size": "8",
    "pretrain.model.embed_dim": "48",
    "pretrain.model.num_heads": "3",
    "pretrain.model.depth": "2",
    "pretrain.train.length": "8 steps",
    "pretrain.train.batch_size": "16",
    "pretrain.data.workers": "0",
    "pretrain.log.every": "50 steps",
    "pretrain.log.pictures": "",
    "finetune.data.workers": "0",
    "finetune.train.batch_size": "8",
    "finetune.optim.name": "adamw",
    "finetune.optim.lr": "1e-3,3e-3",
}

TAKEN = {"arms": "", "pretrain_seeds": "0", "longer": "", "tune_at": ""}
"""Settings of a study that pretrains nothing."""


def command(source: str, run_dir: Path, **changed: str) -> list[str]:
    """The words of the command; `changed` are settings with `__` for the dot."""
    test = runs.write_images(Path(source.partition(":")[2]).parent / "test", 24, seed=1)
    settings = SETTINGS | {"data": source, "test": test, "run_dir": str(run_dir)}
    settings |= {name.replace("__", "."): value for name, value in changed.items()}
    empty = ("arms", "longer", "lengths", "tune_at")  # lists that may be
    words = [
        word for name, value in settings.items() if value or name not in empty
        for word in (f"--{name}", *(value.split(",") if value else [""]))
    ]  # fmt: skip
    return [str(STUDY), *words]
