use std::fmt::Write as _;

use super::*;

/// Says in one line what a host is.
fn line(endpoint: &Endpoint, directory: &str) -> String {
    let Endpoint { url, capabilities, settings } = endpoint;
    let mut line = url.as_ref().map_or_else(|| "itself".to_owned(), Url::to_string);
    let flags = [(capabilities.pull, " pull"), (capabilities.resolve, " resolve"), (capabilities.push, " push")];
    line.extend(flags.iter().filter(|(set, _)| *set).map(|(_, name)| *name));
    let shown = |path: &Path| path.display().to_string().replace(directory, "DIR");
    if let Some(connection) = &settings.connection {
        if !connection.authorities.is_empty() {
            let files: Vec<_> = connection.authorities.iter().map(|file| shown(file)).collect();
            write!(line, " ca=[{}]", files.join(",")).unwrap();
        }
        if let Some((certificate, key)) = &connection.client {
            let key = key.as_ref().map(|key| format!("+{}", shown(key))).unwrap_or_default();
            write!(line, " client={}{key}", shown(certificate)).unwrap();
        }
        if let Some(skip) = connection.skip_verify {
            write!(line, " skip_verify={skip}").unwrap();
        }
        if let Some(dial) = connection.dial_timeout {
            write!(line, " dial={}s", dial.as_secs()).unwrap();
        }
        if let Some(directory) = &connection.directory {
            write!(line, " directory={}", shown(directory)).unwrap();
        }
    }
    let mut headers: Vec<_> =
        settings.headers.iter().map(|(name, value)| format!(" header={name}:{}", value.to_str().unwrap())).collect();
    headers.sort();
    line.extend(headers);
    if let Some(patience) = settings.patience {
        write!(line, " patience={}s", patience.as_secs()).unwrap();
    }
    line
}

fn lines(endpoints: &[Endpoint], directory: &str) -> Vec<String> {
    endpoints.iter().map(|endpoint| line(endpoint, directory)).collect()
}

#[test]
fn files_mean_what_they_mean_to_containerd() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/registry/hosts/corpus");
    let mut count = 0;
    for entry in corpus.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let found = file::endpoints(&path, &read(&path).unwrap(), "docker.io").unwrap();
        let expected = read(&path.with_extension("expected")).unwrap();
        assert_eq!(lines(&found, &corpus.display().to_string()).join("\n"), expected.trim_end(), "{}", path.display());
        count += 1;
    }
    assert_eq!(count, 8);
}

