"""The set-up behind the Makefile: what it installs, when it does not, and its one-line errors.

No network. Most tests give tools/setup_venv.py a .venv whose Python is a shell script, so that
"pip" does what the test says; one test makes a real .venv and lets the real pip fail.

    pytest tests/test_setup.py
"""

import argparse
import ast
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"

# `-c` answers what is installed; `-m pip install` notes its arguments and runs the test's script.
FAKE_PYTHON = """\
#!/bin/sh
here={here}
if [ "$1" = -c ]; then cat "$here/installed.json"; exit; fi
echo "$*" >> "$here/calls"
. "$here/pip.sh"
"""


def load(path: Path) -> ModuleType:
    """Import a script by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Checkout:
    """A copy of what the set-up reads, in a folder of its own, and a fake Python for its .venv."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "check out"
        self.root.mkdir()
        shutil.copytree(ROOT / "tools", self.root / "tools")
        for name in ("pyproject.toml", "constraints.txt", "Makefile"):
            shutil.copy(ROOT / name, self.root)
        self.fake = folder / "fake"
        self.fake.mkdir()
        self.tool = load(self.root / "tools" / "setup_venv.py")
        self.pip_does("exit 0")
        self.has({})

    def pip_does(self, script: str) -> None:
        """Set the shell script that stands for pip; its arguments are pip's."""
        (self.fake / "pip.sh").write_text(script)

    def has(self, installed: dict[str, tuple[str, str]]) -> None:
        """Set what the fake Python finds installed: package -> (version, place)."""
        (self.fake / "installed.json").write_text(json.dumps(installed))

    def calls(self) -> list[str]:
        """The pip commands so far."""
        path = self.fake / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def make_venv(self, venv_args: str = "", version: str = f"{HERE}.0") -> None:
        """Stand in for `python -m venv`."""
        venv = self.root / ".venv"
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "lib" / f"python{HERE}" / "site-packages" / "pip").mkdir(parents=True)
        python = venv / "bin" / "python"
        python.write_text(FAKE_PYTHON.format(here=f"'{self.fake}'"))
        python.chmod(0o755)
        shared = str("--system-site-packages" in venv_args).lower()
        (venv / "pyvenv.cfg").write_text(
            f"include-system-site-packages = {shared}\nversion = {version}\n"
        )

    def set_up(self, target: str = "core", **settings: str) -> None:
        """Run the set-up in this process, with the fake `python -m venv`."""
        given = {"python": "", "torch_index": "", "venv_args": "", **settings}
        vars(self.tool)["create"] = self.make_venv
        self.tool.set_up(target, argparse.Namespace(**given))

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the checkout; pip sees no network and no setting of this machine."""
        ours = re.compile("PIP_|MAKE|MFLAGS|PYTHON|TORCH_INDEX|VENV_ARGS|PYTEST_ARGS")
        kept = {name: value for name, value in os.environ.items() if not ours.match(name)}
        offline = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
            "PIP_RETRIES": "1",
            "NO_PROXY": "*",
        }
        return subprocess.run(
            command,
            cwd=self.root,
            env={**kept, **offline, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def make(checkout: Checkout, *arguments: str) -> list[str]:
    """What a failing make says on stderr, without make's own lines."""
    result = checkout.run("make", *arguments)
    assert result.returncode != 0
    return [line for line in result.stderr.splitlines() if not line.startswith("make")]


def python_where(folder: Path, statement: str) -> str:
    """An interpreter on which `statement` has run before the script it is given."""
    (folder / "sitecustomize.py").write_text(f"import sys\n{statement}\n")
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return str(path)


# ---- one-line errors -----------------------------------------------------------------------------

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@needs_make
@pytest.mark.parametrize("target", ["demo", "lock"])
def test_old_python_is_named(checkout: Checkout, tmp_path: Path, target: str) -> None:
    old = python_where(tmp_path, "sys.version_info = (3, 9, 2)")
    (line,) = make(checkout, target, f"PYTHON={old}")
    assert line.startswith("setup: flashgpt needs Python 3.11 or newer")
    assert "is 3.9.2" in line
    assert "PYTHON=" in line


@needs_make
def test_missing_ensurepip_names_the_debian_package(checkout: Checkout, tmp_path: Path) -> None:
    bare = python_where(tmp_path, "sys.modules['ensurepip'] = None")
    (line,) = make(checkout, "demo", f"PYTHON={bare}")
    assert "has no module ensurepip" in line
    assert f"apt install python{HERE}-venv" in line


@needs_make
def test_no_python_at_all(checkout: Checkout) -> None:
    (line,) = make(checkout, "demo", "PYTHON=no-such-python")
    assert line.startswith("setup: no no-such-python here")


