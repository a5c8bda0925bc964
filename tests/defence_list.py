"""For each test that injects a fault into backups: the defence that it is about, as text, and what stands there without it.

Run by tests/defences.py; tests/unit/test_defences.py holds the texts to the code.
"""

from __future__ import annotations

from dataclasses import dataclass

Change = tuple[str, str, str]
"""(source file, the text that stands in it exactly once, what stands there instead)."""


@dataclass(frozen=True)
class Defence:
    """`also`: what would catch the fault in its place. `hangs`: without it the test does not end, and is given up."""

    test: str
    module: str
    code: str
    without: str
    what: str
    also: tuple[Change, ...] = ()
    hangs: bool = False

    @property
    def changes(self) -> tuple[Change, ...]:
        return (self.module, self.code, self.without), *self.also


U, I, E = "tests/unit/tasks/backup", "tests/integration/backup", "tests/e2e"  # noqa: E741
B = "tasks/backup"
STATUS = (f"{B}/chain.py", "if status != 0:", "if False:")
DECODED = (
    "if plain is not None and len(plain) == chunk.size_bytes and hashlib.sha256(plain).hexdigest() == chunk.sha256:"
)

# fmt: off
STORAGE = (
    Defence(f"{I}/test_storage_faults.py::test_while_a_backup_is_written",
            f"{B}/s3.py", "self._check_upload(name, data, checksum)", "pass", "what was sent to the store is looked at there"),
    Defence(f"{I}/test_storage_faults.py::test_a_directory_keeps_what_the_store_does_not_take",
            f"{B}/repository.py", "self.is_down(number, error)\n            if done:", "raise\n            if done:",
            "a place that fails is left out, and the others go on"),
    Defence(f"{I}/test_storage_faults.py::test_the_spool_keeps_what_the_only_store_does_not_take",
            f"{B}/repository.py", "return [self.spool_number]", "return []", "what no place takes goes into the spool"),
    Defence(f"{I}/test_storage_on_disk.py::test_a_full_disk_is_told_with_the_remedy_and_leaves_no_half_file",
            f"{B}/places.py", "temporary.unlink(missing_ok=True)", "pass", "a file that could not be written to its end is removed"),
    Defence(f"{I}/test_storage_on_disk.py::test_a_writer_killed_at_any_step_leaves_no_backup_or_a_whole_one_and_the_next_is_good",
            f"{B}/writer.py", "elif at:", "elif False:", "objects that a killed backup left are read, and used where they are right"),
    Defence(f"{I}/test_storage_on_disk.py::test_a_file_where_a_folder_should_be_is_told",
            f"{B}/places.py", 'raise self._error(error, name, "written") from error', "raise", "errors of a disk are told with a remedy"),
    Defence(f"{I}/test_storage_on_disk.py::test_a_read_only_disk_is_told_and_what_is_on_it_can_be_read",
            f"{B}/repository.py", "self.is_down(number, error)\n            if done:", "raise\n            if done:",
            "a place that fails is left out, and the others go on"),
    Defence(f"{I}/test_storage_s3.py::test_a_store_that_is_not_there_is_told_after_all_attempts_and_then_at_once",
            f"{B}/s3.py", "attempts = 1 if lately else self._attempts", "attempts = self._attempts",
            "a store that has just failed all attempts gets one only"),
    Defence(f"{U}/test_repository.py::test_of_two_that_write_one_name_at_once_one_wins_and_the_other_is_told",
            f"{B}/places.py", "final.hardlink_to(temporary)  #", "temporary.replace(final)  #",
            "a new name is taken by a link, which fails where there is one"),
    Defence(f"{U}/test_repository.py::test_two_backups_of_the_same_content_at_once_both_restore",
            f"{B}/codec.py", 'compressed = chunk.codec.startswith("zstd")',
            'compressed = chunk.codec.startswith("zstd")\n    if hashlib.sha256(data).hexdigest() != chunk.stored_sha256:\n'
            '        raise ArtifactError(f"object {chunk.object} has other bytes")',
            "an object is right by what it holds, not by how it is stored"),
    Defence(f"{U}/test_repository.py::test_a_disk_that_cannot_be_synced_does_not_count_and_the_other_does",
            f"{B}/repository.py", "self.is_down(number, error)  # what this place has is not certain", "pass  # what this place has is not certain",
            "a place that cannot be synced has no backup"),
    Defence(f"{I}/test_storage_faults.py::test_while_a_backup_is_read",
            f"{B}/s3.py", "self._attempts = attempts", "self._attempts = 1", "a request that fails is sent again"),
    Defence(f"{U}/test_damage.py::test_damage_is_told_and_another_place_makes_it_good",
            f"{B}/codec.py", DECODED, "if plain is not None:", "each object is compared with its SHA-256 when it is read"),
    Defence(f"{U}/test_repository.py::test_a_manifest_of_the_future_of_another_name_or_of_nobody_is_refused",
            f"{B}/repository.py", "if record.backup_id != backup_id:", "if False:", "a manifest must be of the backup that it is named after"),
    Defence(f"{U}/test_repository.py::test_a_bomb_is_not_unpacked",
            f"{B}/codec.py", "if parameters.content_size > at_most:", "if False:", "the size in a frame is looked at before it is unpacked"),
    Defence(f"{U}/test_repository.py::test_a_missing_object_is_named_before_anything_is_restored",
            f"{B}/upkeep.py", "if not known.at(chunk.object):", "if False:", "objects that no place lists are counted before a recovery"),
)

