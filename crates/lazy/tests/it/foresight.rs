//! What is fetched before anyone asks, because the command or what was waited for hints at it.

use std::{fs, path::Path, sync::Arc};

use loris_lazy::{Command, LazyLayer, foresee};

use crate::{
    Case,
    blob::{Shape, noise},
    until,
};

/// A program of this machine with what its loader needs: paths without a slash at the beginning, and contents.
fn program_with_libraries(program: &str) -> Vec<(String, Vec<u8>)> {
    let listed = std::process::Command::new("ldd").arg(program).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let paths = listed.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned);
    let mut paths: Vec<String> = paths.chain([program.to_owned()]).collect();
    paths.sort();
    paths.dedup();
    paths.into_iter().map(|path| (path[1..].to_owned(), fs::read(&path).unwrap())).collect()
}

fn is_whole(case: &Case, layer: &Arc<LazyLayer>, name: &str) -> bool {
    assert!(case.blob.files.iter().any(|(file, _)| file == name), "{name}");
    let node = layer.index().lookup(name.as_bytes()).unwrap();
    let loris_format::index::NodeKind::Regular(content) = &layer.index().node(node).kind else { panic!("{name}") };
    layer.is_filled(&(content.data..loris_format::position::DataOffset(content.data.0 + content.size)))
}

fn shape() -> Shape {
    Shape { chunk_bytes: 1 << 20, ..Shape::default() }
}

#[tokio::test]
async fn a_script_brings_its_shell_its_programs_and_all_their_libraries() {
    let mut files = program_with_libraries("/bin/sh");
    files.extend(program_with_libraries("/bin/ls"));
    files.sort();
    files.dedup();
    let needed: Vec<String> = files.iter().map(|(name, _)| name.clone()).collect();
    assert!(needed.len() > 3, "{needed:?}");
    files.push(("start.sh".to_owned(), b"#!/bin/sh -e\nexec \"ls\" --all; missing /etc/nothing\n".to_vec()));
    files.push(("etc/passwd".to_owned(), b"root:x:0:0::/:\n".to_vec()));
    files.push(("bin/other".to_owned(), noise(7, 100_000)));
    let case = Case::new(files, shape());
    let layer = case.open().await;
    let command = Command { words: vec![b"./start.sh".to_vec()], ..Command::default() };
    let foreseen = tokio::spawn(foresee(vec![Arc::clone(&layer)], command));
    until("all that is needed", || {
        needed.iter().map(String::as_str).chain(["start.sh", "etc/passwd"]).all(|name| is_whole(&case, &layer, name))
    })
    .await;
    assert!(!is_whole(&case, &layer, "bin/other"));
    let statistics = layer.statistics();
    assert_eq!((statistics.demand_bytes, statistics.waits), (0, 0));
    foreseen.abort();
    for file in 0..case.blob.files.len() {
        case.check(&layer, file).await.unwrap();
    }
}

#[tokio::test]
async fn a_program_named_without_a_directory_is_found_and_so_are_its_arguments() {
    let mut files = program_with_libraries("/bin/sh");
    files.push(("usr/local/bin/app.py".to_owned(), noise(1, 3000)));
    files.push(("work/app.py".to_owned(), noise(2, 3000)));
    let case = Case::new(files, shape());
    let layer = case.open().await;
    let command = Command {
        words: vec![b"sh".to_vec(), b"-u".to_vec(), b"app.py".to_vec(), b"/no/such.file".to_vec()],
        path: b"/nowhere:/bin".to_vec(),
        directory: b"work".to_vec(),
    };
    let foreseen = tokio::spawn(foresee(vec![Arc::clone(&layer)], command));
    until("program and argument", || is_whole(&case, &layer, "bin/sh") && is_whole(&case, &layer, "work/app.py")).await;
    assert!(!is_whole(&case, &layer, "usr/local/bin/app.py"));
    foreseen.abort();
}

