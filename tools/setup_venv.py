"""Makes .venv, installs flashgpt into it and keeps it whole; the Makefile calls it.

    python3 tools/setup_venv.py core|dev [--python= --torch-index= --venv-args=]

`core` installs what `flashgpt` needs, `dev` adds the dev extras, both at the versions in
constraints.txt. A set-up that is current costs one Python start: the stamp in .venv names a digest
of pyproject.toml and constraints.txt. A write that was killed leaves a mark behind, and the next
call starts .venv anew. What goes wrong is one line on stderr and status 1.

Standard library only. An interpreter that is too old must get as far as saying so: no syntax, and
nothing at import, that Python 3.6 does not have (hence the quoted annotations).
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

OLDEST_PYTHON = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
CONSTRAINTS = ROOT / "constraints.txt"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"

# Ours inside .venv: stamp (what is installed), mark (a write is under way), lock, log.
STATE = VENV / "flashgpt-setup"
STAMP = STATE / "stamp.json"
MARK = STATE / "incomplete"
LOG = STATE / "pip.log"

NETWORK_TROUBLE = re.compile(
    r"NewConnectionError|Max retries exceeded|ConnectTimeout|ReadTimeout|ConnectionResetError"
    r"|Name or service not known|Temporary failure in name resolution|nodename nor servname"
    r"|Network is unreachable|Connection refused|No route to host|ProxyError|SSLError"
    r"|CERTIFICATE_VERIFY_FAILED|ProtocolError|IncompleteRead"
)


class SetupError(Exception):
    """What stands in the way, in one line, and what to do about it."""


def say(text: str) -> None:
    """Print one line of progress, at once."""
    print(f"setup: {text}", flush=True)


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


# ---- what is asked for ---------------------------------------------------------------------------


def check_interpreter() -> None:
    """Raise if this Python is too old, lacks venv, or runs where .venv has another layout."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(
            f"flashgpt needs Python 3.11 or newer, {sys.executable} is {version}: "
            "name another one, e.g. make demo PYTHON=python3.12"
        )
    if os.name == "nt":
        raise SetupError(
            "on Windows use pip directly: py -m venv .venv, then "
            r".venv\Scripts\pip install -e . -c constraints.txt"
        )
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"{sys.executable} (Python {version}) has no module {module}: on Debian and Ubuntu "
                f"run `sudo apt install python3.{sys.version_info[1]}-venv`, or name another "
                "Python with PYTHON="
            )


def lower_bound(package: str) -> str:
    """The oldest version of `package` that pyproject.toml accepts."""
    match = re.search(rf'"{package}>=([0-9.]+)', PYPROJECT.read_text(encoding="utf-8"))
    assert match, f"pyproject.toml states no lower bound for {package}"
    return match.group(1)


def satisfies(version: str, bound: str) -> bool:
    """Whether `version` >= `bound` in PEP 440's order, as far as releases and pre-releases go."""
    match = re.match(r"([\d.]*\d)(\.?(?:a|b|rc|dev)\d*)?", version)
    assert match, f"not a version: {version}"
    release, pre = match.groups()
    have, need = ([int(part) for part in text.split(".")] + [0, 0] for text in (release, bound))
    return have[:3] > need[:3] or (have[:3] == need[:3] and not pre)


def pins() -> "dict[str, str]":
    """Package -> version, from constraints.txt."""
    text = CONSTRAINTS.read_text(encoding="utf-8")
    return dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==(\S+)", text))


def inputs_digest() -> str:
    """Digest of everything an install depends on."""
    return hashlib.sha256(PYPROJECT.read_bytes() + b"\0" + CONSTRAINTS.read_bytes()).hexdigest()


# ---- what is there -------------------------------------------------------------------------------


def stamp() -> "dict[str, str]":
    """What the last finished set-up recorded; empty if none did."""
    return dict(json.loads(STAMP.read_text(encoding="utf-8"))) if STAMP.exists() else {}


def is_current(target: str) -> bool:
    """Whether .venv already holds `target` ("core" or "dev") as it stands in the checkout."""
    done = stamp()
    return (
        not MARK.exists()
        and VENV_PYTHON.exists()
        and done.get("root") == str(ROOT)
        and done.get("inputs") == inputs_digest()
        and done.get("target") in (target, "dev")
    )