DATABASES = (
    Defence(f"{I}/test_database_faults.py::test_a_dump_that_is_killed_at_each_tenth_of_its_output",
            *STATUS, "the exit status of every program of a chain is looked at"),
    Defence(f"{I}/test_database_faults.py::test_a_dump_that_is_cut_at_a_statement_and_ends_with_exit_code_0",
            f"{B}/mariadb_dump.py", "if not TRAILER.search(self._tail):", "if False:", "a dump must have its last line"),
    Defence(f"{I}/test_database_faults.py::test_a_dump_that_lacks_one_row_and_is_whole_otherwise",
            f"{B}/mariadb.py", 'if counts[name]["rows"] != text.rows[name]:', "if False:",
            "the rows of the dump are compared with those that its moment had"),
    Defence(f"{I}/test_database_faults.py::test_a_dump_that_ends_with_an_exit_code_after_its_last_line",
            *STATUS, "the exit status of every program of a chain is looked at"),
    Defence(f"{I}/test_database_faults.py::test_a_dump_that_never_gives_a_byte",
            f"{B}/chain.py", "ready = selector.select(program.silent_seconds)", "ready = selector.select(None)",
            "a program that stands still is ended", hangs=True),
    Defence(f"{I}/test_database_faults.py::test_a_schema_that_changes_while_a_mariadb_is_dumped_is_dumped_again",
            f"{B}/mariadb.py", 'if facts["schema"]["sha256"] != before:', "if False:", "the schema is compared before and after the dump"),
    Defence(f"{I}/test_database_faults.py::test_a_schema_that_keeps_changing_is_no_backup_of_a_mariadb",
            f"{B}/mariadb.py", 'if facts["schema"]["sha256"] != before:', "if False:", "the schema is compared before and after the dump"),
    Defence(f"{I}/test_database_faults.py::test_a_schema_that_changes_while_a_postgresql_is_dumped_is_not_in_its_snapshot",
            f"{B}/postgresql.py", 'f"--snapshot={snapshot}", ', "", "pg_dump reads the snapshot in which is counted"),
    Defence(f"{I}/test_database_faults.py::test_connections_that_are_lost_while_they_are_dumped",
            *STATUS, "the exit status of every program of a chain is looked at"),
    Defence(f"{I}/test_database_faults.py::test_a_wrong_password_and_a_server_that_is_not_there",
            f"{B}/mariadb_access.py", 'raise self.failed(error, "cannot be reached") from error', "raise",
            "errors of the driver are told in our words, without secrets"),
    Defence(f"{I}/test_database_faults.py::test_a_disk_that_is_full_at_the_temporary_folder",
            f"{B}/chain.py", "except OSError as error:\n        if folder is not None:", "except ZeroDivisionError as error:\n        if folder is not None:",
            "a temporary file that cannot be written is told with a remedy"),
    Defence(f"{I}/test_mariadb.py::test_a_user_who_cannot_see_everything_makes_no_backup",
            f"{B}/mariadb.py", "check_privileges(control, where.database, where.shown)", "pass", "the rights of the user are looked at first"),
    Defence(f"{I}/test_mariadb.py::test_a_table_that_somebody_holds_for_long_is_dumped_when_it_is_free",
            f"{B}/mariadb_snapshot.py", "elif error.args[0] == _LOCK_TIMEOUT:", "elif False:",
            "without the lock the rows are counted in the dump's own text"),
    Defence(f"{I}/test_postgresql.py::test_rows_that_a_policy_hides_are_no_backup",
            f"{B}/postgresql_access.py", 'connection.execute("SET row_security = off")', "pass", "a count that a policy would cut is an error",
            ((f"{B}/postgresql.py", '"--no-tablespaces",', '"--no-tablespaces", "--enable-row-security",'),)),
    Defence(f"{U}/test_chain.py::test_a_program_that_is_killed_fails_the_chain_wherever_it_stands",
            *STATUS, "the exit status of every program of a chain is looked at"),
    Defence(f"{U}/test_dump_texts.py::test_a_dump_without_its_last_line_is_no_dump",
            f"{B}/mariadb_dump.py", "if not TRAILER.search(self._tail):", "if False:", "a dump must have its last line"),
    Defence(f"{U}/test_sqlite_part.py::test_a_damaged_database_is_no_backup",
            f"{B}/sqlite.py", 'if facts["integrity"] != "ok":\n        raise ArtifactError(\n            f"{origin} is damaged',
            'if False:\n        raise ArtifactError(\n            f"{origin} is damaged', "SQLite's own check of every page"),
    Defence(f"{U}/test_sqlite_part.py::test_a_database_that_is_not_there_is_told_and_not_made",
            f"{B}/sqlite.py", "if not origin.exists():", "if False:", "a file that is not there is told as that"),
    Defence(f"{U}/test_sqlite_part.py::test_a_database_that_somebody_holds_is_told_and_not_changed",
            f"{B}/sqlite.py", "if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) and time.monotonic() > deadline:", "if False:",
            "waiting for a database that is held has an end", hangs=True),
    Defence(f"{I}/test_database_faults.py::test_a_backup_that_was_changed_does_not_verify",
            f"{B}/mariadb.py", 'for field in ("rows", "checksum", "engine")', 'for field in ("rows", "engine")',
            "the content of tables is compared, not their rows alone"),
    Defence(f"{I}/test_database_faults.py::test_what_is_there_is_not_overwritten_unless_it_is_forced",
            f"{B}/mariadb.py", "if there and not target.force and marker not in marks:", "if False:", "what stands at the target is refused without force"),
    Defence(f"{I}/test_database_faults.py::test_a_restore_that_is_killed_is_begun_again_and_never_taken_for_whole",
            f"{B}/mariadb.py", "marks = {str(one) for (one,) in listed} & MARKERS", "marks = set()", "a half that was left is known by its mark"),
    Defence(f"{I}/test_database_faults.py::test_a_server_that_goes_away_in_a_restore",
            *STATUS, "the exit status of every program of a chain is looked at",
            ((f"{B}/mariadb.py", 'where.translated("failed in a restore")', "contextlib.nullcontext()"),)),
    Defence(f"{I}/test_mariadb.py::test_a_backup_of_another_kind_of_server_is_refused_and_never_verified",
            f"{B}/mariadb.py", 'if facts.get("flavour", host.flavour) != host.flavour:', "if False:", "the kind of server is compared"),
    Defence(f"{I}/test_postgresql.py::test_a_restore_that_fails_leaves_what_was_there_and_tells_no_row",
            f"{B}/postgresql.py", '"--single-transaction", ', "", "a restore is one transaction"),
    Defence(f"{U}/test_sqlite_part.py::test_a_copy_that_was_changed_is_not_restored",
            f"{B}/sqlite.py", "if differing := compare(copy, source.record.facts):", "if differing := list[str]():",
            "the copy is compared before the target is touched"),
    Defence(f"{U}/test_sqlite_part.py::test_what_is_there_is_not_overwritten_unless_it_is_forced",
            f"{B}/sqlite.py", "if (names := _tables(live)) and not force:", "if (names := _tables(live)) and False:",
            "what stands at the target is refused without force"),
    Defence(f"{U}/test_sqlite_part.py::test_a_file_put_in_place_beside_a_wal_is_undone_and_ours_is_not",
            f"{B}/sqlite.py", '_copy(copy, live, f"{path} into {place}")', "place.write_bytes(path.read_bytes())",
            "a database comes back through SQLite, not as a file"),
    Defence(f"{I}/test_point_in_time.py::test_a_damaged_or_a_missing_shipped_log_is_told_and_nothing_is_restored",
            f"{B}/point.py", "if following.begins_with != chain[-1].ends_with:", "if False:", "each log must begin where the one before it ended"),
    Defence(f"{I}/test_point_in_time.py::test_a_log_that_was_purged_before_it_was_shipped_is_a_gap_until_the_next_backup",
            f"{B}/ship_mariadb.py", "(gap := _gap(previous, name, found))", "(gap := None)", "each log must begin where the one before it ended"),
    Defence(f"{I}/test_point_in_time.py::test_another_server_or_one_that_begins_anew_is_never_taken_for_the_same",
            f"{B}/ship_mariadb.py", "if last.server != now.server:", "if False:", "the server is known by its ids"),
    Defence(f"{I}/test_point_in_time.py::test_ship_logs_is_killed_at_each_step_and_the_next_run_leaves_nothing_out",
            f"{B}/ship.py", "shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed", "pass", "what a killed run left is removed"),
    Defence(f"{I}/test_point_in_time.py::test_a_place_that_was_away_gets_the_logs_that_it_lacks",
            f"{B}/ship.py", "copied = shelf.copy_missing()", "copied = 0", "logs are brought to the places that lack them"),
)

