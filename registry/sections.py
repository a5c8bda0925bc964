"""The sections of the settings, one typed model a table of modelkeep.toml. MB are 2**20 bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, get_args
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from registry.errors import SettingsError, UsageError
from registry.names import check_name
from registry.policy import PromotionPolicy

DATABASE_SCHEMES = ("sqlite", "mysql+pymysql", "postgresql+psycopg")
_OWN_API = (
    *("model-info", "model-health", "update-models", "analytics", "promotions", "rollback", "feedback", "captured"),
)
OWN_PATHS = (
    *("/v1", "/v2", "/ws", "/health", "/metrics", "/dashboard", "/docs", "/openapi.json", "/api/gpu", "/api/cache"),
    *("/favicon.ico", *(f"/api/v2/{name}" for name in _OWN_API)),
)
"""Paths, each with all below it, that no alias may take."""


def number_not_bool(annotation: Any, value: Any) -> None:
    """TOML has booleans of its own: `port = true` is a mistake, not port 1. Raises ValueError."""
    kinds = get_args(annotation) or (annotation,)
    if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
        raise ValueError(f"a number is needed here, not {str(value).lower()}")


def check_url(value: str, schemes: tuple[str, ...], example: str) -> str:
    """The URL itself where it has one of the schemes and names a host. Raises ValueError."""
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:  # its own words may hold a part of the password
        raise ValueError(f"is not a URL: host or port cannot be read; it looks like {example}") from None
    if parts.scheme not in schemes:
        raise ValueError(f"the URL must begin with {' or '.join(s + '://' for s in schemes)}, as in {example}")
    if not host:
        raise ValueError(f"the URL names no host; it looks like {example}")
    return value


def check_database_url(value: str) -> str:
    """A SQLAlchemy URL of a database that modelkeep knows. Raises ValueError that says which ones these are."""
    scheme, mark, rest = value.partition("://")
    if not mark or scheme not in DATABASE_SCHEMES:
        near = {"mysql": "mysql+pymysql", "mariadb": "mysql+pymysql", "postgres": "postgresql+psycopg"}
        near["postgresql"] = "postgresql+psycopg"
        hint = f" (write {near[scheme.split('+')[0]]}://)" if scheme.split("+")[0] in near else ""
        known = ", ".join(f"{s}://" for s in DATABASE_SCHEMES)
        raise ValueError(f"the URL must begin with one of {known}{hint}")
    if scheme == "sqlite":
        path = rest.partition("?")[0]
        if not path.startswith("/") or path in ("/", "/:memory:"):
            raise ValueError("a SQLite URL names a file by its whole path: sqlite:////var/lib/modelkeep/registry.db")
        return value
    check_url(value, DATABASE_SCHEMES, f"{scheme}://user@host/database")
    if not urlsplit(value).path.strip("/"):
        raise ValueError(f"the URL names no database; it looks like {scheme}://user@host/database")
    return value


class Section(BaseModel):
    """Unknown keys are refused and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name is not None:
            number_not_bool(cls.model_fields[info.field_name].annotation, value)
        return value


class Entry(Section):
    """One of a `[[list]]` of tables. The field named by `KEY` tells it from its neighbours."""

    KEY: ClassVar[str | None] = "name"


class ModelPolicy(PromotionPolicy, Entry):
    """What the policy of one model has other than `promotion`: the fields that are given (`model_fields_set`), and no others."""

    KEY: ClassVar[str | None] = "model"

    model: str = Field(description="The model; small and large letters are one here, and so are '-' and '_'.")


class GpuSection(Section):
    device: int = Field(0, ge=0, description="Index of the device among the visible ones.")
    max_memory_mb: int | None = Field(2048, gt=0, description="Most memory for models; absent: the fraction decides.")
    memory_fraction: float = Field(1.0, gt=0, le=1, description="Share of the device's memory that models may take.")
    allow_growth: bool = Field(True, description="Take memory as it is needed rather than all at the start.")
    enable_fp16: bool = Field(False, description="Run in half precision where a model has it.")
    compute: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        "auto",
        description="Where models compute: auto takes the profile's device, and its CUDA provider; tensorrt takes ONNX Runtime's TensorRT provider.",
    )
    limit_on_cpu: bool = Field(
        False,
        description="On the CPU: all ONNX models compute in one arena of the size of the memory budget (weights apart); what does not fit it is split.",
    )


