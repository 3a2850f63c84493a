"""`kill -9` at every crash point of the program, with data in flight: the next run goes on by itself, the tables come out exact.

Every point belongs to the scene that is to hit it; the last test compares that list with the points in the source.

By default the points of a scene are hit in turn, one life after another on the same tables: each life but the first recovers
from the kill before it, and is killed at the next point. Then the job goes on, and everything is compared with the topics.
`TIDEMILL_TEST_HITS=1` puts the scene back before each point, and goes on and compares after each; `2` kills at a later hit
too, and `all` sweeps each point in every scene that hits it, at up to `HITS_MAX` of its hits and the last.
`TIDEMILL_TEST_PAIRS` is the number of pairs per scene: a run and the run that recovers are killed at points that are drawn.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

import ledger
from conftest import Corner
from events import NOW_MS, event
from hands import forget_history
from job import COLUMNS, Job, binary, started, tidemill
from services import wait_until
from sweep import KILLED, SOURCE_AWAY, Scene, report
from truth import start_offsets

SEED = 20_260_202
SOURCE = Path(__file__).parents[2] / "src"
HITS = os.environ.get("TIDEMILL_TEST_HITS", "in turn")
IN_TURN = HITS == "in turn"
ALL_HITS = HITS == "all"
PAIRS = int(os.environ.get("TIDEMILL_TEST_PAIRS", "0" if IN_TURN else "2"))
HITS_MAX = 3
# What a scene without points of its own is killed at.
POINTS_DRAWN = 5
# A point on a thread beside the batches may come after the end of the run; then the run is done again.
TRIES_MAX = 8
POINTS_MIN = 60
# So long ago that no event of a scene is ahead of its time.
BEGIN_MS = NOW_MS - 100 * 24 * 3_600_000
MINUTE_MS = 60_000


def feed(place: Corner, topic: str, numbers: range, ms_per_number: int = 1) -> None:
    """Events with repeats, near and far, and refused ones. An event's time follows from its number, in all its copies."""
    draws = random.Random(SEED + numbers.start)
    sender = place.feed(topic)

    def send(number: int, **members: object) -> None:
        sender.send(event(number, ts=BEGIN_MS + number * ms_per_number, **members), flush=False)

    for number in numbers:
        send(number)
        if draws.random() < 0.1:
            send(max(numbers.start, number - draws.randrange(50)))
        if draws.random() < 0.05:
            send(draws.randrange(number + 1))
        if draws.random() < 0.03:
            send(number, event_type=None)
    sender.flush()


def a_first_run(place: Corner) -> Scene:
    """Catalog, tables, state and ledger are made, then a dozen microbatches: a kill in each still leaves records to read."""
    topic = place.topic(partitions=2)
    feed(place, topic, range(1_000))
    # the last microbatch owes the side table files too, so that the release is a commit of its own
    last = ((number, None if number % 3 == 0 else "sent") for number in range(1_000, 1_060))
    place.feed(topic).send(*(event(number, ts=BEGIN_MS + number, event_type=kind) for number, kind in last))
    job = place.job(topic, microbatch={"max_records": 100}, max_ratio=0.5)
    return Scene(job, place.truth(topic))


def a_run_that_merges(place: Corner) -> Scene:
    """Seven microbatches stand; the eighth fills a tier, and older generations are swept."""
    topic = place.topic(partitions=2)
    feed(place, topic, range(1_300))
    job = place.job(topic, microbatch={"max_records": 150}, max_ratio=0.5)
    job.run("--max-batches", "7").expect(0)
    return Scene(job, place.truth(topic))


def a_run_that_rebuilds_and_widens(place: Corner) -> Scene:
    """The state is gone, the window doubled, a column added, and events come that are older than the window."""
    topic = place.topic()
    job = place.job(topic, window="2 hours", microbatch={"max_records": 300}, max_ratio=0.5)
    feed(place, topic, range(600), MINUTE_MS)
    job.run().expect(0)
    feed(place, topic, range(500, 800), MINUTE_MS)
    feed(place, topic, range(60), MINUTE_MS)
    feed(place, topic, range(700, 1_000), MINUTE_MS)
    shutil.rmtree(job.folder / "state")
    job.window, job.columns = "4 hours", COLUMNS + 'added_later = { type = "string" }\n'
    job.write()
    return Scene(job, place.truth(topic))


