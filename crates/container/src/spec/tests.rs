//! What is asked for against what the runtime is told.

use std::fs;

use tempfile::TempDir;

use super::*;

fn rootfs() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("etc")).unwrap();
    fs::write(directory.path().join("etc/passwd"), "root:x:0:0::/root:\nweb:x:33:33::/var/www:\n").unwrap();
    fs::write(directory.path().join("etc/group"), "adm:x:4:web\n").unwrap();
    directory
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

fn image() -> ProcessConfig {
    ProcessConfig {
        env: strings(&["PATH=/bin", "A=image", "B=image=b"]),
        entrypoint: strings(&["/entry"]),
        cmd: strings(&["default"]),
        working_dir: "/work/../srv".to_owned(),
        user: "web".to_owned(),
        ..ProcessConfig::default()
    }
}

fn build(image: &ProcessConfig, wishes: &Wishes) -> Result<Value, SpecError> {
    let rootfs = rootfs();
    let caller_env = |name: &str| (name == "CALLER").then(|| "caller".to_owned());
    let container = Container::new(image, wishes, rootfs.path(), &caller_env)?;
    Ok(serde_json::to_value(&container.spec).unwrap())
}

#[test]
fn the_image_decides() {
    let spec = build(&image(), &Wishes::default()).unwrap();
    let process = &spec["process"];
    assert_eq!(process["args"], json!(["/entry", "default"]));
    assert_eq!(process["cwd"], "/srv");
    assert_eq!(process["user"], json!({ "uid": 33, "gid": 33, "additionalGids": [4] }));
    assert_eq!(process["terminal"], false);
    assert_eq!(process["noNewPrivileges"], true);
    let env = process["env"].as_array().unwrap();
    for variable in ["PATH=/bin", "A=image", "B=image=b", "HOME=/var/www"] {
        assert!(env.contains(&json!(variable)), "{variable} in {env:?}");
    }
    for set in ["bounding", "effective", "permitted"] {
        assert_eq!(process["capabilities"][set].as_array().unwrap().len(), 14, "{set}");
    }
    assert_eq!(process["capabilities"].get("inheritable"), None);
    assert_eq!(process["capabilities"].get("ambient"), None);
    assert_eq!(spec["root"]["readonly"], false);
    let namespaces: Vec<_> = spec["linux"]["namespaces"].as_array().unwrap().iter().map(|n| &n["type"]).collect();
    assert_eq!(namespaces, ["pid", "ipc", "uts", "mount"]);
    let mounts: Vec<_> =
        spec["mounts"].as_array().unwrap().iter().map(|m| m["destination"].as_str().unwrap()).collect();
    assert_eq!(mounts, ["/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys"]);
}

#[test]
fn the_user_decides() {
    let source = tempfile::tempdir().unwrap();
    let wishes = Wishes {
        args: strings(&["mine"]),
        env: strings(&["A=user", "CALLER", "MISSING", "EMPTY="]),
        volumes: vec![Volume { source: source.path().to_owned(), target: "/data".into(), read_only: true }],
        working_dir: Some("/data/below".to_owned()),
        user: Some("7:adm".to_owned()),
        network: Network::None,
        read_only: true,
        hostname: Some("box".to_owned()),
        tty: true,
        ..Wishes::default()
    };
    let spec = build(&image(), &wishes).unwrap();
    let process = &spec["process"];
    assert_eq!(process["args"], json!(["/entry", "mine"]));
    assert_eq!(process["cwd"], "/data/below");
    assert_eq!(process["user"]["uid"], 7);
    assert_eq!(process["user"]["gid"], 4);
    assert_eq!(process["terminal"], true);
    let expected =
        ["HOSTNAME=box", "HOME=/", "TERM=xterm", "PATH=/bin", "B=image=b", "A=user", "CALLER=caller", "EMPTY="];
    assert_eq!(process["env"], json!(expected));
    assert_eq!(spec["hostname"], "box");
    assert_eq!(spec["root"]["readonly"], true);
    assert!(spec["linux"]["namespaces"].as_array().unwrap().contains(&json!({ "type": "network" })));
    let bind = spec["mounts"].as_array().unwrap().last().unwrap();
    assert_eq!(
        *bind,
        json!({ "destination": "/data", "type": "bind", "source": source.path(),
        "options": ["rbind", "rprivate", "ro"] })
    );
}

