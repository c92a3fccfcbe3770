"""The tools from Python: the same names, defaults, checks and messages as on the command line.

    result = mpp.pretrain(config="base", data="folder:/my/images", run_dir="runs/first", **{"optim.lr": 3e-4})
    result.figures, result.paths["report"], result.encoder()

Settings are keywords, dotted names in a dict with `**`, or dicts: `train={"length": "20k steps"}`. `config` is the name
of a shipped config, the path of a YAML file, a dict or a dataclass of settings; the other settings go on top. Where a
setting names a source of images, it takes a sequence of images or a torch Dataset, too (see `PythonSource`).

Errors are `mpp.UserError` with the line that the tool prints. A run that was asked to stop, and has saved itself,
raises `mpp.Stopped`, or KeyboardInterrupt after Ctrl-C; the same call goes on with it.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpp.cli.commands import TOOLS, run
from mpp.config import from_values
from mpp.errors import RunError, Stopped, Unreachable, UserError
from mpp.system.cache import limit_of
from mpp.system.cores import THREADS, limit_threads
from mpp.system.files import cache_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mpp.api.results import Result

_SOURCES = ("data", "test", "data.source", "data.test", "fewshot.data", "fewshot.test", "pretrain.data.source")
_INTERRUPTED = 130  # exit code of a run


def _tool(name: str) -> "Callable[..., Result]":
    """The function of a tool: `config` and settings in, a `Result` out."""

    def call(config: Any = None, **settings: Any) -> "Result":
        return _call(name, config, settings)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"{TOOLS[name].about} As `mpp {name.replace('_', '-')}`; see mpp.api for settings and errors."
    return call


pretrain = _tool("pretrain")
finetune = _tool("finetune")
fewshot = _tool("fewshot")
probe = _tool("probe")
predict = _tool("predict")
embed = _tool("embed")
convert = _tool("convert")
visualize = _tool("visualize")
study = _tool("study")
shard = _tool("shard")
check_data = _tool("check_data")


def load(spec: str) -> "tuple[nn.Module, Callable[[Any], torch.Tensor]]":
    """A timm model in evaluation mode, with its weights, and the transform of its input.

    `spec` is all that `init` takes: a run, a folder of timm or Hugging Face, a JAX .npz, a timm name.
    The model takes float32 (B, C, H, W) to logits (B, K), or to features (B, D) without a head; the transform takes a
    Pillow image, an array (H, W, C), a tensor (C, H, W), bytes or a path to one float32 (C, H, W).
    Raises UserError for weights that cannot be opened.
    """
    from mpp.data.transform import ImageTransform
    from mpp.system.process import global_draws
    from mpp.weights.base import build
    from mpp.weights.opening import open_weights

    weights = open_weights(os.fspath(spec))
    with global_draws():
        model = build(weights).eval()
    return model, ImageTransform(weights.image_hw, weights.framing, weights.reading, weights.mean, weights.std)


def _call(name: str, config: Any, settings: Mapping[str, Any]) -> "Result":
    """Runs a tool; raises as the module says."""
    tool = TOOLS[name]
    sources: list[Any] = []  # they live as long as the call

    def converted(setting: str, value: Any) -> Any:
        if setting not in _SOURCES or value is None or isinstance(value, str | os.PathLike):
            return value
        from mpp.data.sources.from_python import register

        labelled = (name, setting) != ("pretrain", "data.source")  # it never asks for labels
        sources.append(register(value, labelled))
        return sources[-1].name

    with _own_environment(), tempfile.TemporaryDirectory() as scratch:
        limit_of(cache_folder())  # a wrong $MPP_CACHE_LIMIT is reported now rather than when something is cached
        asked = ready = from_values(tool.settings, config, settings, tool.aliases, name, converted)
        if name == "predict" and not asked.out:  # the table instead of lines
            ready = replace(asked, out=str(Path(scratch) / "predictions.csv"))
        try:
            status = run(tool, ready)
        except Unreachable as error:
            if isinstance(error, UserError):
                raise
            raise RunError(f"{error}; once it answers, try again") from error
        if status == _INTERRUPTED:
            raise KeyboardInterrupt
        if status == Stopped.exit_code:
            raise Stopped(f"{asked.run_dir} was asked to stop and has saved itself; the same call goes on")
        from mpp.api.results import result_of

        result = result_of(name, ready, status)
        return result if ready is asked else replace(result, config=asked, paths={})


@contextmanager
def _own_environment() -> Iterator[None]:
    """Limits threads where torch is yet to be loaded; puts the environment and torch's generator back."""
    limited = [name for name in THREADS if name not in os.environ]
    torch: Any = sys.modules.get("torch")
    drawn: Any = torch.random.get_rng_state() if torch else None
    if torch is None:
        limit_threads()
    try:
        yield
    finally:
        for name in limited:
            os.environ.pop(name, None)
        if torch and drawn is not None:
            torch.random.set_rng_state(drawn)
