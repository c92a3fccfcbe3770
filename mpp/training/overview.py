"""What a run says of itself before it starts, in a few lines."""

import torch

from mpp.data.sources.base import count
from mpp.training.training_run import TrainingRun


def overview(run: TrainingRun, model: str, image_hw: tuple[int, int], data: tuple[str, str]) -> str:
    """The model, images, steps, rate and device of a run, and what was chosen for it, a line each.

    `model` is its name, `data` the line about its images: the first word and the rest.
    """
    schedule, config, world = run.schedule, run.config, run.world
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    passes = schedule.total_steps * schedule.batch_size / schedule.epoch_images
    rise = min(run.steps("schedule.warmup"), schedule.total_steps - 1)
    minor = ("schedule.warmup", "log.every", "checkpoint.every")
    choices = [str(choice) for choice in run.choices if choice.name not in minor]
    if len(choices) < len(run.choices):
        choices.append("rise of the rate, rows and checkpoints: by the length of the run")
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else str(run.device)
    lines = [
        ("model", f"{model}, {parameters / 1e6:.1f} M parameters with heads, {image_hw[0]} x {image_hw[1]} pixels"),
        data,
        (
            "training",
            f"{count(schedule.total_steps, 'step')} of {count(schedule.batch_size, 'image')}, {passes:,.1f} epochs, "
            f"{count(schedule.micro_batch, 'image')} in a pass",
        ),
        (
            "rate",
            f"{config.optim.name}, {schedule.rate(rise):.3g} from step {rise:,} on, then {config.schedule.kind}",
        ),
        ("device", f"{device}, {run.precision}, {count(world.size, 'process')}"),
        *(("automatic", choice) for choice in choices),
    ]
    if config.run_dir and not getattr(config, "dry_run", False):
        lines.append(("settings", f"all of them are in {run.folder / 'config.yaml'}"))
    names = [name if name != before else "" for (name, _), (before, _) in zip(lines, [("", ""), *lines], strict=False)]
    return "\n".join(f"{name:12} {text}" for name, (_, text) in zip(names, lines, strict=True))
