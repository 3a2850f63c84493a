//! Secrets and credentials: references only, and never shown.

use super::*;

#[test]
fn secrets_are_references_and_a_literal_is_refused_without_being_shown() {
    let kafka = [
        "sasl.password",
        "ssl.key.password",
        "ssl.keystore.password",
        "ssl.key.pem",
        "sasl.oauthbearer.client.secret",
        "sasl.oauthbearer.config",
        "sasl.oauthbearer.assertion.private.key.passphrase",
        "sasl.oauthbearer.assertion.private.key.pem",
    ];
    let catalog = [
        "credential",
        "token",
        "s3.secret-access-key",
        "s3.session-token",
        "s3.sse.key",
        "header.authorization",
    ];
    let in_kafka = |name: &str, value: &str| {
        let sasl = "\"security.protocol\" = \"SASL_SSL\"\n\"sasl.mechanism\" = \"PLAIN\"";
        edited("\"h:1\"", &format!("\"h:1\"\n{sasl}\n\"{name}\" = {value}"))
    };
    let in_catalog = |name: &str, value: &str| {
        edited(
            "\"e.n\"",
            &format!(
                "\"e.n\"\ncatalog = {{ type = \"rest\", uri = \"https://c\", \"{name}\" = {value}, bad = 1 }}"
            ),
        )
    };
    let in_catalog_good = |name: &str, value: &str| in_catalog(name, value).replace(", bad = 1", "");
    for (name, text) in kafka
        .iter()
        .map(|name| (name, &in_kafka as &dyn Fn(&str, &str) -> String))
        .chain(catalog.iter().map(|name| (name, &in_catalog as _)))
    {
        let literals = [
            format!("\"{CANARY}\""),
            format!("'''\n{CANARY}'''"),
            "\"${PASSWORD}\"".to_owned(),
            "\"x${PASSWORD}\"".to_owned(),
            format!("\"${{NOT_SET:-{CANARY}}}\""),
            format!("\"${{TWELVE}}{CANARY}\""),
            "12345".to_owned(),
        ];
        for literal in literals {
            let said = check(&text(name, &literal), &[]).expect_err("a literal secret").to_string();
            assert!(said.contains("secret"), "{said}");
            assert!(said.contains("write \"env:"), "{said}");
            assert!(!said.contains(CANARY) && !said.contains("12345"), "{said}");
        }
        let broken = check(&text(name, &format!("\"{CANARY}")), &[]).expect_err("an open string").to_string();
        assert!(!broken.contains(CANARY), "{broken}");
    }
    for name in kafka {
        let key = format!("source.kafka.properties.\"{name}\"={CANARY}");
        let said = check(SMALL, &[&key]).expect_err("a literal secret").to_string();
        assert!(!said.contains(CANARY), "{said}");
        let read = |value: &str| {
            let loaded = check(&in_kafka(name, value), &[]).unwrap_or_else(|errors| panic!("{errors}"));
            loaded.job.source.properties[name].clone()
        };
        assert_eq!(read("\"env:KAFKA_PASSWORD\""), Setting::Env("KAFKA_PASSWORD".to_owned()));
        assert_eq!(read("\"file:/run/secrets/x\""), Setting::File("/run/secrets/x".into()));
        assert_eq!(read("\"file:${NOPE:-./x}\""), Setting::File("./x".into()));
    }
    for name in catalog {
        let loaded =
            check(&in_catalog_good(name, "\"env:X\""), &[]).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(loaded.job.sink.catalog.properties[name], Setting::Env("X".to_owned()));
    }
}

#[test]
fn an_address_with_a_password_is_refused_without_being_shown() {
    for uri in [format!("https://user:{CANARY}@c"), format!("ftp://user:{CANARY}@c")] {
        let said =
            refused("\"e.n\"", &format!("\"e.n\"\ncatalog = {{ type = \"rest\", uri = \"{uri}\", x = 1 }}"));
        assert!(said.contains("uri holds a name or password"), "{said}");
        assert!(!said.contains(CANARY), "{said}");
    }
}

#[test]
fn a_broken_reference_is_refused() {
    for (reference, what) in [
        ("env:", "an environment variable without a legal name"),
        ("env:A B", "an environment variable without a legal name"),
        ("file:", "a file without a path"),
        ("file:///etc/x", "a file without a path"),
    ] {
        let said = refused("\"h:1\"", &format!("\"h:1\"\n\"sasl.password\" = \"{reference}\""));
        assert!(said.contains(what), "{said}");
    }
}

#[test]
fn a_login_that_the_client_can_not_do_is_refused_by_name() {
    let refused = |lines: &str| {
        check(&edited("\"h:1\"", &format!("\"h:1\"\n{lines}")), &[]).expect_err("no such login").to_string()
    };
    let said = refused("\"security.protocol\" = \"SASL_SSL\"");
    assert!(said.contains("sasl.mechanism") && said.contains("SCRAM-SHA-512"), "{said}");
    for mechanism in ["GSSAPI", "OAUTHBEARER", "scram-sha-512"] {
        let said =
            refused(&format!("\"security.protocol\" = \"SASL_SSL\"\n\"sasl.mechanisms\" = \"{mechanism}\""));
        assert!(said.contains(&format!("not built yet: sasl.mechanisms = \"{mechanism}\"")), "{said}");
    }
}

#[test]
fn credentials_in_the_open_are_a_warning() {
    let warnings = |from: &str, to: &str| {
        let warnings = accepted(from, to).warnings;
        warnings.iter().map(|warning| warning.found.clone()).collect::<Vec<_>>()
    };
    let kafka = |protocol: &str| {
        warnings(
            "\"h:1\"",
            &format!(
                "\"h:1\"\n\"sasl.password\" = \"env:P\"\n\"sasl.mechanism\" = \"PLAIN\"\n\
                 \"security.protocol\" = \"{protocol}\""
            ),
        )
    };
    assert_eq!(
        kafka("plaintext"),
        ["a SASL credential is set, and security.protocol plaintext never sends it"]
    );
    assert_eq!(kafka("SASL_PLAINTEXT"), ["credentials cross the network unencrypted"]);
    assert_eq!(kafka("SASL_SSL"), Vec::<String>::new());
    let catalog = |uri: &str| {
        warnings(
            "\"e.n\"",
            &format!("\"e.n\"\ncatalog = {{ type = \"rest\", uri = \"{uri}\", token = \"env:T\" }}"),
        )
    };
    assert_eq!(catalog("http://catalog"), ["the catalog's credential crosses the network unencrypted"]);
    assert_eq!(catalog("http://localhost:8181/x"), Vec::<String>::new());
    assert_eq!(catalog("https://catalog"), Vec::<String>::new());
    let verification = "\"h:1\"\n\"enable.ssl.certificate.verification\" = false";
    assert_eq!(warnings("\"h:1\"", verification), ["brokers are not verified"]);
}
