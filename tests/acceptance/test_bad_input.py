"""Bad records: a clear reason each, once per place, and nothing lost beside them."""

import json
from typing import Any

import ledger
import snapshots
from conftest import Corner
from events import NOW_MS, event
from job import tidemill

REASON = "reason_code"
TEXT = "reason_text"


def without(name: str) -> dict[str, Any]:
    made = event(1)
    del made[name]
    return made


def deep(levels: int) -> bytes:
    return json.dumps(event(2)).encode()[:-1] + b',"x":' + b"[" * levels + b"]" * levels + b"}"


def raw(text: str) -> bytes:
    """An event's bytes with one more member, written as given."""
    return json.dumps(event(3)).encode()[:-1] + b"," + text.encode() + b"}"


# what is sent -> the reason under which it stands in the dead-letter table
BAD: list[tuple[Any, str]] = [
    (None, "tombstone"),
    (b"", "empty_payload"),
    (b'{"event_id":"\xff\xfe"}', "invalid_utf8"),
    (json.dumps(event(4)).encode()[:-20], "truncated_json"),
    (b'{"event_id": "a", "event_type"', "truncated_json"),
    (json.dumps(event(5)).encode() + b" trailing", "invalid_json"),
    (raw('"amount":NaN'), "invalid_json"),
    (b'{"event_id":"\\ud800","event_type":"sent","ts":1}', "invalid_json"),
    (b"{'event_id':'single quotes'}", "invalid_json"),
    (deep(200), "too_deep"),
    (b"42", "not_an_object"),
    (b'"text"', "not_an_object"),
    (b"null", "not_an_object"),
    (b"[]", "empty_array"),
    (raw('"event_id":"twice"'), "duplicate_field"),
    (event(6, event_id=17), "wrong_type"),
    (event(7, ts="yesterday"), "wrong_type"),
    (event(8, delivery="not an object"), "wrong_type"),
    (event(9, ts=10**18), "out_of_range"),
    (event(15, user_id=2**63), "out_of_range"),
    (event(16, price=123456789.12), "out_of_range"),
    (event(17, price=1.005), "out_of_range"),
    (event(18, delivery={"provider": "fcm", "attempt": 2**31}), "out_of_range"),
    (b'{"event_id":"a","event_type":"sent","ts":1e400}', "out_of_range"),
    (without("event_type"), "missing_required"),
    (event(10, event_type=None), "missing_required"),
    (without("event_id"), "null_key"),
    (event(11, event_id=None), "null_key"),
    (event(12, event_id=""), "empty_key"),
    (without("ts"), "missing_event_time"),
    (event(13, ts=NOW_MS + 7 * 86_400_000), "event_time_ahead"),
    (json.dumps(event(14, blob="x" * (5 << 20))), "record_too_large"),
]


def test_each_kind_of_bad_record_stands_in_the_dead_letter_table_under_its_reason(place: Corner) -> None:
    topic = place.topic()
    feed = place.feed(topic)
    for value, _ in BAD:
        feed.send(value, flush=False, key=b"some key")
    feed.send(*(event(number) for number in range(100, 400)))
    job = place.job(topic)
    counts = job.run().expect(0).last["counts"]
    letters = {row["offset"]: row for row in job.letters()}
    found = [letters[offset][REASON] if offset in letters else "written" for offset in range(len(BAD))]
    assert found == [reason for _, reason in BAD]
    assert counts["dead_letter"] == len(BAD) and counts["written"] == 300
    assert all(letters[offset][TEXT] for offset in letters), "every letter says why in words"
    kept = {offset: row["payload"] for offset, row in letters.items()}
    for offset, (value, reason) in enumerate(BAD):
        if reason in ("tombstone", "record_too_large"):
            assert kept[offset] is None
        elif isinstance(value, bytes):
            assert kept[offset] == value, "the bytes are kept as they came"
    large = next(row for row in letters.values() if row[REASON] == "record_too_large")
    assert large["payload_bytes"] > 5 << 20, "a record that is not kept leaves its length"


def test_nul_unknown_fields_and_missing_timestamps_are_no_faults(place: Corner) -> None:
    topic = place.topic()
    feed = place.feed(topic)
    feed.send(event(1, user="a\x00b", campaign="zero\x00byte"), event(2, extra={"any": ["thing"]}))
    feed.send(event(3, ts=NOW_MS - 1_000), timestamp=-1)
    feed.send(event(4, ts=NOW_MS + 86_400_000), timestamp=-1)
    job = place.job(topic)
    job.run().expect(0)
    rows = job.reader().columns("event_id", "campaign", "_kafka_timestamp").to_pylist()
    by_id = {row["event_id"]: row for row in rows}
    assert by_id.keys() == {event(number)["event_id"] for number in (1, 2, 3)}
    assert by_id[event(1)["event_id"]]["campaign"] == "zero\x00byte"
    assert by_id[event(3)["event_id"]]["_kafka_timestamp"] is None
    assert by_id[event(1)["event_id"]]["_kafka_timestamp"] is not None
    assert [row[REASON] for row in job.letters()] == ["event_time_ahead"], "without timestamp the cut time judges"