@needs_make
def test_unreachable_index_is_one_line_and_the_log_exists(checkout: Checkout) -> None:
    # The real venv and the real pip. A folder name with a space comes for free.
    (line,) = make(checkout, "demo", f"PYTHON={sys.executable}")
    assert "no network" in line
    log = re.search(r"\(pip's log: (.+)\)$", line)
    assert log
    assert "127.0.0.1:9" in Path(log.group(1)).read_text()
    # Nothing was installed, so the next attempt goes on with this .venv.
    assert not checkout.tool.MARK.exists()


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("... NewConnectionError(...): No matching distribution found for x", "no network"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        (
            "ERROR: No matching distribution found for torch==9.9",
            f"no torch==9.9 for Python {HERE}",
        ),
        ("ERROR: first\nERROR: ResolutionImpossible: last", "ResolutionImpossible: last"),
        ("", "pip failed"),
    ],
)
def test_cause_found_in_pips_log(checkout: Checkout, log: str, expected: str) -> None:
    line = checkout.tool.failure(log, "torch")
    assert expected in line
    assert "\n" not in line


def test_failed_venv_says_why(checkout: Checkout) -> None:
    checkout.tool.STATE.mkdir(parents=True)
    with pytest.raises(checkout.tool.SetupError, match=r"could not make .venv: .*--nonsense"):
        checkout.tool.create("--nonsense")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"python": "python3.99"}, "PYTHON=python3.99 is"),
        ({"venv_args": "--system-site-packages"}, "VENV_ARGS=--system-site-packages differs"),
        ({"torch_index": "https://other"}, "TORCH_INDEX=https://other is not where"),
    ],
)
def test_setting_that_cannot_take_effect(
    checkout: Checkout, settings: dict[str, str], expected: str
) -> None:
    checkout.set_up()
    cfg = checkout.root / ".venv" / "pyvenv.cfg"
    if "python" in settings:
        cfg.write_text("version = 3.98.0\n")
    with pytest.raises(checkout.tool.SetupError, match=re.escape(expected)):
        checkout.set_up(**settings)


def test_a_venv_of_an_older_python(checkout: Checkout) -> None:
    checkout.make_venv(version="3.10.4")
    with pytest.raises(checkout.tool.SetupError, match=r"made by Python 3\.10\.4"):
        checkout.set_up()


def test_a_venv_that_another_tool_made_is_not_emptied(checkout: Checkout) -> None:
    (checkout.root / ".venv").mkdir()
    (checkout.root / ".venv" / "precious").touch()
    with pytest.raises(checkout.tool.SetupError, match="no Python"):
        checkout.set_up()
    assert (checkout.root / ".venv" / "precious").exists()


# ---- when it installs ----------------------------------------------------------------------------


def test_second_call_installs_nothing(checkout: Checkout) -> None:
    checkout.set_up()
    checkout.set_up()
    (call,) = checkout.calls()
    assert call.startswith("-m pip install")
    assert "-e . -c" in call


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_inputs_install_again(checkout: Checkout, name: str) -> None:
    checkout.set_up()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    checkout.set_up()
    assert len(checkout.calls()) == 2


def test_dev_covers_core_but_not_the_reverse(checkout: Checkout) -> None:
    checkout.set_up("core")
    checkout.set_up("dev")
    checkout.set_up("core")
    assert ["-e .[dev] " in call for call in checkout.calls()] == [False, True]


def test_moved_checkout_starts_anew(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    checkout.set_up()
    record = json.loads(checkout.tool.STAMP.read_text())
    checkout.tool.STAMP.write_text(json.dumps({**record, "root": "/elsewhere"}))
    checkout.set_up()
    assert "the checkout has moved" in capsys.readouterr().out
    assert len(checkout.calls()) == 2


def test_killed_install_starts_anew(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    checkout.make_venv()
    checkout.pip_does("touch .venv/half-written; kill -9 $PPID")
    result = checkout.run(sys.executable, "tools/setup_venv.py", "core")
    assert result.returncode == -9
    assert (checkout.root / ".venv" / "half-written").exists()
    checkout.pip_does("exit 0")
    checkout.set_up()
    assert "interrupted: starting .venv anew" in capsys.readouterr().out
    assert not (checkout.root / ".venv" / "half-written").exists()
    assert checkout.tool.is_current("core")


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("0,1   Installing collected packages: hatchling", True),
        ("0,1 Installing collected packages: torch", False),
    ],
)
def test_failed_download_keeps_the_venv_a_failed_install_does_not(
    checkout: Checkout, line: str, kept: bool
) -> None:
    checkout.pip_does(f"echo '{line}' > .venv/flashgpt-setup/pip.log; exit 1")
    with pytest.raises(checkout.tool.SetupError):
        checkout.set_up()
    assert checkout.tool.MARK.exists() is not kept


