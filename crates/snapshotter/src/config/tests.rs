#![allow(clippy::unwrap_used)]
use super::*;

const PATH: &str = "/etc/loris/snapshotter.toml";

fn read(text: &str) -> Result<Settled, ConfigError> {
    settle(Some(File { path: Path::new(PATH), text }), &[])
}

fn value(settled: &Settled, key: &str) -> String {
    keys::key(key).unwrap().value(&settled.settings).map_or_else(|| "nothing".to_owned(), |value| value.to_string())
}

#[test]
fn nothing_said_is_the_defaults() {
    let settled = read("# nothing\n").unwrap();
    assert_eq!(settled.settings, Settings::default());
    assert!(settled.warnings.is_empty());
    assert_eq!(settled.place("root"), "default");
}

/// A line of a file, the key that it sets, and what that has then.
#[test]
fn keys_of_ours() {
    let cases = [
        ("root = '/x'", "root", "\"/x\""),
        ("address = \"/run/a.sock\"", "address", "\"/run/a.sock\""),
        ("open_timeout = 3", "open_timeout", "3"),
        ("open_timeout = '2m'", "open_timeout", "120"),
        ("open_timeout = '7'", "open_timeout", "7"),
        ("read_timeout = 1_000", "read_timeout", "1000"),
        ("prefetch = false", "prefetch", "false"),
        ("complete = 'idle'", "complete", "\"idle\""),
        ("complete_rate = '1.5M'", "complete_rate", "1572864"),
        ("complete_rate = 0", "complete_rate", "nothing"),
        ("engine = 'erofs-loop'", "engine", "\"erofs-loop\""),
        ("mount_options = ['volatile', 'xino=off']", "mount_options", "[\"volatile\", \"xino=off\"]"),
        ("allow_unverified = true", "allow_unverified", "true"),
        ("formats = ['estargz']", "formats", "[\"estargz\"]"),
        ("memory = '64M'", "memory", "67108864"),
        ("memory = 0x100", "memory", "256"),
        ("cache.quota = '20G'", "cache.quota", "21474836480"),
        ("[cache]\ndir = '/c'", "cache.dir", "\"/c\""),
        ("cache = { paranoid = true }", "cache.paranoid", "true"),
        ("[log]\nformat = 'json'", "log.format", "\"json\""),
        ("[registries]\ninsecure = ['a:5000']", "registries.insecure", "[\"a:5000\"]"),
        ("[registries]\nhosts_dirs = []", "registries.hosts_dirs", "[]"),
        ("[credentials]\ndocker = false", "credentials.docker", "false"),
        ("[cri_keychain]\nlisten_path = '/l'", "cri_keychain.listen_path", "\"/l\""),
    ];
    for (text, key, expected) in cases {
        let settled = read(text).unwrap();
        assert_eq!(value(&settled, key), expected, "{text}");
        assert_eq!(settled.warnings, [], "{text}");
        assert_eq!(settled.place(key), format!("{PATH}:{}", text.lines().count()), "{text}");
    }
}

