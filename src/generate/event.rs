//! Events from their numbers: what happens to a notification, when, and what the event says.
//!
//! Flow: [`Origin`] -> [`Notifications::event`] -> [`Event`]
//!
//! Invariants
//! 1. An event follows from seed and origin alone.
//! 2. Two origins never give the same `event_id`: it carries a bijection of the origin's number.
//! 3. Events of notification `n` are sent at or after [`Notifications::begins_ms`] of `n`, which never decreases.

use super::config::Plan;
use super::draws::{Draws, Millionths, Quantiles};

/// What happened to a notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EventType {
    /// It was made.
    Generated,
    /// It was handed to a provider.
    Sent,
    /// The provider reports that it arrived.
    Delivered,
    /// The user clicked it; may happen more than once.
    Clicked,
}

impl EventType {
    /// All types in the order in which they happen.
    pub const ALL: [EventType; 4] = [Self::Generated, Self::Sent, Self::Delivered, Self::Clicked];

    /// The name in payloads and in names of topics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Generated => "generated",
            Self::Sent => "sent",
            Self::Delivered => "delivered",
            Self::Clicked => "clicked",
        }
    }
}

/// Types of the events that one notification can have: slot -> type. The last is a second real click.
pub(super) const SLOTS: [EventType; 5] =
    [EventType::Generated, EventType::Sent, EventType::Delivered, EventType::Clicked, EventType::Clicked];

/// Share of each slot among the notifications that reached the slot before it.
const SLOT_SHARES: [Millionths; 5] = [
    Millionths(1_000_000),
    Millionths(970_000),
    Millionths(950_000),
    Millionths(120_000),
    Millionths(80_000),
];

/// Mean number of events of a notification: 1 + 0.97 (1 + 0.95 (1 + 0.12 (1 + 0.08))).
pub(super) const EVENTS_PER_NOTIFICATION: f64 = 1.0 + 0.97 * (1.0 + 0.95 * (1.0 + 0.12 * 1.08));

/// Time from the event of the slot before to the event of each slot.
const SLOT_DELAYS: [&Quantiles; 5] = [
    &[(0, 0), (1_000_000, 1)],
    &[(0, 20), (500_000, 250), (900_000, 1_500), (990_000, 20_000), (1_000_000, 120_000)],
    &[(0, 100), (500_000, 800), (900_000, 10_000), (990_000, 300_000), (1_000_000, 7_200_000)],
    &[(0, 2_000), (500_000, 240_000), (900_000, 3_600_000), (1_000_000, 28_800_000)],
    &[(0, 1_000), (500_000, 30_000), (900_000, 600_000), (1_000_000, 10_800_000)],
];

/// Time from an event to its arrival in Kafka.
const TRANSPORT: &Quantiles = &[(0, 1), (500_000, 15), (900_000, 120), (1_000_000, 2_000)];

/// Additional time for the share of events that is out of order.
const DISORDER: &Quantiles = &[(0, 1_000), (500_000, 20_000), (900_000, 240_000), (1_000_000, 1_800_000)];

/// Where the draws for times and for details begin among a notification's draws, in words of 32 bits: apart, so that
/// either is drawn without the other.
const TIME_WORDS: u32 = 0;
const DETAIL_WORDS: u32 = 32;

/// Number space of events whose first record was bad: apart from all notifications of the regular stream.
const REFUSED_NUMBERS: u64 = 1 << 60;
/// Subject number of the stream's own decisions.
pub(super) const CONTROL_SUBJECT: u64 = u64::MAX;

const CAMPAIGNS: [&str; 8] =
    ["welcome", "spring-sale", "cart-reminder", "price-drop", "weekly-digest", "Frühling", "été", "新着"];
const REGIONS: [&str; 3] = ["eu-west-1", "us-east-1", "ap-south-1"];
const LOCALES: [&str; 6] = ["en-US", "en-GB", "de-DE", "fr-FR", "ja-JP", "pt-BR"];
const SYSTEMS: [&str; 3] = ["ios", "android", "web"];

/// Channels with their providers; a channel stands as often as its share in twentieths.
const CHANNELS: [(&str, &[&str]); 20] = {
    const PUSH: (&str, &[&str]) = ("push", &["fcm", "apns", "huawei"]);
    const EMAIL: (&str, &[&str]) = ("email", &["ses", "sendgrid"]);
    const SMS: (&str, &[&str]) = ("sms", &["twilio", "sinch"]);
    const INAPP: (&str, &[&str]) = ("inapp", &["inhouse"]);
    [
        PUSH, PUSH, PUSH, PUSH, PUSH, PUSH, PUSH, PUSH, PUSH, PUSH, EMAIL, EMAIL, EMAIL, EMAIL, EMAIL, SMS,
        SMS, INAPP, INAPP, INAPP,
    ]
};

