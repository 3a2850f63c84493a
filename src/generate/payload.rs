//! Payloads: the JSON text of an event, the same event in other bytes, and every way to get it wrong.
//!
//! Invariants
//! 1. All forms of an event carry the same `event_id`, type and time; so a repeat is a repeat in any form.
//! 2. A bad payload has exactly one fault, in a member that the job of
//!    [`demo_job_toml`](super::demo_job_toml) reads, and is otherwise the event's good payload.

use super::event::{Event, hex};
use crate::letter::ReasonCode;

/// Depth of nesting of a payload that is too deep; more than any JSON decoder in use goes by default.
pub(super) const NESTING_DEPTH_BAD: usize = 1_200;
/// Least distance of an event time that is too far ahead: beyond what any job sensibly allows.
pub(super) const AHEAD_MS_MIN: i64 = 2 * 24 * 3_600_000;
const AHEAD_DAYS_END: u32 = 300;
const DAY_MS: i64 = 24 * 3_600_000;

/// How the bytes of a record differ from the event's first ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Not at all.
    First,
    /// Other order of members, white space and escapes, as after a gateway that parses and writes again.
    Restyled(u32),
    /// A provider's retry: `delivery.attempt` is one higher.
    NextAttempt,
}

/// Members in their usual order.
const MEMBERS: [Member; 11] = [
    Member::EventId,
    Member::EventType,
    Member::NotificationId,
    Member::UserId,
    Member::Campaign,
    Member::Channel,
    Member::Time,
    Member::Price,
    Member::Delivery,
    Member::Attributes,
    Member::Locale,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Member {
    EventId,
    EventType,
    NotificationId,
    UserId,
    Campaign,
    Channel,
    Time,
    Price,
    Delivery,
    Attributes,
    Locale,
}

/// How members are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Style {
    first_member: usize,
    backwards: bool,
    spaced: bool,
    escaped: bool,
}

const PLAIN: Style = Style { first_member: 0, backwards: false, spaced: false, escaped: false };

impl Member {
    fn name(self) -> &'static str {
        match self {
            Self::EventId => "event_id",
            Self::EventType => "event_type",
            Self::NotificationId => "notification_id",
            Self::UserId => "user_id",
            Self::Campaign => "campaign",
            Self::Channel => "channel",
            Self::Time => "ts",
            Self::Price => "price",
            Self::Delivery => "delivery",
            Self::Attributes => "attributes",
            Self::Locale => "locale",
        }
    }

    /// Whether the event has this member at all.
    fn stands_in(self, event: &Event) -> bool {
        self != Self::Price || event.price_cents.is_some()
    }

    fn write_value(self, event: &Event, attempt: u32, style: Style, out: &mut Vec<u8>) {
        match self {
            Self::EventId if style.escaped => {
                // The first hyphen as an escape: a key must be compared as text, not as bytes of JSON.
                out.push(b'"');
                out.extend_from_slice(&event.event_id[..8]);
                out.extend_from_slice(b"\\u002d");
                out.extend_from_slice(&event.event_id[9..]);
                out.push(b'"');
            }
            Self::EventId => quoted(&event.event_id, out),
            Self::EventType => quoted(event.event_type.as_str().as_bytes(), out),
            Self::NotificationId => quoted(&event.notification_id, out),
            Self::UserId => number(event.user_id, out),
            Self::Campaign => write_campaign(event, style.escaped, out),
            Self::Channel => quoted(event.channel.as_bytes(), out),
            Self::Time => number(event.event_time_ms, out),
            Self::Price => write_price(event.price_cents.unwrap_or(0), out),
            Self::Delivery => write_delivery(event, attempt, out),
            Self::Attributes => write_attributes(event, out),
            Self::Locale => quoted(event.locale.as_bytes(), out),
        }
    }
}

