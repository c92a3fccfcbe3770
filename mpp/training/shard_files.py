"""The sharded tensors of a checkpoint: a folder to which each rank writes its own, by torch.distributed.checkpoint.

.metadata           which shard of which tensor is where
__0_0.distcp ...    the shards of each rank

Readable by any number of processes, sharded or not. Nothing in it is unpickled freely: torch's own reader would run
what a foreign .metadata says.
"""

import pickle
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch import distributed as torch_dist
from torch.distributed.checkpoint import filesystem, metadata, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.tensor import DTensor

from mpp.system.process import without_warnings
from mpp.training.tensor_tree import Key, Like, map_tensors


def _enum_member(kind: Any, name: str) -> Enum:
    """Stands for getattr, by which Python 3.11.0 to 3.11.3 (as in Debian 12) pickle the members of an enum."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError("builtins.getattr does not belong in a checkpoint")
    return kind[name]


_ALLOWED = {("builtins", "getattr"): _enum_member} | {
    (kind.__module__, kind.__name__): kind
    for kind in (
        *(metadata.Metadata, metadata.MetadataIndex, metadata.TensorStorageMetadata, metadata.ChunkStorageMetadata),
        *(metadata.TensorProperties, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.Size),
        torch.serialization._get_layout,
    )
}
"""What a .metadata may name, beside torch's types of numbers and members of its enums."""


def write_shards(folder: Path, content: Any, group: torch_dist.ProcessGroup) -> Any:
    """Write the sharded tensors of `content`, which are on the CPU, to a new `folder`; all of `group` together.

    Returns the rest of `content`, and under "sharded" the keys of the tensors. Raises CheckpointException on every rank
    where one cannot write.
    """
    shards: dict[str, Any] = {}
    keys: dict[str, Key] = {}

    def take(key: Key, value: Tensor) -> Tensor | None:
        if not isinstance(value, DTensor):
            return value
        name = "/".join(map(str, key))
        shards[name], keys[name] = value, key
        return None

    rest = map_tensors(content, take) | {"sharded": keys}
    torch_dist.barrier(group)  # rank 0 has made room for it
    planner = DefaultSavePlanner(flatten_state_dict=False)
    state_dict_saver.save(shards, storage_writer=_Writer(folder), planner=planner, process_group=group)
    return rest


def read_shards(folder: Path, rest: Any, like: Like) -> None:
    """Complete in place what `write_shards` returned; each rank reads for itself what it needs.

    Tensors come whole and on the CPU, but for those that are to be `like` sharded ones. A truncated or foreign folder
    raises exceptions of many kinds.
    """
    reader = _Reader(folder)
    stored = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {}
    for name, key in rest.pop("sharded").items():
        entry: Any = stored[name]
        template, dtype = like(key), entry.properties.dtype
        if template is None or template.shape != entry.size:
            tensors[name] = torch.empty(entry.size, dtype=dtype)
        else:
            tensors[name] = torch.empty_like(template, dtype=dtype)
        *above, last = key
        parent = rest
        for part in above:
            parent = parent[part]
        parent[last] = tensors[name]
    with without_warnings("torch.distributed is disabled"):  # each for itself, as is meant
        state_dict_loader.load(tensors, storage_reader=reader, planner=_Planner(flatten_state_dict=False), no_dist=True)


class _Writer(filesystem.FileSystemWriter):
    """Writes files that are synced, and not where they were first written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)

    def storage_meta(self) -> None:
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise origin(error) from None  # its context would not travel to the other ranks


def origin(error: BaseException) -> BaseException:
    """Return the system's own error inside what torch made of it, or what torch said first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while not (isinstance(error, OSError) and error.strerror) and error.__context__ is not None:
        error = error.__context__
    return error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = _ALLOWED.get((module_name, global_name))
        if found is None and module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            found = getattr(torch, global_name)
        if found is None:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} does not belong in a checkpoint")
        return found


class _Reader(filesystem.FileSystemReader):
    """Reads the tensors in one folder, and unpickles nothing but what describes them."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, metadata.Metadata):
            raise pickle.UnpicklingError("not the description of a checkpoint")
        for stored in found.storage_data.values():
            if PurePath(stored.relative_path).name != stored.relative_path:
                raise pickle.UnpicklingError(f"{stored.relative_path} is outside the checkpoint")
        return found


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor")