REGISTRY_AND_MODELS = (
    Defence(f"{U}/test_registry_part.py::test_a_chain_that_was_tampered_with_is_backed_up_said_and_restored",
            f"{B}/registry_part.py", 'sink.warn(f"the audit chain does not verify, here as in the live registry: {fault}")', "pass",
            "faults of the audit chain are said in the backup"),
    Defence(f"{U}/test_registry_part.py::test_a_registry_that_is_gone_or_of_another_release_fails",
            "registry/restoring.py", "if (found := source.revision()) != REVISION:", "if (found := source.revision()) and False:",
            "the revision of the schema is looked at"),
    Defence(f"{U}/test_registry_part.py::test_a_backup_that_was_taken_during_a_promotion_comes_back_without_it",
            "registry/restoring.py", "let_go = _let_go(transaction, origin)", "let_go = list[object]()", "what was under way is ended by a restore"),
    Defence(f"{I}/test_registry_kinds.py::test_a_server_that_is_gone_fails_the_component",
            "registry/database.py", "raise dialects.translate(error, self.shown) from error", "raise",
            "errors of the driver are told in our words, without secrets"),
    Defence(f"{U}/test_registry_part.py::test_a_damaged_backup_is_never_called_verified",
            f"{B}/registry_part.py", "if found != facts.get(name)", "if False",
            "routes, generations, digests and the audit chain are compared with the manifest"),
    Defence(f"{U}/test_registry_part.py::test_killed_at_any_step_the_next_call_finishes_it",
            "registry/restoring.py", "if fresh:", "if False:", "an empty target is marked before it is filled"),
    Defence(f"{U}/test_registry_part.py::test_a_damaged_backup_changes_nothing_at_its_target",
            f"{B}/registry_part.py", "if differences := _differences(copy, source.record.facts):", "if differences := list[str]():",
            "the copy is compared before the target is touched"),
    Defence(f"{U}/test_registry_part.py::test_a_registry_that_holds_something_is_refused_and_replaced_only_by_force",
            "registry/restoring.py", "if held and not force:", "if False:", "what stands at the target is refused without force"),
    Defence(f"{U}/test_models_part.py::test_an_artifact_that_is_not_there_as_it_should_fails_the_component_by_its_version",
            f"{B}/models.py", "if stream.sha256 != digest:", "if False:", "an artifact is hashed while it is read"),
    Defence(f"{U}/test_models_part.py::test_after_a_promotion_during_the_backup_registry_and_artifacts_agree",
            f"{B}/models.py", "self.needs = found.needs", "pass", "which artifacts belong to it is said by the registry's snapshot"),
    Defence(f"{U}/test_models_part.py::test_a_version_that_is_deleted_in_between_is_said_and_no_fault",
            f"{B}/models.py", "if wanted:", "if True:", "the live registry says whether a missing artifact is wanted"),
    Defence(f"{U}/test_models_part.py::test_a_damaged_backup_is_never_called_verified",
            f"{B}/models.py", 'if _list_digest(artifacts) != facts["sha256"] or len(artifacts) != facts["artifacts"]:', "if False:",
            "the list of artifacts is compared with the manifest"),
    Defence(f"{U}/test_models_part.py::test_a_model_that_no_longer_answers_as_it_did_is_not_verified",
            f"{B}/models.py", "if not found.loaded:", "if False:", "a model that does not load is a difference"),
    Defence(f"{U}/test_models_part.py::test_a_probe_that_ends_without_a_result_verifies_nothing",
            f"{B}/models.py", 'return [f"{one.name} was not measured: {result.problem or result.outcome}"]', "return []",
            "a probe without a result is a difference"),
    Defence(f"{U}/test_models_part.py::test_a_damaged_artifact_is_not_put_into_a_store",
            "registry/store.py", "if due is not None and digest.hexdigest() != due:", "if False:", "bytes take a name in the store that they hash to"),
    Defence(f"{U}/test_models_part.py::test_an_interrupted_restore_goes_on",
            f"{B}/models.py", "if _whole(store, digest):", "if False:", "artifacts that are there already are left alone"),
)