def test_unknown_fields_are_kept_when_the_job_says_so(place: Corner) -> None:
    topic = place.topic()
    place.feed(topic).send(event(1), event(2, extra={"any": ["thing"], "n": 1}))
    job = place.job(topic, decode={"unknown_fields": "keep"})
    job.run().expect(0)
    kept = {
        row["event_id"]: row["unknown_fields"] for row in job.reader().columns("event_id", "unknown_fields").to_pylist()
    }
    assert json.loads(kept[event(2)["event_id"]])["extra"] == {"any": ["thing"], "n": 1}


def test_unknown_fields_are_refused_when_the_job_says_so(place: Corner) -> None:
    topic = place.topic()
    known = {"event_id": "a", "event_type": "sent", "ts": NOW_MS}
    place.feed(topic).send(known, {**known, "event_id": "b", "extra": 1})
    job = place.job(topic, decode={"unknown_fields": "dead_letter"})
    job.run().expect(0)
    assert job.reader().ids() == ["a"]
    assert [row[REASON] for row in job.letters()] == ["unknown_field"]


def test_an_array_is_split_into_rows_with_their_index_and_bad_elements_are_refused_alone(place: Corner) -> None:
    topic = place.topic()
    place.feed(topic).send([event(1), event(2), 17, event(1)], event(3))
    job = place.job(topic, decode={"arrays": "split"})
    job.run().expect(0)
    truth = place.truth(topic)
    assert truth.consumed == 5 and len(truth.events) == 3
    job.check_against(truth)
    ledger.check_conservation(job.reader().table, truth)
    assert [(row["index"], row[REASON]) for row in job.letters()] == [(2, "not_an_object")]


def test_an_array_is_one_dead_letter_when_the_job_says_so(place: Corner) -> None:
    topic = place.topic()
    place.feed(topic).send([event(1), event(2)], event(3))
    job = place.job(topic, decode={"arrays": "dead_letter"})
    job.run().expect(0)
    assert job.reader().ids() == [event(3)["event_id"]]
    assert [row[REASON] for row in job.letters()] == ["array_refused"]


def test_a_corrected_resend_of_a_dead_letter_is_written_and_every_batch_conserves_its_rows(place: Corner) -> None:
    topic = place.topic(partitions=3)
    feed = place.feed(topic)
    job = place.job(topic, microbatch={"max_records": 700}, max_ratio=0.5)
    truth = place.truth(topic)
    spoiled = [event(number, event_type=None) for number in range(0, 3_000, 30)]
    for wave in range(3):
        feed.send(*(event(number) for number in range(1, 3_000 + wave) if number % 30), flush=False)
        feed.send(*(spoiled if wave == 0 else []), [event(5_000 + wave), 17, event(5_000)], flush=False)
        feed.send(*(event(number) for number in range(0, 3_000, 30)) if wave == 2 else ())
        job.run().expect(0)
        ledger.check_conservation(job.reader().table, truth.advance())
    job.check_against(truth)
    ids = set(job.reader().ids())
    assert {made["event_id"] for made in spoiled} <= ids, "each corrected event is there"
    assert truth.by_reason == {"missing_required": 100, "not_an_object": 3}


def test_too_many_dead_letters_stop_the_run_with_nothing_committed(place: Corner) -> None:
    topic = place.topic()
    feed = place.feed(topic)
    feed.send(*(event(number) for number in range(1_500)), flush=False)
    feed.send(*(event(number, event_type=None) for number in range(300)), flush=False)
    feed.send(*(b"no json" for _ in range(200)))
    job = place.job(topic, max_ratio=0.05)
    stop = job.run().expect_stop(21, "BRAKE")
    snapshots.check("brake", tidemill("run", job.path).expect(21).stderr, place.prefix)
    said = stop["what"] + stop["way_out"]
    for expected in ("missing_required", "300", "invalid_json", "200", topic):
        assert expected in said, f"{expected} is not in: {said}"
    assert job.reader().count() == 0 and not job.letters()
    before = ledger.check_chain(job.reader().table)
    assert before[-1].ends == {(topic, 0): 0}, "offsets stay"
    job.follow(stop).expect(0)
    truth = place.truth(topic)
    job.check_against(truth)
    ledger.check_conservation(job.reader().table, truth)


def test_good_rows_beside_bad_ones_of_every_generated_kind_are_all_written(place: Corner) -> None:
    from test_waves import generate, topics_of

    topics = topics_of(place.prefix)
    generate(place.broker, place.prefix, 50_000, 0, "--bad", "20")
    job = place.job(*topics)
    job.run().expect(0)
    truth = place.truth(*topics)
    assert len(truth.by_reason) >= 10, truth.by_reason
    job.check_against(truth)
    found: dict[str, int] = {}
    for row in job.letters():
        found[row[REASON]] = found.get(row[REASON], 0) + 1
    assert found == truth.by_reason
    ledger.check_conservation(job.reader().table, truth)