/// The payload of an event in one of its forms.
pub(super) fn render(event: &Event, form: Form) -> Vec<u8> {
    let (style, attempt) = match form {
        Form::First => (PLAIN, event.attempt),
        Form::NextAttempt => (PLAIN, event.attempt + 1),
        Form::Restyled(bits) => (style_of(bits), event.attempt),
    };
    let (member_separator, value_separator): (&[u8], &[u8]) =
        if style.spaced { (b",\n  ", b": ") } else { (b",", b":") };
    let mut out = Vec::with_capacity(400);
    out.push(b'{');
    for index in 0..MEMBERS.len() {
        let index = (style.first_member + index) % MEMBERS.len();
        let member = MEMBERS[if style.backwards { MEMBERS.len() - 1 - index } else { index }];
        if !member.stands_in(event) {
            continue;
        }
        if out.len() > 1 {
            out.extend_from_slice(member_separator);
        }
        quoted(member.name().as_bytes(), &mut out);
        out.extend_from_slice(value_separator);
        member.write_value(event, attempt, style, &mut out);
    }
    out.push(b'}');
    out
}

/// Any style but the plain one.
fn style_of(bits: u32) -> Style {
    Style {
        first_member: 1 + (bits >> 8) as usize % (MEMBERS.len() - 1),
        backwards: bits & 1 == 0,
        spaced: bits & 2 == 0,
        escaped: bits & 0b1100 == 0,
    }
}

