"""Megatron's state on its way to the disk, beside the training.

What is saved is copied to the host's memory, and training may go on: threads write the copy and
take digests of what they wrote. Megatron would have processes write, forked from one that has
threads, and perhaps a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from queue import Queue
from threading import Lock, Thread
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException

from peergrad.echo import OtherRankFailed
from peergrad.parallel.digests import digest

Item = tuple[Any, torch.Tensor]
Bucket = tuple[str, str, tuple[list[Any], list[Item]]]
"""Megatron's: path and name of one file, what is in it as bytes and as tensors."""
Reader = Callable[[torch.Tensor], torch.Tensor]
_readers: list[Reader] = []


@contextmanager
def placeholders(read: Reader) -> Iterator[None]:
    """Inside, what is saved may lie on the meta device: ``read`` makes of such a tensor what is
    meant, when its turn to be written comes, and no two are in memory at a time. It is called in
    another thread."""
    _readers.append(read)
    try:
        yield
    finally:
        _readers.remove(read)


class Write:
    """A sharded state that is being written into ``folder``. Made and finished by all ranks."""

    def __init__(
        self, folder: Path, state: dict[str, Any], described: dict[str, Any], *, aside: bool
    ) -> None:
        """Plan with all ranks, then begin to write. ``described``: how it is sharded, for whoever
        reads it. ``aside``: copy what is saved first, so that it may change before ``finish``."""
        _use_plain_queue()
        request = dist_checkpointing.save(
            state, str(folder), content_metadata=described, async_sharded_save=True
        )
        assert request is not None, "Megatron writes at once"
        self._folder, self._finalize = folder, request.finalize_fns
        self._results: dict[int, Any] = {}
        self._digests: dict[str, str] = {}
        self._queue, self._threads = None, []
        if request.async_fn is None:
            return  # other ranks write all of it
        _, buckets, self._queue = request.async_fn_args
        transforms = request.async_fn.args[0]
        self._turn: AbstractContextManager[object] = Lock() if _readers else nullcontext()
        for index, bucket in enumerate(buckets):
            if _readers:
                path, name, (content, tensors) = bucket
                in_turn: Any = _in_turn(tensors, _readers[-1])  # it is gone through once
                bucket = (path, name, (content, in_turn))
            else:
                _bring_to_host(bucket, aside=aside)
            # A run that fails does not wait for what nobody would finish.
            self._threads.append(
                Thread(target=self._write, args=(index, bucket, transforms), daemon=True)
            )
        for thread in self._threads:
            thread.start()

    @property
    def done(self) -> bool:
        """Whether this rank has written its share, or failed to."""
        return not any(thread.is_alive() for thread in self._threads)

    def finish(self) -> dict[str, str]:
        """Wait for the files of all ranks, and have Megatron describe them; the digests of this
        rank's, by ``<folder>/<file>``. Collective. Raises on every rank what is wrong on any."""
        for thread in self._threads:
            thread.join()
        if self._queue is not None:
            failed = (found for found in self._results.values() if isinstance(found, Exception))
            self._queue.put(next(failed, self._results))
        try:
            for finalize in self._finalize:
                finalize()
        except CheckpointException as error:
            if error.failures:
                raise
            # Only rank 0 is told by Megatron what failed, and where; it says so.
            raise OtherRankFailed(f"a rank could not write {self._folder}") from error
        return self._digests

    def _write(self, index: int, bucket: Bucket, transforms: list[Any]) -> None:
        results: Queue[tuple[int, Any]] = Queue()
        running: Queue[int] = Queue()  # Megatron's count of its processes
        running.put(index)
        with self._turn:
            FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, results, running, use_fsync=True
            )
        found = results.get()[1]
        try:
            if not isinstance(found, Exception):
                self._digests[f"{self._folder.name}/{bucket[1]}"] = digest(Path(bucket[0]))
        except OSError as error:
            found = error
        self._results[index] = found


def _bring_to_host(bucket: Bucket, *, aside: bool) -> None:
    """Replace its tensors, one by one, so that at most one is there three times."""
    tensors = bucket[2][1]
    for place, (item, tensor) in enumerate(tensors):
        copy = aside and tensor.device.type == "cpu"
        tensors[place] = (item, tensor.clone() if copy else tensor.cpu())


def _in_turn(tensors: list[Item], read: Reader) -> Iterator[Item]:
    for item, placeholder in tensors:
        tensor = read(placeholder)
        yield item, tensor
        tensor.untyped_storage().resize_(0)  # the writer holds it until it has the next


def _use_plain_queue() -> None:
    """The writers' results come back to this process through a queue. Megatron's own stands in a
    process of its own, for writers that are processes, which spends seconds on importing what it
    only hands on, and would live on for ever if this rank were killed."""
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = Queue()
