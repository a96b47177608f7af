"""What the package `spaces` does on ZeroGPU: each call of a decorated generator runs in a process
that is forked for it, and gives picklable values back. There is no GPU here."""

import os
from functools import partial, wraps
from multiprocessing import get_context

LONGEST = 120  # seconds that a call may ask for


def GPU(task=None, *, duration=60, size=None):
    if task is None:
        return partial(GPU, duration=duration, size=size)

    @wraps(task)
    def call(*args):
        seconds = duration(*args) if callable(duration) else duration
        assert 0 < seconds <= LONGEST, seconds
        context = get_context("fork")
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(task, args, sending), daemon=True)
        process.start()
        sending.close()
        try:
            while (found := receiving.recv())[0]:
                yield found[1]
        finally:
            process.kill()
            process.join()

    return call


def _run(task, args, sending):
    with open(os.environ["STANDIN_CALLS"], "a") as calls:
        calls.write(f"{task.__name__} {os.getpid()}\n")
    for value in task(*args):
        sending.send((True, value))
    sending.send((False, None))
