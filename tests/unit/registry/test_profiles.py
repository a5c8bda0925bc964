"""Hardware profiles: their numbers, which one `auto` takes, and what their limits refuse."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from registry import profiles
from registry.budget import memory_budget_bytes
from registry.errors import SettingsError, UnavailableError
from registry.profiles import MEBIBYTE, PROFILES, Device, choose, for_memory, read_device
from registry.settings import Settings, load_settings


def load(tmp_path: Path, **variables: str) -> Settings:
    return load_settings(environ={"MODELKEEP_HOME": str(tmp_path), **variables}, cwd=tmp_path)


def test_the_4_gb_profile_is_exactly_what_its_owner_wrote_down(tmp_path: Path) -> None:
    settings = load(tmp_path, MODELKEEP_PROFILE="rtx3050-4gb")
    gpu = settings.gpu
    assert (gpu.max_memory_mb, gpu.memory_fraction, gpu.allow_growth, gpu.enable_fp16) == (3500, 0.85, True, True)
    models = settings.models
    assert (models.max_concurrent_models, models.enable_model_swapping) == (2, True)
    assert (models.swap_threshold_mb, models.preload_models) == (3000, False)
    performance = settings.performance
    assert (performance.max_concurrent_requests, performance.batch_size, performance.enable_caching) == (5, 1, True)
    assert settings.server.request_timeout_seconds == 30
    pool = settings.database
    assert (pool.pool_size, pool.max_overflow, pool.pool_timeout_seconds, pool.pool_recycle_seconds) == (
        5,
        10,
        30,
        3600,
    )
    assert settings.source("performance.batch_size") == "profile rtx3050-4gb"


def test_the_cpu_profile_has_2048_mb_256_requests_batches_of_32_and_no_fp16(tmp_path: Path) -> None:
    settings = load(tmp_path, MODELKEEP_PROFILE="cpu")
    assert settings.gpu.max_memory_mb == 2048
    assert settings.performance.max_concurrent_requests == 256
    assert settings.performance.batch_size == 32
    assert settings.gpu.enable_fp16 is False


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_keeps_its_own_limits_and_sets_the_same_keys(name: str, tmp_path: Path) -> None:
    assert load(tmp_path, MODELKEEP_PROFILE=name).hardware is PROFILES[name]
    keys = {(section, key) for section, table in PROFILES[name].values.items() for key in table}
    assert keys == {(section, key) for section, table in profiles.CPU.values.items() for key in table}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("MODELKEEP_GPU__MAX_MEMORY_MB", "3501", "gpu.max_memory_mb = 3501"),
        ("MODELKEEP_PERFORMANCE__MAX_CONCURRENT_REQUESTS", "6", "performance.max_concurrent_requests = 6"),
        ("MODELKEEP_MODELS__PRELOAD_MODELS", "true", "models.preload_models = true"),
        ("MODELKEEP_SERVER__WORKERS", "2", "server.workers = 2"),
    ],
)
def test_a_value_over_a_limit_names_the_value_its_source_the_limit_and_the_profile(
    variable: str, value: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as error:
        load(tmp_path, MODELKEEP_PROFILE="rtx3050-4gb", **{variable: value})
    message = str(error.value)
    assert said in message
    assert f"environment {variable}" in message
    assert "profile rtx3050-4gb allows" in message


def test_all_broken_limits_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as error:
        load(tmp_path, MODELKEEP_PROFILE="cpu", MODELKEEP_GPU__MAX_MEMORY_MB="4096", MODELKEEP_GPU__ENABLE_FP16="1")
    assert len(str(error.value).splitlines()) == 2


def test_values_inside_the_limits_may_be_set(tmp_path: Path) -> None:
    settings = load(tmp_path, MODELKEEP_PROFILE="rtx3050-4gb", MODELKEEP_GPU__MAX_MEMORY_MB="3000")
    assert settings.gpu.max_memory_mb == 3000


@pytest.mark.parametrize(
    ("total_mb", "name"),
    [
        (2048, "rtx3050-4gb"),
        (4096, "rtx3050-4gb"),
        (6144, "rtx3050-4gb"),
        (8188, "8gb"),
        (16376, "8gb"),
        (24564, "24gb"),
        (49140, "24gb"),
        (81559, "80gb-plus"),
        (143771, "80gb-plus"),
    ],
)
def test_auto_goes_by_the_memory_that_a_device_reports(total_mb: int, name: str) -> None:
    assert for_memory(total_mb * MEBIBYTE).name == name


def test_auto_says_which_device_it_saw() -> None:
    profile, source = choose("auto", read=lambda index, environ: Device("NVIDIA H200", 143771 * MEBIBYTE), environ={})
    assert (profile.name, source) == ("80gb-plus", "profile 80gb-plus (auto: NVIDIA H200, 143771 MB)")


def test_auto_says_why_it_took_the_cpu() -> None:
    profile, source = choose("auto", read=lambda index, environ: "no NVIDIA device", environ={})
    assert (profile.name, source) == ("cpu", "profile cpu (auto: no NVIDIA device)")


def test_a_hidden_device_is_not_taken() -> None:
    assert read_device(0, {"CUDA_VISIBLE_DEVICES": ""}) == "CUDA_VISIBLE_DEVICES='' shows no device 0"
    assert read_device(0, {"CUDA_VISIBLE_DEVICES": "-1"}) == "CUDA_VISIBLE_DEVICES='-1' shows no device 0"
    assert read_device(2, {"CUDA_VISIBLE_DEVICES": "0,1"}) == "CUDA_VISIBLE_DEVICES='0,1' shows no device 2"


class Nvml(types.ModuleType):
    """What of pynvml is used, answering for a machine with `totals` devices."""

    class NVMLError(Exception):
        pass

    def __init__(self, totals: Mapping[str | int, int], *, starts: bool = True) -> None:
        super().__init__("pynvml")
        self.totals, self.starts, self.ended = totals, starts, 0

    def nvmlInit(self) -> None:
        if not self.starts:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        self.ended += 1

    def nvmlDeviceGetCount(self) -> int:
        return sum(isinstance(key, int) for key in self.totals)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int | str:
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int | str:
        return name

    def nvmlDeviceGetName(self, handle: int | str) -> str:
        return f"device {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int | str) -> Any:
        if handle not in self.totals:
            raise self.NVMLError("Not Found")
        return types.SimpleNamespace(total=self.totals[handle])


@pytest.mark.parametrize(
    ("nvml", "environ", "found"),
    [
        (Nvml({0: 5, 1: 7}), {}, Device("device 0", 5)),
        (Nvml({0: 5, 1: 7}), {"CUDA_VISIBLE_DEVICES": "1"}, Device("device 1", 7)),
        (Nvml({0: 5, "GPU-ab": 9}), {"CUDA_VISIBLE_DEVICES": "GPU-ab"}, Device("device GPU-ab", 9)),
        (Nvml({}), {}, "no NVIDIA device"),
        (Nvml({}, starts=False), {}, "no NVIDIA device"),
        (Nvml({0: 1}), {"CUDA_VISIBLE_DEVICES": "MIG-x"}, "NVIDIA device MIG-x does not answer: Not Found"),
    ],
)
def test_nvml_is_asked_for_the_device_that_the_server_would_use(
    nvml: Nvml, environ: dict[str, str], found: Device | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert read_device(0, environ) == found
    assert nvml.ended == int(nvml.starts)


def test_the_memory_budget_is_the_least_of_all_bounds(tmp_path: Path) -> None:
    small = load(tmp_path, MODELKEEP_PROFILE="rtx3050-4gb")
    assert memory_budget_bytes(small, None) == 3500 * MEBIBYTE
    assert memory_budget_bytes(small, 4096 * MEBIBYTE) == int(0.85 * 4096 * MEBIBYTE)
    assert memory_budget_bytes(small, 24_000 * MEBIBYTE) == 3500 * MEBIBYTE


def test_on_the_cpu_the_budget_is_2048_mb_at_most(tmp_path: Path) -> None:
    settings = load(tmp_path, MODELKEEP_PROFILE="cpu")
    assert memory_budget_bytes(settings, 64_000 * MEBIBYTE) == 2048 * MEBIBYTE
    lower = load(tmp_path, MODELKEEP_PROFILE="cpu", MODELKEEP_GPU__MAX_MEMORY_MB="512")
    assert memory_budget_bytes(lower, None) == 512 * MEBIBYTE


def test_a_budget_without_any_bound_is_an_error_and_not_a_guess(tmp_path: Path) -> None:
    settings = load(tmp_path, MODELKEEP_PROFILE="80gb-plus")
    with pytest.raises(UnavailableError, match=r"set gpu\.max_memory_mb"):
        memory_budget_bytes(settings, None)
    assert memory_budget_bytes(settings, 80_000 * MEBIBYTE) == int(0.92 * 80_000 * MEBIBYTE)
