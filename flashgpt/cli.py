"""The command `flashgpt`: finds the verb, runs it, turns errors into one line and an exit status.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 / 143 ended by Ctrl-C / SIGTERM. Imports nothing
slow; a verb's module is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flashgpt import usercache
from flashgpt.launch import Launch

VERBS = {
    "demo": "from text to a trained GPT that writes, in about two minutes",
    "prepare": "turn text into token files",
    "train": "train a model, or go on with one",
    "evaluate": "loss, perplexity and bits per byte of a model on text",
    "generate": "write text with a model",
    "convert": "to and from Hugging Face, nanoGPT, llm.c and others, with proof",
    "verify": "prove on this machine that both settings of use_flash agree",
    "bench": "time and memory of attention, of a training step, of writing, on this machine",
    "plan": "which micro-batch fits and is fastest here; what larger machines would do",
    "info": "versions, devices, and which attention kernels can run here",
}
COMPILE = ("demo", "plan", "train", "verify")
PARALLEL = ("train",)  # may run in several processes
OLDEST_TORCH = (2, 9)
FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
# Seconds for which a process that says nothing waits: as soon as one has left torchrun ends the
# others, also one that is about to speak.
PATIENCE = 20.0


class UsageError(Exception):
    """The command line is wrong; the message says how to say it right."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    try:
        return _run(argv)
    except UsageError as error:
        return _report(error, WRONG_USAGE, debug)
    except KeyboardInterrupt:
        print(f"\n{_name()}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone; what is left to print goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ValueError, OSError, RuntimeError) as error:
        return _report(error, FAILED, debug)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview(), flush=True)
        return 0 if argv else WRONG_USAGE
    if argv[0] == "--version":
        from flashgpt import __version__

        print(f"flashgpt {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        raise UsageError(_unknown_verb(verb))
    if verb not in PARALLEL and Launch.here().size > 1:
        raise UsageError(f"{verb} is for one process; leave torchrun out")
    _prepare_torch()
    if verb in COMPILE:
        _keep_compiled_code()
    module = importlib.import_module(f"flashgpt.verbs.{verb}")
    return int(module.main(rest))


def _prepare_torch() -> None:
    """What must be right before torch is imported: its version, and how its threads wait.

    Threads of the GNU OpenMP runtime spin long before they sleep. Next to any other busy process
    that makes a training step on two cores up to ten times slower (measured: 1.7 s instead of
    0.1 s; 0.5 s with a shorter spin); on an idle machine the shorter spin costs nothing.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError("torch is not installed; run: pip install torch") from None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        raise RuntimeError(f"torch must be {needed} or newer, got {version}; upgrade it")


def _keep_compiled_code() -> None:
    """Has torch keep what it compiles in the user's cache, where the next process finds it.

    Torch's own place is the system's folder for temporary files, which is lost at reboot. It
    stays if the cache cannot be written, or can by anyone, and gives way to one that the user
    named. It is fixed when torch's compiler is imported, which an optimizer does; hence here.
    """
    try:
        folder = usercache.folder() / "compile"
    except RuntimeError:  # no home
        return
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if os.path.isdir(there) and os.access(there, os.W_OK) and not _is_open_to_all(there):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _is_open_to_all(folder: Path) -> bool:
    """Whether other users may put code there that would run as ours."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _report(error: Exception, status: int, debug: bool) -> int:
    if debug:
        raise error
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without "[Errno 28]"
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(text.split()) or type(error).__name__
    if status == WRONG_USAGE and Launch.here().local_rank > 0:  # all processes see it alike
        time.sleep(PATIENCE)
    else:
        print(f"{_name()}: {text}", file=sys.stderr)
    return status


def _name() -> str:
    """Who speaks: the program, or one of its processes."""
    launch = Launch.here()
    return f"flashgpt[{launch.rank}]" if launch.size > 1 else "flashgpt"


def _overview() -> str:
    lines = ["usage: flashgpt VERB [options]", "", "Train, check and run GPT-2-class models.", ""]
    lines += [f"  {verb:10} {what}" for verb, what in VERBS.items()]
    lines += [
        "",
        "flashgpt VERB --help shows the options of a verb, with examples.",
        "--debug shows the traceback of an error.",
        "",
        "first steps:",
        "  flashgpt demo                        the whole way, on Python's own source code",
        "  flashgpt demo my.txt                 the same on your text",
        '  flashgpt generate runs/demo --prompt "def "',
    ]
    return "\n".join(lines)


def _unknown_verb(verb: str) -> str:
    import difflib

    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"verbs are {', '.join(VERBS)}"
    return f"unknown verb {verb!r}; {hint}"