/// What is wrong is said with line and column, all at once.
#[test]
fn what_is_wrong_is_said_with_its_place() {
    let cases = [
        (
            "open_timeout = true",
            "1:16: open_timeout: expected 1 to 86400 seconds, as a number or a text such as \"2m\", found true or false",
        ),
        (
            "open_timeout = 0",
            "1:16: open_timeout: expected 1 to 86400 seconds, as a number or a text such as \"2m\", found 0",
        ),
        ("\n\n  prefetch = 'yes'", "3:14: prefetch: expected true or false, found text"),
        (
            "[cache]\nquota = 'much'",
            "2:9: cache.quota: expected a size, as a number of bytes or a text such as \"20G\", found \"much\"",
        ),
        ("complete = 'maybe'", "1:12: complete: expected one of \"always\", \"idle\", \"never\", found \"maybe\""),
        ("formats = []", "1:11: formats: expected a list of at least one of \"estargz\", \"zstdchunked\", found []"),
        (
            "formats = ['zip']",
            "1:11: formats: expected a list of at least one of \"estargz\", \"zstdchunked\", found [\"zip\"]",
        ),
        ("cache = 3", "1:9: cache: expected a table, found a whole number"),
        ("root = { a = 1 }", "1:8: root: expected a path in quotes, found a table"),
        ("root = ''", "1:8: root: expected a path in quotes, found \"\""),
        (
            "mount_options = ['a', 1]",
            "1:17: mount_options: expected a list of texts, such as [\"one\", \"another\"], found a list with something else in it",
        ),
        ("noprefetch = 1", "1:14: noprefetch: expected true or false, found a whole number"),
        ("[blob]\nchunk_size = 'big'", "2:14: blob.chunk_size: expected a whole number, found text"),
        ("metadata_store = 'sql'", "1:18: metadata_store: expected one of \"memory\", \"db\", found \"sql\""),
        ("[resolver]\nhost = 1", "2:8: resolver.host: expected a table, found a whole number"),
        ("[[resolver.host.a.mirrors]]\ninsecure = true", "1:1: resolver.host.a.mirrors: a mirror must have a host"),
        (
            "[[resolver.host.a.mirrors]]\nhost = 'b'\ninsecure = 'x'",
            "3:12: resolver.host.a.mirrors.insecure: expected true or false, found text",
        ),
        (
            "memory = 99999999999999999999",
            "1:10: memory: expected a size, as a number of bytes or a text such as \"20G\", found a whole number",
        ),
    ];
    for (text, expected) in cases {
        let said = read(text).unwrap_err().to_string();
        assert_eq!(said, format!("{PATH}:{expected}"), "{text}");
    }
    let said = read("prefetch = 1\nmemory = -1\n").unwrap_err();
    assert_eq!(said.problems.len(), 2, "{said}");
    for broken in ["root = ", "[cache", "a = 1\na = 2\n", "root = \"\u{0}\"", &"[".repeat(10_000), &"a.".repeat(10_000)]
    {
        let said = read(broken).unwrap_err();
        assert!(said.to_string().starts_with(&format!("{PATH}:")), "{said}");
    }
}

#[test]
fn unknown_keys_are_named_with_what_may_be_meant() {
    let cases = [
        ("open_timout = 3", "1: there is no key open_timout; did you mean open_timeout?"),
        ("\n[cache]\nqouta = 3", "3: there is no key cache.qouta; did you mean cache.quota?"),
        ("[cach]\nquota = 3", "1: there is no key cach; did you mean cache?"),
        ("[blob]\nchunksize = 3", "2: there is no key blob.chunksize; did you mean blob.chunk_size?"),
        ("banana = 3", "1: there is no key banana"),
        ("\"a b\" = 3", "1: there is no key \"a b\""),
        ("[resolver.host.a]\nmirror = []", "2: there is no key resolver.host.a.mirror"),
    ];
    for (text, expected) in cases {
        let settled = read(text).unwrap();
        assert_eq!(settled.warned().collect::<Vec<_>>(), [format!("{PATH}:{expected}")], "{text}");
    }
    let many: String = (0..1000).map(|number| format!("unknown{number} = 1\n")).collect();
    assert_eq!(read(&many).unwrap().warnings.len(), MOST_WARNINGS);
}

