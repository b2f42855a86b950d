"""The server's configuration: file < environment < flags, merged once and validated once.

A key that does not exist, or a value that does not fit, is an error that names it and where it
came from, before anything starts. Every key is documented in ``config/server.yaml``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from synthia_vllm.errors import StartupError, without_password
from synthia_vllm.ledger import place
from synthia_vllm.template.formats import FORMATS, PromptFormat
from synthia_vllm.template.prompt import PRESETS, Markers, Preset

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ENV_PREFIX: Final = "SYNTHIA_"
SYNTHIA: Final = "migtissera/Synthia-7B-v3.0"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SamplingDefaults(_Section):
    """What a request gets that does not ask for something else. The defaults are the card's."""

    temperature: float = Field(0.75, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(50, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    max_tokens: int = Field(1024, ge=1)


class Limits(_Section):
    """Bounds on what one request, one connection, and all of them together may take."""

    max_body_bytes: int = Field(512 * 1024, ge=1024)
    max_n: int = Field(16, ge=1, le=128)
    max_scored_tokens: int = Field(4096, ge=0)
    max_requests: int = Field(1024, ge=1)
    max_queue_seconds: float = Field(30.0, gt=0)
    request_seconds: float = Field(600.0, gt=0)
    max_header_bytes: int = Field(32 * 1024, ge=1024)
    max_connections: int = Field(4096, ge=1)
    receive_seconds: float = Field(30.0, gt=0)
    stalled_seconds: float = Field(30.0, gt=0)


class Transcript(_Section):
    """Whether and how conversations are kept on disk."""

    directory: Path | None = None
    max_bytes: int = Field(100 * 1024 * 1024, ge=4096)
    keep: int = Field(10, ge=1)
    fsync: Literal["never", "always"] = "never"


class Batches(_Section):
    """Whether and how files of requests are answered in the time that users leave."""

    directory: Path | None = None
    max_file_bytes: int = Field(200 * 1024 * 1024, ge=1024)
    max_stored_bytes: int = Field(2 * 1024**3, ge=1024)
    keep_days: float = Field(30.0, gt=0)
    beside_users: float = Field(0.25, ge=0, le=1)


def _valkey_url(url: str) -> str:
    try:
        address = urlsplit(url)
        valid = (
            address.scheme in ("valkey", "valkeys", "redis", "rediss")
            and bool(address.hostname)
            and address.port != 0
            and re.fullmatch(r"/?\d*", address.path)
            and not re.search(r"\s", url)  # as it could not be told from a password's end
        )
    except ValueError:
        valid = False
    if not valid:
        raise PydanticCustomError(
            "valkey_url",
            "Input should be valkey://host:port/number (valkeys with TLS), with user:password@ in"
            " front of the host if one is asked for",
        )
    return url


def _known_format(name: str) -> str:
    if name not in FORMATS:
        names = " or ".join(map(repr, FORMATS))
        raise PydanticCustomError("unknown_format", "Input should be {names}", {"names": names})
    return name


def _known_ledger(setting: str) -> str:
    try:
        place.shown(setting)
    except ValueError as error:
        raise PydanticCustomError(
            "unknown_ledger", "The ledger {problem}", {"problem": str(error)}
        ) from None
    return setting


class Settings(_Section):
    """All of the configuration, immutable."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_workers: int = Field(1, ge=1, le=64)
    model: str = Field("auto", min_length=1)
    served_name: str | None = Field(None, min_length=1, pattern=r"^[^\s/][^\s]*$")
    preset: Literal["none", "tree-of-thought"] = "none"
    format: Annotated[str, AfterValidator(_known_format)] = "documented"
    markers: Markers = Markers.ESCAPE
    overflow: Literal["error", "drop-oldest"] = "error"
    unknown_fields: Literal["say", "refuse"] = "say"
    tools: Literal["refuse", "ignore"] = "refuse"
    answer_reserve: int = Field(256, ge=1)
    sampling: SamplingDefaults = SamplingDefaults()
    keys_file: Path | None = None
    accounts: (
        Annotated[
            str,
            AfterValidator(_valkey_url),
            PlainSerializer(without_password, when_used="json"),
        ]
        | None
    ) = Field(None, repr=False)
    prefix_cache: Literal["auto", "per-user", "shared"] = "auto"
    discovery: Literal["key", "open"] = "key"
    metrics: Literal["open", "key", "off"] = "open"
    limits: Limits = Limits()
    page: bool = True
    cors_origins: tuple[str, ...] = ()
    keepalive_seconds: float = Field(3900.0, gt=0)
    sse_keepalive_seconds: float = Field(0.0, ge=0)
    stream_pace_ms: float = Field(20.0, ge=0, le=1000)
    transcripts: Transcript = Transcript()
    batches: Batches = Batches()
    ledger: Annotated[
        str,
        AfterValidator(_known_ledger),
        PlainSerializer(place.shown, when_used="json"),
    ] = Field(place.DEFAULT, repr=False)
    shutdown_delay_seconds: float = Field(0.0, ge=0)
    shutdown_grace_seconds: float = Field(30.0, ge=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["human", "json"] = "human"
    log_content: bool = False
    engine: dict[str, Any] = Field(default_factory=dict)

    @property
    def traces(self) -> bool:
        """Whether requests are traced: where to is an option of the engine's."""
        return bool(self.engine.get("otlp_traces_endpoint"))

    @property
    def cache_per_user(self) -> bool:
        """Whether no user finds in the prefix cache what another has sent."""
        if self.prefix_cache == "auto":
            return self.keys_file is not None
        return self.prefix_cache == "per-user"

    @property
    def refuse_unknown(self) -> bool:
        """Whether a field of a request that is not known is an error."""
        return self.unknown_fields == "refuse"

    @property
    def prompt_format(self) -> PromptFormat:
        """How conversations are written."""
        return FORMATS[self.format]

    @property
    def resolved_model(self) -> str:
        """``demo``, a hub name or a directory: `model` with ``auto`` decided by the machine."""
        if self.model != "auto":
            return self.model
        return SYNTHIA if gpu_present() else "demo"

    @property
    def base_name(self) -> str:
        """The model name clients use for the plain model, without a preset."""
        if self.served_name is not None:
            return self.served_name
        if self.resolved_model == "demo":
            return "synthia-demo"
        return Path(self.resolved_model).name or self.resolved_model

    @property
    def served(self) -> dict[str, Preset | None]:
        """Every model name a client can ask for, with the preset it stands for."""
        names: dict[str, Preset | None] = {self.base_name: PRESETS.get(self.preset)}
        for preset in PRESETS.values():
            names[f"{self.base_name}-{preset.suffix}"] = preset
        return names

    def to_yaml(self) -> str:
        """The configuration as a file that loads to the same, but for a password in it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def gpu_present() -> bool:
    """Whether this machine (or container) shows an NVIDIA GPU."""
    return any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "nvidia0", "dxg"))


def load(
    file: Path | None, environ: Mapping[str, str], flags: Sequence[tuple[str, str, Any]]
) -> Settings:
    """Merge and validate.

    `flags` are (what the user typed, dotted key, value). Raises `StartupError`, which names the
    key, the value and the source.
    """
    merged: dict[str, Any] = {}
    source_of: dict[str, str] = {}

    def put(key: str, value: Any, source: str) -> None:
        """Set the dotted `key`; a mapping is merged key by key."""
        if isinstance(value, dict) and key != "":
            for inner, inner_value in value.items():
                put(f"{key}.{inner}", inner_value, source)
            if value:
                return
        *parents, last = key.split(".")
        place = merged
        for parent in parents:
            inner_place = place.setdefault(parent, {})
            if not isinstance(inner_place, dict):
                raise StartupError(f"{source}: {key}: {parent} is not a section.")
            place = inner_place
        place[last] = value
        source_of[key] = source

    if file is not None:
        for key, value in _read(file).items():
            if not isinstance(key, str):
                raise StartupError(f"{file}: {key!r} is not a key; keys are words.")
            put(key, value, str(file))
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and environ[name].strip():
            put(_env_key(name, environ[name]), _scalar(environ[name], name), name)
    for typed, key, value in flags:
        put(key, value, typed)

    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise StartupError(_explain(error, source_of)) from None


def _read(file: Path) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(
            f"Cannot read the configuration file {file}: {error.strerror}."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = place.without_addresses(str(error))
        raise StartupError(f"The configuration file {file} is not valid YAML: {told}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise StartupError(f"The configuration file {file} must be a mapping of keys to values.")
    return content


def _env_key(name: str, value: str) -> str:
    """``SYNTHIA_SAMPLING__TOP_K`` -> ``sampling.top_k``."""
    key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
    if key.split(".")[0] not in Settings.model_fields or ("://" in value and key == "port"):
        raise StartupError(
            f"The environment variable {name} is not a setting of this server. "
            "If Kubernetes put it there for a Service, set `enableServiceLinks: false` in the pod."
        )
    return key


def _scalar(text: str, source: str) -> Any:
    """A value from the environment or a flag: YAML, so numbers and lists can be written."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        told = place.without_addresses(f"{text!r} is not a valid value: {error}")
        raise StartupError(f"{source}: {told}") from error


def parse_assignment(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` as given to ``--set`` and ``--engine``. Raises `StartupError`."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise StartupError(f"{text!r} must have the form KEY=VALUE.")
    return key.strip().replace("-", "_"), _scalar(value, key)


def _explain(error: ValidationError, source_of: Mapping[str, str]) -> str:
    """One line for each wrong key: where it came from, what is wrong, what it was."""
    lines = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        source = next(
            (
                source_of[place]
                for place in sorted(source_of, key=len, reverse=True)
                if place == key or place.startswith(key + ".") or key.startswith(place + ".")
            ),
            "the configuration",
        )
        if problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"][:-1])
            lines.append(f"{source}: there is no key {key!r}. Keys here: {', '.join(known)}.")
        else:
            value = problem["input"]
            shown = "nan" if isinstance(value, float) and math.isnan(value) else repr(value)
            shown = place.without_addresses(shown)[:80]
            lines.append(f"{source}: {key}: {problem['msg']}, but it is {shown}.")
    return "\n".join(lines)


def _known_keys(section: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] = Settings
    for name in section:
        annotation = model.model_fields[str(name)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)