/// Which event: everything else about it follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    /// Number of the notification; see [`refused_notification`] for those apart from the regular stream.
    pub(super) notification: u64,
    /// Index into [`SLOTS`].
    pub(super) slot: u8,
    /// When it happened. Follows from the two for regular events and is kept to save the work.
    pub(super) event_time_ms: i64,
}

/// The notification of the bad record of this number: its own, apart from the regular stream.
pub(super) fn refused_notification(bad_number: u64) -> u64 {
    REFUSED_NUMBERS | bad_number
}

/// An event, ready to be written.
#[derive(Debug, Clone)]
pub(super) struct Event {
    pub(super) event_id: [u8; 36],
    pub(super) event_type: EventType,
    pub(super) notification_id: [u8; 18],
    pub(super) event_time_ms: i64,
    pub(super) user_id: i64,
    pub(super) campaign: &'static str,
    pub(super) campaign_number: u32,
    pub(super) channel: &'static str,
    pub(super) provider: &'static str,
    pub(super) region: &'static str,
    pub(super) attempt: u32,
    /// Price in hundredths, if the event has one.
    pub(super) price_cents: Option<u32>,
    pub(super) locale: &'static str,
    pub(super) system: &'static str,
    pub(super) template: u32,
    /// Trace and span of the header `traceparent`, if the record carries one.
    pub(super) trace: Option<(u128, u64)>,
}

/// When an event happens and when it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Times {
    pub(super) event_time_ms: i64,
    pub(super) sent_at_ms: i64,
}

/// All notifications of a seed, made on demand.
#[derive(Debug, Clone)]
pub(super) struct Notifications {
    draws: Draws,
    seed: u64,
    start_ms: i64,
    interval_us: u32,
    disorder: Millionths,
}

impl Notifications {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            draws: Draws::new(plan.seed),
            seed: plan.seed,
            start_ms: plan.start_ms,
            interval_us: plan.interval_us,
            disorder: plan.disorder,
        }
    }

    /// Draws for the stream's own decisions.
    pub(super) fn control(&self) -> Draws {
        self.draws.of_subject(CONTROL_SUBJECT, 0)
    }

    /// Earliest time at which anything of notification `notification` happens.
    pub(super) fn begins_ms(&self, notification: u64) -> i64 {
        let after_us = u128::from(notification) * u128::from(self.interval_us);
        self.start_ms.saturating_add(i64::try_from(after_us / 1_000).unwrap_or(i64::MAX))
    }

    /// The first notification that begins at or after `time_ms`.
    pub(super) fn first_beginning_at(&self, time_ms: i64) -> u64 {
        let after_ms = u128::try_from(time_ms.saturating_sub(self.start_ms)).unwrap_or(0);
        u64::try_from((after_ms * 1_000).div_ceil(u128::from(self.interval_us))).unwrap_or(u64::MAX)
    }

    /// Times of the events of a notification, by slot; `None` where nothing happened.
    pub(super) fn times(&self, notification: u64) -> [Option<Times>; SLOTS.len()] {
        let mut draws = self.draws.of_subject(notification, TIME_WORDS);
        let jitter_us = u128::from(draws.below(self.interval_us));
        let after_us = u128::from(notification) * u128::from(self.interval_us) + jitter_us;
        let mut event_time_ms =
            self.start_ms.saturating_add(i64::try_from(after_us / 1_000).unwrap_or(i64::MAX));
        let mut times = [None; SLOTS.len()];
        for (slot, slot_times) in times.iter_mut().enumerate() {
            if !draws.chance(SLOT_SHARES[slot]) {
                break;
            }
            event_time_ms = event_time_ms.saturating_add(draws.duration_ms(SLOT_DELAYS[slot]));
            let mut sent_at_ms = event_time_ms.saturating_add(draws.duration_ms(TRANSPORT));
            if draws.chance(self.disorder) {
                sent_at_ms = sent_at_ms.saturating_add(draws.duration_ms(DISORDER));
            }
            *slot_times = Some(Times { event_time_ms, sent_at_ms });
        }
        times
    }

    /// The event of `origin`.
    pub(super) fn event(&self, origin: Origin) -> Event {
        let Origin { notification, slot, event_time_ms } = origin;
        let mut draws = self.draws.of_subject(notification, DETAIL_WORDS);
        let (channel, providers) = draws.pick(&CHANNELS);
        let user = draws.bits();
        let price = draws.below(3_000);
        let trace = draws.bits();
        // Fits, because notifications and refused numbers stay far below 2^60.
        let event_number = notification * 8 + u64::from(slot);
        Event {
            event_id: uuid_text(scramble(event_number, self.seed), scramble(event_number, !self.seed)),
            event_type: SLOTS[usize::from(slot)],
            notification_id: notification_id_text(scramble(notification, self.seed.rotate_left(32))),
            event_time_ms,
            user_id: user_id(user),
            campaign: draws.pick(&CAMPAIGNS),
            campaign_number: draws.below(100),
            channel,
            provider: draws.pick(providers),
            region: draws.pick(&REGIONS),
            attempt: 1 + u32::from(draws.chance(Millionths(40_000))),
            price_cents: (price < 1_000).then_some(price * 7 + 99),
            locale: draws.pick(&LOCALES),
            system: draws.pick(&SYSTEMS),
            template: draws.below(40),
            trace: (trace & 1 == 0).then(|| {
                let high = scramble(notification, u64::from(trace));
                let low = scramble(notification, !u64::from(trace));
                (u128::from(high) << 64 | u128::from(low | 1), scramble(event_number, u64::from(trace)) | 1)
            }),
        }
    }
}