/// The payload of an event with a fault of this kind; `None` is a tombstone. `bits` chooses among the faults of
/// the kind, `now_ms` is the record's Kafka timestamp.
pub(super) fn render_bad(event: &Event, kind: ReasonCode, bits: u32, now_ms: i64) -> Option<Vec<u8>> {
    let mut members = Members::of(event);
    match kind {
        ReasonCode::Tombstone => return None,
        ReasonCode::EmptyPayload => return Some(Vec::new()),
        ReasonCode::EmptyArray => return Some(b"[]".to_vec()),
        ReasonCode::NotAnObject => {
            let texts: [&[u8]; 4] = [b"42", b"true", b"\"ping\"", b"-0.5e3"];
            return Some(texts[bits as usize % texts.len()].to_vec());
        }
        ReasonCode::TruncatedJson => return Some(cut_short(render(event, Form::First), bits)),
        ReasonCode::InvalidUtf8 => members.set(Member::Campaign, b"\"caf\xe9\""),
        ReasonCode::InvalidJson => match bits % 3 {
            0 => members.set(Member::Price, b"NaN"),
            1 => members.set(Member::Campaign, br#""sale \ud83d""#),
            _ => return Some([render(event, Form::First).as_slice(), b" {}"].concat()),
        },
        ReasonCode::TooDeep => {
            let nested = ["[".repeat(NESTING_DEPTH_BAD), "]".repeat(NESTING_DEPTH_BAD)].concat();
            members.set(Member::Attributes, nested.as_bytes());
        }
        ReasonCode::DuplicateField => {
            let twice = [Member::EventId, Member::EventType, Member::UserId][bits as usize % 3];
            members
                .0
                .push((twice, if twice == Member::UserId { b"7".to_vec() } else { b"\"other\"".to_vec() }));
        }
        ReasonCode::WrongType => {
            let texts: [&[u8]; 3] = [br#"{"id":7}"#, b"true", b"[7]"];
            members.set(Member::UserId, texts[bits as usize % 3]);
        }
        ReasonCode::OutOfRange => match bits % 3 {
            0 => members.set(Member::UserId, b"9223372036854775808"),
            1 => members.set(Member::Price, b"123456789.12"),
            _ => members.set(Member::Delivery, br#"{"provider":"fcm","attempt":2147483648}"#),
        },
        ReasonCode::MissingRequired => members.lose(Member::EventType, bits),
        ReasonCode::NullKey => members.lose(Member::EventId, bits),
        ReasonCode::EmptyKey => members.set(Member::EventId, br#""""#),
        ReasonCode::MissingEventTime => members.lose(Member::Time, bits),
        ReasonCode::EventTimeAhead => {
            let ahead_ms = AHEAD_MS_MIN + i64::from(bits % AHEAD_DAYS_END) * DAY_MS;
            members.set(Member::Time, now_ms.saturating_add(ahead_ms).to_string().as_bytes());
        }
        other => unreachable!("{other} is not among the kinds that a checked plan holds"),
    }
    Some(members.render())
}

/// The event's members as JSON texts, to be changed one by one.
struct Members(Vec<(Member, Vec<u8>)>);

impl Members {
    fn of(event: &Event) -> Self {
        let text = |member: Member| {
            let mut out = Vec::new();
            member.write_value(event, event.attempt, PLAIN, &mut out);
            (member, out)
        };
        Self(MEMBERS.into_iter().filter(|member| member.stands_in(event)).map(text).collect())
    }

    fn set(&mut self, member: Member, text: &[u8]) {
        match self.0.iter_mut().find(|(name, _)| *name == member) {
            Some((_, value)) => *value = text.to_vec(),
            None => self.0.push((member, text.to_vec())),
        }
    }

    /// Makes the member null or leaves it out.
    fn lose(&mut self, member: Member, bits: u32) {
        if bits & 1 == 0 {
            self.set(member, b"null");
        } else {
            self.0.retain(|(name, _)| *name != member);
        }
    }

    fn render(&self) -> Vec<u8> {
        let mut out = vec![b'{'];
        for (member, text) in &self.0 {
            if out.len() > 1 {
                out.push(b',');
            }
            quoted(member.name().as_bytes(), &mut out);
            out.push(b':');
            out.extend_from_slice(text);
        }
        out.push(b'}');
        out
    }
}

/// Between one and all but one byte of the payload, cut between characters, so that it stays UTF-8.
fn cut_short(mut payload: Vec<u8>, bits: u32) -> Vec<u8> {
    let mut length = 1 + bits as usize % (payload.len() - 1);
    while payload[length] & 0b1100_0000 == 0b1000_0000 {
        length -= 1;
    }
    payload.truncate(length);
    payload
}

fn quoted(text: &[u8], out: &mut Vec<u8>) {
    out.push(b'"');
    out.extend_from_slice(text);
    out.push(b'"');
}

fn number(number: i64, out: &mut Vec<u8>) {
    let mut digits = [0; 20];
    let mut first = digits.len();
    let mut rest = number.unsigned_abs();
    loop {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if number < 0 {
        out.push(b'-');
    }
    out.extend_from_slice(&digits[first..]);
}

fn write_campaign(event: &Event, escaped: bool, out: &mut Vec<u8>) {
    out.push(b'"');
    if escaped {
        for unit in event.campaign.encode_utf16() {
            match u8::try_from(unit) {
                Ok(byte) if byte.is_ascii() => out.push(byte),
                _ => {
                    let mut digits = *b"\\u0000";
                    hex(u64::from(unit), &mut digits[2..]);
                    out.extend_from_slice(&digits);
                }
            }
        }
    } else {
        out.extend_from_slice(event.campaign.as_bytes());
    }
    out.push(b'-');
    number(i64::from(event.campaign_number), out);
    out.push(b'"');
}

/// A decimal number with two digits after the point: exact in text, not in a double.
fn write_price(cents: u32, out: &mut Vec<u8>) {
    number(i64::from(cents / 100), out);
    out.extend_from_slice(&[b'.', b'0' + (cents / 10 % 10) as u8, b'0' + (cents % 10) as u8]);
}

fn write_delivery(event: &Event, attempt: u32, out: &mut Vec<u8>) {
    out.extend_from_slice(br#"{"provider":"#);
    quoted(event.provider.as_bytes(), out);
    out.extend_from_slice(br#","region":"#);
    quoted(event.region.as_bytes(), out);
    out.extend_from_slice(br#","attempt":"#);
    number(i64::from(attempt), out);
    out.push(b'}');
}

fn write_attributes(event: &Event, out: &mut Vec<u8>) {
    out.extend_from_slice(br#"{"template":"t"#);
    number(i64::from(event.template), out);
    out.extend_from_slice(br#"","device":{"os":"#);
    quoted(event.system.as_bytes(), out);
    out.extend_from_slice(b"}}");
}