#[test]
fn commands() {
    let with = |entrypoint: Option<&[&str]>, args: &[&str]| {
        let wishes = Wishes { entrypoint: entrypoint.map(strings), args: strings(args), ..Wishes::default() };
        command(&image(), &wishes).ok()
    };
    assert_eq!(with(None, &[]).unwrap(), ["/entry", "default"]);
    assert_eq!(with(None, &["a", "b"]).unwrap(), ["/entry", "a", "b"]);
    assert_eq!(with(Some(&["sh"]), &[]).unwrap(), ["sh"]);
    assert_eq!(with(Some(&["sh", "-c"]), &["x"]).unwrap(), ["sh", "-c", "x"]);
    assert_eq!(with(Some(&[]), &["x"]).unwrap(), ["x"]);
    assert_eq!(with(Some(&[]), &[]), None);
    assert_eq!(with(Some(&[""]), &[]), None);
}

#[test]
fn volumes() {
    let read = |text: &str| text.parse::<Volume>().map(|volume| (volume.source, volume.target, volume.read_only)).ok();
    assert_eq!(read("/a:/b"), Some(("/a".into(), "/b".into(), false)));
    assert_eq!(read("/a:/b:rw"), Some(("/a".into(), "/b".into(), false)));
    assert_eq!(read("/a b:/b:ro"), Some(("/a b".into(), "/b".into(), true)));
    for bad in ["", "/a", "a:/b", "/a:b", "/a:/", "/a:/b:z", "/a:/b:ro:x", "/a:/b/../c", ":/b", "/a:", "/a\0:/b"] {
        assert_eq!(read(bad), None, "{bad:?}");
    }
}

#[test]
fn what_cannot_be() {
    let volume = |source: &str| vec![Volume { source: source.into(), target: "/x".into(), read_only: false }];
    let cases = [
        (Wishes { volumes: volume("/does/not/exist"), ..Wishes::default() }, "No such file"),
        (Wishes { volumes: volume("relative"), ..Wishes::default() }, "absolute"),
        (Wishes { working_dir: Some("relative".to_owned()), ..Wishes::default() }, "absolute"),
        (Wishes { working_dir: Some("/etc/passwd/x".to_owned()), ..Wishes::default() }, "Not a directory"),
        (Wishes { user: Some("nobody".to_owned()), ..Wishes::default() }, "no user"),
        (Wishes { env: strings(&["=x"]), ..Wishes::default() }, "NAME=value"),
        (Wishes { env: strings(&["A=\0"]), ..Wishes::default() }, "NAME=value"),
        (Wishes { hostname: Some("a b".to_owned()), ..Wishes::default() }, "host name"),
        (Wishes { hostname: Some("x".repeat(65)), ..Wishes::default() }, "host name"),
        (Wishes { entrypoint: Some(Vec::new()), ..Wishes::default() }, "nothing to run"),
    ];
    for (wishes, message) in cases {
        let error = build(&image(), &wishes).unwrap_err().to_string();
        assert!(error.contains(message), "{error:?} does not hold {message:?}");
    }
}

#[test]
fn files_for_the_container() {
    let rootfs = rootfs();
    let wishes = Wishes { network: Network::None, hostname: Some("box".to_owned()), ..Wishes::default() };
    let container = Container::new(&image(), &wishes, rootfs.path(), &|_| None).unwrap();
    assert_eq!(container.files["/etc/hostname"], b"box\n");
    assert!(String::from_utf8_lossy(&container.files["/etc/hosts"]).contains("127.0.1.1\tbox\n"));
    assert!(!container.files.contains_key("/etc/resolv.conf"));
    assert_eq!(container.id.len(), 12);

    // A link that leads nowhere can't be mounted upon, and what the user mounts is the user's.
    std::os::unix::fs::symlink("/nowhere/hosts", rootfs.path().join("etc/hosts")).unwrap();
    let container = Container::new(&image(), &wishes, rootfs.path(), &|_| None).unwrap();
    assert_eq!(container.files.keys().collect::<Vec<_>>(), [&"/etc/hostname"]);
    let volume = Volume { source: "/tmp".into(), target: "/etc".into(), read_only: false };
    let wishes = Wishes { volumes: vec![volume], ..wishes };
    let container = Container::new(&image(), &wishes, rootfs.path(), &|_| None).unwrap();
    assert!(container.files.is_empty());
}