/// One user in ten has an id that a double can not hold: odd and above 2^53.
fn user_id(bits: u32) -> i64 {
    let bits = i64::from(bits);
    if bits % 10 == 0 { (1 << 53) + 1 + bits * 2 * 1_000_003 } else { 1_000 + bits % 50_000_000 }
}

/// A bijection of 64-bit numbers, another one for each key: the finalizer of MurmurHash3, twice, with the key
/// added between. Each step (xor with a shift of itself, product with an odd number, sum) can be undone.
fn scramble(number: u64, key: u64) -> u64 {
    finalize(finalize(number ^ 0x9e37_79b9_7f4a_7c15).wrapping_add(finalize(key)))
}

fn finalize(mut number: u64) -> u64 {
    number ^= number >> 33;
    number = number.wrapping_mul(0xff51_afd7_ed55_8ccd);
    number ^= number >> 33;
    number = number.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    number ^ (number >> 33)
}

/// A UUID of version 8 (RFC 9562, 5.8: contents of one's own) that holds all 64 bits of `identity`; the remaining
/// 58 free bits come from `filler`.
fn uuid_text(identity: u64, filler: u64) -> [u8; 36] {
    let high = (identity >> 16) << 16 | 0x8000 | (identity >> 4 & 0x0fff);
    let low = 0b10 << 62 | (identity & 0xf) << 58 | filler >> 6;
    let mut digits = [0; 32];
    hex(high, &mut digits[..16]);
    hex(low, &mut digits[16..]);
    let mut text = [b'-'; 36];
    for (from, to) in [(0..8, 0..8), (8..12, 9..13), (12..16, 14..18), (16..20, 19..23), (20..32, 24..36)] {
        text[to].copy_from_slice(&digits[from]);
    }
    text
}

fn notification_id_text(identity: u64) -> [u8; 18] {
    let mut text = *b"n-0000000000000000";
    hex(identity, &mut text[2..]);
    text
}

/// Writes the lowest `digits.len()` hexadecimal digits of `number`, most significant first.
pub(super) fn hex(mut number: u64, digits: &mut [u8]) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 0xf) as usize];
        number >>= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_id_keeps_every_bit_of_its_identity() {
        for identity in [0, 1, 0xf, 0x10, 0xffff, u64::MAX, 0x0123_4567_89ab_cdef] {
            let text = String::from_utf8(uuid_text(identity, 0x5555_5555_5555_5555).to_vec()).unwrap();
            let uuid = uuid::Uuid::parse_str(&text).unwrap();
            assert_eq!(uuid.get_version_num(), 8);
            assert_eq!(uuid.get_variant(), uuid::Variant::RFC4122);
            let (high, low) = uuid.as_u64_pair();
            assert_eq!(high >> 16 << 16 | (high & 0xfff) << 4 | (low >> 58 & 0xf), identity);
        }
    }

    #[test]
    fn one_user_in_ten_has_an_id_above_what_a_double_holds() {
        let wide: Vec<i64> = (0..1_000).map(user_id).filter(|id| *id > 1 << 53).collect();
        assert_eq!(wide.len(), 100);
        assert!(wide.iter().all(|id| *id as f64 as i64 != *id));
        assert!(user_id(u32::MAX / 10 * 10) > 1 << 53);
    }
}
