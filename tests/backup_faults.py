"""The injected faults of backups: which tests inject them, into which component, at which step. `python -m tests.backup_faults` prints
the table of docs/RELIABILITY.md."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tests/unit/tasks/backup", "tests/integration/backup", "tests/e2e/test_backup_command.py")
BACKUP, STORE, READ, VERIFY, RESTORE, PRUNE, LOGS, DRILL = (
    "backup", "store", "read", "verify", "restore", "prune", "ship logs", "drill",
)  # fmt: skip
U, I = FOLDERS[0], FOLDERS[1]  # noqa: E741

FAULTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("the store", STORE): (
        f"{I}/test_storage_faults.py::test_while_a_backup_is_written",
        f"{I}/test_storage_faults.py::test_a_directory_keeps_what_the_store_does_not_take",
        f"{I}/test_storage_faults.py::test_the_spool_keeps_what_the_only_store_does_not_take",
        f"{I}/test_storage_on_disk.py::test_a_full_disk_is_told_with_the_remedy_and_leaves_no_half_file",
        f"{I}/test_storage_on_disk.py::test_a_writer_killed_at_any_step_leaves_no_backup_or_a_whole_one_and_the_next_is_good",
        f"{I}/test_storage_on_disk.py::test_a_file_where_a_folder_should_be_is_told",
        f"{I}/test_storage_on_disk.py::test_a_read_only_disk_is_told_and_what_is_on_it_can_be_read",
        f"{I}/test_storage_s3.py::test_a_store_that_is_not_there_is_told_after_all_attempts_and_then_at_once",
        f"{U}/test_repository.py::test_of_two_that_write_one_name_at_once_one_wins_and_the_other_is_told",
        f"{U}/test_repository.py::test_two_backups_of_the_same_content_at_once_both_restore",
        f"{U}/test_repository.py::test_a_disk_that_cannot_be_synced_does_not_count_and_the_other_does",
    ),
    ("the store", READ): (
        f"{I}/test_storage_faults.py::test_while_a_backup_is_read",
        f"{U}/test_damage.py::test_damage_is_told_and_another_place_makes_it_good",
        f"{U}/test_repository.py::test_a_manifest_of_the_future_of_another_name_or_of_nobody_is_refused",
        f"{U}/test_repository.py::test_a_bomb_is_not_unpacked",
        f"{U}/test_repository.py::test_a_missing_object_is_named_before_anything_is_restored",
    ),
    ("databases", BACKUP): (
        f"{I}/test_database_faults.py::test_a_dump_that_is_killed_at_each_tenth_of_its_output",
        f"{I}/test_database_faults.py::test_a_dump_that_is_cut_at_a_statement_and_ends_with_exit_code_0",
        f"{I}/test_database_faults.py::test_a_dump_that_lacks_one_row_and_is_whole_otherwise",
        f"{I}/test_database_faults.py::test_a_dump_that_ends_with_an_exit_code_after_its_last_line",
        f"{I}/test_database_faults.py::test_a_dump_that_never_gives_a_byte",
        f"{I}/test_database_faults.py::test_a_schema_that_changes_while_a_mariadb_is_dumped_is_dumped_again",
        f"{I}/test_database_faults.py::test_a_schema_that_keeps_changing_is_no_backup_of_a_mariadb",
        f"{I}/test_database_faults.py::test_a_schema_that_changes_while_a_postgresql_is_dumped_is_not_in_its_snapshot",
        f"{I}/test_database_faults.py::test_connections_that_are_lost_while_they_are_dumped",
        f"{I}/test_database_faults.py::test_a_wrong_password_and_a_server_that_is_not_there",
        f"{I}/test_database_faults.py::test_a_disk_that_is_full_at_the_temporary_folder",
        f"{I}/test_mariadb.py::test_a_user_who_cannot_see_everything_makes_no_backup",
        f"{I}/test_mariadb.py::test_a_table_that_somebody_holds_for_long_is_dumped_when_it_is_free",
        f"{I}/test_postgresql.py::test_rows_that_a_policy_hides_are_no_backup",
        f"{U}/test_chain.py::test_a_program_that_is_killed_fails_the_chain_wherever_it_stands",
        f"{U}/test_dump_texts.py::test_a_dump_without_its_last_line_is_no_dump",
        f"{U}/test_sqlite_part.py::test_a_damaged_database_is_no_backup",
        f"{U}/test_sqlite_part.py::test_a_database_that_is_not_there_is_told_and_not_made",
        f"{U}/test_sqlite_part.py::test_a_database_that_somebody_holds_is_told_and_not_changed",
    ),
    ("databases", VERIFY): (f"{I}/test_database_faults.py::test_a_backup_that_was_changed_does_not_verify",),
    ("databases", RESTORE): (
        f"{I}/test_database_faults.py::test_what_is_there_is_not_overwritten_unless_it_is_forced",
        f"{I}/test_database_faults.py::test_a_restore_that_is_killed_is_begun_again_and_never_taken_for_whole",
        f"{I}/test_database_faults.py::test_a_server_that_goes_away_in_a_restore",
        f"{I}/test_mariadb.py::test_a_backup_of_another_kind_of_server_is_refused_and_never_verified",
        f"{I}/test_postgresql.py::test_a_restore_that_fails_leaves_what_was_there_and_tells_no_row",
        f"{U}/test_sqlite_part.py::test_a_copy_that_was_changed_is_not_restored",
        f"{U}/test_sqlite_part.py::test_what_is_there_is_not_overwritten_unless_it_is_forced",
        f"{U}/test_sqlite_part.py::test_a_file_put_in_place_beside_a_wal_is_undone_and_ours_is_not",
    ),
    ("databases", LOGS): (
        f"{I}/test_point_in_time.py::test_a_damaged_or_a_missing_shipped_log_is_told_and_nothing_is_restored",
        f"{I}/test_point_in_time.py::test_a_log_that_was_purged_before_it_was_shipped_is_a_gap_until_the_next_backup",
        f"{I}/test_point_in_time.py::test_another_server_or_one_that_begins_anew_is_never_taken_for_the_same",
        f"{I}/test_point_in_time.py::test_ship_logs_is_killed_at_each_step_and_the_next_run_leaves_nothing_out",
        f"{I}/test_point_in_time.py::test_a_place_that_was_away_gets_the_logs_that_it_lacks",
    ),
    ("registry", BACKUP): (
        f"{U}/test_registry_part.py::test_a_chain_that_was_tampered_with_is_backed_up_said_and_restored",
        f"{U}/test_registry_part.py::test_a_registry_that_is_gone_or_of_another_release_fails",
        f"{U}/test_registry_part.py::test_a_backup_that_was_taken_during_a_promotion_comes_back_without_it",
        f"{I}/test_registry_kinds.py::test_a_server_that_is_gone_fails_the_component",
    ),
    ("registry", VERIFY): (f"{U}/test_registry_part.py::test_a_damaged_backup_is_never_called_verified",),
    ("registry", RESTORE): (
        f"{U}/test_registry_part.py::test_killed_at_any_step_the_next_call_finishes_it",
        f"{U}/test_registry_part.py::test_a_damaged_backup_changes_nothing_at_its_target",
        f"{U}/test_registry_part.py::test_a_registry_that_holds_something_is_refused_and_replaced_only_by_force",
    ),
    ("models", BACKUP): (
        f"{U}/test_models_part.py::test_an_artifact_that_is_not_there_as_it_should_fails_the_component_by_its_version",
        f"{U}/test_models_part.py::test_after_a_promotion_during_the_backup_registry_and_artifacts_agree",
        f"{U}/test_models_part.py::test_a_version_that_is_deleted_in_between_is_said_and_no_fault",
    ),
    ("models", VERIFY): (
        f"{U}/test_models_part.py::test_a_damaged_backup_is_never_called_verified",
        f"{U}/test_models_part.py::test_a_model_that_no_longer_answers_as_it_did_is_not_verified",
        f"{U}/test_models_part.py::test_a_probe_that_ends_without_a_result_verifies_nothing",
    ),
    ("models", RESTORE): (
        f"{U}/test_models_part.py::test_a_damaged_artifact_is_not_put_into_a_store",
        f"{U}/test_models_part.py::test_an_interrupted_restore_goes_on",
    ),
    ("vectors", VERIFY): (f"{I}/test_vectors.py::test_a_damaged_backup_is_never_called_verified",),
    ("queues", BACKUP): (
        f"{I}/test_queues.py::test_keys_that_are_consumed_or_evicted_meanwhile_are_named",
        f"{I}/test_queues.py::test_a_key_that_takes_another_type_meanwhile_is_read_again",
        f"{I}/test_queues.py::test_a_redis_that_dies_fails_the_component",
    ),
    ("queues", VERIFY): (f"{I}/test_queues.py::test_a_damaged_backup_is_never_called_verified",),
    ("queues", RESTORE): (
        f"{I}/test_queues.py::test_a_key_that_stands_there_is_refused_before_anything_is_written",
        f"{I}/test_queues.py::test_an_interrupted_restore_goes_on",
        f"{I}/test_queues.py::test_a_full_redis_says_so",
    ),
    ("files", BACKUP): (f"{U}/test_folders.py::test_a_file_that_changes_while_it_is_read",),
    ("files", VERIFY): (f"{U}/test_folders.py::test_a_damaged_backup_is_never_called_verified",),
    ("files", RESTORE): (
        f"{U}/test_folders.py::test_a_name_that_leads_out_is_refused",
        f"{U}/test_folders.py::test_nothing_is_written_through_a_link_in_the_index",
    ),
    ("config", VERIFY): (f"{U}/test_config_part.py::test_a_damaged_backup_is_never_called_verified",),
    ("all", BACKUP): (
        f"{U}/test_run.py::test_a_component_that_fails_makes_the_backup_partial_and_the_others_are_there",
        f"{U}/test_run.py::test_a_restore_in_the_middle_voids_the_backup",
        f"{U}/test_run.py::test_what_a_killed_backup_left_is_swept_and_noted_by_the_next",
        f"{U}/test_run.py::test_two_homes_of_one_registry_do_not_back_up_at_once",
        f"{U}/test_run.py::test_without_the_registry_the_rest_is_backed_up_and_it_is_said",
        f"{FOLDERS[2]}::test_killed_at_any_point_it_leaves_no_half_backup_and_the_next_one_is_whole",
    ),
    ("all", RESTORE): (
        f"{I}/test_recover.py::test_what_is_there_is_not_overwritten_unasked",
        f"{I}/test_recover.py::test_an_object_that_is_gone_is_seen_before_anything_is_written",
        f"{I}/test_recover.py::test_a_damaged_object_fails_its_component_and_the_registry_is_not_begun",
        f"{I}/test_recover.py::test_a_recovery_that_was_killed_at_any_step_goes_on",
    ),
    ("all", PRUNE): (
        f"{U}/test_prune.py::test_a_prune_that_was_killed_at_any_step_is_finished_by_the_next",
        f"{U}/test_prune.py::test_nothing_is_deleted_while_a_backup_is_under_way",
        f"{U}/test_prune.py::test_two_collections_do_not_run_at_once",
        f"{U}/test_prune.py::test_while_a_manifest_cannot_be_read_nothing_is_marked_or_deleted",
        f"{U}/test_prune.py::test_while_an_index_is_damaged_nothing_is_deleted",
        f"{U}/test_prune.py::test_nothing_is_decided_while_a_place_does_not_answer",
        f"{U}/test_prune.py::test_an_object_written_between_its_mark_and_the_deletion_stays",
        f"{U}/test_prune_logs.py::test_nothing_goes_while_a_backup_or_a_shipment_is_under_way",
        f"{U}/test_prune_logs.py::test_nothing_goes_while_a_manifest_cannot_be_read",
        f"{U}/test_prune_logs.py::test_nothing_goes_while_a_place_does_not_answer",
    ),
    ("databases", PRUNE): (
        f"{I}/test_point_in_time.py::test_logs_that_no_kept_backup_needs_go_and_a_prune_that_is_killed_at_each_step_leaves_the_way_to_a_moment",
        f"{I}/test_logs_in_a_bucket.py::test_shipped_logs_are_locked_and_a_bucket_that_keeps_them_fails_nothing",
        f"{U}/test_prune_logs.py::test_killed_at_any_deletion_the_ways_are_the_same_and_the_next_run_finishes",
        f"{U}/test_log_plan.py::test_nothing_goes_while_the_log_in_which_a_backup_stands_is_damaged",
        f"{U}/test_log_plan.py::test_a_backup_whose_own_log_is_not_there_keeps_what_follows_it",
        f"{U}/test_prune_logs.py::test_a_deletion_whose_flag_was_taken_away_stops",
        f"{U}/test_prune_logs.py::test_logs_stay_in_the_spool_until_every_place_has_them",
    ),
    ("all", DRILL): (
        f"{I}/test_drill.py::test_a_drill_against_a_damaged_location_fails_loudly",
        f"{I}/test_drill.py::test_every_known_damage_is_told_and_the_backup_itself_is_untouched",
        f"{I}/test_drill.py::test_a_damage_that_nobody_notices_fails_the_drill",
    ),
}  # fmt: skip


def collected() -> list[str]:
    """Every test there is in the suites of backups, by its full name: those of `make test` and of `make test-long`."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", *FOLDERS],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the tests of backups cannot be collected: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def cases(tests: list[str]) -> dict[tuple[str, str, str], list[str]]:
    """{(component, step, test): its faults}: of a table the words of each case, of a single test its name."""
    found: dict[tuple[str, str, str], list[str]] = {}
    places = {name: place for place, names in FAULTS.items() for name in names}
    for full in tests:
        name, mark, case = full.partition("[")
        if name in places:
            found.setdefault((*places[name], name), []).append(
                case.removesuffix("]") if mark else name.partition("::")[2]
            )
    return found


def counts(found: dict[tuple[str, str, str], list[str]]) -> dict[tuple[str, str], int]:
    return dict(Counter(place[:2] for place, faults in found.items() for _ in faults))


def table(number: dict[tuple[str, str], int]) -> str:
    """Markdown, with a row for each component and a column for each step."""
    steps = [
        one
        for one in (BACKUP, STORE, READ, VERIFY, RESTORE, PRUNE, LOGS, DRILL)
        if any(step == one for _, step in number)
    ]
    rows = [["component", *steps, "together"]]
    for component in dict.fromkeys(one for one, _ in FAULTS):
        own = [number.get((component, step), 0) for step in steps]
        rows.append([component, *(str(one or "") for one in own), str(sum(own))])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    there = counts(cases(collected()))
    print(table(there))
    print(f"\n{sum(there.values())} faults.")
