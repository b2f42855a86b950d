"""Configuration: one merge, one validation, and errors that say where to look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from synthia_vllm import settings as module
from synthia_vllm.cli.main import main
from synthia_vllm.errors import StartupError
from synthia_vllm.settings import SYNTHIA, Settings, load, parse_assignment
from synthia_vllm.template.prompt import TREE_OF_THOUGHT

SHIPPED = Path(__file__).parents[2] / "config" / "server.yaml"


def keys(section: dict[str, Any], prefix: str = "") -> set[str]:
    """All dotted keys of a nested mapping."""
    found = set()
    for key, value in section.items():
        if isinstance(value, dict) and value:
            found |= keys(value, f"{prefix}{key}.")
        else:
            found.add(prefix + key)
    return found


def test_shipped_file_documents_every_key_with_its_default() -> None:
    """`config/server.yaml` has every key, each with the default it really has."""
    shipped = yaml.safe_load(SHIPPED.read_text())
    defaults = Settings().model_dump(mode="json")
    assert keys(shipped) == keys(defaults)
    assert load(SHIPPED, {}, []) == Settings()


def test_every_key_has_a_comment() -> None:
    """Above each key, or above the first of its group, stands a comment."""
    lines = SHIPPED.read_text().splitlines()
    for position, line in enumerate(lines):
        if line and not line.startswith((" ", "#")):
            above = position
            while lines[above - 1] and not lines[above - 1].startswith("#"):
                above -= 1
            assert lines[above - 1].startswith("#"), line


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    """Each source overrules the one before, key by key, also inside a section."""
    file = tmp_path / "c.yaml"
    file.write_text("port: 1\nhost: a\nsampling: {top_k: 1, top_p: 0.5}\nengine: {x: 1, y: 1}\n")
    merged = load(
        file,
        {"SYNTHIA_PORT": "2", "SYNTHIA_SAMPLING__TOP_K": "2", "SYNTHIA_ENGINE__Y": "2", "PATH": ""},
        [("--port 3", "port", 3), ("--engine z=3", "engine.z", 3)],
    )
    assert (merged.port, merged.host) == (3, "a")
    assert (merged.sampling.top_k, merged.sampling.top_p) == (2, 0.5)
    assert merged.engine == {"x": 1, "y": 2, "z": 3}


def test_print_config_round_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `--print-config` shows is a configuration file that means the same."""
    assert main(["serve", "--print-config", "--port", "8123", "--set", "sampling.top_k=7"]) == 0
    shown = capsys.readouterr().out
    file = tmp_path / "c.yaml"
    file.write_text(shown)
    again = load(file, {}, [])
    assert (again.port, again.sampling.top_k) == (8123, 7)


