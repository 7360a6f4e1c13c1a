"""Who may write into a workdir."""

import os
import signal
import subprocess
import sys

import pytest

from jaxlib_methods.train import lock

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_the_second_one_is_told_who_is_there(tmp_path):
    workdir = tmp_path / "new" / "run"
    message = f"{workdir} is in use by process {os.getpid()} on .*; wait for its end, or give"
    with lock.hold(workdir):
        with pytest.raises(ValueError, match=message), lock.hold(workdir):
            pass
        with lock.hold(tmp_path / "another"):
            pass
    with lock.hold(workdir):
        pass


def test_a_killed_process_keeps_nobody_out(tmp_path):
    path = tmp_path / lock.FILE_NAME
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="in use by another run"), lock.hold(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with lock.hold(tmp_path):
        assert str(os.getpid()) in path.read_text()


@pytest.mark.parametrize("exists", [True, False])
def test_a_lock_that_is_a_link_is_refused_and_not_followed(tmp_path, exists):
    target = tmp_path / "target"
    if exists:
        target.write_text("dear")
    (tmp_path / lock.FILE_NAME).symlink_to(target)
    with pytest.raises(ValueError, match=r"\.lock is a link, .* remove it"), lock.hold(tmp_path):
        pass
    assert target.exists() == exists
    assert not exists or target.read_text() == "dear"


def test_a_bucket_has_no_locks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a folder `gs:` would be made
    with lock.hold("gs://bucket/run"), lock.hold("gs://bucket/run"):
        assert not list(tmp_path.iterdir())


def test_nor_has_every_file_system(tmp_path, monkeypatch):
    asked = []

    def refuse(file, how):
        asked.append(how)
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with lock.hold(tmp_path), lock.hold(tmp_path):
        assert len(asked) == 2