class ModelsSection(Section):
    max_concurrent_models: int = Field(
        4, ge=1, description="Versions in memory at a time; models beyond that are loaded when they are asked for."
    )
    enable_model_swapping: bool = Field(
        True,
        description="Unload the least recently used model for one that is asked for; off: that one is answered 503.",
    )
    swap_threshold_mb: int | None = Field(
        1800, gt=0, description="Memory of loaded models above which the least recently used one goes."
    )
    preload_models: bool = Field(
        False, description="Load every routed model, as far as there is room, before the server says that it is ready."
    )
    prewarm: bool = Field(
        True,
        description="Load the routed models ahead, the one that was asked last first; off (and `preload_models` off): at their first request.",
    )
    prewarm_seconds: float = Field(
        30.0,
        ge=0,
        description="The server is ready after that time at the latest; what is not loaded then comes in the background.",
    )
    max_file_bytes: int = Field(20 << 30, gt=0, description="Largest model to register, external data included.")


class PerformanceSection(Section):
    max_concurrent_requests: int = Field(256, ge=1, description="Requests that are computed or queued at a time.")
    batch_size: int = Field(32, ge=1, description="Most rows that are run together.")
    enable_caching: bool = Field(True, description="Answer a repeated request from the cache.")
    queue_size: int = Field(1024, ge=1, description="Requests that may wait for one version.")


class DatabaseSection(Section):
    """The connection pool of the registry; without effect on SQLite."""

    pool_size: int = Field(5, ge=1)
    max_overflow: int = Field(10, ge=0)
    pool_timeout_seconds: float = Field(30.0, gt=0)
    pool_recycle_seconds: float = Field(3600.0, gt=0)