REST = (
    Defence(f"{I}/test_vectors.py::test_a_damaged_backup_is_never_called_verified",
            f"{B}/vectors.py", 'if not near(record["embedding"], found["embedding"]):', "if False:", "each vector is compared",
            ((f"{B}/vectors.py", 'differences += compare_neighbours(name, end["queries"], due["queries"])', "pass"),)),
    Defence(f"{I}/test_queues.py::test_keys_that_are_consumed_or_evicted_meanwhile_are_named",
            f"{B}/queues.py", "self.gone.append(shown(name))", "pass", "keys that went away while they were read are named"),
    Defence(f"{I}/test_queues.py::test_a_key_that_takes_another_type_meanwhile_is_read_again",
            f"{B}/keyvalues.py", 'if "changed" not in found:', "if True:", "a key whose type has changed is read again"),
    Defence(f"{I}/test_queues.py::test_a_redis_that_dies_fails_the_component",
            f"{B}/keyvalues.py", "except (redis.RedisError, RedisClusterException, OSError) as error:", "except ZeroDivisionError as error:",
            "errors of the client are told in our words"),
    Defence(f"{I}/test_queues.py::test_a_damaged_backup_is_never_called_verified",
            f"{B}/queues.py", '("content of all keys", combined(hashes), facts["sha256"]),', "", "the content of all keys is compared with the manifest"),
    Defence(f"{I}/test_queues.py::test_a_key_that_stands_there_is_refused_before_anything_is_written",
            f"{B}/queues.py", "if taken and not target.force:", "if False:", "all keys are looked at before one is written"),
    Defence(f"{I}/test_queues.py::test_an_interrupted_restore_goes_on",
            f"{B}/queues.py", "elif value.name in there:", "elif False:", "keys that are there as they should be are left alone"),
    Defence(f"{I}/test_queues.py::test_a_full_redis_says_so",
            f"{B}/keyvalues.py", "except OutOfMemoryError as error:", "except ZeroDivisionError as error:", "a full Redis is told as that"),
    Defence(f"{U}/test_folders.py::test_a_file_that_changes_while_it_is_read",
            f"{B}/folders.py", "elif not last:", "elif False:", "a file that has changed is read again"),
    Defence(f"{U}/test_folders.py::test_a_damaged_backup_is_never_called_verified",
            f"{B}/untree.py", 'if digest.hexdigest() != facts["sha256"]:', "if False:", "each file is hashed before it takes its name"),
    Defence(f"{U}/test_folders.py::test_a_name_that_leads_out_is_refused",
            f"{B}/untree.py", 'if any(part in ("", ".", "..") or "\\0" in part for part in parts):', "if False:", "names of the index are looked at"),
    Defence(f"{U}/test_folders.py::test_nothing_is_written_through_a_link_in_the_index",
            f"{B}/untree.py", "_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC",
            "_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC", "folders are entered without following links"),
    Defence(f"{U}/test_config_part.py::test_a_damaged_backup_is_never_called_verified",
            f"{B}/config_part.py", 'for name, data in files.items()}) != source.record.facts["files"]:', "for name, data in files.items()}) != found:",
            "each file is compared with the hash in the manifest"),
)