/// Their key, the key of ours that it is, and what that has then.
#[test]
fn keys_of_stargz_snapshotter_that_mean_something() {
    let cases = [
        ("noprefetch = true", "prefetch", "false"),
        ("noprefetch = false", "prefetch", "true"),
        ("no_background_fetch = true", "complete", "\"never\""),
        ("allow_no_verification = true", "allow_unverified", "true"),
        ("metrics_address = '127.0.0.1:8234'", "metrics_address", "\"127.0.0.1:8234\""),
        ("metrics_address = ''", "metrics_address", "nothing"),
        ("no_prometheus = true\nmetrics_address = '127.0.0.1:8234'", "metrics_address", "nothing"),
        ("metrics_address = '127.0.0.1:8234'\nno_prometheus = true", "metrics_address", "nothing"),
        ("[blob]\nfetching_timeout_sec = 120", "registries.read_deadline", "120"),
        ("[blob]\nfetching_timeout_sec = 0", "registries.read_deadline", "300"),
        ("[blob]\nmax_retries = 1000", "registries.retries", "100"),
        ("[resolver]\nrequest_timeout_sec = 10", "registries.stall_timeout", "10"),
        ("[resolver]\nrequest_timeout_sec = -1", "registries.stall_timeout", "30"),
        ("[registry]\nconfig_path = '/a:/b'", "registries.hosts_dirs", "[\"/a\", \"/b\"]"),
        ("[kubeconfig_keychain]\nenable_keychain = true", "kubeconfig_keychain.enable_keychain", "true"),
        ("[cri_keychain]\nimage_service_path = '/s'", "cri_keychain.image_service_path", "\"/s\""),
    ];
    for (text, key, expected) in cases {
        let settled = read(text).unwrap();
        assert_eq!(value(&settled, key), expected, "{text}");
        assert_eq!(settled.warnings, [], "{text}");
    }
    let settled = read("noprefetch = true").unwrap();
    assert_eq!(settled.place("prefetch"), format!("{PATH}:1, noprefetch"));
    let settled = read("noprefetch = true\nprefetch = true").unwrap();
    assert_eq!(value(&settled, "prefetch"), "true");
    assert_eq!(
        settled.warned().collect::<Vec<_>>(),
        [format!("{PATH}:1: noprefetch is not used: prefetch says the same, and is there too")]
    );
    let settled = read("disable_verification = true").unwrap();
    assert!(settled.settings.allow_unverified);
    assert!(settled.warnings[0].text.contains("verified all the same"), "{:?}", settled.warnings);
}

/// Every key of `protocols/containerd-snapshotter.md`, as their own documentation and scripts have them in one file.
const STARGZ: &str = include_str!("tests/stargz.toml");

#[test]
fn a_whole_configuration_of_stargz_snapshotter_is_read() {
    let settled = read(STARGZ).unwrap();
    let unknown: Vec<_> = settled.warned().filter(|text| text.contains("there is no key")).collect();
    assert_eq!(unknown, [] as [String; 0]);
    let line =
        |key: &str| STARGZ.lines().position(|line| line.trim_start().starts_with(&format!("{key} ="))).unwrap() + 1;
    for foreign in FOREIGN {
        let key = foreign.name.rsplit('.').next().unwrap();
        if let Meaning::Nothing(_) = foreign.meaning {
            let said =
                settled.warnings.iter().any(|warning| warning.text.starts_with(&format!("{} means", foreign.name)));
            assert!(said, "nothing is said of {}", foreign.name);
        } else {
            assert!(line(key) > 0);
        }
    }
    let mirrors = &settled.settings.registries.mirrors;
    assert_eq!(mirrors["exampleregistry.io"].len(), 2);
    assert!(mirrors["exampleregistry.io"][0].insecure);
    assert_eq!(mirrors["registry2:5000"][0].headers, ["x-custom-2"]);
    assert!(!settled.settings.prefetch);
    assert!(settled.settings.cri_keychain.enable_keychain);
    assert_eq!(
        settled.settings.kubeconfig_keychain.kubeconfig_path,
        Some("/etc/kubernetes/snapshotter/config.conf".into())
    );
}

#[test]
fn flags_come_before_variables_before_the_file() {
    let file = File { path: Path::new(PATH), text: "[cache]\ndir = '/file'\nquota = 1\nparanoid = true\n" };
    let given = |key: &str, text: &str, origin| {
        let key = keys::key(key).unwrap();
        Given { key, value: key.kind.of_text(text).unwrap(), origin }
    };
    let given = [
        given("cache.dir", "/variable", Origin::Environment("LORIS_CACHE_DIR")),
        given("cache.dir", "/flag", Origin::Flag("--cache-dir".to_owned())),
        given("cache.quota", "2K", Origin::Environment("LORIS_CACHE_QUOTA")),
        given("registries.insecure", "a,b:5000", Origin::Flag("--insecure".to_owned())),
    ];
    let settled = settle(Some(file), &given).unwrap();
    let said: Vec<_> = ["cache.dir", "cache.quota", "cache.paranoid", "root", "registries.insecure"]
        .map(|key| format!("{} {}", value(&settled, key), settled.place(key)))
        .into();
    assert_eq!(
        said,
        [
            "\"/flag\" flag --cache-dir",
            "2048 environment LORIS_CACHE_QUOTA",
            "true /etc/loris/snapshotter.toml:4",
            "\"/var/lib/loris-snapshotter\" default",
            "[\"a\", \"b:5000\"] flag --insecure",
        ]
    );
}

