"""scripts/setup and scripts/ffcv on machines that are missing something, played by a PATH of stand-ins."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = [
    "bash",
    "cat",
    "cksum",
    "cut",
    "df",
    "dirname",
    "du",
    "env",
    "flock",
    "grep",
    "id",
    "mkdir",
    "rm",
    "sleep",
    "tail",
    "tr",
    "uname",
    "touch",
    "chmod",
]


class Machine:
    """A checkout with the scripts of a set-up in it, and a PATH on which only `TOOLS` and the given stand-ins are."""

    def __init__(self, folder: Path):
        self.checkout, self.bin = folder / "checkout", folder / "bin"
        (self.checkout / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for script in ("setup", "steps", "ffcv", "fetch_pip.py"):
            shutil.copy(ROOT / "scripts" / script, self.checkout / "scripts" / script)
        for home in (".", "kernels", "loaders"):
            (self.checkout / home).mkdir(exist_ok=True)
            (self.checkout / home / "pyproject.toml").write_text("[project]\n")
        (self.checkout / "constraints.txt").write_text("torch==9.9.9\n")
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found or tool == "flock", tool
            if found:
                (self.bin / tool).symlink_to(found)

    def put(self, name: str, script: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def complete(self) -> None:
        """A Python whose venvs are stand-ins too, all that FFCV is built with, and an apt that must not be asked."""
        for name in ("gcc", "g++", "pkg-config"):
            self.put(name, "exit 0")
        for name in ("apt-get", "sudo"):
            self.put(name, f'touch "{self.checkout}/apt-was-asked"; exit 1')
        self.put(
            "python3",
            f"""
here="{self.checkout}"
if [ "$1 $2" = "-m venv" ]; then
  echo venv >>"$here/done"
  folder="${{@: -1}}"
  mkdir -p "$folder/bin"
  if [ "$3" != --without-pip ]; then printf '#!%s/.venv/bin/python\n' "$here" >"$folder/bin/pip"; fi
  cat >"$folder/bin/python" <<'END'
#!/bin/bash
here="{self.checkout}"
case "$*" in
  "-m pip"*)
    echo pip >>"$here/done"
    echo "$3" >>"$here/asked-of-pip"
    if [ -e "$here/no-network" ]; then echo "no route to the package index"; exit 1; fi
    case "$*" in *ffcv*) echo ffcv >>"$here/done" ;; esac
    ;;
  *.whl/pip" install"*)
    echo "$1" >>"$here/asked-of-pip"
    printf '#!%s/.venv/bin/python\n' "$here" >"$here/.venv/bin/pip"
    ;;
  *ImportWarning*) echo "torch 9.9.9 CUDA False" ;;
  *"import cv2, ffcv"*) exit 0 ;;
  *Python.h*) exit 0 ;; # the headers are not what is tested
  *) exec "{sys.executable}" "$@" ;;
