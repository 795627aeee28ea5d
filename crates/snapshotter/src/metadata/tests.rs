//! The cases of containerd's own test suites (`core/snapshots/storage/metastore_test.go`, `testsuite/testsuite.go`), as
//! a table of steps.

#![allow(clippy::unwrap_used)]
use super::*;

enum Step {
    Prepare(&'static str, &'static str),
    View(&'static str, &'static str),
    Commit(&'static str, &'static str),
    CommitOn(&'static str, &'static str, &'static str),
    Remove(&'static str),
}

use Step::{Commit, CommitOn, Prepare, Remove, View};

/// What is expected of a step.
#[derive(PartialEq, Eq, Debug)]
enum Said {
    Fine,
    NotFound,
    Exists,
    Invalid,
    WrongState,
}

use Said::{Exists, Fine, Invalid, NotFound, WrongState};

fn said<T>(result: &Result<T>) -> Said {
    match result {
        Ok(_) => Fine,
        Err(MetadataError::NotFound(_)) => NotFound,
        Err(MetadataError::AlreadyExists(_)) => Exists,
        Err(MetadataError::Invalid(_)) => Invalid,
        Err(MetadataError::WrongState(_)) => WrongState,
        Err(error) => panic!("{error}"),
    }
}

fn wanted<'a>(name: &'a str, parent: &'a str, kind: Kind) -> Wanted<'a> {
    Wanted { name, parent, kind, labels: Labels::new(), remote: None, fallback: None }
}

fn open(directory: &tempfile::TempDir) -> Metadata {
    Metadata::open(&directory.path().join("metadata.redb")).unwrap()
}

#[test]
fn states_lead_where_they_lead_in_containerd() {
    let base =
        [(Prepare("a", ""), Fine), (Commit("A", "a"), Fine), (Prepare("b", "A"), Fine), (Commit("B", "b"), Fine)];
    let cases: [(&str, &[(Step, Said)]); 10] = [
        ("a chain", &[(Prepare("c", "B"), Fine), (View("v", "B"), Fine), (Commit("C", "c"), Fine)]),
        ("a name twice", &[(Prepare("c", "B"), Fine), (Prepare("c", "B"), Exists), (View("c", "B"), Exists)]),
        ("the name of a committed one", &[(Prepare("B", "A"), Exists), (View("B", "A"), Exists)]),
        ("no such parent", &[(Prepare("c", "X"), NotFound), (View("v", "X"), NotFound)]),
        (
            "a parent that is not committed",
            &[
                (Prepare("c", "B"), Fine),
                (Prepare("d", "c"), Invalid),
                (View("v", "B"), Fine),
                (Prepare("e", "v"), Invalid),
            ],
        ),
        (
            "commits",
            &[
                (Prepare("c", "B"), Fine),
                (Commit("A", "c"), Exists),
                (Commit("C", "x"), NotFound),
                (Commit("", "c"), Invalid),
                (Commit("C", "c"), Fine),
                (Commit("D", "C"), WrongState),
                (Commit("C", "c"), Exists),
                (Commit("E", "c"), NotFound),
            ],
        ),
        ("views are not committed", &[(View("v", "B"), Fine), (Commit("V", "v"), WrongState)]),
        (
            "removals",
            &[
                (Remove("A"), WrongState),
                (Remove("x"), NotFound),
                (Prepare("c", "B"), Fine),
                (Remove("B"), WrongState),
                (Remove("c"), Fine),
                (Remove("c"), NotFound),
                (Remove("B"), Fine),
                (Remove("A"), Fine),
            ],
        ),
        (
            "names that begin alike",
            &[
                (Prepare("x", ""), Fine),
                (Commit("A0", "x"), Fine),
                (Prepare("y", "A0"), Fine),
                (Remove("B"), Fine),
                (Remove("A"), Fine),
            ],
        ),
        (
            "a parent at last",
            &[
                (Prepare("c", ""), Fine),
                (CommitOn("C", "c", "X"), NotFound),
                (CommitOn("C", "c", "B"), Fine),
                (Remove("B"), WrongState),
                (Prepare("d", "A"), Fine),
                (CommitOn("D", "d", "B"), Invalid),
                (CommitOn("D", "d", "A"), Fine),
            ],
        ),
    ];
    for (name, steps) in cases {
        let directory = tempfile::tempdir().unwrap();
        let metadata = open(&directory);
        for (number, (step, expected)) in base.iter().chain(steps).enumerate() {
            let result = match step {
                Prepare(key, parent) => metadata.create(&wanted(key, parent, Kind::Active)).map(drop),
                View(key, parent) => metadata.create(&wanted(key, parent, Kind::View)).map(drop),
                Commit(to, key) => metadata.commit(to, key, "", &Labels::new(), Usage::default()).map(drop),
                CommitOn(to, key, on) => metadata.commit(to, key, on, &Labels::new(), Usage::default()).map(drop),
                Remove(key) => metadata.remove(key, |_| None).map(drop),
            };
            assert_eq!(said(&result), *expected, "{name}, step {number}: {result:?}");
        }
    }
}

#[test]
fn labels_are_changed_by_path() {
    let directory = tempfile::tempdir().unwrap();
    let metadata = open(&directory);
    let labels = |pairs: &[(&str, &str)]| -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let first = Wanted { labels: labels(&[("a", "1"), ("b", "2")]), ..wanted("s", "", Kind::Active) };
    metadata.create(&first).unwrap();
    let paths = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>();
    for (given, which, expected) in [
        (labels(&[("a", "9"), ("c", "3")]), paths(&["labels.a", "labels.b"]), labels(&[("a", "9")])),
        (labels(&[("x.y/z", "1")]), paths(&["labels.x.y/z"]), labels(&[("a", "9"), ("x.y/z", "1")])),
        (labels(&[("n", "1")]), paths(&["labels"]), labels(&[("n", "1")])),
        (labels(&[("m", "1")]), paths(&[]), labels(&[("m", "1")])),
    ] {
        let updated = metadata.update("s", &given, &which).unwrap();
        assert_eq!(updated.labels, expected);
        assert_eq!(metadata.get("s").unwrap(), updated);
    }
    for wrong in ["parent", "name", "kind", "labelsx"] {
        assert_eq!(said(&metadata.update("s", &Labels::new(), &paths(&[wrong]))), Invalid, "{wrong}");
    }
    assert_eq!(said(&metadata.update("x", &Labels::new(), &[])), NotFound);
    assert_eq!(said(&metadata.update("", &Labels::new(), &[])), Invalid);
    let long = "x".repeat(MOST_LABEL_BYTES);
    assert_eq!(said(&metadata.update("s", &labels(&[("long", &long)]), &[])), Invalid);
    // Those of an active snapshot are not those of the committed one.
    let committed = metadata.commit("S", "s", "", &labels(&[("k", "v")]), Usage { bytes: 5, inodes: 1 }).unwrap();
    assert_eq!((committed.labels, committed.usage.bytes), (labels(&[("k", "v")]), 5));
}

#[test]
fn everything_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let metadata = open(&directory);
    let mut ids = Vec::new();
    for name in ["a", "b", "c"] {
        ids.push(metadata.create(&wanted(name, "", Kind::Active)).unwrap().id);
    }
    metadata.remove("c", |_| None).unwrap();
    let all = metadata.list(|_| true).unwrap();
    drop(metadata);
    let metadata = open(&directory);
    assert_eq!(metadata.list(|_| true).unwrap(), all);
    let next = metadata.create(&wanted("d", "", Kind::View)).unwrap();
    assert!(!ids.contains(&next.id), "a number is used once");
    assert_eq!(metadata.list(|snapshot| snapshot.kind == Kind::View).unwrap(), [next]);
}

#[test]
fn parents_come_the_nearest_first() {
    let directory = tempfile::tempdir().unwrap();
    let metadata = open(&directory);
    let mut parent = String::new();
    for name in ["A", "B", "C"] {
        metadata.create(&wanted("x", &parent, Kind::Active)).unwrap();
        metadata.commit(name, "x", "", &Labels::new(), Usage::default()).unwrap();
        name.clone_into(&mut parent);
    }
    metadata.create(&wanted("top", "C", Kind::View)).unwrap();
    let names: Vec<String> = metadata.parents("top").unwrap().into_iter().map(|parent| parent.name).collect();
    assert_eq!(names, ["C", "B", "A"]);
}

#[test]
fn a_file_of_a_newer_version_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metadata.redb");
    drop(open(&directory));
    let database = Database::create(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(ABOUT).unwrap().insert("version", 2).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let error = Metadata::open(&path).unwrap_err();
    assert!(matches!(error, MetadataError::Newer { found: 2, .. }), "{error}");
    std::fs::write(&path, "not a database").unwrap();
    let error = Metadata::open(&path).unwrap_err();
    assert!(error.to_string().contains("metadata.redb"), "{error}");
}

#[test]
fn what_is_to_be_removed_of_a_layer_is_known_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let descriptor = loris_oci::Descriptor::new("layer".to_owned(), loris_format::digest::Digest::sha256_of(b"1"), 1);
    let remote = RemoteLayer {
        reference: "r.example/app:1".to_owned(),
        descriptor,
        diff_id: None,
        opening: crate::remote::OpeningTimes::default(),
        unvouched_from: None,
    };
    let metadata = open(&directory);
    for name in ["a", "b"] {
        metadata.create(&Wanted { remote: Some(remote.clone()), ..wanted(name, "", Kind::Committed) }).unwrap();
    }
    metadata.remove("a", |_| Some("layers/x".to_owned())).unwrap();
    assert!(metadata.discards().unwrap().is_empty(), "another snapshot has the layer");
    metadata.remove("b", |_| Some("layers/x".to_owned())).unwrap();
    drop(metadata);
    let metadata = open(&directory);
    assert_eq!(metadata.discards().unwrap(), ["layers/x"]);
    metadata.discarded("layers/x").unwrap();
    assert!(metadata.discards().unwrap().is_empty());
}

#[test]
fn a_file_without_the_table_of_discards_is_opened() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metadata.redb");
    drop(open(&directory));
    let database = Database::open(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    assert!(transaction.delete_table(DISCARDS).unwrap());
    transaction.commit().unwrap();
    drop(database);
    assert!(open(&directory).discards().unwrap().is_empty());
}