#[test]
fn what_is_wrong_is_said_with_file_and_key() {
    for (text, expected) in [
        ("server = 5", "server: a string is expected, not a whole number"),
        ("x = ", "line 1: "),
        ("\n\n[host.\"https://a\"\n", "line 3: "),
        ("host = \"https://a.example\"", "host: a table is expected, not a string"),
        ("host.a = 1", "host.a: a table is expected, not a whole number"),
        ("server = \"https://\"", "server: \"https://\" is no address"),
        ("server = \"https://user:secret@a.example\"", "which belong where `podman login` puts them"),
        ("server = \"https://a.example/?x=y\"", "has a query or a fragment"),
        ("[host.\"httpx://a.example\"]", "is neither an http nor an https address"),
        (
            "[host.\"https://a.example\"]\ncapabilities = [\"pul\"]",
            "host.\"https://a.example\".capabilities: \"pul\" is none of",
        ),
        ("[host.\"https://a.example\"]\ncapabilities = \"pull\"", "a list of strings is expected, not a string"),
        ("capabilities = [1]", "capabilities: a list of strings is expected, not one with a whole number"),
        ("ca = 1", "ca: a string or a list of strings is expected"),
        ("client = [[\"a\", \"b\", \"c\"]]", "client: a pair is two file names"),
        ("client = [1]", "client: a whole number is no file name"),
        ("client = 1.5", "client: a number with a fraction is no file name"),
        ("skip_verify = \"yes\"", "skip_verify: true or false is expected, not a string"),
        ("override_path = 1", "override_path: true or false is expected"),
        ("dial_timeout = \"5\"", "dial_timeout: \"5\" is no duration"),
        ("[header]\n\"a b\" = \"c\"", "header.\"a b\": it is no name of a header"),
        ("[header]\na = \"b\\nc\"", "header.a: its value can't be sent"),
        ("[header]\na = 1", "header.a: a string or a list of strings is expected"),
    ] {
        let path = Path::new("/certs.d/r.example/hosts.toml");
        let error = file::endpoints(path, text, "r.example").unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
        assert!(error.starts_with("/certs.d/r.example/hosts.toml is not valid: "), "{error}");
        assert!(error.ends_with("; correct the file, or remove it"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn too_many_hosts_are_refused() {
    let text = |hosts: usize| (0..hosts).map(|n| format!("[host.\"https://h{n}.example\"]\n")).collect::<String>();
    let count = |hosts| file::endpoints(Path::new("hosts.toml"), &text(hosts), "r").map(|found| found.len());
    assert_eq!(count(MAX_HOSTS - 1).unwrap(), MAX_HOSTS);
    assert!(count(MAX_HOSTS).is_err());
}

#[test]
fn directories_are_found_as_containerd_finds_them() {
    let first = tempfile::tempdir().unwrap();
    let second = tempfile::tempdir().unwrap();
    let put = |root: &Path, name: &str, text: &str| {
        let directory = root.join(name);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(HOSTS_FILE), text).unwrap();
    };
    let server = |name: &str| format!("server = \"https://{name}.example\"");
    put(first.path(), "a.example_5000_", &server("escaped"));
    put(first.path(), "a.example:5000", &server("plain"));
    put(first.path(), "b.example:5000", &server("with-port"));
    put(second.path(), "c.example", &server("second"));
    put(second.path(), DEFAULT_DIRECTORY, &server("default"));
    std::fs::create_dir(first.path().join("certificates.example")).unwrap();
    put(first.path(), "empty.example", " \n");
    let roots = vec![first.path().join("nothing"), first.path().to_owned(), second.path().to_owned()];
    let config = Config { hosts_dirs: roots, ..Config::default() };
    let directory = first.path().display().to_string();
    for (registry, expected) in [
        ("a.example:5000", "https://escaped.example/v2/ pull resolve push"),
        ("b.example:5000", "https://with-port.example/v2/ pull resolve push"),
        ("c.example", "https://second.example/v2/ pull resolve push"),
        ("d.example", "https://default.example/v2/ pull resolve push"),
        ("certificates.example", "itself pull resolve push directory=DIR/certificates.example"),
        ("empty.example", "itself pull resolve push directory=DIR/empty.example"),
    ] {
        assert_eq!(lines(&endpoints(&config, registry).unwrap(), &directory), [expected], "{registry}");
    }
    // An earlier root's default comes before a later root's own.
    put(first.path(), DEFAULT_DIRECTORY, &server("first-default"));
    let found = endpoints(&config, "c.example").unwrap();
    assert_eq!(lines(&found, ""), ["https://first-default.example/v2/ pull resolve push"]);
    let none = Config { hosts_dirs: Vec::new(), ..Config::default() };
    assert_eq!(endpoints(&none, "c.example").unwrap(), [Endpoint::registry()]);
}

#[test]
fn a_file_that_is_no_text_or_too_long_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("r.example").join(HOSTS_FILE);
    std::fs::create_dir(file.parent().unwrap()).unwrap();
    let config = Config { hosts_dirs: vec![root.path().to_owned()], ..Config::default() };
    std::fs::write(&file, b"\xff").unwrap();
    assert!(matches!(endpoints(&config, "r.example"), Err(Error::Invalid { .. })));
    std::fs::write(&file, vec![b'#'; usize::try_from(FILE_BYTES).unwrap() + 1]).unwrap();
    assert!(matches!(endpoints(&config, "r.example"), Err(Error::TooLarge { .. })));
}

#[test]
fn mirrors_of_stargz_are_read() {
    let text = r#"
        noprefetch = true
        [resolver]
        [resolver.host."docker.io"]
        [[resolver.host."docker.io".mirrors]]
        host = "mirror.example:5000"
        insecure = true
        request_timeout_sec = 7
        header = { x-one = "a" }
        [[resolver.host."docker.io".mirrors]]
        host = "other.example"
        request_timeout_sec = -1
        [[resolver.host."docker.io".mirrors]]
        host = "127.0.0.1:30500"
        [[resolver.host."docker.io".mirrors]]
        host = "docker.io"
        [[resolver.host."quay.io".mirrors]]
        insecure = true
        [resolver.host."ghcr.io"]
        mirrors = []
    "#;
    let path = Path::new("/config.toml");
    let found = stargz::mirrors(path, text, "docker.io").unwrap().unwrap();
    let expected = [
        "http://mirror.example:5000/v2/ pull resolve header=x-one:a patience=7s",
        "https://other.example/v2/ pull resolve",
        "http://127.0.0.1:30500/v2/ pull resolve",
        "https://registry-1.docker.io/v2/ pull resolve",
        "itself pull resolve push",
    ];
    assert_eq!(lines(&found, ""), expected);
    assert_eq!(stargz::mirrors(path, text, "ghcr.io").unwrap(), None);
    assert_eq!(stargz::mirrors(path, text, "r.example").unwrap(), None);
    assert_eq!(stargz::mirrors(path, "", "r.example").unwrap(), None);
    let error = stargz::mirrors(path, text, "quay.io").unwrap_err().to_string();
    assert!(error.contains("resolver.host.\"quay.io\".mirrors[0].host: a mirror must have one"), "{error}");
    let error = stargz::mirrors(path, "[resolver.host.r]\nmirrors = 1", "r").unwrap_err().to_string();
    assert!(error.contains("resolver.host.r.mirrors: a list of tables is expected"), "{error}");
}

#[test]
fn a_directory_comes_before_stargz() {
    let root = tempfile::tempdir().unwrap();
    let stargz_config = root.path().join("config.toml");
    std::fs::write(&stargz_config, "[[resolver.host.\"r.example\".mirrors]]\nhost = \"m.example\"").unwrap();
    let hosts_dirs = vec![root.path().join("certs.d")];
    let config = Config { hosts_dirs, stargz_config: Some(stargz_config), ..Config::default() };
    assert_eq!(endpoints(&config, "r.example").unwrap().len(), 2);
    std::fs::create_dir_all(root.path().join("certs.d/r.example")).unwrap();
    assert_eq!(endpoints(&config, "r.example").unwrap().len(), 1);
    let missing = Config { hosts_dirs: Vec::new(), stargz_config: Some(root.path().join("no")), ..Config::default() };
    assert!(matches!(endpoints(&missing, "r.example"), Err(Error::File { .. })));
    let text = "[[resolver.host.\"r.example\".mirrors]]\nhost = \"m.example\"".to_owned();
    let read = Config { stargz_text: Some((root.path().join("read already"), text)), ..missing };
    assert_eq!(endpoints(&read, "r.example").unwrap().len(), 2);
}

proptest::proptest! {
    #[test]
    fn no_file_panics(
        noise in "[ -~\n\u{e9}]{0,80}",
        key in "(server|capabilities|ca|client|skip_verify|header|override_path|dial_timeout|host|host\\.\"[ -!#-\\[\\]-~]{0,20}\"\\.[a-z]{1,8})",
        value in "(\"[ -!#-\\[\\]-~]{0,20}\"|[0-9]{1,3}|true|\\[\\]|\\[\"a\"\\]|\\[\\[\"a\"\\]\\]|\\{a = \"b\"\\}|[0-9.]{1,6}|1979-05-27)",
    ) {
        for text in [noise, format!("{key} = {value}")] {
            let _ = file::endpoints(Path::new("/d/hosts.toml"), &text, "r.example");
            let _ = stargz::mirrors(Path::new("/d/config.toml"), &text, "r.example");
        }
    }

    #[test]
    fn what_is_written_down_is_what_is_asked(
        hosts in proptest::collection::btree_set("[a-z]{1,8}", 0..6),
        path in "(/[a-z]{1,5}){0,2}",
        complete in proptest::bool::ANY,
    ) {
        let mut hosts: Vec<String> = hosts.into_iter().collect();
        hosts.reverse();
        let host = |name: &String| format!("[host.\"https://{name}.example{path}\"]\noverride_path = {complete}\n");
        let text: String = hosts.iter().map(host).collect();
        let found = file::endpoints(Path::new("/d/hosts.toml"), &text, "r.example").unwrap();
        let addresses: Vec<String> = found.iter().filter_map(|found| Some(found.url.as_ref()?.to_string())).collect();
        let end = if complete { "/" } else { "/v2/" };
        let expected: Vec<String> = hosts.iter().map(|name| format!("https://{name}.example{path}{end}")).collect();
        proptest::prop_assert_eq!(addresses, expected);
        proptest::prop_assert!(found.last().is_some_and(|last| last.url.is_none()));
    }
}
