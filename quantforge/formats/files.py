"""Files as a whole: read through a map, or written so that nothing stands at the final name until all of it is there."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ..arrays import Array, TensorInfo
from ..errors import FormatError, OutputError

_LFS = b"version https://git-lfs"


class MappedFile:
    """A regular file in memory, read-only. Raises FormatError for what cannot be one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # before open: opening a pipe would wait for a writer
                raise FormatError(path, "not a regular file")
            with path.open("rb") as f:
                self.size = os.fstat(f.fileno()).st_size
                if not self.size:
                    raise FormatError(path, "the file is empty", 0)
                self.bytes = mmap.mmap(f.fileno(), self.size, access=mmap.ACCESS_READ)
        except OSError as e:
            raise FormatError(path, f"cannot read: {e.strerror or e}") from None
        if self.bytes[: len(_LFS)] == _LFS:
            raise FormatError(path, "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`", 0)

    def array(self, offset: int, info: TensorInfo) -> Array:
        """A read-only view of checked bytes; a copy only where they are not aligned for the dtype."""
        if not info.nbytes:
            return np.empty(info.shape, info.dtype)
        # np.ndarray(buffer=...) would not keep the map alive, a memoryview does
        octets = np.frombuffer(memoryview(self.bytes), np.uint8, info.nbytes, offset)
        view: Array = octets.view(info.dtype).reshape(info.shape)
        return view if view.flags.aligned else view.copy()

    def release(self, offset: int, nbytes: int) -> None:
        """Let the system drop these pages from this process; a later read brings them back."""
        if nbytes and hasattr(mmap, "MADV_DONTNEED"):
            start = offset - offset % mmap.PAGESIZE
            self.bytes.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

    def close(self) -> None:
        """Unmap; where arrays still view the file, that happens when the last one is gone."""
        with suppress(BufferError):
            self.bytes.close()


