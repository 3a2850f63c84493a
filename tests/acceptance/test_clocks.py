"""A producer whose clock is a year ahead, in event time and in Kafka's: what it sends is refused, and moves nothing. And a
watermark that was pushed a year ahead by force, and mended by `watermark set`."""

from __future__ import annotations

import random

import ledger
from conftest import Corner
from events import NOW_MS, event, event_id
from job import Job, tidemill
from test_backfill import shown
from test_late import SIDE, check_both_tables, event_times
from truth import Place

SEED = 20_261_124
PARTITIONS = 3
HOUR_MS = 3_600_000
YEAR_MS = 365 * 24 * HOUR_MS
WAVE = 2_000
WILD = 10**8
BEGIN_MS = NOW_MS - 30 * HOUR_MS
FORCED = ("--set", "event_time.max_ahead=800 days")


def send_wave(place: Corner, topic: str, wave: int, *, with_wild: bool) -> None:
    """Events in six hours of event time, late ones and repeats of all waves; a tenth more from clocks a year ahead."""
    draws = random.Random(SEED + wave)
    feed = place.feed(topic)

    def time_of(number: int) -> int:
        late = 8 * HOUR_MS if number % 20 == 7 else 0
        return BEGIN_MS + number * 6 * HOUR_MS // WAVE - late

    for number in range(wave * WAVE, (wave + 1) * WAVE):
        partition = draws.randrange(PARTITIONS)
        for which in (number, draws.randrange(number + 1)) if draws.random() < 0.3 else (number,):
            ts = time_of(which)
            feed.send(event(which, ts=ts), flush=False, partition=partition, timestamp=ts)
        if number % 10 == 0:
            ts = time_of(number)
            ahead = ts + YEAR_MS
            if with_wild:
                feed.send(event(WILD + number, ts=ahead), flush=False, partition=partition, timestamp=ahead)
                # Kafka's time right, event time not
                feed.send(event(WILD + number, ts=ahead), flush=False, partition=partition, timestamp=ts)
            # Kafka's time alone, which is no fault of the event
            feed.send(event(number, ts=ts), flush=False, partition=partition, timestamp=ahead if with_wild else ts)
    feed.flush()


def wild_topic(place: Corner) -> str:
    # by default a broker refuses records of more than an hour ahead
    return place.topic(partitions=PARTITIONS, message_timestamp_after_max_ms=str(2 * YEAR_MS))


def live_of(job: Job) -> tuple[str | None, object]:
    """The live lane's watermark, and from when on the state is complete."""
    record = ledger.full_record(job.reader().table)
    return record["lanes"]["live"]["watermark"], record["dedup"].get("complete_since")


def test_a_producer_a_year_ahead_makes_nothing_late_and_expires_nothing(place: Corner) -> None:
    topic = wild_topic(place)
    job = place.job(topic, max_ratio=0.5, microbatch={"max_records": WAVE // 3})
    tame = place.topic("tame", partitions=PARTITIONS)
    like = place.job(tame, max_ratio=0.5, microbatch={"max_records": WAVE // 3}, folder=place.folder / "like")
    for wave in range(3):
        send_wave(place, topic, wave, with_wild=True)
        send_wave(place, tame, wave, with_wild=False)
        job.run(*SIDE).expect(0)
        like.run(*SIDE).expect(0)
        # as it is without that producer, whose every record would have moved it
        assert live_of(job) == live_of(like) and live_of(job)[1] is None
    truth = place.truth(topic)
    assert truth.by_reason == {"event_time_ahead": 2 * 3 * WAVE // 10}
    times = event_times(topic, place.broker.bootstrap, truth)
    late = check_both_tables(job, truth, times)
    assert WAVE * 3 * 0.02 < late < WAVE * 3 * 0.1, "those that were sent late, and no others"
    job.check_letters(truth)


def test_a_watermark_that_was_pushed_a_year_ahead_is_set_back_and_the_tables_stay_exact(place: Corner) -> None:
    topic = wild_topic(place)
    job = place.job(topic, max_ratio=0.5, microbatch={"max_records": WAVE // 3})
    send_wave(place, topic, 0, with_wild=False)
    job.run(*SIDE).expect(0)
    before = live_of(job)
    assert before[1] is None and before[0] is not None

    # By force: what a job with this bound believes pushes watermarks, the window moves away, all that is right is late.
    for partition in range(PARTITIONS):
        place.feed(topic).send(event(WILD + 50 + partition, ts=BEGIN_MS + YEAR_MS), partition=partition)
    wild = {event_id(WILD + 50 + partition) for partition in range(PARTITIONS)}
    job.run(*SIDE, *FORCED).expect(0)
    send_wave(place, topic, 1, with_wild=False)
    pushed = job.run(*SIDE).expect(0).last
    assert pushed["counts"]["written"] == 0 and pushed["counts"]["late_side"] > WAVE // 2, pushed
    assert str(pushed["watermark"]) > shown(NOW_MS + YEAR_MS // 2)

    to_ms = BEGIN_MS + 12 * HOUR_MS
    words = ("watermark", "set", job.path, "--to", shown(to_ms))
    tidemill(*words, "--json").expect_stop(2, "USAGE")
    mended = tidemill(*words, "--yes", "--json").expect(0)
    watermark, since = live_of(job)
    assert watermark == to_ms and (since is None or int(str(since)) <= to_ms - 7 * 24 * HOUR_MS), mended.stdout
    tidemill("state", "verify", job.path).expect(0)

    send_wave(place, topic, 2, with_wild=True)
    done = job.run(*SIDE).expect(0).last
    assert done["buckets_lent"] == 0, "the window is whole again without the table"
    assert done["counts"]["late_side"] < WAVE * 0.1 and done["counts"]["written"] > WAVE // 2, done
    truth = place.truth(topic)
    catalog = job.open_catalog()
    tables = [catalog.load_table(name) for name in (job.table, f"{job.table}_late")]
    ids = [one for table in tables for one in table.scan(selected_fields=("event_id",)).to_arrow()["event_id"].to_pylist()]
    assert len(ids) == len(set(ids)), "a key stands twice"
    assert set(ids) == truth.events.keys() | wild
    kept = {Place(row["topic"], row["partition"], row["offset"], row["index"]) for row in job.letters()}
    places = {place for place, reason in truth.letters.items() if reason == "event_time_ahead"}
    assert len(places) - len(kept) == len(wild) and kept <= places
    tidemill("state", "verify", job.path).expect(0)