def test_two_set_ups_at_once_wait_for_each_other(checkout: Checkout) -> None:
    checkout.make_venv()
    checkout.tool.STATE.mkdir()
    with (checkout.tool.STATE / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = [sys.executable, "tools/setup_venv.py", "core"]
        second = subprocess.Popen(command, cwd=checkout.root, stdout=subprocess.PIPE, text=True)
        assert second.stdout
        assert "another set-up" in second.stdout.readline()
        assert not checkout.calls()
    second.communicate(timeout=30)
    assert second.returncode == 0
    assert len(checkout.calls()) == 1


# ---- which torch ---------------------------------------------------------------------------------


def test_sizes_are_announced_before_pip_runs(checkout: Checkout) -> None:
    checkout.make_venv()
    checkout.pip_does("echo 'ERROR: stop here' >&2; exit 1")
    result = checkout.run(sys.executable, "tools/setup_venv.py", "core")
    version = checkout.tool.pins()["torch"]
    assert re.search(rf"torch {re.escape(version)}: .*\b[MG]B", result.stdout)
    assert "stop here" in result.stderr


def test_torch_index_serves_torch_alone_and_first(checkout: Checkout) -> None:
    url = "https://index.invalid/cpu"
    checkout.pip_does("""echo '{"torch": ["2.10.0+cpu", ""]}' > "$here/installed.json" """)
    checkout.set_up(torch_index=url)
    first, second = checkout.calls()
    assert f"--index-url {url}" in first
    assert "-e ." not in first
    assert "--index-url" not in second
    # That index ended before our pin: the pin must not replace what was chosen.
    used = checkout.tool.STATE.joinpath("constraints.txt").read_text()
    assert not re.search("^(torch|triton)==", used, re.MULTILINE)
    assert re.search("^numpy==", used, re.MULTILINE)
    # A later set-up asks the same index again.
    checkout.set_up("dev")
    assert f"--index-url {url}" in checkout.calls()[2]


def test_shared_torch_is_reused(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    checkout.has({"torch": ("2.11.0+cu128", "/usr/lib"), "numpy": ("1.26.4", "/usr/lib")})
    checkout.set_up(venv_args="--system-site-packages")
    used = checkout.tool.STATE.joinpath("constraints.txt").read_text()
    assert not re.search("^(torch|triton|numpy)==", used, re.MULTILINE)
    assert "torch 2.11.0+cu128 is here" in capsys.readouterr().out
    assert len(used.splitlines()) == len(checkout.tool.CONSTRAINTS.read_text().splitlines()) - 3


def test_shared_torch_that_is_too_old(checkout: Checkout) -> None:
    checkout.has({"torch": ("2.6.0+cu124", "/opt/python")})
    with pytest.raises(checkout.tool.SetupError, match=r"torch 2\.6\.0\+cu124 in /opt/python"):
        checkout.set_up(venv_args="--system-site-packages")
    assert not checkout.calls()


def test_own_torch_follows_the_pin(checkout: Checkout) -> None:
    checkout.has({"torch": ("2.9.0", ""), "numpy": ("2.0.0", "")})
    checkout.set_up()
    used = checkout.tool.STATE.joinpath("constraints.txt").read_text()
    assert used == checkout.tool.CONSTRAINTS.read_text()


@pytest.mark.parametrize(
    ("version", "bound", "expected"),
    [
        ("2.13.0+cpu", "2.9", True),
        ("2.9.0", "2.9", True),
        ("2.10.0a0+b4e4ee8", "2.9", True),
        ("2.9.0a0+git1", "2.9", False),
        ("2.8.1", "2.9", False),
        ("1.26.4", "1.26", True),
    ],
)
def test_version_order(checkout: Checkout, version: str, bound: str, expected: bool) -> None:
    assert checkout.tool.satisfies(version, bound) is expected


# ---- the files themselves ------------------------------------------------------------------------


def test_set_up_parses_on_the_pythons_it_refuses() -> None:
    ast.parse((ROOT / "tools" / "setup_venv.py").read_text(), feature_version=(3, 6))


def test_every_requirement_is_pinned_within_its_bounds(checkout: Checkout) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = sum((extras[name] for name in extras if name != "fa4"), project["dependencies"])
    pinned = {name.lower(): version for name, version in checkout.tool.pins().items()}
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement
    assert not [version for version in pinned.values() if "+" in version]
    oldest = ".".join(map(str, checkout.tool.OLDEST_PYTHON))
    assert project["requires-python"] == f">={oldest}"


def test_lock_keeps_torch_and_its_triton_together(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    lock = load(ROOT / "tools" / "lock.py")
    for bound in map(Requirement, lock.BOUNDS):
        assert bound.specifier.contains(checkout.tool.pins()[bound.name])
    frozen = (
        "-e git+https://host/flashgpt@0#egg=flashgpt\nflashgpt==0.1.0\ntorch==2.13.0+cpu\n"
        "pip==23.2\nnvidia-nccl-cu13==2.29.7\nJinja2==3.1.6\n"
    )
    assert lock.pins(frozen) == {"torch": "2.13.0", "Jinja2": "3.1.6"}


@needs_make
def test_make_alone_names_every_target(checkout: Checkout) -> None:
    shown = checkout.run("make").stdout
    for target in ("demo", "test", "check", "venv", "lock"):
        assert f"make {target} " in shown
