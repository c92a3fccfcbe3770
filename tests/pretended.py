"""A CUDA device that is not there: real training code runs on it, nothing is computed, and what would wait is noted."""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    is_fake,
    unset_fake_temporarily,
)
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1] / "mpp"


class Generator(torch.Generator):
    """One that says that it is on the device; in truth there is none but the CPU's."""

    device = torch.device("cpu")  # pyright: ignore[reportAssignmentType]

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        generator = super().__new__(cls)
        generator.device = torch.device(device)
        return generator


class Stream:
    """Notes the order in which streams wait for each other, and which one is current."""

    current: "Stream"

    def __init__(self, *_: Any, **__: Any) -> None:
        self.waits_for: list[Stream] = []
        self.uses: list[tuple[int, ...]] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waits_for.append(other)

    def wait_event(self, event: "Event") -> None: ...

    def record_event(self) -> "Event":
        return Event()

    def synchronize(self) -> None:
        raise AssertionError("the host waits for a stream")


class Event:
    """One that has always happened: how often it is waited for is for the guard's own tests."""

    def __init__(self, **_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...


@contextlib.contextmanager
def stream(entered: Stream) -> Iterator[None]:
    before, Stream.current = Stream.current, entered
    try:
        yield
    finally:
        Stream.current = before


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """As `nn.Module.to`, which cannot exchange fake parameters."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                empty = torch.empty_like(value, device=device)
                part._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else torch.empty_like(value, device=device)
    return module


class Fake(FakeTensorMode):
    """Tensors on the device, where torch itself makes one beside another."""

    avoid_device_init = True  # pyright: ignore[reportAssignmentType]

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = CUDA
        return super().dispatch(func, types, args, kwargs)


class Waits(TorchDispatchMode):
    """Counts, by the line of mpp that asks for them, what the host waits for the device to do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.pinned: list[Tensor] = []
        self.copied: list[Stream] = []

    def note(self, what: str) -> None:
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
        place = f"{Path(ours[-1].filename).relative_to(ROOT.parent)}:{ours[-1].name}" if ours else "elsewhere"
        self.seen[f"{place}: {what}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name == "_local_scalar_dense":
            if args[0].device.type == "cuda":
                self.note("item")
            if isinstance(args[0], FakeTensor):
                # Of a copy the guard asks whether a norm is finite; on the device a loop may ask whether to go on.
                return 1.0 if args[0].is_floating_point() else args[0].device.type == "cpu"
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            target = torch.device(kwargs.get("device") or source.device) if name == "_to_copy" else args[0].device
            blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            pageable = source.device.type == "cpu" and not any(source is one for one in self.pinned)
            if (source.device.type == "cpu") != (target.type == "cpu"):
                self.copied.append(Stream.current)
                if blocking or pageable:
                    self.note(f"copy to {target}, {'blocking' if blocking else 'not pinned'}")
        if name in ("_fused_sgd_", "_amp_update_scale_"):  # of which torch (2.13) has no fake one
            return args[0] if name == "_amp_update_scale_" else None
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        host = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        with unset_fake_temporarily() if host and not any(map(is_fake, tensors)) else contextlib.nullcontext():
            try:
                return func(*args, **kwargs)
            except DynamicOutputShapeException:  # of a size that the device alone knows
                self.note(name)
                raise


class Made(TorchFunctionMode):
    """What is not to arrive at tensors: pinning, and generators."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(generator := kwargs.get("generator"), Generator) and generator.device.type == "cuda":
            kwargs["generator"] = None
        if func is Tensor.pin_memory:
            self.waits.pinned.append(args[0])
            return args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def cuda() -> Iterator[Waits]:
    """Within it tensors may be made on `CUDA`, also where torch was built without it."""
    fake, waits = Fake(allow_non_fake_inputs=True), Waits()
    made, grouped = Tensor._make_subclass, torch._C._group_tensors_by_device_and_dtype

    def subclass(cls: Any, data: Tensor, requires_grad: bool = False, **options: Any) -> Tensor:
        # Autograd asks a tensor's device for its streams: below Python let it be "meta", which has them everywhere.
        device = options.get("device_for_backend_keys")
        if device is not None and torch.device(device).type == "cuda":
            options = {"dispatch_device": False}
        return made(cls, data, requires_grad, **options)

    def groups(*tensors: Any) -> Any:  # by which several are updated at once, as only on CUDA
        return {
            (torch.device(CUDA if d.type == "meta" else d), of): found for (d, of), found in grouped(*tensors).items()
        }

    Stream.current = Stream()
    instead: list[tuple[Any, str, Any]] = [
        (Tensor, "_make_subclass", staticmethod(subclass)),
        (Tensor, "record_stream", lambda tensor, stream: stream.uses.append(tuple(tensor.shape))),
        (DTensor, "device", property(lambda sharded: sharded._local_tensor.device)),
        (_foreach_utils, "_foreach_supported_types", [*_foreach_utils._foreach_supported_types, FakeTensor]),
        (torch._C, "_group_tensors_by_device_and_dtype", groups),
        (nn.Module, "to", moved),
        (torch, "Generator", Generator),
        # Within the real one copies to a device would pass by the modes below.
        (torch, "inference_mode", lambda mode=True: torch.set_grad_enabled(torch.is_grad_enabled() and not mode)),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "Event", Event),
        (torch.cuda, "stream", stream),
        (torch.cuda, "current_stream", lambda *_: Stream.current),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 2),
        (torch.cuda, "set_device", lambda *_: None),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.accelerator, "is_available", lambda: True),  # that a loader pins
        (torch.accelerator, "current_accelerator", lambda check_available=False: None if check_available else CUDA),
    ]
    with contextlib.ExitStack() as stack:
        for change in instead:
            stack.enter_context(patch.object(*change))
        for mode in (fake, waits, Made(waits)):
            stack.enter_context(mode)
        yield waits
