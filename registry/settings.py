"""The settings: defaults < hardware profile < modelkeep.toml < environment MODELKEEP_*, each value with its source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from registry import layers, profiles
from registry.access import ClientSection, SecuritySection, ServerSection
from registry.aliases import Alias
from registry.errors import SettingsError, UsageError
from registry.layers import FILE_NAME, Layer
from registry.names import check_name
from registry.policy import PromotionPolicy
from registry.profiles import Profile
from registry.redaction import HIDDEN, redact
from registry.sections import (
    AlertsSection,
    BackupSection,
    CacheSection,
    CaptureSection,
    Database,
    DatabaseSection,
    Entry,
    Files,
    GpuSection,
    HealthSection,
    LoggingSection,
    ModelPolicy,
    ModelsSection,
    MonitoringSection,
    PerformanceSection,
    PrefectSection,
    QueuesSection,
    TextSection,
    VectorsSection,
    check_database_url,
    check_redis_url,
    check_url,
    number_not_bool,
)

DEFAULT_HOME = Path("~/.modelkeep")

_LAYERS: ContextVar[tuple[Layer, ...]] = ContextVar("_LAYERS", default=())


class LayerSource(PydanticBaseSettingsSource):
    """One layer, as pydantic-settings merges them. What it holds was read and checked before."""

    def __init__(self, settings_cls: type[BaseSettings], layer: Layer) -> None:
        super().__init__(settings_cls)
        self.layer = layer

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self.layer.values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self.layer.values


class Settings(BaseSettings):
    """Made by `load_settings`. Made directly it holds the defaults and what it is given, nothing of the environment.

    A relative path is relative to `home`, from wherever a command is started; `home` itself is relative to the working
    directory, or to the modelkeep.toml that sets it.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    home: Path = Field(DEFAULT_HOME, description="Where modelkeep keeps its own files.")
    database_url: str = Field(
        default_factory=lambda data: f"sqlite:///{data['home']}/registry.db",
        repr=False,
        description="The registry's database.",
    )
    artifacts: str = Field("artifacts", description="The artifact store: a directory or s3://bucket/prefix.")
    backups: list[str] = Field(default=["backups"], description="Where backups go: directories and s3:// URLs.")
    s3_endpoint_url: str | None = Field(default=None, repr=False, description="An S3 server other than Amazon's.")
    redis_url: str | None = Field(default=None, repr=False, description="Shared cache; absent: in the process only.")
    chroma: str | None = Field(default=None, repr=False, description="Path or URL of a Chroma vector store.")
    backup_key_file: Path | None = Field(default=None, description="File with the key that backups are encrypted with.")
    api_key: SecretStr | None = Field(
        default=None, description="The API key that commands act by; absent: the system's user."
    )
    api_key_file: Path | None = Field(default=None, description="File with that key.")
    environment: str = Field("production", description="The environment that this server serves.")
    profile: str = Field("auto", description="auto, or one of: " + ", ".join(profiles.PROFILES))
    servers: list[str] = Field(default=["http://127.0.0.1:8000"], description="Servers to reach without the registry.")
    lease_seconds: float = Field(30.0, gt=0, description="A lease has expired when its heartbeat stands still so long.")
    poll_seconds: float = Field(1.0, gt=0, description="How often a server asks for the generation.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"

    server: ServerSection = ServerSection()
    client: ClientSection = ClientSection()
    gpu: GpuSection = GpuSection()
    models: ModelsSection = ModelsSection()
    performance: PerformanceSection = PerformanceSection()
    database: DatabaseSection = DatabaseSection()
    prefect: PrefectSection = PrefectSection()
    promotion: PromotionPolicy = PromotionPolicy()
    policies: list[ModelPolicy] = []
    monitoring: MonitoringSection = MonitoringSection()
    logging: LoggingSection = LoggingSection()
    alerts: AlertsSection = AlertsSection()
    security: SecuritySection = SecuritySection()
    health: HealthSection = HealthSection()
    capture: CaptureSection = CaptureSection()
    cache: CacheSection = CacheSection()
    text: TextSection = TextSection()
    backup: BackupSection = BackupSection()
    databases: list[Database] = []
    vectors: VectorsSection = VectorsSection()
    queues: QueuesSection = QueuesSection()
    files: list[Files] = []
    aliases: list[Alias] = []

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _hardware: Profile | None = PrivateAttr(default=None)
    _config: Path | None = PrivateAttr(default=None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, *(LayerSource(settings_cls, layer) for layer in _LAYERS.get()))

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation if info.field_name else None
        entry = layers.entry_of(annotation)
        if entry is not None and entry.KEY is not None and isinstance(value, Mapping):
            return [{entry.KEY: key, **item} if isinstance(item, Mapping) else item for key, item in value.items()]
        number_not_bool(annotation, value)
        return value

    @field_validator("home")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return expand(value, Path.cwd())

    @field_validator("database_url")
    @classmethod
    def _database_url(cls, value: str, info: ValidationInfo) -> str:
        if "home" in info.data and value.startswith("sqlite:///"):
            path, mark, query = value.removeprefix("sqlite:///").partition("?")
            if path and path != ":memory:":
                value = f"sqlite:///{expand(Path(path), info.data['home'])}{mark}{query}"
        return check_database_url(value)

    @field_validator("artifacts", "backups", "chroma")
    @classmethod
    def _places(cls, value: str | list[str] | None, info: ValidationInfo) -> str | list[str] | None:
        home = info.data.get("home", Path.cwd())
        schemes = ("http", "https") if info.field_name == "chroma" else ("s3",)
        if isinstance(value, list):
            if not value:
                raise ValueError("name at least one place")
            return [_place(item, home, schemes) for item in value]
        return value if value is None else _place(value, home, schemes)

    @field_validator("s3_endpoint_url", "redis_url")
    @classmethod
    def _urls(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None or info.field_name == "redis_url":
            return value if value is None else check_redis_url(value)
        return check_url(value, ("http", "https"), "http://127.0.0.1:9000")

    @field_validator("backup_key_file", "api_key_file")
    @classmethod
    def _key_file(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.field_name == "api_key_file" and info.data.get("api_key") is not None:
            raise ValueError("api_key and api_key_file are both set: leave one of them out")
        return value if value is None else expand(value, info.data.get("home", Path.cwd()))

    @field_validator("environment")
    @classmethod
    def _environment(cls, value: str) -> str:
        try:
            return check_name(value, "name of an environment")
        except UsageError as error:
            raise ValueError(str(error)) from error

    @field_validator("profile")
    @classmethod
    def _profile(cls, value: str) -> str:
        if value != "auto" and value not in profiles.PROFILES:
            meant = layers.nearest(value, ["auto", *profiles.PROFILES])
            hint = f"; did you mean {meant!r}?" if meant else ""
            raise ValueError(f"there are auto, {', '.join(profiles.PROFILES)}{hint}")
        return value

    @field_validator("servers")
    @classmethod
    def _servers(cls, value: list[str]) -> list[str]:
        return [check_url(item, ("http", "https"), "http://127.0.0.1:8000").rstrip("/") for item in value]

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("server", "client", "logging")
    @classmethod
    def _paths(cls, value: BaseModel, info: ValidationInfo) -> BaseModel:
        home = info.data.get("home", Path.cwd())
        return value.model_copy(update={name: expand(path, home) for name, path in value if isinstance(path, Path)})

    @field_validator("vectors")
    @classmethod
    def _vector_store(cls, value: VectorsSection, info: ValidationInfo) -> VectorsSection:
        if value.url is None:
            return value
        home = info.data.get("home", Path.cwd())
        return value.model_copy(update={"url": _place(value.url, home, ("http", "https"))})

    @field_validator("databases")
    @classmethod
    def _password_files(cls, value: list[Database], info: ValidationInfo) -> list[Database]:
        home = info.data.get("home", Path.cwd())
        return [
            item.model_copy(update={"password_file": expand(item.password_file, home)}) if item.password_file else item
            for item in value
        ]

    @field_validator("files")
    @classmethod
    def _folders(cls, value: list[Files], info: ValidationInfo) -> list[Files]:
        home = info.data.get("home", Path.cwd())
        return [item.model_copy(update={"path": expand(item.path, home)}) for item in value]

    @property
    def hang_seconds(self) -> float:
        """`health.hang_seconds`, or what it is where nothing is given."""
        given = self.health.hang_seconds
        return 2 * self.server.request_timeout_seconds if given is None else given

    def load_hang_seconds(self, size_bytes: int) -> float:
        """How long a version with files of so many bytes may load: `health.load_hang_seconds`, or what it is where nothing is given."""
        given = self.health.load_hang_seconds
        return 600.0 + size_bytes / 20e6 if given is None else given

    @property
    def hardware(self) -> Profile:
        """The profile that `profile` came to; with `auto` what NVML said."""
        return self._hardware if self._hardware is not None else profiles.choose(self.profile, index=self.gpu.device)[0]

    @property
    def config_file(self) -> Path | None:
        """The modelkeep.toml that was read, if one was."""
        return self._config

    def source(self, key: str) -> str:
        """Where the value of a dotted key comes from; of a section, every source that has a part in it.

        Raises UsageError for a key that does not exist, with the nearest one that does.
        """
        rows = {layers.slug(row_key): row_source for row_key, _, row_source in self._rows()}
        wanted = layers.slug(key)
        if wanted in rows:
            return rows[wanted]
        inside = [found for row_key, found in rows.items() if row_key.startswith(wanted + ".")]
        if inside:
            return ", ".join(dict.fromkeys(inside))
        meant = layers.nearest(key, list(rows))
        raise UsageError(f"{key!r} is not a setting" + (f"; did you mean {meant!r}?" if meant else ""))

    def describe(self) -> list[dict[str, Any]]:
        """Every value as {"key", "value", "source"}, JSON-able, secrets hidden."""
        return [{"key": key, "value": value, "source": source} for key, value, source in self._rows()]

    def _rows(self) -> list[tuple[str, Any, str]]:
        rows: list[tuple[str, Any, str]] = []
        _flatten(self, "", "", self._sources, rows)
        return rows


def _flatten(
    model: BaseModel, prefix: str, lookup: str, sources: Mapping[str, str], rows: list[tuple[str, Any, str]]
) -> None:
    for name, info in type(model).model_fields.items():
        if isinstance(model, ModelPolicy) and name not in model.model_fields_set:
            continue  # it has what it changes, and nothing else
        value, entry = getattr(model, name), layers.entry_of(info.annotation)
        if isinstance(value, BaseModel):
            _flatten(value, f"{prefix}{name}.", f"{lookup}{name}.", sources, rows)
        elif entry is not None and entry.KEY is not None and value:
            for item in value:
                called = getattr(item, entry.KEY)
                _flatten(item, f"{prefix}{name}.{called}.", f"{lookup}{name}.{layers.slug(called)}.", sources, rows)
        else:
            rows.append((f"{prefix}{name}", _shown(value), sources.get(f"{lookup}{name}", "default")))


def _shown(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return HIDDEN
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    if isinstance(value, Entry):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        return {name: _shown(part) for name, part in fields.items() if part is not None}
    return value


def expand(path: Path, base: Path) -> Path:
    """Absolute, `~` expanded, relative to `base`; `.` and `..` folded without following links. Raises ValueError."""
    try:
        expanded = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error
    return Path(os.path.normpath(base / expanded))


def _place(value: str, home: Path, schemes: tuple[str, ...]) -> str:
    if "://" in value:
        return check_url(value, schemes, f"{schemes[0]}://name/path" if schemes == ("s3",) else "http://127.0.0.1:8001")
    if not value.strip():
        raise ValueError("is empty")
    return str(expand(Path(value), home))


def find_config(environ: Mapping[str, str], cwd: Path) -> Path | None:
    """modelkeep.toml of MODELKEEP_CONFIG, else the working directory, else MODELKEEP_HOME. Raises SettingsError."""
    if named := environ.get("MODELKEEP_CONFIG", "").strip():
        path = cwd / named
        if not path.is_file():
            raise SettingsError(f"MODELKEEP_CONFIG={named}: there is no such file; correct it or unset it")
        return path
    for folder in (cwd, home_of(environ, cwd)):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    return None


def home_of(environ: Mapping[str, str], cwd: Path) -> Path:
    """MODELKEEP_HOME, before any modelkeep.toml is read. Raises SettingsError."""
    try:
        return expand(Path(environ.get("MODELKEEP_HOME", "").strip() or DEFAULT_HOME), cwd)
    except ValueError as error:
        raise SettingsError(f"MODELKEEP_HOME={environ.get('MODELKEEP_HOME', '')}: {error}") from error


def load_settings(
    *, environ: Mapping[str, str] | None = None, config: Path | None = None, cwd: Path | None = None
) -> Settings:
    """The settings of this process. `config` names the modelkeep.toml to read instead of the usual ones.

    Raises SettingsError: every wrong value with its key and source, every unknown key with the nearest right one.
    """
    environ = os.environ if environ is None else environ
    cwd = Path.cwd() if cwd is None else cwd
    path = find_config(environ, cwd) if config is None else config
    if path is None:
        return build_settings(None, None, environ=environ, cwd=cwd)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{FILE_NAME} ({path}) cannot be read: {error}") from error
    return build_settings(path, text, environ=environ, cwd=cwd)


def build_settings(path: Path | None, text: str | None, *, environ: Mapping[str, str], cwd: Path) -> Settings:
    """The settings that a modelkeep.toml with this text would give, be it on the disk or not. Raises SettingsError."""
    file = Layer()
    if path is not None and text is not None:
        file = layers.file_layer(Settings, text, path)
    environment = layers.environment_layer(Settings, environ)
    for layer, base in ((file, path.parent if path is not None else cwd), (environment, cwd)):
        if isinstance(home := layer.values.get("home"), str):
            try:
                layer.values["home"] = expand(Path(home), cwd / base)
            except ValueError as error:
                raise SettingsError(f"home = {home!r} ({layer.sources['home']}): {error}") from error

    asked = environment.values.get("profile", file.values.get("profile", "auto"))
    stack, hardware = [environment, file], None
    if isinstance(asked, str) and (asked == "auto" or asked in profiles.PROFILES):
        hardware, words = profiles.choose(asked, index=_device(environment, file), environ=environ)
        stack.append(layers.profile_layer(hardware.values, words))
    sources: dict[str, str] = {}
    for layer in reversed(stack):
        sources.update(layer.sources)

    token = _LAYERS.set(tuple(stack))
    try:
        settings = Settings()
    except ValidationError as error:
        raise SettingsError(_words(error, sources)) from None
    finally:
        _LAYERS.reset(token)
    settings._sources = sources
    settings._hardware = hardware
    settings._config = path
    check_limits(settings)
    return settings


def _device(*stack: Layer) -> int:
    for layer in stack:
        value = layer.values.get("gpu", {})
        if isinstance(value, Mapping) and str(value.get("device", "")).isdigit():
            return int(value["device"])
    return 0


def _words(error: ValidationError, sources: Mapping[str, str]) -> str:
    """One line a problem: key, value, source, what is wrong."""
    lines = []
    merged: dict[str, Any] = {}
    for layer in reversed(_LAYERS.get()):
        layers.merge(merged, layer.values)
    for problem in error.errors(include_url=False):
        if problem["type"] == "default_factory_not_called":
            continue
        key = _dotted(problem["loc"], merged)
        source = _nearest_source(key, sources)
        message = problem["msg"].removeprefix("Value error, ")
        secret = key == "api_key" or any(word in key.rpartition(".")[2] for word in ("password", "secret", "token"))
        if problem["type"] == "missing":
            lines.append(f"{key} is missing ({source})")
        elif isinstance(problem["input"], Mapping | BaseModel):
            lines.append(f"{key} ({source}): {message}")
        else:
            shown = HIDDEN if secret else redact(repr(_shown(problem["input"])))
            lines.append(f"{key} = {shown} ({source}): {message}")
    return "\n".join(lines)


def _nearest_source(key: str, sources: Mapping[str, str]) -> str:
    """The source of a key; else of the value that it is a part of, or of what stands in the table."""
    while key:
        if key in sources:
            return sources[key]
        if inside := [found for name, found in sources.items() if name.startswith(key + ".")]:
            return ", ".join(dict.fromkeys(inside))
        key = key.rpartition(".")[0]
    return "default"


def _dotted(loc: tuple[int | str, ...], merged: Mapping[str, Any]) -> str:
    """The place of a problem as a dotted key: a named table goes by its slug, not by its number."""
    parts: list[str] = []
    here: Any = merged
    for part in loc:
        if isinstance(part, int) and isinstance(here, Mapping):
            part = list(here)[part]
        if isinstance(here, Mapping):
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int):
            here = here[part]
        parts.append(str(part))
    return ".".join(parts)


def check_limits(settings: Settings) -> None:
    """Raises SettingsError where a value breaks the limits of the hardware profile: value, limit and profile named; or where
    a server would look too seldom to tell whether a lease moves."""
    broken = []
    if settings.poll_seconds > settings.lease_seconds / 4:
        broken.append(
            f"poll_seconds = {settings.poll_seconds:g} ({settings.source('poll_seconds')}) is too long for lease_seconds = "
            f"{settings.lease_seconds:g} ({settings.source('lease_seconds')}): at most a quarter of it"
        )
    if settings.hang_seconds < settings.server.request_timeout_seconds:
        broken.append(
            f"health.hang_seconds = {settings.hang_seconds:g} ({settings.source('health.hang_seconds')}) is shorter than "
            f"server.request_timeout_seconds = {settings.server.request_timeout_seconds:g}: a request that may take so long would count as hanging"
        )
    for limit in settings.hardware.limits:
        value: Any = settings
        for name in limit.key.split("."):
            value = getattr(value, name)
        if allowed := limit.broken_by(value):
            broken.append(
                f"{limit.key} = {str(value).lower()} ({settings.source(limit.key)}): profile {settings.hardware.name} "
                f"allows {allowed}. Change the value, or the profile by MODELKEEP_PROFILE"
            )
    if broken:
        raise SettingsError("\n".join(broken))