class NewFiles:
    """A file, a set of files, or a directory of files, that appears at `path` complete or not at all.

    heads: the first bytes of each file; sizes: all of its bytes. A single file is named ""; those of a set have names of
    their own, beside `path`. Everything is written to temporary files, or a temporary directory, beside `path`; `commit`
    flushes it to disk and renames it, replacing what stands there; of a set the first file comes last. An existing
    directory is replaced only if it holds nothing but files and one of them is a .safetensors file.
    Thread-safe. Raises OutputError.
    """

    def __init__(self, path: Path, heads: Mapping[str, bytes], sizes: Mapping[str, int], *, directory: bool = False) -> None:
        self._path = path.absolute()  # a later chdir must not move the output
        self._directory = directory
        self._idle = threading.Condition()
        self._busy = 0
        self._closed = False
        self._fds: dict[str, int] = {}
        parent = self._path.parent
        self._temporary = parent / f".quantforge-{secrets.token_hex(6)}.tmp"
        self._written: dict[Path, Path] = {}
        """Temporary file -> the name it will have, where no directory is written."""
        for target in [self._path] if directory else map(self._final, heads):
            self._check_target(target)
        with self._or_nothing():
            space, needed = os.statvfs(parent), sum(sizes.values())
            if space.f_blocks and space.f_bavail * space.f_frsize < needed:
                raise OutputError(
                    path, f"the result takes {needed} bytes and only {space.f_bavail * space.f_frsize} are free there"
                )
            if directory:
                self._temporary.mkdir()
            for i, (name, head) in enumerate(heads.items()):
                target = self._temporary / name if directory else self._temporary.with_suffix(f".{i}.tmp")
                if not directory:
                    self._written[target] = self._final(name)
                fd = self._fds[name] = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                os.ftruncate(fd, sizes[name])
                _pwrite(fd, memoryview(head), 0)

    def take(self, file: Path) -> None:
        """Move a finished file into a directory that is being written."""
        try:
            os.rename(file, self._temporary / file.name)
            self._fds[file.name] = os.open(self._temporary / file.name, os.O_RDWR)
        except OSError as e:
            raise self._cannot_write(e) from None

    def write(self, file: str, data: memoryview, at: int) -> None:
        """Put bytes in their place, inside of `writing`."""
        try:
            _pwrite(self._fds[file], data, at)
        except OSError as e:
            raise self._cannot_write(e) from None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is under way here is waited for before anything is closed."""
        with self._idle:
            if self._closed:
                raise OutputError(self._path, "written to after commit or abort")
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def drain(self) -> None:
        """Wait for writes under way, and refuse more."""
        # a file descriptor closed under a writer could by then belong to another file
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._busy)

    def commit(self) -> None:
        """Flush to disk and rename to the final name."""
        with self._or_nothing():
            self.drain()
            for fd in self._fds.values():
                os.fsync(fd)
            self._close()
            if self._directory:
                _fsync_directory(self._temporary)
                self._replace_directory()
            else:
                self._rename()
        with suppress(OSError):  # the file is whole and in place; not every directory can be opened or synced
            _fsync_directory(self._path.parent)

    def abort(self) -> None:
        """Wait for writes under way, then remove what was written. Harmless after `commit`."""
        self.drain()
        self._close()
        with suppress(OSError):
            if self._directory:
                shutil.rmtree(self._temporary)
            for file in self._written:
                file.unlink(missing_ok=True)

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """Whatever goes wrong, what was written is removed; what the system says becomes an OutputError."""
        try:
            yield
        except OSError as e:
            self.abort()
            raise self._cannot_write(e) from None
        except BaseException:
            self.abort()
            raise

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _final(self, name: str) -> Path:
        """Where a file will stand that is in no directory of its own."""
        return self._path.with_name(name) if name else self._path

    def _rename(self) -> None:
        """Give the files their names. A set whose first file is not there yet is not taken for whole."""
        done: list[Path] = []
        try:
            for temporary, final in reversed(self._written.items()):
                os.replace(temporary, final)
                done.append(final)
        except BaseException:
            for file in done:
                file.unlink(missing_ok=True)
            raise

    def _check_target(self, target: Path) -> None:
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            if not target.parent.is_dir():
                raise OutputError(target, f"the directory {target.parent} does not exist") from None
            return
        except OSError as e:
            raise self._cannot_write(e) from None
        if not self._directory and not stat.S_ISREG(mode):
            raise OutputError(target, "exists and is not a regular file; choose another name")
        if self._directory:
            if not stat.S_ISDIR(mode):
                raise OutputError(self._path, "exists and is not a directory; choose another name")
            inside = list(self._path.iterdir())
            if any(p.is_dir() for p in inside) or (inside and not any(p.suffix == ".safetensors" for p in inside)):
                raise OutputError(
                    self._path, "exists and is not a plain checkpoint directory; it is not replaced, choose another name"
                )

    def _replace_directory(self) -> None:
        old = self._temporary.with_suffix(".old")
        replacing = self._path.exists()
        if replacing:
            os.rename(self._path, old)
        try:
            os.rename(self._temporary, self._path)
        except BaseException:
            if replacing:
                os.rename(old, self._path)
            raise
        if replacing:
            shutil.rmtree(old, ignore_errors=True)

    def _cannot_write(self, e: OSError) -> OutputError:
        return OutputError(self._path, f"cannot write: {e.strerror or e}")


def write_file(path: Path, data: bytes) -> None:
    """Write a small file as `NewFiles` does. Raises OutputError."""
    files = NewFiles(path, {"": data}, {"": len(data)})
    files.commit()


def adopt(directory: Path, path: Path) -> None:
    """Put the files of a finished directory on `path`'s file system in place as `NewFiles` would. Raises OutputError."""
    files = NewFiles(path, {}, {}, directory=True)
    try:
        for file in sorted(directory.iterdir()):
            if file.is_file():
                files.take(file)
        files.commit()
    finally:
        files.abort()


def _pwrite(fd: int, data: memoryview, at: int) -> None:
    while data:
        n = os.pwrite(fd, data, at)  # writes at most 2 GiB
        data, at = data[n:], at + n


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without directory sync
            raise
    finally:
        os.close(fd)