@pytest.mark.parametrize(
    ("content", "environ", "flags", "named"),
    [
        ("prot: 1", {}, [], ["c.yaml", "'prot'", "port"]),
        ("sampling: {topk: 1}", {}, [], ["c.yaml", "'sampling.topk'", "top_k"]),
        ("port: 70000", {}, [], ["c.yaml", "port", "65535", "70000"]),
        ("sampling: 5", {}, [], ["c.yaml", "sampling", "5"]),
        ("format: fancy", {}, [], ["c.yaml", "format", "documented", "fancy"]),
        ("- a", {}, [], ["c.yaml", "mapping"]),
        ("a: [", {}, [], ["c.yaml", "YAML"]),
        ("sampling: {temperature: .nan}", {}, [], ["temperature", "nan"]),
        ("", {"SYNTHIA_PROT": "1"}, [], ["SYNTHIA_PROT", "not a setting"]),
        ("", {"SYNTHIA_PORT": "tcp://10.0.0.1:80"}, [], ["SYNTHIA_PORT", "enableServiceLinks"]),
        ("", {"SYNTHIA_SAMPLING__TOP_P": "2"}, [], ["SYNTHIA_SAMPLING__TOP_P", "top_p", "2"]),
        ("", {}, [("--overflow x", "overflow", "x")], ["--overflow x", "drop-oldest", "'x'"]),
        ("", {}, [("--set port.a=1", "port.a", 1)], ["--set port.a=1", "port"]),
    ],
)
def test_errors_name_key_value_and_source(
    tmp_path: Path, content: str, environ: dict[str, str], flags: list[Any], named: list[str]
) -> None:
    """A wrong key or value is refused, naming what it is, where it is, and what would do."""
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(StartupError) as caught:
        load(file, environ, flags)
    for word in named:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        "http://u:sesame@valkey:6379/0",
        "valkey://u:sesame@valkey:port/0",
        "valkey://u:sesame@valkey:6379/zero",
        "valkey://:sesame/with/slashes@valkey:6379/0",
        "valkey://u:" + 80 * "sesame" + "@valkey:99999/0",
        "valkey://u:sesame@:6379",
        "valkey://u:sesame street@valkey:6379/0",
    ],
)
def test_no_password_is_shown(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither that of a right URL in the configuration, nor that of a wrong one in the error."""
    right = "valkeys://u:sesame@valkey:6379/0?ssl_ca_certs=/ca.pem"
    assert main(["serve", "--print-config", "--set", f"accounts={right}"]) == 0
    assert "accounts: valkeys://***@valkey:6379/0?ssl_ca_certs=/ca.pem" in capsys.readouterr().out
    settings = load(None, {"SYNTHIA_ACCOUNTS": right}, [])
    assert settings.accounts == right
    assert "sesame" not in repr(settings)
    assert main(["serve", "--set", f"accounts={wrong}"]) == 2
    told = capsys.readouterr()
    assert "Input should be valkey://host:port/number" in told.err
    assert "sesame" not in told.err + told.out


def test_missing_file_is_named() -> None:
    """A file that is not there is an error, not an empty configuration."""
    with pytest.raises(StartupError, match=r"no/such\.yaml"):
        load(Path("no/such.yaml"), {}, [])


def test_command_line_error_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with code 2 and one line on stderr, without a traceback."""
    assert main(["serve", "--print-config", "--set", "sampling.topk=1"]) == 2
    assert capsys.readouterr().err.startswith("synthia-vllm: --set sampling.topk=1: there is no")


def test_assignment_values_are_yaml() -> None:
    """Numbers, lists and booleans can be written in KEY=VALUE; dashes may stand for underscores."""
    assert parse_assignment("max-num-seqs=8") == ("max_num_seqs", 8)
    assert parse_assignment("a=[x, 1]") == ("a", ["x", 1])
    assert parse_assignment("a=b=c") == ("a", "b=c")
    with pytest.raises(StartupError, match="KEY=VALUE"):
        parse_assignment("a")


@pytest.mark.parametrize(("gpu", "model"), [(True, SYNTHIA), (False, "demo")])
def test_default_model(monkeypatch: pytest.MonkeyPatch, gpu: bool, model: str) -> None:
    """With a GPU the default is Synthia itself, without one the demo model."""
    monkeypatch.setattr(module, "gpu_present", lambda: gpu)
    assert Settings().resolved_model == model


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model": SYNTHIA}, ["Synthia-7B-v3.0", "Synthia-7B-v3.0-tot"]),
        ({"model": "demo"}, ["synthia-demo", "synthia-demo-tot"]),
        ({"model": "/models/mine/"}, ["mine", "mine-tot"]),
        ({"model": "demo", "served_name": "s"}, ["s", "s-tot"]),
    ],
)
def test_served_names(changes: dict[str, str], names: list[str]) -> None:
    """Two names are served: the model's, and with ``-tot`` the same with the card's preset."""
    served = Settings(**changes).served
    assert list(served.values()) == [None, TREE_OF_THOUGHT]
    assert list(served) == names


def test_preset_applies_to_the_plain_name() -> None:
    """With `preset: tree-of-thought` the plain name has it too."""
    assert set(Settings(model="demo", preset="tree-of-thought").served.values()) == {
        TREE_OF_THOUGHT
    }


def test_a_key_file_parts_the_prefix_cache(tmp_path: Path) -> None:
    """Unless it is said otherwise, users with keys do not share it, and a server of all does."""
    keys = tmp_path / "keys.yaml"
    assert not Settings().cache_per_user
    assert Settings(keys_file=keys).cache_per_user
    assert not Settings(keys_file=keys, prefix_cache="shared").cache_per_user
    assert Settings(prefix_cache="per-user").cache_per_user
