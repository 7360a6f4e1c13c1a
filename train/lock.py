"""One run at a time in a workdir."""

import contextlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from etils import epath

FILE_NAME = ".lock"


@contextlib.contextmanager
def hold(workdir: epath.PathLike) -> Iterator[None]:
    """Keeps others out of a workdir; the system lets go of it when the process ends, however.

    A bucket, and a file system or platform without locks, keeps nobody out. Raises ValueError
    where another process is in there, or the lock is a link.
    """
    if "://" in str(workdir) or importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    with _open(folder / FILE_NAME) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(
                f"{workdir} is in use by {file.read() or 'another run'}; wait for its end, or give "
                "another --workdir"
            ) from error
        except OSError:  # of a file system without locks
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _open(path: Path) -> IO[str]:
    def no_link(name: str, how: int) -> int:
        return os.open(name, how | os.O_NOFOLLOW, 0o666)

    try:
        return open(path, "a+", opener=no_link)
    except OSError as error:
        if not path.is_symlink():
            raise
        raise ValueError(
            f"{path} is a link, whose target would be overwritten; remove it"
        ) from error
