#![allow(clippy::unwrap_used)]
use super::*;
use crate::metadata::{Time, Usage};

fn snapshot() -> Snapshot {
    let now = Time::now();
    let labels = [("containerd.io/snapshot.ref", "sha256:abc"), ("plain", "value"), ("empty", "")];
    Snapshot {
        name: "default/7/sha256:abc".to_owned(),
        id: 1,
        kind: Kind::Committed,
        parent: Some("parent".to_owned()),
        created: now,
        updated: now,
        labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        usage: Usage::default(),
        remote: None,
        fallback: None,
    }
}

#[test]
fn filters_match_as_containerds_do() {
    let snapshot = snapshot();
    for (filter, expected) in [
        ("name==default/7/sha256:abc", true),
        ("name==other", false),
        ("name!=other", true),
        ("kind==committed", true),
        ("kind==committed,parent==parent", true),
        ("kind==committed,parent==\"\"", false),
        ("kind==active", false),
        ("parent==\"parent\"", true),
        ("labels.plain==value", true),
        ("labels.plain", true),
        ("labels.empty", false),
        ("labels.missing", false),
        ("labels.missing!=x", true),
        ("labels.\"containerd.io/snapshot.ref\"==sha256:abc,parent==\"parent\"", true),
        ("labels.\"containerd.io/snapshot.ref\"==\"sha256:abc\"", true),
        ("name~=^default/", true),
        ("name~=\"^default/[0-9]+/sha256:.*c$\"", true),
        ("name~=/^other/", false),
        ("unknown==x", false),
        ("unknown!=x", true),
    ] {
        let filters = Filters::parse(&[filter.to_owned()]).unwrap();
        assert_eq!(filters.match_snapshot(&snapshot), expected, "{filter}");
    }
    let any = Filters::parse(&["name==x".to_owned(), "kind==committed".to_owned()]).unwrap();
    assert!(any.match_snapshot(&snapshot), "one of several is enough");
    assert!(Filters::default().match_snapshot(&snapshot), "no filter wants all");
}

#[test]
fn what_is_no_filter_is_refused() {
    for wrong in [
        "",
        ",",
        "name==x,",
        "==x",
        "name==\"x",
        "labels.",
        "7==x",
        "name~=(",
        "name==x y",
        "labels.\"a",
        "name==\"\\q\"",
    ] {
        let error = Filters::parse(&[wrong.to_owned()]).unwrap_err();
        assert!(error.to_string().contains("at byte"), "{wrong}: {error}");
    }
    let large = format!("name~=\"{}\"", "(a{1,1000}){1,1000}");
    assert!(Filters::parse(&[large]).is_err(), "a pattern that would take all memory");
}

/// Whatever a client sends, there is an answer.
#[test]
fn no_filter_is_a_panic() {
    let pieces = ["name", "==", "!=", "~=", "\"", "\\", ".", ",", "labels", "\u{e9}", "|", "/", "(", "7", " ", "$"];
    let mut state = 7_u64;
    for _ in 0..20_000 {
        let mut filter = String::new();
        for _ in 0..state % 9 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            filter.push_str(pieces[usize::try_from(state >> 60).unwrap()]);
        }
        state = state.wrapping_add(1);
        if let Ok(filters) = Filters::parse(&[filter]) {
            let _ = filters.match_snapshot(&snapshot());
        }
    }
}
