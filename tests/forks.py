"""Processes that need not import torch again: each is a fork of one that has imported everything."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Imports; then forks for each line that it reads with code to run, or says how the fork of that number ended.
_SERVER = """
import json, os, sys, traceback
space = {"__name__": "fork"}
exec(sys.argv.pop(), space)
print("ready", flush=True)

def run(job):
    os.setsid()
    os.chdir(job["folder"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job["environment"])
    sys.argv = ["fork", *job["arguments"]]
    status = 0
    try:
        exec(job["code"], space)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    job = json.loads(line)
    if isinstance(job, int):
        done, status = os.waitpid(job, os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if done else None
    else:
        answer = os.fork()
        if answer == 0:
            run(job)
    print(json.dumps(answer), flush=True)
"""

# All that a training imports, and one thread, so that forks are safe.
TRAINING = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
import accelerate, datasets, matplotlib.figure, timm, torchvision
import timm_selfdistill.train.run
from quick_reports import quicken
quicken()
"""

COMMAND = "from timm_selfdistill.train import main; main()"


@dataclass
class Fork:
    """A process that a server has forked; what it prints goes to files."""

    server: "ForkServer"
    pid: int
    stdout: Path
    stderr: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative after a signal, or None while it runs."""
        if self.returncode is None:
            self.returncode = self.server.ask(self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 600, kill: bool = False) -> tuple[int, str, str]:
        """Wait for its end, and return the exit status and what was printed.

        Args:
            seconds: How long; then it is killed, with the processes that it started.
            kill: Whether that is what is wanted, and no failure.
        """
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                assert kill, f"it still ran after {seconds} s: {self.stderr.read_text()}"
                end += 60
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode, self.stdout.read_text(), self.stderr.read_text()


class ForkServer:
    """Forks processes from one that has run `preload`; `environment` adds to this one's, None takes a variable away."""

    def __init__(self, preload: str, folder: Path, environment: Mapping[str, str | None] | None = None) -> None:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={name: value for name, value in variables.items() if value is not None},
        )
        assert self._read() == "ready"

    def start(self, code: str, arguments: Sequence[str] = (), folder: Path | None = None, **environment: str) -> Fork:
        """Run code in a fork, in a folder, with command line arguments and with more environment variables."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("stdout", "stderr"))
        for path in (out, err):
            path.touch()
        job = {"code": code, "arguments": arguments, "folder": str(folder or self._folder), "environment": environment}
        return Fork(self, self.ask({**job, "stdout": str(out), "stderr": str(err)}), out, err)

    def start_together(self, code: str, arguments: Sequence[str] = (), **environment: str) -> list[Fork]:
        """Run code in two forks that find one another as if torchrun had started them, on CPUs."""
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
        common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **environment}
        return [self.start(code, arguments, **common, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]

    def ask(self, question: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        assert answer, "the server of forks has ended"
        return answer


@contextmanager
def fork_server(
    preload: str, factory: pytest.TempPathFactory, environment: Mapping[str, str | None] | None = None
) -> Iterator[ForkServer]:
    """A server that ends with the body."""
    server = ForkServer(preload, factory.mktemp("forks"), environment)
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