#[tokio::test]
async fn files_beside_those_that_are_waited_for_come_with_the_second() {
    let mut files: Vec<_> = (0..30).map(|number| (format!("pkg/m{number:02}.py"), noise(number, 1500))).collect();
    files.extend((0..30).map(|number| (format!("pkg/m{number:02}.txt"), noise(100 + number, 1500))));
    files.sort();
    let case = Case::new(files, shape());
    let layer = case.open().await;
    let foreseen = tokio::spawn(foresee(vec![Arc::clone(&layer)], Command::default()));
    tokio::task::yield_now().await;
    let place = |name: &str| case.blob.files.iter().position(|(file, _)| file == name).unwrap();
    case.check(&layer, place("pkg/m10.py")).await.unwrap();
    case.check(&layer, place("pkg/m11.py")).await.unwrap();
    until("its neighbours", || (0..30).all(|number| is_whole(&case, &layer, &format!("pkg/m{number:02}.py")))).await;
    assert!((0..30).all(|number| !is_whole(&case, &layer, &format!("pkg/m{number:02}.txt"))));
    foreseen.abort();
}

#[tokio::test]
async fn what_is_wrong_costs_no_more_than_the_waiting_did() {
    // Each is waited for, one by one, and none of the files beside them is ever read.
    let mut files: Vec<_> = (0..8).map(|number| (format!("pkg/read-{number}.so"), noise(number, 600))).collect();
    files.extend((0..200).map(|number| (format!("pkg/vain-{number:03}.so"), noise(100 + number, 20_000))));
    let case = Case::new(files, shape());
    let layer = case.open().await;
    let foreseen = tokio::spawn(foresee(vec![Arc::clone(&layer)], Command::default()));
    tokio::task::yield_now().await;
    for number in 0..8 {
        case.check(&layer, number).await.unwrap();
    }
    until("guesses", || layer.statistics().prefetch_bytes > 0).await;
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    // A round trip of this link is taken for 64 KiB.
    let waits = layer.statistics().waits;
    assert!(layer.statistics().prefetch_bytes <= waits * (64 << 10) + (64 << 10), "{:?}", layer.statistics());
    foreseen.abort();
}

#[tokio::test]
async fn a_guess_keeps_no_layer_open() {
    let files = (0..9).map(|number| (format!("f{number}"), noise(number, 1500))).collect();
    let case = Case::new(files, shape());
    let layer = case.open().await;
    let weak = Arc::downgrade(&layer);
    let command = Command { words: vec![b"/f5".to_vec()], ..Command::default() };
    let foreseen = tokio::spawn(foresee(vec![Arc::clone(&layer)], command));
    until("the guess", || is_whole(&case, &layer, "f5")).await;
    drop(layer);
    until("the end of the layer", || weak.strong_count() == 0).await;
    foreseen.abort();
}

#[tokio::test]
async fn a_command_of_a_million_words_is_looked_at_in_part() {
    let case = Case::new(vec![("a/b".to_owned(), noise(1, 100))], shape());
    let layer = case.open().await;
    let words = vec![b"x".to_vec(); 1_000_000];
    let command = Command { words, path: b":".repeat(1 << 20), directory: b"/".repeat(1 << 20) };
    let weak = Arc::downgrade(&layer);
    let foreseen = tokio::spawn(foresee(vec![layer], command));
    // It lets go of the layer when it has looked at the command.
    until("the end of the words", || weak.strong_count() == 0).await;
    foreseen.abort();
}

#[tokio::test]
async fn images_whose_writers_marked_the_start_are_left_alone() {
    let files = (0..9).map(|number| (format!("f{number}"), noise(number, 1500))).collect();
    let case = Case::new(files, Shape { landmark: Some(2), ..shape() });
    let layer = case.open().await;
    let command = Command { words: vec![b"/f5".to_vec()], ..Command::default() };
    foresee(vec![Arc::clone(&layer)], command).await;
    assert!(case.source.take_requests().is_empty());
}

#[tokio::test]
async fn programs_that_lie_bring_nothing_down() {
    let mut elf = fs::read("/bin/ls").unwrap();
    elf.truncate(3000);
    let files = vec![
        ("cut".to_owned(), elf),
        ("loop".to_owned(), b"#!/loop\nloop /loop ./loop\n".to_vec()),
        ("long".to_owned(), [&b"#!/loop\n"[..], &b"/cut ".repeat(2000)].concat()),
        ("empty".to_owned(), vec![]),
    ];
    assert!(Path::new("/bin/ls").exists());
    let case = Case::new(files, shape());
    let layer = case.open().await;
    for program in ["/cut", "/loop", "/long", "/empty", "/", "", "/cut/..", "\u{0}"] {
        let command = Command { words: vec![program.into()], ..Command::default() };
        let foreseen = tokio::spawn(foresee(vec![Arc::clone(&layer)], command));
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!foreseen.is_finished() || layer.is_whole(), "{program:?}");
        foreseen.abort();
    }
}