class PrefectSection(Section):
    host: str = Field("127.0.0.1", min_length=1, description="Address at which `modelkeep up` starts Prefect's server.")
    port: int = Field(4200, ge=1, le=65535, description="Its port.")
    api_url: str = Field("", description="Where Prefect's API is; absent: at host and port.")

    @model_validator(mode="before")
    @classmethod
    def _at_host_and_port(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("api_url"):
            host, port = data.get("host", "127.0.0.1"), data.get("port", 4200)
            shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
            return {**data, "api_url": f"http://{shown}:{port}/api"}
        return data

    @field_validator("api_url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        return check_url(value or "http://127.0.0.1:4200/api", ("http", "https"), "http://127.0.0.1:4200/api")


class MonitoringSection(Section):
    prometheus_enabled: bool = True
    prometheus_port: int = Field(9090, ge=1, le=65535)
    metrics_path: str = Field("/metrics", pattern=r"^/[A-Za-z0-9._/-]+$")
    trace_sample_ratio: float = Field(0.01, ge=0, le=1, description="Share of the requests that are traced.")
    dashboard_history_seconds: int = Field(300, ge=1, description="How far back the dashboard's charts go.")


class LoggingSection(Section):
    """The level is the setting `log_level`."""

    format: Literal["json", "text"] = "json"
    directory: Path = Field(Path("logs"), description="Relative to home.")
    app_file: str = Field("app.log", pattern=r"^[^/]+$")
    performance_file: str = Field("performance.log", pattern=r"^[^/]+$")
    error_file: str = Field("error.log", pattern=r"^[^/]+$")
    access: Literal["off", "file", "stderr"] = Field(
        "off", description="Where each server writes one JSON line a request."
    )
    access_file: str = Field("access.log", pattern=r"^[^/]+$", description="With `file`: in `directory`.")
    access_share: float = Field(1.0, ge=0, le=1, description="Share of the requests to write; of 5xx always all.")
    access_max_mb: int = Field(64, ge=1, description="The file is put aside when it is so large, as NAME.1 and so on.")
    access_files: int = Field(5, ge=1, le=100, description="So many files are kept, the current one among them.")


class AlertsSection(Section):
    """When to say something. Percentages are of the device's or the machine's own total."""

    gpu_temperature_advise_celsius: float = 75.0
    gpu_temperature_warning_celsius: float = 80.0
    gpu_temperature_warning_for_seconds: float = Field(300.0, ge=0)
    gpu_temperature_critical_celsius: float = 85.0
    gpu_memory_warning_percent: float = Field(85.0, gt=0, le=100)
    gpu_memory_high_percent: float = Field(90.0, gt=0, le=100)
    gpu_memory_high_for_seconds: float = Field(120.0, ge=0)
    gpu_memory_critical_percent: float = Field(95.0, gt=0, le=100)
    gpu_memory_critical_for_seconds: float = Field(60.0, ge=0)
    cpu_advise_percent: float = Field(80.0, gt=0, le=100)
    cpu_warning_percent: float = Field(85.0, gt=0, le=100)
    cpu_warning_for_seconds: float = Field(600.0, ge=0)
    api_latency_p95_warning_seconds: float = Field(5.0, gt=0)
    model_latency_p95_warning_seconds: float = Field(10.0, gt=0)
    latency_warning_for_seconds: float = Field(600.0, ge=0)
    timeouts_critical_percent: float = Field(5.0, gt=0, le=100)
    timeouts_critical_for_seconds: float = Field(300.0, ge=0)
    error_rate_critical_percent: float = Field(5.0, gt=0, le=100)
    error_rate_critical_for_seconds: float = Field(180.0, ge=0)
    version_error_rate_percent: float = Field(5.0, gt=0, le=100, description="Of one version after a route change.")
    version_error_rate_for_seconds: float = Field(30.0, ge=0)
    version_error_rate_window_seconds: float = Field(3600.0, gt=0, description="How long after the route change.")
    slo_target: float = Field(0.999, gt=0, lt=1, description="Share of the requests that must be good.")
    slo_latency_seconds: float = Field(1.0, gt=0, description="A good request is answered within this time.")

    @model_validator(mode="after")
    def _rising(self) -> AlertsSection:
        for names in (
            ("gpu_temperature_advise_celsius", "gpu_temperature_warning_celsius", "gpu_temperature_critical_celsius"),
            ("gpu_memory_warning_percent", "gpu_memory_high_percent", "gpu_memory_critical_percent"),
            ("cpu_advise_percent", "cpu_warning_percent"),
        ):
            values = [getattr(self, name) for name in names]
            if values != sorted(values):
                shown = ", ".join(f"{name} = {value:g}" for name, value in zip(names, values, strict=True))
                raise ValueError(f"the thresholds must rise: {shown}")
        return self


class HealthSection(Section):
    """When a loaded version counts as unhealthy, and whether the server does something about it."""

    max_memory_mb: int = Field(8192, gt=0, description="A version that takes more memory is unhealthy.")
    response_seconds: float = Field(
        5.0, gt=0, description="A version whose answers take longer on average is degraded."
    )
    error_rate: float = Field(
        0.05, gt=0, le=1, description="A version that fails a larger share of its requests is unhealthy."
    )
    window_seconds: float = Field(60.0, gt=0, description="The time that is looked at.")
    minimum_requests: int = Field(20, ge=1, description="Fewer requests in that time say nothing.")
    hang_seconds: float | None = Field(
        None,
        gt=0,
        description="A version hangs whose worker is at one computation for longer; not below `server.request_timeout_seconds`, twice "
        "that where nothing is given.",
    )
    load_hang_seconds: float | None = Field(
        None,
        gt=0,
        description="A version hangs whose loading takes longer; 600 s and a second for each 20 MB of its files where nothing is given.",
    )
    act: bool = Field(
        True,
        description="Load an unhealthy version again once, then take it out of its route where another version can serve.",
    )


class CacheSection(Section):
    """Answers that servers keep, of models that say they are deterministic, where `performance.enable_caching` is on."""

    max_mb: int = Field(64, ge=1, description="Most that the answers in one server may take.")
    ttl_seconds: float = Field(3600.0, gt=0, description="An answer is given again for so long.")
    redis_timeout_seconds: float = Field(
        0.005, gt=0, le=1, description="Longest that a request waits for Redis (`redis_url`) before it is computed."
    )


class TextSection(Section):
    """Text generation, for each version that generates text."""

    max_running: int = Field(16, ge=1, description="Texts that one version generates at a time.")
    max_waiting: int = Field(
        64, ge=0, description="Texts that may wait for one of these places; the next are told to come again."
    )
    max_cache_mb: int = Field(
        512,
        ge=1,
        description="Most that their key/value caches may take together, if the memory for models has it; a text alone may take what is free.",
    )
    max_tokens: int = Field(4096, ge=1, description="Most tokens that one request may ask for.")
    timeout_seconds: float = Field(300.0, gt=0, description="Longest that one text may take.")


class CaptureSection(Section):
    """Requests that a server keeps on its own disk for a replay (`promote --strategy replay`). They hold what clients sent."""

    share: float = Field(
        0.0, ge=0, le=1, description="Share of the requests answered by stable versions to keep; 0: none."
    )
    requests: int = Field(1000, ge=1, description="The newest so many of a model are kept.")
    max_mb: int = Field(64, ge=1, description="Most that those of one model may take on the disk.")
    days: float = Field(7.0, gt=0, description="Older ones are removed.")


class BackupSection(Section):
    """How backups are taken, checked and kept. Where they go is the setting `backups`, their key `backup_key_file`."""

    keep_daily: int = Field(7, ge=0, description="Days of which the newest verified backup is kept.")
    keep_weekly: int = Field(5, ge=0, description="Weeks of which the newest verified backup is kept.")
    keep_monthly: int = Field(12, ge=0, description="Months of which the newest verified backup is kept.")
    minimum_redundancy: int = Field(
        2, ge=1, description="So many verified backups of each component stay, whatever the other rules say."
    )
    unverified_days: float = Field(
        7.0,
        ge=0,
        description="Days after which a failed, partial or unverified backup may go, once a newer one is verified.",
    )
    gc_grace_hours: float = Field(
        24.0,
        gt=0,
        description="Hours between the mark of an object that no backup needs and its removal, and for which logs stay that only a pruned backup could use.",
    )
    sample_share: float = Field(
        0.05, gt=0, le=1, description="Share of a daily backup's content that `verify-backups` reads back."
    )
    object_lock: Literal["governance", "compliance"] | None = Field(
        None, description="Lock what a bucket is given, where it has object lock: nobody can delete it before its time."
    )
    object_lock_days: float = Field(30.0, gt=0, description="Days for which it is locked.")
    logs: list[str] = Field(
        default=[], description="Names of [[databases]] whose logs are shipped, for recovery to a point in time."
    )
    notify_url: str | None = Field(
        default=None,
        repr=False,
        description="A URL that is sent a JSON document when a drill fails: a chat's webhook, a pager.",
    )

    @field_validator("notify_url")
    @classmethod
    def _notify_url(cls, value: str | None) -> str | None:
        return value if value is None else check_url(value, ("http", "https"), "https://chat.example.com/hooks/backups")


def _entry_name(value: str) -> str:
    try:
        return check_name(value, "name")
    except UsageError as error:
        raise ValueError(str(error)) from error


class Retention(Entry):
    """Rows of `table` older than `days` by `column` (and where `where` holds) are deleted by maintenance."""

    KEY: ClassVar[str | None] = None

    table: str = Field(min_length=1)
    column: str = Field(min_length=1)
    days: int = Field(ge=1)
    where: str | None = None


class Database(Entry):
    """A database of the application that modelkeep looks after."""

    name: str
    url: str = Field(repr=False)
    password: SecretStr | None = None
    password_file: Path | None = None
    retention: list[Retention] = []

    _name = field_validator("name")(_entry_name)
    _url = field_validator("url")(check_database_url)

    @model_validator(mode="after")
    def _one_password(self) -> Database:
        if self.password is not None and self.password_file is not None:
            raise ValueError("password and password_file are both set: leave one of them out")
        return self

    def connection_url(self) -> str:
        """The URL with its password in it: never log it. Raises SettingsError if the password file cannot be read."""
        if self.password is not None:
            secret = self.password.get_secret_value()
        elif self.password_file is not None:
            try:
                secret = self.password_file.read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"databases.{self.name}.password_file {self.password_file}: {error}") from error
        else:
            return self.url
        parts = urlsplit(self.url)
        user, host = parts.username or "", parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{user}:{quote(secret, safe='')}@{host}"))


class VectorsSection(Section):
    """The application's vector store; without `url` the setting `chroma`."""

    url: str | None = Field(default=None, description="Path or URL of a Chroma store.")
    collections: list[str] = Field(default=[], description="Collections to keep; none named: all.")


class QueuesSection(Section):
    """The application's queues; without `url` the setting `redis_url`."""

    url: str | None = Field(default=None, repr=False)
    names: list[str] = Field(default=[], description="Keys of the queues to keep, or patterns; none named: none.")
    critical: list[str] = Field(
        default=[], description="Keys of cache entries, or patterns, that must not be lost: kept as the queues are."
    )

    @field_validator("url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        return value if value is None else check_redis_url(value)


class Files(Entry):
    """A folder of the application: uploads, configuration."""

    name: str
    path: Path
    exclude: list[str] = Field(default=[], description="Patterns of names to leave out, as in a shell.")

    _name = field_validator("name")(_entry_name)


def check_redis_url(value: str) -> str:
    """A Redis, or a Redis Cluster by some of its nodes: hosts with commas between. Raises ValueError."""
    schemes, example = ("redis", "rediss", "redis+cluster", "rediss+cluster"), "redis://127.0.0.1:6379/0"
    scheme, mark, rest = value.partition("://")
    if not scheme.endswith("+cluster"):
        return check_url(value, schemes, example)
    place, slash, others = rest.partition("/")
    user, at, hosts = place.rpartition("@")
    for host in hosts.split(","):
        check_url(f"{scheme}{mark}{user}{at}{host}{slash}{others}", schemes, "redis+cluster://one:6379,two:6379")
    return value