def a_loss_that_is_accepted(place: Corner) -> Scene:
    """Records were deleted before they were read; `accept-loss` moves the offsets."""
    topic = place.topic()
    job = place.job(topic, microbatch={"max_records": 100}, max_ratio=0.5)
    feed(place, topic, range(200))
    job.run().expect(0)
    truth = place.truth(topic)
    feed(place, topic, range(200, 300))
    place.broker.delete_records(topic, 0, place.truth(topic, keep_rows=False).ends[topic, 0])
    truth.ends.update(start_offsets(place.broker.bootstrap, [topic]))
    feed(place, topic, range(150, 500))
    return Scene(job, truth.advance(), command=["accept-loss", "--yes"], stops={"OFFSETS_LOST"})


def a_batch_that_the_brake_stops(place: Corner) -> Scene:
    """More refused rows than allowed: the open batch is dropped, and let through on request."""
    topic = place.topic(partitions=2)
    feed(place, topic, range(1_200))
    sender = place.feed(topic)
    sender.send(*(event(number, event_type=None) for number in range(300)))
    job = place.job(topic, microbatch={"max_records": 2_000}, max_ratio=0.1)
    return Scene(job, place.truth(topic), exit_code=21, stops={"BRAKE"})


def a_page_that_is_damaged(place: Corner) -> Scene:
    """A page of the state is damaged: its file is set aside, and the next run rebuilds."""
    topic = place.topic()
    feed(place, topic, range(3_000))
    job = place.job(topic, microbatch={"max_records": 2_000}, max_ratio=0.5)
    job.run().expect(0)
    largest = max((job.folder / "state").rglob("*.segment"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x40
    largest.write_bytes(content)
    feed(place, topic, range(3_500))
    return Scene(job, place.truth(topic), exit_code=14, stops={"STORAGE_FAILED"})


def a_batch_of_many_days(place: Corner) -> Scene:
    """Each open file has a large filter to build: more of them than the memory holds, so that some are closed early."""
    topic = place.topic()
    feed(place, topic, range(280), 6 * 60 * MINUTE_MS)
    filters = {"write.parquet.bloom-filter-enabled.column.event_id": "true"}
    job = place.job(
        topic, microbatch={"max_records": 400}, max_ratio=0.5, memory="256 MiB", table_properties=filters
    )
    return Scene(job, place.truth(topic))


def a_state_that_is_discarded(place: Corner) -> Scene:
    """The state folder is deleted on request while records wait."""
    topic = place.topic()
    feed(place, topic, range(300))
    job = place.job(topic, microbatch={"max_records": 200}, max_ratio=0.5)
    job.run().expect(0)
    feed(place, topic, range(200, 500))
    return Scene(job, place.truth(topic), command=["state discard", "--yes"])


def a_run_that_maintains(place: Corner) -> Scene:
    """Snapshots expire, manifests are merged, and files that nothing names any more are deleted between the microbatches."""
    topic = place.topic()
    feed(place, topic, range(500))
    maintenance: dict[str, str | int] = {"every_commits": 2, "max_snapshots": 2}
    job = place.job(topic, microbatch={"max_records": 100}, max_ratio=0.5, maintenance=maintenance)
    job.run("--max-batches", "1").expect(0)
    with job.reader().table.transaction() as change:
        change.set_properties({"commit.manifest.min-count-to-merge": "2"})
    return Scene(job, place.truth(topic), is_history_kept=False)


def a_savepoint(place: Corner, *more: range) -> tuple[Job, str]:
    """A job with a savepoint after its first events; later ones are taken, and the last of them wait."""
    topic = place.topic(partitions=2)
    feed(place, topic, range(300))
    job = place.job(topic, microbatch={"max_records": 200}, max_ratio=0.5)
    job.run().expect(0)
    for numbers in more:
        tidemill("savepoint", "create", job.path, "before").expect(0)
        feed(place, topic, numbers)
        job.run().expect(0)
    feed(place, topic, range(250, 600))
    return job, topic


def a_savepoint_that_is_made(place: Corner) -> Scene:
    """Both tables are tagged."""
    job, topic = a_savepoint(place)
    return Scene(job, place.truth(topic), command=["savepoint create", "before"], is_done="savepoint before stands already")


def a_savepoint_that_is_gone_back_to(place: Corner) -> Scene:
    """Both tables, offsets and state go back; what came after is read again."""
    job, topic = a_savepoint(place, range(200, 500))
    command = ["savepoint restore", "before", "--yes"]
    return Scene(job, place.truth(topic), command=command, is_history_kept=False)


def a_savepoint_that_is_dropped(place: Corner) -> Scene:
    """Both tables lose their tag."""
    job, topic = a_savepoint(place, range(200, 500))
    return Scene(job, place.truth(topic), command=["savepoint drop", "before", "--yes"], is_done="has no savepoint before")


def a_run_that_copies(place: Corner) -> Scene:
    """New files of the state are copied, and copies that nobody needs are deleted."""
    topic = place.topic(partitions=2)
    job = place.job(topic, microbatch={"max_records": 150}, max_ratio=0.5)
    command = ["run", "--json", "--set", f"state.copy_to={job.folder}/copies"]
    for begin in (0, 300):
        feed(place, topic, range(begin, begin + 300))
        job.run(*command[2:]).expect(0)
    feed(place, topic, range(500, 900))
    return Scene(job, place.truth(topic), command=command)


def a_start_that_takes_a_copy(place: Corner) -> Scene:
    """The state is gone, and its copy lags by the last batches."""
    topic = place.topic(partitions=2)
    job = place.job(topic, microbatch={"max_records": 150}, max_ratio=0.5)
    command = ["run", "--json", "--set", f"state.copy_to={job.folder}/copies"]
    feed(place, topic, range(300))
    job.run(*command[2:]).expect(0)
    feed(place, topic, range(200, 600))
    job.run().expect(0)
    shutil.rmtree(job.folder / "state")
    feed(place, topic, range(500, 700))
    return Scene(job, place.truth(topic), command=command)


def a_backfill_that_is_registered(place: Corner) -> Scene:
    """A lane over half of the records, most of which are in the table, beside what live has still to read."""
    topic = place.topic(partitions=2)
    feed(place, topic, range(300))
    job = place.job(topic, microbatch={"max_records": 150}, max_ratio=0.5)
    job.run().expect(0)
    feed(place, topic, range(250, 400))
    begin = datetime.fromtimestamp(NOW_MS / 1000 - 3_600, UTC).isoformat()
    # Without a name of its own: it may be killed and given again.
    command = ["backfill", "--from", begin, "--yes", "--json"]
    # What a backfill reads lies in ranges of its own, which the check of conservation does not know.
    return Scene(job, place.truth(topic), command=command, is_history_kept=False)


def a_request_that_is_taken_up(place: Corner) -> Scene:
    """Somebody left a request in the table: a backfill with nothing to read."""
    topic = place.topic()
    feed(place, topic, range(200))
    job = place.job(topic, microbatch={"max_records": 150}, max_ratio=0.5)
    job.run().expect(0)
    feed(place, topic, range(150, 300))
    table = job.reader().table
    record = ledger.full_record(table)
    spans = {topic: {"0": {"start": 0, "end": 0}}}
    ask = {"backfill": {"lane": "asked", "from_ms": 0, "spans": spans}}
    request = {"format": 1, "job_id": record["job_id"], "ask": ask}
    with table.transaction() as change:
        change.set_properties({f"tidemill.request.{uuid.uuid4()}": json.dumps(request)})
    return Scene(job, place.truth(topic))


def letters_that_are_written_again(place: Corner) -> Scene:
    """A run died before the side table followed, and the files that it is owed are gone: `side reread` writes them again."""
    topic = place.topic(partitions=2)
    feed(place, topic, range(400))
    job = place.job(topic, microbatch={"max_records": 300}, max_ratio=0.5)
    assert job.run(environment={"TIDEMILL_CRASH_AT": "main_landed:2"}).exit_code == KILLED
    for file in ledger.full_record(job.reader().table)["sides"]["dead_letters"]["files"]:
        Path(file["path"].removeprefix("file://")).unlink()
    return Scene(job, place.truth(topic), command=["side reread", "--yes"], stops={"SIDE_FILES_LOST"})


def a_pass_over_letters_that_was_killed(place: Corner) -> Scene:
    """A pass said what it will delete of the dead-letter table, and died: the next owner has the table to itself first."""
    topic = place.topic()
    feed(place, topic, range(300))
    job = place.job(topic, microbatch={"max_records": 50}, max_ratio=0.5, maintenance={"every_commits": 2})
    job.run().expect(0)
    # main has its turn first
    words = ("table", "expire", job.path, "--older-than", "0s", "--retain-last", "2", "--yes")
    killed = tidemill(*words, environment={"TIDEMILL_CRASH_AT": "maintenance_intended:2"})
    assert killed.exit_code == KILLED, killed.stdout + killed.stderr
    feed(place, topic, range(250, 500))
    return Scene(job, place.truth(topic), is_history_kept=False)


# Which scene is to hit which point.
POINTS: dict[Callable[[Corner], Scene], str] = {
    a_first_run: """
        start lock_folder_made lock_taken catalog_file_made verified namespace_made table_made table_folders_synced
        tables_ready lock_line_written lock_line_synced main_sent request_to_send request_answered main_landed fenced
        side_claimed state_folder_made
        read rows_decoded keys_probed first_data_file_byte data_file_begins data_file_open data_rows_taken
        letters_looked_up letters_written data_file_closed data_folders_to_sync data_folders_synced main_files_closed
        side_files_closed
        data_files_closed batch_segment_created segment_pages_written segment_header_written segment_footer_written
        segment_synced batch_segment_filled batch_segment_durable generation_drafted manifest_created manifest_written
        manifest_synced generation_durable state_prepared record_made sides_sent side_files_looked_up sides_landed published
        sweep_ended state_swept lag_tools_told release_to_send released
    """,
    a_run_that_merges: """
        merge_output_created merge_runs merge_output_filled merge_ended merge_adopted sweep_deletes sweep_deleted
    """,
    a_run_that_rebuilds_and_widens: """
        columns_to_add columns_added rebuild_keys_read rebuild_lease_renewed rebuilt_segment_durable
        rebuilt_manifest_durable rebuilt_generation_durable rebuild_compared change_to_commit change_committed run_file_created run_file_unlinked loan_keys_read window_widened
        bucket_lent adopted_segment_created adopted_segment_durable
    """,
    a_loss_that_is_accepted: "",
    a_batch_that_the_brake_stops: "batch_to_drop data_file_given_up batch_dropped",
    a_page_that_is_damaged: "damaged_file_renamed damaged_file_set_aside",
    a_batch_of_many_days: "data_file_closed_early",
    a_state_that_is_discarded: "state_to_discard state_discarded",
    a_backfill_that_is_registered: "backfill_to_register backfill_registered",
    a_request_that_is_taken_up: "request_to_grant request_granted",
    a_run_that_maintains: """
        maintenance_intended maintenance_merged maintenance_landed maintenance_deleting maintenance_deleted
        maintenance_finished maintenance_swept
    """,
    a_pass_over_letters_that_was_killed: "maintenance_side_fenced",
    letters_that_are_written_again: "other_files_owed",
    a_savepoint_that_is_made: "savepoint_side_tagged savepoint_main_tagged updates_written",
    a_savepoint_that_is_gone_back_to: "savepoint_to_restore savepoint_main_restored savepoint_sides_restored",
    a_savepoint_that_is_dropped: "savepoint_main_untagged savepoint_side_untagged",
    a_run_that_copies: "copy_segment_written copy_manifest_written copy_deleted",
    a_start_that_takes_a_copy: "copy_segment_arrived copy_arrived copy_rows_read",
}


# Exit code of a command that can not be followed as it was given.
USAGE = 2
# Points of tables that no scene has, at which test_late.py kills, one of a run that has no end, and one behind others' hands.
ELSEWHERE = "late_rows_written marks_written heartbeat rows_looked_up"


def hits_of(scene: Scene, trace: Path) -> Counter[str]:
    """How often an undisturbed run passes each point."""
    trace.unlink(missing_ok=True)
    scene.restore().strike(TIDEMILL_POINTS=str(trace)).expect(scene.exit_code)
    return Counter(trace.read_text().split())


def hits_to_try(hits: int, draws: random.Random) -> list[int]:
    """The first hit; a later one too, or the first ones and the last, as `TIDEMILL_TEST_HITS` says."""
    if ALL_HITS:
        return sorted({*range(1, min(hits, HITS_MAX) + 1), max(hits, 1)})
    return [1] if hits < 2 or HITS == "1" else [1, draws.randint(2, hits)]


def kill_at(scene: Scene, point: str, hit: int) -> bool:
    """Runs the command until the point kills it; false if it ended before, as it always would."""
    outcome = scene.strike(TIDEMILL_CRASH_AT=f"{point}:{hit}")
    if scene.is_done and outcome.exit_code == USAGE and scene.is_done in outcome.stderr:
        return False
    assert outcome.exit_code in (KILLED, scene.exit_code, SOURCE_AWAY, 0), f"{outcome.command} {point}:{hit}\n{outcome.stderr}"
    return outcome.exit_code == KILLED


@pytest.mark.parametrize("build", POINTS, ids=lambda build: build.__name__)
def test_a_kill_at_every_point_leaves_the_tables_exact(place: Corner, build: Callable[[Corner], Scene]) -> None:
    scene = build(place)
    draws = random.Random(SEED)
    # in the order in which a run passes them first
    passed = hits_of(scene, place.folder / "points")
    scene.go_on_and_check()
    listed = POINTS[build].split() or draws.sample(sorted(passed), min(POINTS_DRAWN, len(passed)))
    assert set(listed) <= set(passed), f"points that the scene does not reach: {sorted(set(listed) - set(passed))}"
    points = [point for point in passed if ALL_HITS or point in listed]
    kills = kill_in_turn(scene, points) if IN_TURN else kill_alone(scene, points, passed, draws)
    pairs = kill_pairs(scene, sorted(passed.elements()), draws)
    print(f"seed {SEED}: {kills.total()} kills at {len(kills)} points, {len(pairs)} pairs, exact after each")
    facts = {"seed": SEED, "kills": kills, "passed": passed, "pairs": pairs, "in_turn": IN_TURN}
    report(f"crash-points-{build.__name__}", facts)
    assert all(kills[point] for point in points), f"no kill at {[point for point in points if not kills[point]]}"


def kill_in_turn(scene: Scene, points: list[str]) -> Counter[str]:
    """Kills one life after another, each at the next point. A life that ends before its point has everything compared, and
    the next one begins where the scene does."""
    kills: Counter[str] = Counter()
    scene.restore()
    for point in points:
        for _ in range(TRIES_MAX):
            if kill_at(scene, point, 1):
                kills[point] += 1
                break
            scene.go_on_and_check()
            scene.restore()
    scene.go_on_and_check()
    return kills


def kill_alone(scene: Scene, points: list[str], passed: Counter[str], draws: random.Random) -> Counter[str]:
    """Kills at each point, every time from where the scene begins, and has everything compared after each kill."""
    kills: Counter[str] = Counter()
    for point in points:
        for hit in hits_to_try(passed[point], draws):
            for _ in range(TRIES_MAX if hit == 1 else 1):
                if kill_at(scene.restore(), point, hit):
                    kills[point] += 1
                    break
            scene.go_on_and_check()
    return kills


def kill_pairs(scene: Scene, passed: list[str], draws: random.Random) -> list[str]:
    """Kills a run, then the run that recovers, at points drawn by how often they are passed."""
    pairs: list[str] = []
    for _ in range(PAIRS * TRIES_MAX):
        if len(pairs) == PAIRS:
            break
        first, second = draws.choice(passed), draws.choice(passed)
        hit, again = draws.randint(1, 3), draws.randint(1, 2)
        if not kill_at(scene.restore(), first, hit):
            continue
        both = kill_at(scene, second, again)
        scene.go_on_and_check()
        if both:
            pairs.append(f"{first}:{hit} {second}:{again}")
    return pairs


def test_a_kill_at_a_heartbeat_leaves_the_tables_exact(place: Corner) -> None:
    topic = place.topic(partitions=2)
    job = place.job(topic, microbatch={"max_records": 100, "max_interval": "100ms"}, max_ratio=0.5)
    for number in range(3):
        feed(place, topic, range(number * 300, number * 300 + 300))
        # it comes when everything is read: what is in flight is the renewal, and the maintenance that follows
        point = {"TIDEMILL_LEASE": "3s", "TIDEMILL_CRASH_AT": f"heartbeat:{number + 1}"}
        killed = tidemill("run", job.path, "--continuous", "--json", environment=point)
        assert killed.exit_code == KILLED, killed.stdout + killed.stderr
    feed(place, topic, range(800, 1_000))
    job.run().expect(0)
    truth = place.truth(topic)
    job.check_against(truth)
    kinds = Counter(commit.kind for commit in ledger.check_conservation(job.reader().table, truth))
    assert kinds["renewal"] >= 1 + 2 + 3, kinds
    tidemill("state", "verify", job.path).expect(0)


def test_a_kill_after_rows_were_looked_for_in_a_cut_off_history_leaves_the_tables_exact(place: Corner) -> None:
    topic = place.topic(partitions=2)
    job = place.job(topic, microbatch={"max_records": 200}, max_ratio=0.5)
    feed(place, topic, range(600))
    # the third microbatch is cut; of the second and its rows nothing but the property tells when others are done
    points = {"TIDEMILL_STOP_AT": "data_files_closed:3", "TIDEMILL_CRASH_AT": "rows_looked_up"}
    with started("run", job.path, "--json", environment=points) as running:

        def is_stopped() -> bool:
            assert running.poll() is None, running.output()
            return running.is_stopped()

        wait_until("its stop", is_stopped)
        forget_history(job)
        running.send(signal.SIGCONT)
        assert running.wait() == KILLED, running.output()
    feed(place, topic, range(500, 800))
    job.run().expect(0)
    job.check_against(place.truth(topic))
    tidemill("state", "verify", job.path).expect(0)


def points_in_the_source() -> list[str]:
    """Every name that is handed to `crash_point!` or names a phase."""
    named = re.compile(r'(?:crash_point!\(|\breach\()\s*"([a-z0-9_]+)"')
    return [name for path in SOURCE.rglob("*.rs") for name in named.findall(path.read_text())]


def test_every_point_of_the_source_is_hit_by_a_scene_and_has_a_name_of_its_own() -> None:
    source = Counter(points_in_the_source())
    listed = Counter(name for names in (*POINTS.values(), ELSEWHERE) for name in names.split())
    assert len(source) >= POINTS_MIN
    assert not [name for name, count in source.items() if count > 1], "a name stands for one place"
    assert not [name for name, count in listed.items() if count > 1], "a point belongs to one scene"
    assert not source.keys() - listed.keys(), "points that no scene is to hit"
    assert not listed.keys() - source.keys(), "points that the source does not have"
    assert b"TIDEMILL_CRASH_AT" in binary().read_bytes(), "the program was built without its crash points"
