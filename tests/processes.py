"""Real processes that start at once: they are forked from one that has imported everything.

A new Python needs seconds to import torch and transformers, and most tests of processes are about
what becomes of their work when they are killed, not about how they start. What is closed, read or
left over where Python itself starts and ends is tested with ``subprocess``.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

# Imported by the first process alone; what it cannot import the others do.
_IMPORTED = [
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "coachhook.cli",
    "coachhook.cli.common",
    "coachhook.editing",
    "coachhook.evaluation",
    "coachhook.statistics",
    "coachhook.store",
    "benchmarks.experiments.worker",
    "tests.processes",
]


def start(
    source: str, *words: object, out: Path | None = None, err: Path | None = None, **environ: str
) -> BaseProcess:
    """Starts Python code in a process of its own.

    Args:
        source: the code, or after ``-m `` the name of a module to run.
        words: what stands in ``sys.argv`` behind the program.
        out: a file for its standard output, which goes nowhere by default.
        err: the same for its messages.
        environ: changes of the environment.

    Returns:
        The process, whose ``exitcode`` is as ``subprocess`` has it: negative after a signal.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    process = context.Process(
        target=_work,
        args=(source, [str(word) for word in words], [out, err], dict(os.environ) | environ),
        daemon=True,  # none outlives the tests
    )
    process.start()
    return process


def run(source: str, *words: object, **more: object) -> int | None:
    """Starts code as `start` does, and waits for its end; the exit status."""
    process = start(source, *words, **more)  # type: ignore[arg-type]
    process.join()
    return process.exitcode


def together(source: str, *words: object, folder: Path, count: int = 2) -> None:
    """Runs code in processes that know of each other what torchrun tells them; all must succeed.

    Args:
        source: the code of each.
        words: what stands in ``sys.argv`` behind the program.
        folder: where their messages go.
        count: how many there are.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    files = [folder / f"messages-{rank}" for rank in range(count)]
    started = [
        start(source, *words, err=file, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank, file in enumerate(files)
    ]
    for process in started:
        process.join(240)
        if process.exitcode:  # the others may wait for it
            break
    for process in started:
        process.kill()
        process.join()
    assert all(process.exitcode == 0 for process in started), [f.read_text() for f in files]


def _work(source: str, words: list[str], files: list[Path | None], environ: dict[str, str]) -> None:
    for number, file in enumerate(files, 1):
        opened = os.open(file or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    sys.argv = ["-c", *words]
    if source.startswith("-m "):
        runpy.run_module(source.removeprefix("-m "), run_name="__main__", alter_sys=True)
    else:
        exec(compile(source, "<started>", "exec"), {"__name__": "__main__"})
