"""Settings: precedence, sources, what is refused and in which words, what is hidden."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from registry.errors import SettingsError, UsageError
from registry.settings import Settings, find_config, load_settings

APP = """
log_level = "warning"

[server]
port = 9000

[[databases]]
name = "My-App"
url = "mysql+pymysql://app@db/app"
[[databases.retention]]
table = "generations"
column = "created_at"
days = 90
where = "archived = 1"

[[files]]
name = "uploads"
path = "uploads"

[[aliases]]
path = "/api/v2/analyze-image"
model = "digits"
"""


def load(tmp_path: Path, text: str | None = None, **variables: str) -> Settings:
    if text is not None:
        (tmp_path / "modelkeep.toml").write_text(text, encoding="utf-8")
    environ = {"MODELKEEP_HOME": str(tmp_path), "MODELKEEP_PROFILE": "cpu", **variables}
    return load_settings(environ=environ, cwd=tmp_path)


def refusal(tmp_path: Path, text: str | None = None, **variables: str) -> str:
    with pytest.raises(SettingsError) as error:
        load(tmp_path, text, **variables)
    return str(error.value)


def test_each_layer_wins_over_the_one_below(tmp_path: Path) -> None:
    file = str(tmp_path / "modelkeep.toml")
    assert load(tmp_path).performance.batch_size == 32
    assert load(tmp_path).source("performance.batch_size") == "profile cpu"
    settings = load(tmp_path, "[performance]\nbatch_size = 16\n")
    assert settings.performance.batch_size == 16
    assert settings.source("performance.batch_size") == f"modelkeep.toml ({file})"
    settings = load(tmp_path, MODELKEEP_PERFORMANCE__BATCH_SIZE="8")
    assert settings.performance.batch_size == 8
    assert settings.source("performance.batch_size") == "environment MODELKEEP_PERFORMANCE__BATCH_SIZE"
    assert settings.performance.max_concurrent_requests == 256
    assert settings.source("performance.max_concurrent_requests") == "profile cpu"
    assert settings.source("server.port") == "default"


def test_the_defaults_need_no_other_server(tmp_path: Path) -> None:
    settings = load(tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path}/registry.db"
    assert settings.artifacts == str(tmp_path / "artifacts")
    assert settings.backups == [str(tmp_path / "backups")]
    assert settings.redis_url is None
    assert (settings.server.host, settings.server.port, settings.server.workers) == ("127.0.0.1", 8000, 1)
    assert settings.servers == ["http://127.0.0.1:8000"]
    assert settings.environment == "production"
    assert settings.security.cors_origins == []
    assert str(settings.security.rate) == "60/minute"
    assert settings.models.max_file_bytes == 20 * 2**30
    assert settings.prefect.api_url == "http://127.0.0.1:4200/api"
    assert settings.promotion.stages == [0.05, 0.25, 0.5, 1.0]


def test_the_alert_thresholds_are_the_settled_ones(tmp_path: Path) -> None:
    alerts = load(tmp_path).alerts
    temperatures = (
        alerts.gpu_temperature_advise_celsius,
        alerts.gpu_temperature_warning_celsius,
        alerts.gpu_temperature_critical_celsius,
    )
    assert temperatures == (75, 80, 85)
    memory = (alerts.gpu_memory_warning_percent, alerts.gpu_memory_high_percent, alerts.gpu_memory_critical_percent)
    assert memory == (85, 90, 95)
    assert (alerts.api_latency_p95_warning_seconds, alerts.model_latency_p95_warning_seconds) == (5, 10)
    assert (alerts.cpu_advise_percent, alerts.cpu_warning_percent) == (80, 85)
    assert (alerts.slo_target, alerts.slo_latency_seconds) == (0.999, 1.0)


def test_the_application_is_described_by_the_file_and_its_password_by_the_environment(tmp_path: Path) -> None:
    settings = load(tmp_path, APP, MODELKEEP_DATABASES__MY_APP__PASSWORD="s3/cr@t")
    (database,) = settings.databases
    assert database.name == "My-App"
    assert database.connection_url() == "mysql+pymysql://app:s3%2Fcr%40t@db/app"
    assert (database.retention[0].days, database.retention[0].where) == (90, "archived = 1")
    assert settings.files[0].path == tmp_path / "uploads"
    assert settings.aliases[0].model == "digits"
    assert settings.log_level == "WARNING"
    assert settings.source("databases.My-App.password") == "environment MODELKEEP_DATABASES__MY_APP__PASSWORD"
    assert "modelkeep.toml" in settings.source("databases.my-app.url")


def test_a_password_file_is_read_when_the_connection_is_made(tmp_path: Path) -> None:
    text = '[[databases]]\nname = "app"\nurl = "postgresql+psycopg://app@db:5433/app"\npassword_file = "pw"\n'
    settings = load(tmp_path, text)
    with pytest.raises(SettingsError, match=r"databases\.app\.password_file .*pw"):
        settings.databases[0].connection_url()
    (tmp_path / "pw").write_text("geheim\n", encoding="utf-8")
    assert settings.databases[0].connection_url() == "postgresql+psycopg://app:geheim@db:5433/app"


def test_two_passwords_for_one_database_are_one_too_many(tmp_path: Path) -> None:
    text = '[[databases]]\nname = "a"\nurl = "sqlite:////x.db"\npassword_file = "pw"\n'
    assert "both set" in refusal(tmp_path, text, MODELKEEP_DATABASES__A__PASSWORD="x")


@pytest.mark.parametrize("value", ["http://a:8000,http://b:8000/", '["http://a:8000", "http://b:8000"]'])
def test_servers_are_a_list_by_commas_or_json(value: str, tmp_path: Path) -> None:
    assert load(tmp_path, MODELKEEP_SERVERS=value).servers == ["http://a:8000", "http://b:8000"]


def test_lists_and_sections_may_be_json(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        MODELKEEP_PROMOTION__STAGES="[0.1, 1]",
        MODELKEEP_SERVER='{"port": 1, "host": "::1"}',
        MODELKEEP_SERVER__PORT="2",
        MODELKEEP_DATABASES='[{"name": "app", "url": "sqlite:////app.db"}]',
    )
    assert settings.promotion.stages == [0.1, 1.0]
    assert (settings.server.host, settings.server.port) == ("::1", 2)
    assert settings.databases[0].url == "sqlite:////app.db"
    assert settings.source("server.host") == "environment MODELKEEP_SERVER"
    assert settings.source("server.port") == "environment MODELKEEP_SERVER__PORT"


def test_an_empty_variable_counts_as_not_set(tmp_path: Path) -> None:
    assert load(tmp_path, MODELKEEP_REDIS_URL="", MODELKEEP_SERVER__PORT=" ").server.port == 8000


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("databse_url = 'x'", "'databse_url' is not a setting; did you mean 'database_url'?"),
        ("[server]\nprot = 1", "'server.prot' is not a setting; did you mean 'server.port'?"),
        ("[sever]\nport = 1", "'sever' is not a setting; did you mean 'server'?"),
        ("port = 1", "'port' is not a setting; did you mean 'server.port'?"),
        (
            "[[databases]]\nname = 'a'\nurll = 'x'",
            "'databases.a.urll' is not a setting; did you mean 'databases.a.url'?",
        ),
        (
            "[[databases]]\nname = 'a'\nurl = 'sqlite:////x'\n[[databases.retention]]\ntable = 't'\ncolum = 'c'",
            "did you mean 'databases.a.retention.0.column'?",
        ),
    ],
)
def test_an_unknown_key_in_the_file_names_itself_the_file_and_the_nearest_right_one(
    text: str, named: str, tmp_path: Path
) -> None:
    message = refusal(tmp_path, text)
    assert named in message
    assert str(tmp_path / "modelkeep.toml") in message


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("MODELKEEP_SERVR__PORT", "MODELKEEP_SERVER__PORT"),
        ("MODELKEEP_SERVER_PORT", "MODELKEEP_SERVER__PORT"),
        ("MODELKEEP_CONFG", "MODELKEEP_CONFIG"),
        ("MODELKEEP_DATABASEURL", "MODELKEEP_DATABASE_URL"),
    ],
)
def test_an_unknown_variable_names_itself_and_the_nearest_right_one(variable: str, meant: str, tmp_path: Path) -> None:
    said = f"environment {variable} is not a setting; did you mean {meant}?"
    assert refusal(tmp_path, **{variable: "1"}) == said


def test_other_programs_variables_and_those_of_tests_are_left_alone(tmp_path: Path) -> None:
    load(tmp_path, PATH="/bin", MODELKEEP_TEST_LONG="1", MODELKEEP_INTERNAL_SOCKET="3")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MODELKEEP_SERVER__PORT": "abc"}, "server.port = 'abc' (environment MODELKEEP_SERVER__PORT)"),
        ({"MODELKEEP_SERVER__PORT": "70000"}, "less than or equal to 65535"),
        ({"MODELKEEP_LEASE_SECONDS": "nan"}, "lease_seconds = 'nan'"),
        ({"MODELKEEP_PROMOTION__STAGES": "0.5,0.2"}, "the last stage must be 1.0"),
        ({"MODELKEEP_PROMOTION__STAGES": "[0.5,"}, "environment MODELKEEP_PROMOTION__STAGES is not valid JSON"),
        ({"MODELKEEP_SERVER": "9000"}, "environment MODELKEEP_SERVER must be JSON"),
        ({"MODELKEEP_PROFILE": "8gbb"}, "did you mean '8gb'?"),
        ({"MODELKEEP_ENVIRONMENT": "a/b"}, "environment = 'a/b'"),
        ({"MODELKEEP_LOG_LEVEL": "loud"}, "log_level = 'LOUD'"),
        ({"MODELKEEP_SERVERS": "localhost:8000"}, "servers = ['localhost:8000']"),
        ({"MODELKEEP_REDIS_URL": "http://x"}, "the URL must begin with redis://"),
        ({"MODELKEEP_ARTIFACTS": "ftp://x/y"}, "the URL must begin with s3://"),
        ({"MODELKEEP_SECURITY__RATE_LIMIT": "60"}, "60/minute"),
        ({"MODELKEEP_SECURITY__RATE_LIMIT": "0/minute"}, "60/minute"),
        ({"MODELKEEP_SECURITY__CORS_ORIGINS": "example.org"}, "security.cors_origins"),
        ({"MODELKEEP_ALERTS__CPU_ADVISE_PERCENT": "90"}, "the thresholds must rise"),
        (
            {"MODELKEEP_DATABASES__APP__PASSWORD": "x"},
            "databases.app.url is missing (environment MODELKEEP_DATABASES__",
        ),
        ({"MODELKEEP_HOME": "~no-such-user-here/x"}, "no-such-user-here"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_its_source(
    variables: dict[str, str], said: str, tmp_path: Path
) -> None:
    assert said in refusal(tmp_path, **variables)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nport = true", "server.port = True"),
        ("[server]\nport = [1]", "server.port = [1]"),
        ("lease_seconds = false", "lease_seconds = False"),
        ("server = 1", "server = 1"),
        ("databases = 1", "databases = 1"),
        ("environment = ['cpu']", "environment = ['cpu']"),
        ("[gpu]\nmemory_fraction = 1.5", "gpu.memory_fraction = 1.5"),
        ("[[databases]]\nurl = 'sqlite:////x'", "number 1 of 'databases' has no 'name'"),
        ("[[files]]\nname = 'a'\npath = 'x'\n[[files]]\nname = 'A'\npath = 'y'", "the name 'A' twice"),
        ("[[aliases]]\npath = '/v2/models'\nmodel = 'x'", "/v2 is the server's own"),
        ("[[aliases]]\npath = '/a'\nmodel = '../x'", "'../x'"),
    ],
)
def test_a_wrong_value_in_the_file_is_named_with_the_file(text: str, said: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, text)
    assert said in message
    assert str(tmp_path / "modelkeep.toml") in message


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "[server]\nport = 'x'\nthreads = 0\n", MODELKEEP_POLL_SECONDS="-1")
    assert [line.split(" = ")[0] for line in message.splitlines()] == ["poll_seconds", "server.port", "server.threads"]


def test_wrong_toml_names_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, "log_level = 'INFO'\n[server\nport = 1\n")
    assert "is not valid TOML" in message
    assert "line 2" in message


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modelkeep.toml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://app:geheim@db/app", "write mysql+pymysql://"),
        ("postgres://app:geheim@db/app", "write postgresql+psycopg://"),
        ("postgresql+asyncpg://app:geheim@db/app", "write postgresql+psycopg://"),
        ("oracle://app:geheim@db/app", "must begin with one of sqlite://"),
        ("mysql+pymysql://app:geheim@db", "names no database"),
        ("mysql+pymysql:///app", "names no host"),
        ("mysql+pymysql://app:geheim/x@db/app", "is not a URL"),
        ("sqlite://", "names a file"),
        ("sqlite:///:memory:", "names a file"),
        ("registry.db", "must begin with one of"),
    ],
)
def test_a_database_url_is_one_of_three_kinds_and_its_password_is_never_repeated(
    url: str, said: str, tmp_path: Path
) -> None:
    message = refusal(tmp_path, MODELKEEP_DATABASE_URL=url)
    assert said in message
    assert "geheim" not in message


def test_relative_paths_are_relative_to_home(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "chroma = 'vectors'\nbackups = ['b', 's3://bucket/b']\n[logging]\ndirectory = 'l'\n",
        MODELKEEP_DATABASE_URL="sqlite:///other.db",
        MODELKEEP_BACKUP_KEY_FILE="../key",
    )
    assert settings.database_url == f"sqlite:///{tmp_path}/other.db"
    assert settings.chroma == str(tmp_path / "vectors")
    assert settings.backups == [str(tmp_path / "b"), "s3://bucket/b"]
    assert settings.backup_key_file == tmp_path.parent / "key"
    assert settings.logging.directory == tmp_path / "l"


def test_a_relative_home_is_relative_to_what_sets_it(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "modelkeep.toml").write_text("home = 'state'\n", encoding="utf-8")
    environ = {"MODELKEEP_PROFILE": "cpu"}
    assert load_settings(environ=environ, cwd=project).home == project / "state"
    assert load_settings(environ={**environ, "MODELKEEP_HOME": "here"}, cwd=tmp_path).home == tmp_path / "here"


def test_a_tilde_is_the_home_directory_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environ = {"MODELKEEP_PROFILE": "cpu", "MODELKEEP_DATABASE_URL": "sqlite:///~/r.db"}
    settings = load_settings(environ=environ, cwd=tmp_path)
    assert settings.home == tmp_path / ".modelkeep"
    assert settings.database_url == f"sqlite:///{tmp_path}/r.db"


def test_the_file_is_looked_for_in_three_places(tmp_path: Path) -> None:
    home, cwd, named = tmp_path / "home", tmp_path / "cwd", tmp_path / "named.toml"
    home.mkdir()
    cwd.mkdir()
    environ = {"MODELKEEP_HOME": str(home)}
    assert find_config(environ, cwd) is None
    for path in (home / "modelkeep.toml", cwd / "modelkeep.toml", named):
        path.write_text("", encoding="utf-8")
        chosen = environ | ({"MODELKEEP_CONFIG": "../named.toml"} if path == named else {})
        found = find_config(chosen, cwd)
        assert found is not None
        assert found.samefile(path)


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    assert "MODELKEEP_CONFIG=nowhere.toml: there is no such file" in refusal(tmp_path, MODELKEEP_CONFIG="nowhere.toml")


def test_secrets_are_shown_nowhere(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        '[[databases]]\nname = "app"\nurl = "mysql+pymysql://app:geheim@db/app"\n',
        MODELKEEP_DATABASES__APP__PASSWORD="geheim",
        MODELKEEP_DATABASE_URL="postgresql+psycopg://u:geheim@h/d?sslmode=on&password=geheim",
        MODELKEEP_REDIS_URL="redis://:geheim@cache:6379/0",
        MODELKEEP_S3_ENDPOINT_URL="http://key:geheim@s3:9000",
        MODELKEEP_QUEUES__URL="redis://:geheim@q",
    )
    described = {row["key"]: row["value"] for row in settings.describe()}
    assert described["database_url"] == "postgresql+psycopg://u:***@h/d?sslmode=on&password=***"
    assert described["redis_url"] == "redis://:***@cache:6379/0"
    assert described["databases.app.password"] == "***"
    assert "geheim" not in json.dumps(settings.describe())
    assert "geheim" not in repr(settings)


def test_describe_lists_every_key_once_with_a_source_and_is_json(tmp_path: Path) -> None:
    rows = load(tmp_path, APP).describe()
    keys = [row["key"] for row in rows]
    assert len(keys) == len(set(keys))
    assert {"server.port", "databases.My-App.url", "aliases./api/v2/analyze-image.model", "files.uploads.path"} <= set(
        keys
    )
    assert all(row["source"] for row in json.loads(json.dumps(rows)))


def test_the_source_of_a_section_is_all_that_has_a_part_in_it(tmp_path: Path) -> None:
    settings = load(tmp_path, "[server]\nport = 1\n")
    assert settings.source("server") == f"default, modelkeep.toml ({tmp_path / 'modelkeep.toml'}), profile cpu"


def test_the_source_of_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean 'server\.port'"):
        load(tmp_path).source("server.prot")


def test_settings_made_directly_read_nothing_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELKEEP_SERVER__PORT", "1")
    monkeypatch.setenv("SERVER", "{}")
    settings = Settings(home=tmp_path, profile="cpu")
    assert settings.server.port == 8000
    assert settings.database_url == f"sqlite:///{tmp_path}/registry.db"


def test_settings_do_not_change_after_loading(tmp_path: Path) -> None:
    settings: Any = load(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        settings.home = tmp_path
    with pytest.raises(ValueError, match="frozen"):
        settings.server.port = 1


def test_prefects_api_follows_its_host_and_port(tmp_path: Path) -> None:
    assert load(tmp_path, MODELKEEP_PREFECT__PORT="4300").prefect.api_url == "http://127.0.0.1:4300/api"
    assert load(tmp_path, MODELKEEP_PREFECT__HOST="0.0.0.0").prefect.api_url == "http://127.0.0.1:4200/api"
    assert load(tmp_path, MODELKEEP_PREFECT__API_URL="http://p:1/api").prefect.api_url == "http://p:1/api"


def test_loading_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = ["torch", "onnx", "onnxruntime", "prefect", "sqlalchemy", "numpy", "rich", "tomlkit", "boto3"]
    code = (
        "import sys; from registry.settings import load_settings; load_settings(environ={'MODELKEEP_PROFILE': 'cpu'});"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_server_that_polls_too_seldom_for_its_leases_is_refused_with_both_values(tmp_path: Path) -> None:
    message = refusal(tmp_path, MODELKEEP_LEASE_SECONDS="2")
    assert "poll_seconds = 1 (default)" in message
    assert "lease_seconds = 2 (environment MODELKEEP_LEASE_SECONDS)" in message
    assert load(tmp_path, MODELKEEP_LEASE_SECONDS="2", MODELKEEP_POLL_SECONDS="0.5").poll_seconds == 0.5


def test_one_way_to_ask_for_keys_and_one_place_for_ours(tmp_path: Path) -> None:
    both = {"MODELKEEP_SECURITY__REQUIRE_KEYS": "true", "MODELKEEP_SECURITY__ALLOW_UNAUTHENTICATED": "true"}
    assert "keys are asked for or they are not" in refusal(tmp_path, **both)
    said = refusal(tmp_path, MODELKEEP_API_KEY="mk_geheim", MODELKEEP_API_KEY_FILE="key")
    assert "leave one of them out" in said
    assert "geheim" not in said
    settings = load(tmp_path, "", MODELKEEP_API_KEY_FILE="key")
    assert settings.api_key_file == settings.home / "key"