#[test]
fn what_is_printed_says_the_same() {
    for text in ["", STARGZ, EXAMPLE, "mount_options = ['a\"b\\', 'c\nd']\nroot = \"/\u{e4}\"\n"] {
        let text = text.replace("'a\"b\\', 'c\nd'", "'a\"b\\', \"c\\nd\"");
        let settled = read(&text).unwrap();
        let printed = settled.to_toml();
        let again = read(&printed).unwrap_or_else(|error| panic!("{error}\n{printed}"));
        let mut expected = settled.settings.clone();
        // What they say is not shown.
        expected.registries.mirrors.values_mut().flatten().for_each(|mirror| mirror.headers.clear());
        assert_eq!(again.settings, expected, "{printed}");
        assert_eq!(again.warnings, [], "{printed}");
        assert!(!printed.contains("value3"), "{printed}");
    }
}

#[test]
fn what_is_printed_says_where_it_came_from() {
    let printed = read("complete = 'idle'\n[cache]\nquota = '1G'\n[blob]\nmax_retries = 2\n").unwrap().to_toml();
    for line in [
        "complete = \"idle\"                                        # /etc/loris/snapshotter.toml:1",
        "# engine is not set                                      # default",
        "[cache]\n",
        "quota = 1073741824                                       # /etc/loris/snapshotter.toml:3",
        "retries = 2                                              # /etc/loris/snapshotter.toml:5, blob.max_retries",
    ] {
        assert!(printed.contains(line), "{line}\n{printed}");
    }
}

/// The example that documentation points to has every key once, and is what is so without it.
const EXAMPLE: &str = include_str!("../../../../docs/snapshotter.example.toml");

#[test]
fn the_example_is_the_defaults() {
    let settled = read(EXAMPLE).unwrap();
    assert_eq!(settled.warnings, []);
    assert_eq!(settled.settings, Settings::default());
    // The same without the hash in front of keys.
    let all: String = EXAMPLE
        .lines()
        .map(|line| line.strip_prefix('#').filter(|key| !key.starts_with(' ')).unwrap_or(line))
        .fold(String::new(), |all, line| all + line + "\n");
    let settled = read(&all).unwrap_or_else(|error| panic!("{error}\n{all}"));
    assert_eq!(settled.warnings, []);
    for key in KEYS {
        assert_ne!(settled.origin(key.name), Origin::Default, "{} is not in the example", key.name);
    }
}

#[test]
fn documentation_has_every_key() {
    let text = include_str!("../../../../docs/snapshotter.md");
    for name in KEYS.iter().map(|key| key.name).chain(FOREIGN.iter().map(|foreign| foreign.name)) {
        assert!(text.contains(&format!("`{name}`")), "{name} is not in docs/snapshotter.md");
    }
}

#[test]
fn what_changes_is_told_from_what_needs_a_restart() {
    let old = read("").unwrap().settings;
    let text = "root = '/x'\ncomplete = 'never'\n[log]\nlevel = 'debug'\n[[resolver.host.a.mirrors]]\nhost = 'b'\n";
    let new = read(text).unwrap().settings;
    let expected = [("root", false), ("complete", true), ("log.level", true), ("resolver.host", true)];
    assert_eq!(changed(&old, &new), expected);
    assert_eq!(changed(&new, &new), []);
}

#[test]
fn keys_of_one_table_stand_together() {
    let mut tables: Vec<_> = KEYS.iter().map(|key| key.name.split_once('.').map_or("", |(table, _)| table)).collect();
    tables.dedup();
    let all = tables.len();
    tables.sort_unstable();
    tables.dedup();
    assert_eq!(tables.len(), all);
}
