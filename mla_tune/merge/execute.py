"""The shards of a plan, written: linked, copied or merged, by several threads, each shard whole or not at all.

    jobs (pieces of tensors, runs of copied bytes) → worker threads → their places in the file
    a shard whose jobs are done → one thread that flushes it to the disk, renames it and notes it in the journal

Reading, computing, writing and flushing overlap; numpy and the system calls release Python's lock.  What is written
does not depend on the number of workers.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mla_tune.checkpoint.atomic_files import copy_file, sha256_of
from mla_tune.checkpoint.index import TensorRef
from mla_tune.checkpoint.writer import ShardWriter
from mla_tune.errors import CheckError
from mla_tune.merge.apply import Merger, RowRange
from mla_tune.merge.output import MergePlan, OutShard, OutTensor
from mla_tune.merge.retention import DeltaRetention
from mla_tune.merge.staging import Staging

#: Neighboring tensors are copied in one go, up to this many bytes.
_COPY_BYTES = 1 << 26
#: ioctl request that makes a file share another's blocks until one of them changes (Linux: btrfs, XFS, bcachefs).
_FICLONE = 0x40049409
#: Niceness of threads that let others go first.
_GENTLY = 10


@dataclass
class _Work:
    """One shard being written."""

    shard: OutShard
    writer: ShardWriter
    left: int
    retention: dict[tuple[str, int], DeltaRetention] = field(default_factory=dict)


def execute(
    plan: MergePlan,
    staging: Staging,
    *,
    workers: int,
    min_retained: float | None = None,
    hashed: dict[str, Future[str]] | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> dict[str, DeltaRetention]:
    """Write every shard that `staging` does not have yet, and return by key what the rounding retained of each
    tensor's delta.

    `hashed` gets the sha256 of each file that is written, some time later: while it still lies in the page cache.  It
    is given where another process gets ready to prove them: then the threads let it go first, too (on Linux).
    Raises `WorkError` for results that are not finite, `FileError` where the base changes meanwhile, `CheckError` where
    less than `min_retained` of a delta was retained, `OSError` where the disk is full or fails.
    """
    todo = []
    for shard in plan.shards:
        if shard.name in staging.finished:
            done(shard.nbytes)
        elif shard.is_same:
            how = place_same(shard.source.file, staging.folder / shard.name, link=plan.options.link)
            staging.record(shard.name, {"bytes": shard.source.stamp.size, "how": how})
            done(shard.nbytes)
        else:
            todo.append(shard)
    _Executor(plan, staging, min_retained, hashed, done).run(todo, workers)
    retention = {}
    for shard in plan.shards:
        for key, sums in staging.finished[shard.name].get("retention", {}).items():
            retention[key] = DeltaRetention(*sums)
    return retention


class _Executor:
    """Threads over the jobs of some shards; the first error stops them all."""

    def __init__(
        self,
        plan: MergePlan,
        staging: Staging,
        min_retained: float | None,
        hashed: dict[str, Future[str]] | None,
        done: Callable[[int], None],
    ) -> None:
        self.merger = Merger(plan)
        self.staging, self.min_retained, self.hashed, self.done = staging, min_retained, hashed, done
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.whole: queue.Queue[_Work | None] = queue.Queue()
        self.open: set[ShardWriter] = set()

    def run(self, shards: list[OutShard], workers: int) -> None:
        jobs = self._jobs(shards)
        self.hashers = ThreadPoolExecutor(workers, initializer=_let_others_go_first)
        threads = [threading.Thread(target=self._guarded, args=(self._work, jobs)) for _ in range(max(1, workers))]
        flusher = threading.Thread(target=self._guarded, args=(self._flush,))
        try:
            for thread in (*threads, flusher):
                thread.start()
            for thread in threads:
                thread.join()
            self.whole.put(None)
            flusher.join()
        except BaseException:
            self.stop.set()
            raise
        finally:
            self.whole.put(None)
            self.hashers.shutdown(wait=False)
            for thread in (*threads, flusher):
                if thread.is_alive():
                    thread.join()
            for writer in self.open:
                writer.discard()
        if self.errors:
            raise self.errors[0]

    def _guarded(self, target: Callable[..., None], *args: object) -> None:
        try:
            target(*args)
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    def _jobs(self, shards: list[OutShard]) -> Iterator[tuple[_Work, Callable[[], None]]]:
        for shard in shards:
            file = self.staging.folder / shard.name
            file.parent.mkdir(parents=True, exist_ok=True)
            writer = ShardWriter(file, shard.layout, shard.source.metadata)
            self.open.add(writer)
            copies, pieces = _copy_runs(shard), [
                piece for out in shard.tensors if not out.is_copy for piece in self.merger.pieces(out)
            ]  # fmt: skip
            work = _Work(shard, writer, len(copies) + len(pieces))
            if not work.left:
                self.whole.put(work)
            for key, source, nbytes in copies:
                yield work, partial(writer.copy, key, source, nbytes, self._count)
            for piece in pieces:
                yield work, partial(self._merge, work, piece)

    def _merge(self, work: _Work, piece: RowRange) -> None:
        codes, retention = self.merger.compute(piece)
        work.writer.write(piece.out.key, codes, piece.begin * codes[:1].nbytes)
        self._count(codes.nbytes)
        if retention is not None:
            with self.lock:
                work.retention[piece.out.key, piece.begin] = retention

    def _count(self, nbytes: int) -> None:
        with self.lock:
            self.done(nbytes)

    def _work(self, jobs: Iterator[tuple[_Work, Callable[[], None]]]) -> None:
        if self.hashed is not None:
            _let_others_go_first()
        while not self.stop.is_set():
            with self.lock:
                job = next(jobs, None)
            if job is None:
                return
            work, do = job
            do()
            with self.lock:
                work.left -= 1
                if work.left:
                    continue
            self.whole.put(work)

    def _flush(self) -> None:
        while (work := self.whole.get()) is not None and not self.stop.is_set():
            sums: dict[str, DeltaRetention] = {}
            for (key, _), part in sorted(work.retention.items()):
                sums.setdefault(key, DeltaRetention()).add(part)
            self._check_retention(sums)
            work.shard.source.check_unchanged()
            work.writer.commit()
            self.open.discard(work.writer)
            retention = {key: [s.inner, s.delta2, s.written2, s.weight2] for key, s in sums.items()}
            what = {"bytes": work.writer.nbytes, "how": "written", "retention": retention}
            self.staging.record(work.shard.name, what)
            if self.hashed is not None:
                file = self.staging.folder / work.shard.name
                self.hashed[work.shard.name] = self.hashers.submit(sha256_of, file)

    def _check_retention(self, sums: dict[str, DeltaRetention]) -> None:
        if self.min_retained is None:
            return
        poor = {key: s.retained for key, s in sums.items() if s.retained is not None and s.retained < self.min_retained}
        if poor:
            self.staging.keep = True
            worst = sorted(poor.items(), key=lambda item: item[1])
            lines = "".join(f"\n  {key}: {share:.1%}" for key, share in worst[:10])
            more = f"\n  … and {len(worst) - 10} more" if len(worst) > 10 else ""
            raise CheckError(
                f"--min-retained {self.min_retained:g}: rounding leaves less of the adapter's change in {len(poor)} "
                f"tensors; nothing was published:{lines}{more}\n"
                "Write them in a wider dtype (--dtype float32, --quantized dequantize) or lower the limit"
            )


def _let_others_go_first() -> None:
    if sys.platform == "linux":  # where a thread can have a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _GENTLY)


def _copy_runs(shard: OutShard) -> list[tuple[str, TensorRef, int]]:
    """(first key, its source, bytes) of the tensors to copy, neighbors together."""
    runs: list[tuple[str, TensorRef, int]] = []
    last: OutTensor | None = None
    for out in shard.tensors:
        if out.is_copy:
            follows = last is not None and last.source.file == out.source.file and last.source.end == out.source.begin
            if follows and runs[-1][2] + out.nbytes <= _COPY_BYTES:
                key, source, nbytes = runs[-1]
                runs[-1] = (key, source, nbytes + out.nbytes)
            else:
                runs.append((out.key, out.source, out.nbytes))
        last = out if out.is_copy else None
    return runs


def place_same(source: Path, target: Path, *, link: bool) -> str:
    """Give `target` the content of `source`: sharing its blocks, as a hard link, or as a copy.  Says which."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    target.unlink(missing_ok=True)
    if link:
        if _reflink(source, target):
            return "reflinked"
        try:
            os.link(source, target)
        except OSError:
            pass  # another file system, or one without hard links
        else:
            return "linked"
    copy_file(source, target)
    return "copied"


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl

        with source.open("rb") as read, target.open("xb") as write:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
            os.fsync(write.fileno())
    except (ImportError, OSError):
        target.unlink(missing_ok=True)
        return False
    return True
