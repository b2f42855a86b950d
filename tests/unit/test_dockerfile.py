"""What the Dockerfile promises of the versions in its images, by its own commands."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import synthia_vllm

DOCKERFILE = (Path(__file__).parents[2] / "Dockerfile").read_text()
# The project, as a backend that has its wheel ready.
BACKEND = """
import shutil
def build_wheel(directory, config_settings=None, metadata_directory=None):
    return shutil.copy({wheel!r}, directory).rsplit("/", 1)[1]
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


def wheel(place: Path, name: str, version: str, requires: str = "") -> Path:
    """A wheel with nothing in it but what it requires."""
    file = place / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    contents = {
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
    return file


def installation(target: str) -> str:
    """The command by which the image of `target` gets its packages."""
    stage = DOCKERFILE.split(f" AS {target}\n")[1].split("\nFROM ")[0]
    [command] = re.findall(r"^RUN (export LC_ALL.*?[^\\])\n", stage, re.DOTALL | re.MULTILINE)
    return str(command)


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for the Python of the image."""
    place = tmp_path_factory.mktemp("image") / "venv"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    return place


@pytest.mark.parametrize(
    ("wants", "complaint"),
    [
        ("present>=1", ""),
        ("present>=2", "lacking 2 has requirement present>=2, but you have present 1."),
        ("missing", "lacking 2 requires missing, which is not installed."),
    ],
)
def test_what_the_gpu_image_has_stays_as_it_is(
    tmp_path: Path, venv: Path, wants: str, complaint: str
) -> None:
    """What it lacks is installed as it is locked, and the build fails where that does not fit."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    present, lacking = wheel(shelf, "present", "1"), wheel(shelf, "lacking", "2", wants)
    newer, project = wheel(shelf, "present", "2"), wheel(tmp_path, "server", "1", "lacking==2")
    lock = tmp_path / "requirements" / "gpu.txt"
    lock.parent.mkdir()
    for name, file in {"lacking==2": lacking, "present==2": newer}.items():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        with lock.open("a") as lines:
            lines.write(f"{name} ; python_version > '3' \\\n    --hash=sha256:{digest}\n")
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "backend.py").write_text(BACKEND.format(wheel=str(project)))
    environment = os.environ | {
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(shelf), "PIP_CONFIG_FILE": os.devnull,
    }  # fmt: skip

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-ec", command], env=environment, cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    run("python3 -m pip uninstall -y present lacking server")
    assert run(f"python3 -m pip install {present}").returncode == 0
    done = run(installation("gpu"))
    assert (done.returncode == 0) is (not complaint), done.stderr
    assert done.stdout.strip().endswith(complaint)
    has = run("python3 -m pip list --format=freeze").stdout.split()
    assert {"present==1", "lacking==2", "server==1"} <= {*has}


def test_labels() -> None:
    """The version in the images' labels is the one that is built."""
    assert {*re.findall(r"^ARG VERSION=(.*)", DOCKERFILE, re.MULTILINE)} == {
        synthia_vllm.__version__
    }
