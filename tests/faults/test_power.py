"""The power fails at random moments: what was finished is there, the rest goes on, with the same bits.

A disk in a file is told to forget whatever it has not written yet (the ioctl by which file systems are tested for
this), with the processes that write to it, and is mounted again. It is mounted so that it writes as late as it may.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import time

import pytest
import victims
from test_kill import CHECKPOINTS, TRAINING, done, same_as_whole, server, told, updates, whole  # noqa: F401

from layerwise.lab.report.saved import rebuilt

pytestmark = [pytest.mark.full, pytest.mark.dist, pytest.mark.skipif(sys.platform != "linux", reason="needs mount")]

SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN."""

WITHOUT_THE_JOURNAL = struct.pack("I", 2)
"""Its flag: what the journal has in memory is lost too."""

LATE = "loop,noauto_da_alloc,commit=300"
"""Options of a mount: nothing is written before it must be, and no rename waits for a file's content by itself."""


class Disk:
    """A small disk in a file.

    Args:
        folder: of the file and of the place where it is mounted.
    """

    def __init__(self, folder):
        self.image, self.place = folder / "image", folder / "disk"
        self.place.mkdir(parents=True)
        with self.image.open("wb") as stream:
            stream.truncate(64 << 20)
        made = ["mkfs.ext4", "-q", "-F", str(self.image)]
        try:
            if os.geteuid() != 0 or subprocess.run(made, capture_output=True).returncode or self._mount().returncode:
                pytest.skip("only root may mount a disk in a file")
        except FileNotFoundError:
            pytest.skip("mkfs.ext4 is not installed")

    def _mount(self):
        command = ["mount", "-t", "ext4", "-o", LATE, str(self.image), str(self.place)]
        return subprocess.run(command, capture_output=True)

    def lose_power(self):
        """Forget what has not been written."""
        file = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(file, SHUTDOWN, WITHOUT_THE_JOURNAL)
        except OSError as error:
            pytest.skip(f"this system cannot cut the power of a disk: {error}")
        finally:
            os.close(file)

    def begin_again(self):
        """Mount it again, which reads the journal."""
        self.close()
        mounted = self._mount()
        assert mounted.returncode == 0, mounted.stderr

    def close(self):
        subprocess.run(["umount", str(self.place)], check=True)


@contextlib.contextmanager
def disk_at(folder):
    disk = Disk(folder)
    try:
        yield disk
    finally:
        disk.close()


def test_such_a_disk_forgets_what_was_not_flushed_and_keeps_what_was(tmp_path):
    with disk_at(tmp_path) as disk:
        for name in ("flushed", "not"):
            with (disk.place / name).open("wb") as stream:
                stream.write(b"content")
                stream.flush()
                if name == "flushed":
                    os.fsync(stream.fileno())
                    folder = os.open(disk.place, os.O_RDONLY)
                    os.fsync(folder)
                    os.close(folder)
        disk.lose_power()
        disk.begin_again()
        assert (disk.place / "flushed").read_bytes() == b"content"
        assert not (disk.place / "not").exists()


def finished(out):
    """Name the runs that were finished for good: those after which the process went on to another one."""
    return list(updates(out))[:-1]


def lose_power_in_training(server, whole, disk, chance, count, *, pause, seconds):  # noqa: F811
    """Cut the power while runs are trained one after another; give the updates that were done again for each cut."""
    asked = {"pause": pause, "seconds": seconds}
    took = server.do("train", disk.place.parent / "timed", **asked)
    lost = []
    while len(lost) < count:
        out = disk.place.parent / f"runs{len(lost)}-{chance.randrange(1 << 30)}"  # its log is on another disk
        (disk.place / out.name).mkdir()
        out.symlink_to(disk.place / out.name)
        os.sync()  # an empty folder is there for good
        number = server.start("train", out, **asked)
        time.sleep(chance.uniform(0.0, took))
        disk.lose_power()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(number, signal.SIGKILL)
        killed = server.wait(number) != 0
        disk.begin_again()
        if not killed:
            continue
        before = finished(out)
        kept = done(out)
        assert set(before) <= {record.folder.name for record in kept.values()}
        server.do("train", out, **asked)
        records = done(out)
        assert len(records) == 4
        same_as_whole(records, whole)
        again = updates(out)
        assert all(again[record.folder.name] == victims.UPDATES for record in kept.values())
        lost.append(again.total() - 4 * victims.UPDATES)
    return lost


@pytest.mark.parametrize("count", [1, pytest.param(30, marks=pytest.mark.faults)])
@pytest.mark.parametrize("asked", [TRAINING, CHECKPOINTS], ids=["training", "checkpoints"])
def test_the_power_fails_in_training(server, whole, tmp_path, capsys, asked, count):  # noqa: F811
    with disk_at(tmp_path) as disk:
        lost = lose_power_in_training(server, whole, disk, random.Random(len(asked) + count), count, **asked)
    if count > 1:
        told(capsys, "power failure in training", count, f"at most {max(lost)} updates again")


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.faults)])
def test_the_power_fails_in_writing_a_report(server, tmp_path, capsys, count):  # noqa: F811
    chance = random.Random(count)
    with disk_at(tmp_path) as disk:
        out = tmp_path / "runs"
        (disk.place / "runs").mkdir()
        out.symlink_to(disk.place / "runs")
        server.do("train", out, pause=0.0, seconds=60.0)
        took = server.do("report", out)
        for _ in range(count):
            number = server.start("report", out)
            time.sleep(chance.uniform(0.0, took))
            disk.lose_power()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)
            server.wait(number)
            disk.begin_again()
            assert len(done(out)) == 4
            results, left_out = rebuilt(out / "small") or (None, None)
            assert left_out == []
            assert len(results.records) == 4
            assert (out / "small" / "report.html").read_text().rstrip().endswith("</html>")
        server.do("report", out)
    if count > 1:
        told(capsys, "power failure in writing a report", count, "the page before or the new one is whole")