esac
if [ -e "$here/.venv/bin/pip" ]; then chmod +x "$here/.venv/bin/pip"; fi
END
  chmod +x "$folder"/bin/*
  exit 0
fi
case "$*" in
  "-c import ensurepip") if [ -e "$here/no-ensurepip" ]; then exit 1; fi ;;
  scripts/fetch_pip.py*) echo ".setup/pip-1-py3-none-any.whl" ;;
  *) exec "{sys.executable}" "$@" ;;
esac
""",
        )

    def run(self, script: str = "setup", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.checkout / "scripts" / script)],
            env={"PATH": str(self.bin), "HOME": str(self.checkout), **environment},
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    def done(self) -> list[str]:
        path = self.checkout / "done"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def machine(tmp_path):
    if os.name != "posix" or shutil.which("bash") is None:
        pytest.skip("needs bash")
    return Machine(tmp_path)


def test_a_bare_machine_is_set_up_once_without_compiler_root_and_apt(machine):
    machine.complete()
    for name in ("gcc", "g++", "pkg-config"):
        (machine.bin / name).unlink()
    machine.put("id", "echo 1000")
    first = machine.run()
    assert first.returncode == 0, first.stderr
    assert "ready: torch 9.9.9" in first.stdout
    assert machine.done() == ["venv", "pip"]
    again = machine.run()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert machine.done() == ["venv", "pip"]
    assert not (machine.checkout / "apt-was-asked").exists()


def test_a_python_without_ensurepip_is_given_pip(machine):
    machine.complete()
    (machine.checkout / "no-ensurepip").touch()
    run = machine.run()
    assert run.returncode == 0, run.stderr
    assert "fetching pip, which this Python comes without" in run.stdout
    asked = (machine.checkout / "asked-of-pip").read_text().split()
    assert asked == [f"{machine.checkout}/.setup/pip-1-py3-none-any.whl/pip", "install"]
    assert machine.run().stdout == ""
    assert not (machine.checkout / "apt-was-asked").exists()


@pytest.mark.parametrize(
    "changed", ["pyproject.toml", "kernels/pyproject.toml", "loaders/pyproject.toml", "constraints.txt"]
)
def test_other_requirements_install_again_into_the_same_venv(machine, changed):
    machine.complete()
    machine.run()
    (machine.checkout / changed).write_text("[project]\nname = 'other'\n")
    assert machine.run().returncode == 0
    assert machine.done() == ["venv", "pip", "pip"]


def test_what_is_installed_is_uninstalled_before_files_move_between_distributions(machine):
    machine.complete()
    machine.run()
    (machine.checkout / ".venv/lib/python3.11/site-packages/fastpmae-0.0.9.dist-info").mkdir(parents=True)
    (machine.checkout / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert machine.run().returncode == 0
    assert (machine.checkout / "asked-of-pip").read_text().split() == ["install", "uninstall", "install"]


def test_a_failed_step_is_named_with_its_log_and_taken_up_again(machine):
    machine.complete()
    (machine.checkout / "no-network").touch()
    failed = machine.run()
    assert failed.returncode == 1
    assert "no route to the package index" in failed.stderr
    log = machine.checkout / ".setup/packages.log"
    assert "the step 'packages'" in failed.stderr
    assert str(log) in failed.stderr
    assert "no route" in log.read_text()
    (machine.checkout / "no-network").unlink()
    assert machine.run().returncode == 0
    assert machine.done() == ["venv", "pip", "pip"]


def test_a_disk_without_room_is_told_before_anything_is_installed(machine):
    machine.complete()
    machine.put("df", "echo Filesystem 1024-blocks Used Available; echo /dev/vda   252000000 246000000 6000000 98% /")
    full = machine.run()
    assert full.returncode == 1
    assert "6000 MB free, and .venv will take 8000 MB (torch with its CUDA libraries)" in full.stderr
    assert "another disk" in full.stderr
    assert machine.done() == []
    # what is there already counts: a set-up that is renewed needs no second 8 GB
    machine.put("du", r"printf '2500000\t.venv/\n'")
    assert machine.run().returncode == 0


@pytest.mark.parametrize("df", ["exit 1", "echo all is well on this disk"])
def test_a_df_that_tells_nothing_holds_nothing_up(machine, df):
    machine.complete()
    machine.put("df", df)
    assert machine.run().returncode == 0


def test_a_disk_that_fills_up_meanwhile_is_told(machine):
    machine.complete()
    machine.put("df", "echo /dev/vda 252000000 240000000 12000000 95% /")
    (machine.checkout / "no-network").touch()
    assert "a disk is full" not in machine.run().stderr
    python = machine.checkout / ".venv/bin/python"
    python.write_text(python.read_text().replace("no route to the package index", "[Errno 28] No space left on device"))
    full = machine.run(TMPDIR="/elsewhere")
    assert full.returncode == 1
    assert "a disk is full: .venv takes 8 GB here, and pip's downloads 4 GB more in /elsewhere" in full.stderr


def test_a_venv_that_was_cut_off_or_moved_is_made_anew(machine):
    machine.complete()
    (machine.checkout / ".venv/bin").mkdir(parents=True)
    run = machine.run()
    assert run.returncode == 0, run.stderr
    assert "making it anew" in run.stdout
    moved = machine.checkout.with_name("moved")
    machine.checkout.rename(moved)
    machine.checkout = moved
    machine.complete()
    assert "making it anew" in machine.run().stdout


def test_ffcv_is_added_to_the_same_venv_once(machine):
    machine.complete()
    too_early = machine.run("ffcv")
    assert too_early.returncode == 1
    assert "run make setup first" in too_early.stderr
    machine.run()
    assert machine.run("ffcv").returncode == 0
    assert machine.done() == ["venv", "pip", "pip", "ffcv"]
    again = machine.run("ffcv")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    (machine.checkout / "loaders/pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert machine.run().returncode == 0
    assert machine.run("ffcv").returncode == 0
    assert machine.done() == ["venv", "pip", "pip", "ffcv", "pip", "pip", "ffcv"]
    assert not (machine.checkout / "apt-was-asked").exists()


@pytest.mark.parametrize("built", [True, False])
def test_make_test_adds_ffcv_and_says_what_is_skipped_where_it_cannot(machine, built):
    """And `make train` and a plain `make setup` do not ask for it, `make setup FFCV=1` does."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    shutil.copy(ROOT / "Makefile", machine.checkout)
    for name in ("setup", "browser"):
        (machine.checkout / "scripts" / name).write_text("#!/bin/bash\n")
        (machine.checkout / "scripts" / name).chmod(0o755)
    (machine.checkout / "scripts/ffcv").write_text(f"#!/bin/bash\necho asked for ffcv\nexit {1 - built}\n")
    (machine.checkout / ".venv/bin").mkdir(parents=True)
    for name in ("python", "ruff", "pyright"):
        (machine.checkout / ".venv/bin" / name).write_text(f"#!/bin/bash\necho {name}\n")
        (machine.checkout / ".venv/bin" / name).chmod(0o755)
    (machine.bin / "make").symlink_to(make)

    def said(*words: str) -> tuple[int, str]:
        done = subprocess.run(
            [make, *words], cwd=machine.checkout, env={"PATH": f"{machine.bin}:/bin"}, text=True, capture_output=True
        )
        return done.returncode, done.stdout

    status, words = said("test")
    assert status == 0
    assert "asked for ffcv" in words
    assert words.rstrip().endswith("python")
    assert ("reader will be skipped" in words) == (not built)
    assert said("setup", "FFCV=1") == (0 if built else 2, "asked for ffcv\n")
    for asked in (["setup"], ["train"], ["setup", "FFCV=0"]):
        assert "asked for ffcv" not in said(*asked)[1]


def test_without_apt_the_message_names_what_to_install(machine):
    machine.complete()
    machine.run()
    (machine.bin / "apt-get").unlink()
    machine.put("pkg-config", "exit 1")
    run = machine.run("ffcv")
    assert run.returncode == 1
    for word in ("no apt", "libturbojpeg", "OpenCV", "dnf install", "pacman -S", "brew install"):
        assert word in run.stderr
    machine.put("uname", "echo Darwin")
    run = machine.run("ffcv")
    assert "brew install pkg-config jpeg-turbo opencv" in run.stderr
    assert "dnf" not in run.stderr
    machine.put("pkg-config", "exit 0")  # installed meanwhile
    assert machine.run("ffcv").returncode == 0


def test_without_root_and_sudo_the_message_is_the_command(machine):
    machine.complete()
    machine.run()
    (machine.bin / "sudo").unlink()
    machine.put("id", "echo 1000")
    machine.put("pkg-config", "exit 1")
    run = machine.run("ffcv")
    assert run.returncode == 1
    assert "apt-get install -y --no-install-recommends libturbojpeg0-dev libopencv-dev\n" in run.stderr
    assert not (machine.checkout / "apt-was-asked").exists()


def test_with_sudo_apt_installs_what_is_missing_and_nothing_else(machine):
    machine.complete()
    machine.run()
    machine.put("id", "echo 1000")
    machine.put("sudo", 'exec "$@"')
    machine.put("pkg-config", f'[ -e "{machine.checkout}/apt-was-asked" ] || [ "$2" != opencv4 -a "$2" != opencv ]')
    machine.put("apt-get", f'case "$*" in *install*) echo "$*" >"{machine.checkout}/apt-was-asked" ;; esac')
    run = machine.run("ffcv")
    assert run.returncode == 0, run.stderr
    assert (machine.checkout / "apt-was-asked").read_text().split()[-1] == "libopencv-dev"
    assert "libturbojpeg0-dev" not in (machine.checkout / "apt-was-asked").read_text()


def test_a_failing_apt_ends_it_with_its_last_lines(machine):
    machine.complete()
    machine.run()
    machine.put("id", "echo 0")
    machine.put("pkg-config", "exit 1")
    machine.put("apt-get", 'echo "E: Unable to locate package"; exit 100')
    run = machine.run("ffcv")
    assert run.returncode == 1
    assert "E: Unable to locate package" in run.stderr
    assert "the step 'apt-install'" in run.stderr
    assert "status 100" in run.stderr
    assert "ffcv" not in machine.done()


def test_python_missing_or_too_old_is_said(machine):
    machine.complete()
    (machine.bin / "python3").unlink()
    run = machine.run()
    assert run.returncode == 1
    assert "no Python 3.11 or newer" in run.stderr
    machine.put("python3.9", "echo 3.9")
    run = machine.run(PYTHON="python3.9")
    assert run.returncode == 1
    assert "python3.9 is Python 3.9, and fastpmae needs 3.11" in run.stderr
    run = machine.run(PYTHON="python4")
    assert run.returncode == 1
    assert "PYTHON=python4 does not run" in run.stderr


def test_an_older_python3_is_passed_over_for_a_newer_one(machine):
    machine.complete()
    (machine.bin / "python3").rename(machine.bin / "python3.12")
    machine.put("python3", "echo 3.9")
    run = machine.run()
    assert run.returncode == 0, run.stderr