def venv_config() -> "dict[str, str]":
    """pyvenv.cfg as a dict; empty if there is none."""
    path = VENV / "pyvenv.cfg"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pairs = (line.partition("=") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def shares_system_packages() -> bool:
    """Whether .venv sees the packages of the Python it was made from."""
    return venv_config().get("include-system-site-packages") == "true"


def check_settings(options: argparse.Namespace) -> None:
    """Raise if a setting that was given cannot take effect on the .venv that is there."""
    config, done = venv_config(), stamp()
    if not config or MARK.exists():
        return
    python = config.get("version", config.get("version_info", "0.0"))
    have, given = python.split(".")[:2], [str(part) for part in sys.version_info[:2]]
    differs = ""
    if options.python and have != given:
        differs = f"PYTHON={options.python} is {'.'.join(given)}, .venv was made by {python}"
    elif [int(part) for part in have] < list(OLDEST_PYTHON):
        differs = f".venv was made by Python {python}, flashgpt needs 3.11 or newer"
    elif options.venv_args and (
        options.venv_args != done.get("venv_args", options.venv_args)
        or ("--system-site-packages" in options.venv_args) != shares_system_packages()
    ):
        differs = f"VENV_ARGS={options.venv_args} differs from what .venv was made with"
    elif options.torch_index and done and options.torch_index != done.get("torch_index"):
        differs = f"TORCH_INDEX={options.torch_index} is not where the torch in .venv came from"
    if differs:
        raise SetupError(f"{differs}: remove it first (rm -rf .venv)")


def installed() -> "dict[str, tuple[str, str]]":
    """Version and place of torch and numpy as .venv sees them; absent packages are left out."""
    code = (
        "import json\nfrom importlib import metadata\nfound = {}\n"
        "for name in ('torch', 'numpy'):\n"
        "    try:\n"
        "        one = metadata.distribution(name)\n"
        "    except metadata.PackageNotFoundError:\n"
        "        continue\n"
        "    found[name] = (one.version, str(one.locate_file('')))\n"
        "print(json.dumps(found))"
    )
    answer = subprocess.check_output([VENV_PYTHON, "-c", code], cwd=STATE, text=True)
    return dict(json.loads(answer))


def usable_torch(found: "dict[str, tuple[str, str]]") -> str:
    """The torch that stays: a shared one, or our own at the pinned version; "" if none.

    Raises:
        SetupError: a shared torch is too old for flashgpt.
    """
    version, place = found.get("torch", ("", ""))
    if not shares_system_packages():
        return version if version.split("+")[0] == pins()["torch"] else ""
    bound = lower_bound("torch")
    if version and not satisfies(version, bound):
        raise SetupError(
            f"torch {version} in {place} is too old, flashgpt needs {bound} or newer: upgrade it, "
            "or remove .venv and leave out VENV_ARGS=--system-site-packages"
        )
    return version


# ---- doing it ------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked() -> "Iterator[IO[str]]":
    """Hold .venv for one set-up at a time. pip inherits the lock, so an orphaned pip counts."""
    import fcntl  # not at the top: Windows has none, and check_interpreter must get to say so

    STATE.mkdir(parents=True, exist_ok=True)
    with (STATE / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up of this .venv is running, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def clear() -> None:
    """Empty .venv, but for our own folder: the mark must outlive everything it vouches for."""
    MARK.touch()
    for path in VENV.iterdir():
        if path == STATE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    STAMP.unlink(missing_ok=True)


def create(venv_args: str) -> None:
    """Make .venv with this interpreter, or with its base when .venv itself is active."""
    MARK.touch()
    inside = os.path.realpath(sys.prefix) == os.path.realpath(VENV)
    python = getattr(sys, "_base_executable", sys.executable) if inside else sys.executable
    say(f"making .venv with {python} (Python {sys.version.split()[0]})")
    command = [python, "-m", "venv", *shlex.split(venv_args), VENV]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        LOG.write_text(result.stdout)
        reason = result.stdout.strip().splitlines()[-1:] or ["no output"]
        raise SetupError(f"could not make .venv: {reason[0]} (all of it: {LOG})")
    MARK.unlink()


def failure(log: str, what: str) -> str:
    """One line for a failed pip: the likeliest cause found in the text of its log."""
    if "No space left on device" in log:
        return f"the disk is full: could not install {what}"
    if NETWORK_TROUBLE.search(log):
        return (
            f"no network, or package index out of reach: could not install {what}; check the "
            "connection and pip's proxy and index settings, then run make again"
        )
    missing = re.search(r"No matching distribution found for (.+)", log)
    if missing:
        version = ".".join(map(str, sys.version_info[:2]))
        unheard = ", or no network" if "(from versions: none)" in log else ""
        return (
            f"no {missing.group(1).strip()} for Python {version} on this platform in the package "
            f"index{unheard}: could not install {what}"
        )
    errors = re.findall(r"ERROR: (.+)", log)
    return f"could not install {what}: {errors[-1] if errors else 'pip failed'}"


def pip_install(
    python: Path, log: Path, arguments: "list[str]", what: str, held: "IO[str] | None" = None
) -> None:
    """Run pip install; its log takes the wall of text, the user sees progress and one line."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    log.write_text("")
    process = subprocess.Popen(
        [*command, "--log", str(log), *arguments],
        cwd=ROOT,
        env=dict(os.environ, PIP_USER="0"),
        stdout=None if sys.stdout.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        pass_fds=[held.fileno()] if held else [],
    )
    complaints = ""
    assert process.stderr, "asked for as a pipe"
    for line in process.stderr:
        if "Retrying" in line and "Retrying" not in complaints:
            say("the package index does not answer, trying again")
        complaints += line
    if process.wait():
        text = complaints + log.read_text(encoding="utf-8", errors="replace")
        raise SetupError(f"{failure(text, what)} (pip's log: {log})")


def pip_into_venv(arguments: "list[str]", what: str, held: "IO[str]") -> None:
    """pip_install into .venv, marked, so that a kill in the middle is seen by the next call."""
    MARK.touch()
    try:
        pip_install(VENV_PYTHON, LOG, arguments, what, held)
    except SetupError:
        # Until this line pip only resolves and downloads: .venv is as it was. (Indented lines are
        # about the build environment, which is elsewhere.)
        if not re.search(r"(?m)^\S+ Installing collected", LOG.read_text(errors="replace")):
            MARK.unlink()
        raise
    MARK.unlink()


def own_constraints(found: "dict[str, tuple[str, str]]", keeps_torch: bool) -> Path:
    """Constraints without the pins that would replace a torch or numpy the user chose."""
    dropped = set()
    if keeps_torch and found["torch"][0].split("+")[0] != pins()["torch"]:
        dropped |= {"torch", "triton"}
    numpy = found["numpy"][0] if "numpy" in found and shares_system_packages() else ""
    if numpy and satisfies(numpy, lower_bound("numpy")):
        dropped.add("numpy")
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    path = STATE / "constraints.txt"
    replace(path, "".join(f"{one}\n" for one in lines if one.partition("==")[0] not in dropped))
    return path


def announce(target: str, torch: str, torch_index: str) -> None:
    """Say what will be downloaded, and how much that is, before it is."""
    pin, done = pins()["torch"], stamp().get("target")
    if torch:
        say(f"torch {torch} is here and will be used")
    elif torch_index:
        say(f"torch from {torch_index}: about 200 MB for a CPU build, 2 to 3 GB for CUDA or ROCm")
    elif sys.platform == "linux":
        say(
            f"torch {pin}: up to 3 GB from PyPI, with its CUDA libraries; about 200 MB with "
            "TORCH_INDEX=https://download.pytorch.org/whl/cpu"
        )
    else:
        say(f"torch {pin}: about 120 MB")
    sizes = [] if done else ["core packages about 60 MB"]
    sizes += ["dev extras up to 300 MB"] if target == "dev" and done != "dev" else []
    say(", ".join(sizes or ["bringing .venv up to date"]) + "; what pip has cached is reused")


def install(target: str, options: argparse.Namespace, held: "IO[str]") -> None:
    """Bring .venv to `target` and record it."""
    torch_index = options.torch_index or stamp().get("torch_index", "")
    found = installed()
    torch = usable_torch(found)
    announce(target, torch, torch_index)
    keeps_torch = bool(torch or torch_index)
    if torch_index and not torch:
        # Its own step: this index serves torch and what torch needs, often in other versions than
        # constraints.txt, which the next step then puts right. An index for an older CUDA may end
        # before our pin.
        wanted = f"torch>={lower_bound('torch')},<={pins()['torch']}"
        arguments = ["--upgrade", wanted, "--index-url", torch_index]
        pip_into_venv(arguments, f"torch from {torch_index}", held)
        found = installed()
    package = "." if target == "core" else f".[{target}]"
    arguments = ["-e", package, "-c", str(own_constraints(found, keeps_torch))]
    pip_into_venv(arguments, f"flashgpt's {target} packages", held)
    record = {
        "target": target,
        "root": str(ROOT),
        "inputs": inputs_digest(),
        "venv_args": options.venv_args or stamp().get("venv_args", ""),
        "torch_index": torch_index,
    }
    replace(STAMP, json.dumps(record, indent=1) + "\n")


def set_up(target: str, options: argparse.Namespace) -> None:
    """Make or mend .venv until it holds `target`."""
    check_settings(options)
    if is_current(target):
        return
    if VENV.exists() and not STATE.exists() and not VENV_PYTHON.exists():
        raise SetupError(".venv is there but has no Python: remove it first (rm -rf .venv)")
    with locked() as held:
        if is_current(target):
            return
        broken = ""
        if MARK.exists():
            broken = "an earlier set-up was interrupted"
        elif stamp() and stamp().get("root") != str(ROOT):
            broken = "the checkout has moved"
        elif stamp() and not VENV_PYTHON.exists():
            broken = "the Python that made it is gone"
        if broken:
            say(f"{broken}: starting .venv anew")
            clear()
        if not VENV_PYTHON.exists():
            create(options.venv_args)
        if not any(VENV.glob("lib/python3*/site-packages/pip")):
            raise SetupError(".venv has no pip, another tool made it: remove it (rm -rf .venv)")
        install(target, options, held)
        say(f".venv is ready ({target} packages)")


def main() -> int:
    """Parse, run, and turn what went wrong into one line."""
    parser = argparse.ArgumentParser(description="Make .venv and install flashgpt into it.")
    parser.add_argument("target", choices=["core", "dev"])
    parser.add_argument("--python", default="", help="what the user gave as PYTHON=, for messages")
    parser.add_argument("--torch-index", default="", help="package index for torch alone")
    parser.add_argument("--venv-args", default="", help="options of `python -m venv`")
    options = parser.parse_args()
    try:
        check_interpreter()
        set_up(options.target, options)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; the next make mends .venv", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