WHOLE_RUNS = (
    Defence(f"{U}/test_run.py::test_a_component_that_fails_makes_the_backup_partial_and_the_others_are_there",
            f"{B}/run.py", "if not isinstance(error, Exception):", "if True:", "an error of one component leaves the others alone"),
    Defence(f"{U}/test_run.py::test_a_restore_in_the_middle_voids_the_backup",
            f"{B}/run.py", 'if epoch != held.token.rpartition(".")[0]:', "if False:", "the registry's epoch is compared at the end"),
    Defence(f"{U}/test_run.py::test_what_a_killed_backup_left_is_swept_and_noted_by_the_next",
            f"{B}/sweeping.py", "said.append(_note_killed(repository, home, database, backup_id, begun))", "pass",
            "a backup that was killed is noted as failed by the next"),
    Defence(f"{U}/test_run.py::test_two_homes_of_one_registry_do_not_back_up_at_once",
            f"{B}/run.py", "held = take_lease(database, settings.environment, lock, ttl_seconds=settings.lease_seconds)", "held = None",
            "a backup holds the registry's lease"),
    Defence(f"{U}/test_run.py::test_without_the_registry_the_rest_is_backed_up_and_it_is_said",
            f"{B}/run.py", 'if part.name == "registry" and self.registry.why is not None:', "if False:",
            "a registry that is away or gone is not taken for a backed up one"),
    Defence(f"{E}/test_backup_command.py::test_killed_at_any_point_it_leaves_no_half_backup_and_the_next_one_is_whole",
            f"{B}/sweeping.py", "for backup_id, intent in intents.items():\n        if _dead(intent, home):",
            "for backup_id, intent in intents.items():\n        if False:", "the intent of a dead backup is removed"),
    Defence(f"{I}/test_recover.py::test_what_is_there_is_not_overwritten_unasked",
            f"{B}/recover.py", "if standing is not None and not force and not journal.ours(one.component.name, standing):", "if False:",
            "what stands at a target is a problem of the plan"),
    Defence(f"{I}/test_recover.py::test_an_object_that_is_gone_is_seen_before_anything_is_written",
            f"{B}/recover.py", "if not gone:", "if True:", "objects that no place lists are a problem of the plan"),
    Defence(f"{I}/test_recover.py::test_a_damaged_object_fails_its_component_and_the_registry_is_not_begun",
            f"{B}/recover.py", 'if outcome.failed and name == "registry" and', "if False and", "the registry comes last, and only where nothing failed"),
    Defence(f"{I}/test_recover.py::test_a_recovery_that_was_killed_at_any_step_goes_on",
            f"{B}/recover.py", "force = (step.target.force or mine) and", "force = step.target.force and", "what a killed recovery left is known as its own"),
    Defence(f"{U}/test_prune.py::test_a_prune_that_was_killed_at_any_step_is_finished_by_the_next",
            f"{B}/prune.py", "if manifest is None:\n        if standing.pruned or not notes:",
            "if manifest is None or standing.pruned:\n        if standing.pruned or not notes:",
            "a backup is gone when its manifest is, not when that is noted"),
    Defence(f"{U}/test_prune.py::test_nothing_is_deleted_while_a_backup_is_under_way",
            f"{B}/garbage.py", "_delete_due(flag, known, now - grace, ours.waits)", "_delete_due(flag, known, now - grace, None)",
            "intents are respected"),
    Defence(f"{U}/test_prune.py::test_two_collections_do_not_run_at_once",
            f"{B}/garbage.py", "if seen is None:\n                self._put(only_new=True)", "if True:\n                self._put()",
            "the flag of a collection is raised by one only"),
    Defence(f"{U}/test_prune.py::test_while_a_manifest_cannot_be_read_nothing_is_marked_or_deleted",
            f"{B}/garbage.py", "scan.unanswered or scan.unbelieved", "scan.unanswered", "a manifest that cannot be read stops the collection"),
    Defence(f"{U}/test_prune.py::test_while_an_index_is_damaged_nothing_is_deleted",
            f"{B}/garbage.py", 'return f"the index of {component.name} in backup {record.backup_id} cannot be read: {error}"', "continue",
            "an index that cannot be read stops the collection"),
    Defence(f"{U}/test_prune.py::test_nothing_is_decided_while_a_place_does_not_answer",
            f"{B}/prune.py", "if scan.unanswered is not None:", "if False:", "a place that does not answer stops the decision",
            ((f"{B}/prune.py", "if repository.down:", "if False:"),)),
    Defence(f"{U}/test_prune.py::test_an_object_written_between_its_mark_and_the_deletion_stays",
            f"{B}/garbage.py", "if stat is None or clock.text(stat.modified) != modified:", "if stat is None:",
            "an object that was written since is not the one that was marked"),
    Defence(f"{I}/test_drill.py::test_a_drill_against_a_damaged_location_fails_loudly",
            f"{B}/drill.py", 'found = [f"{one.component}: {one.failed}" for one in components if one.failed is not None]', "found = list[str]()",
            "a component that does not come back fails the drill"),
    Defence(f"{I}/test_drill.py::test_every_known_damage_is_told_and_the_backup_itself_is_untouched",
            f"{B}/repository.py", "manifest.check_digest(json.loads(text), name)", "pass", "a manifest is compared with its digest"),
    Defence(f"{I}/test_drill.py::test_a_damage_that_nobody_notices_fails_the_drill",
            f"{B}/drill.py", "if not negative.told:", "if False:", "a damage that was not told fails the drill"),
)

