"""The process that forks victims, seen from a test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import victims


class Server:
    """The process that forks victims."""

    def __init__(self) -> None:
        command = [sys.executable, victims.__file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def _ask(self, **asked):
        self._process.stdin.write(json.dumps(asked, default=str) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, do, out, **more):
        out.parent.mkdir(exist_ok=True)
        return self._ask(do=do, out=out, log=str(out) + ".log", **more)

    def wait(self, number):
        return self._ask(wait=number)

    def do(self, do, out, **more):
        """Do something to its end; give the seconds that it took."""
        clock = time.monotonic()
        code = self.wait(self.start(do, out, **more))
        assert code == 0, Path(str(out) + ".log.said").read_text()
        return time.monotonic() - clock

    def kill_after(self, moment, do, out, **more):
        """Kill the process and what it started; say whether it was still at work."""
        number = self.start(do, out, **more)
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):  # it has not made its group yet, and goes on
            os.killpg(number, signal.SIGKILL)
        return self.wait(number) == -signal.SIGKILL

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