_PIECES = (
    "    for number, place in places:\n        for name in item.pieces.get(number, ()):\n            if (why := going.stops()) is not None:\n"
    "                return why\n            place.delete(name)\n        _tidy(place, item)\n"
)
_DOCUMENTS = (
    "    for number, place in places:\n        if (name := item.documents.get(number)) is not None:\n            place.delete(name)\n"
)
PRUNED_LOGS = (
    Defence(f"{U}/test_prune_logs.py::test_nothing_goes_while_a_backup_or_a_shipment_is_under_way",
            f"{B}/prune_logs.py", "ours.waits or why or found.waits", "why or found.waits", "intents are respected"),
    Defence(f"{U}/test_prune_logs.py::test_nothing_goes_while_a_manifest_cannot_be_read",
            f"{B}/prune_logs.py", "return scan.manifests, scan.unbelieved", "return scan.manifests, None",
            "a manifest that cannot be read stops the deletion"),
    Defence(f"{U}/test_prune_logs.py::test_nothing_goes_while_a_place_does_not_answer",
            f"{B}/prune_logs.py", "if scan.unanswered is not None:", "if False:", "a place that does not answer stops the deletion"),
    Defence(f"{I}/test_point_in_time.py::test_logs_that_no_kept_backup_needs_go_and_a_prune_that_is_killed_at_each_step_leaves_the_way_to_a_moment",
            f"{B}/log_retention.py", "mark < self.first", "mark <= self.first", "the log in which a kept backup stands stays"),
    Defence(f"{I}/test_logs_in_a_bucket.py::test_shipped_logs_are_locked_and_a_bucket_that_keeps_them_fails_nothing",
            f"{B}/prune_logs.py", "places.sort(key=lambda one: not _may_refuse(one[1]))", "pass",
            "a place that may refuse is asked before another copy is gone"),
    Defence(f"{U}/test_prune_logs.py::test_killed_at_any_deletion_the_ways_are_the_same_and_the_next_run_finishes",
            f"{B}/prune_logs.py", _DOCUMENTS + _PIECES, _PIECES + _DOCUMENTS, "the document of a log goes before its pieces"),
    Defence(f"{U}/test_log_plan.py::test_nothing_goes_while_the_log_in_which_a_backup_stands_is_damaged",
            f"{B}/log_plan.py", 'found.append(OfDatabase(database, "", len(items), size, unreadable=why))', "pass",
            "a log that cannot be read is told, and all stay"),
    Defence(f"{U}/test_log_plan.py::test_a_backup_whose_own_log_is_not_there_keeps_what_follows_it",
            f"{B}/log_plan.py", "return min(later, default=None)", "return None", "what could follow a backup stays, its own log there or not"),
    Defence(f"{U}/test_prune_logs.py::test_a_deletion_whose_flag_was_taken_away_stops",
            f"{B}/prune_logs.py", "self.flags.still_ours() else", "True else", "the flag is looked at between two deletions"),
    Defence(f"{U}/test_prune_logs.py::test_logs_stay_in_the_spool_until_every_place_has_them",
            f"{B}/upkeep.py", 'startswith(("keys/", "logs/"))', 'startswith("keys/")', "a backup takes no logs out of the spool"),
)
# fmt: on

DEFENCES = (*STORAGE, *DATABASES, *REGISTRY_AND_MODELS, *REST, *WHOLE_RUNS, *PRUNED_LOGS)
