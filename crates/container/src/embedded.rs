//! The embedded OCI runtime, as a process of its own.
//!
//! It is youki's libcontainer, with these limits:
//!
//! - *No cgroups.* The container stays in the cgroup of whoever started it, so there are no limits and no device rules,
//!   and it works wherever cgroups are of version 1, 2, both, read-only or missing. Since no device rule then keeps a
//!   container's root from the host's disks, it may make no device nodes (no `CAP_MKNOD`), and those in its root file
//!   system don't work (`nodev`). An installed runtime makes cgroups.
//! - It must be root: there are no user namespaces.
//!
//! libcontainer can't be told to leave cgroups alone. It looks for them in the mount table, so this process gets a mount
//! table of its own, in which there are none.

use std::{
    ffi::OsString,
    fs, io,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use libcontainer::{
    container::{Container, builder::ContainerBuilder},
    error::LibcontainerError,
    syscall::syscall::SyscallType,
};
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, Spec};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
    process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, waitpid},
    thread::UnshareFlags,
};

use crate::{
    runtime::{NOT_EXECUTABLE, NOT_FOUND, NOT_STARTED},
    state,
};

mod console;
mod program;

use self::{console::Console, program::Program};

/// Where cgroups are looked for.
const CGROUPS: &str = "/sys/fs/cgroup";

/// A container that can't be started.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The arguments make no sense.
    #[error("usage: [--root DIR] run --bundle DIR [--pid-file FILE] ID")]
    Usage,
    /// The system refused.
    #[error("{action}: {source}")]
    Io { action: String, source: io::Error },
    /// The bundle's `config.json` can't be used.
    #[error("read {}: {source}", path.display())]
    Spec { path: PathBuf, source: oci_spec::OciSpecError },
    /// libcontainer refused. Its error has the cause in its sources.
    #[error("{}", chain(.0))]
    Container(#[from] LibcontainerError),
}

fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let action = action.into();
    move |source| Error::Io { action, source }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
        next = error.source();
    }
    text
}

/// Does what the arguments behind `oci-runtime` say, and returns the exit status. The process must have one thread.
///
/// `[--root DIR] run --bundle DIR [--pid-file FILE] ID` runs a container in the foreground, as `runc run` does.
/// `guard DIR` waits until standard input ends, and then cleans up after the container of a directory.
#[must_use]
pub fn main(args: &[OsString]) -> u8 {
    if let [verb, directory] = args
        && verb == "guard"
    {
        return guard(Path::new(directory));
    }
    match parse(args).and_then(|request| run(&request)) {
        Ok(code) => code,
        Err(error) => {
            let text = error.to_string();
            // The process that has set the container up can only send words.
            let code = match &error {
                Error::Container(_) if text.contains(program::NOT_FOUND_WORDS) => NOT_FOUND,
                Error::Container(_) if text.contains(program::NOT_EXECUTABLE_WORDS) => NOT_EXECUTABLE,
                _ => NOT_STARTED,
            };
            // What libcontainer wraps around these words says nothing about the container.
            let words = [program::NOT_FOUND_WORDS, program::NOT_EXECUTABLE_WORDS];
            let _ = match words.iter().find_map(|words| text.rfind(words)) {
                Some(start) if code != NOT_STARTED => writeln!(io::stderr(), "loris: {}", &text[start..]),
                _ => writeln!(io::stderr(), "the embedded runtime did not start the container: {text}"),
            };
            code
        }
    }
}

/// What `run` was asked for.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    root: PathBuf,
    bundle: PathBuf,
    pid_file: Option<PathBuf>,
    id: String,
}

fn parse(args: &[OsString]) -> Result<Request, Error> {
    let (mut root, mut bundle, mut pid_file, mut id, mut run) = (None, None, None, None, false);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().map(PathBuf::from).ok_or(Error::Usage);
        match arg.to_str().ok_or(Error::Usage)? {
            "--root" => root = Some(value()?),
            "--bundle" => bundle = Some(value()?),
            "--pid-file" => pid_file = Some(value()?),
            "run" if !run => run = true,
            name if run && id.is_none() && !name.starts_with('-') => id = Some(name.to_owned()),
            _ => return Err(Error::Usage),
        }
    }
    match (bundle, id) {
        (Some(bundle), Some(id)) => {
            let root = root.unwrap_or_else(|| PathBuf::from("/run/loris/oci-runtime"));
            Ok(Request { root, bundle, pid_file, id })
        }
        _ => Err(Error::Usage),
    }
}

/// Waits for the end of the process whose pipe is our standard input, then cleans up.
fn guard(directory: &Path) -> u8 {
    let mut byte = [0];
    loop {
        match io::stdin().read(&mut byte) {
            Ok(0) => break,
            Err(error) if error.kind() != io::ErrorKind::Interrupted => break,
            _ => {}
        }
    }
    match state::clean(directory) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

fn run(request: &Request) -> Result<u8, Error> {
    let path = request.bundle.join("config.json");
    let spec = Spec::load(&path).map_err(|source| Error::Spec { path, source })?;
    let rootfs = match spec.root() {
        Some(root) => request.bundle.join(root.path()),
        None => return Err(Error::Usage),
    };
    isolate(&rootfs)?;
    // libcontainer reads the specification from a bundle, so the changed one needs a bundle of its own.
    let bundle = tempfile::Builder::new().prefix("loris-").tempdir().map_err(failed("make a temporary bundle"))?;
    let terminal = spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal).unwrap_or(false);
    let spec = restrict(spec, rootfs);
    spec.save(bundle.path().join("config.json"))
        .map_err(|source| Error::Spec { path: bundle.path().to_owned(), source })?;
    fs::create_dir_all(&request.root).map_err(failed(format!("create {}", request.root.display())))?;

    let console = match terminal {
        true => Some(Console::listen(bundle.path()).map_err(failed("listen for the terminal"))?),
        false => None,
    };
    let mut container = ContainerBuilder::new(request.id.clone(), SyscallType::default())
        .with_executor(Program)
        .with_root_path(&request.root)?
        .with_pid_file(request.pid_file.clone())?
        .with_console_socket(console.as_ref().map(|console| console.path().to_owned()))
        .validate_id()?
        .as_init(bundle.path())
        .with_systemd(false)
        .with_detach(terminal)
        .build()?;
    let ended = start(&mut container, console);
    if ended.is_err()
        && let Some(pid) = init(&container)
    {
        let _ = kill_process(pid, Signal::KILL);
        let _ = waitpid(Some(pid), WaitOptions::empty());
    }
    // What is left is the directory with its state.
    if let Err(error) = container.delete(true) {
        tracing::warn!(error = chain(&error), "failed to delete the container's state");
    }
    ended
}

fn start(container: &mut Container, console: Option<Console>) -> Result<u8, Error> {
    let pid = init(container).ok_or_else(|| failed("find the container's process")(io::ErrorKind::NotFound.into()))?;
    let console = match console {
        Some(console) => Some(console.open().map_err(failed("get the container's terminal"))?),
        None => None,
    };
    container.start()?;
    let status = wait(pid).map_err(failed("wait for the container's process"))?;
    if let Some(console) = console {
        console.finish();
    }
    Ok(match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
        (None, signal) => 128 | u8::try_from(signal.unwrap_or(0)).unwrap_or(0),
    })
}

fn init(container: &Container) -> Option<Pid> {
    container.pid().and_then(|pid| Pid::from_raw(pid.as_raw()))
}

fn wait(pid: Pid) -> io::Result<WaitStatus> {
    loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Ok(Some((_, status))) => return Ok(status),
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Gives this process a mount table of its own, without cgroups, and in which the root file system has no devices.
fn isolate(rootfs: &Path) -> Result<(), Error> {
    #[expect(deprecated, reason = "its successor is unsafe only for the table of descriptors, which stays shared")]
    rustix::thread::unshare(UnshareFlags::NEWNS).map_err(|errno| {
        let action = match errno {
            rustix::io::Errno::PERM => "make a mount namespace (the embedded runtime needs root)",
            _ => "make a mount namespace",
        };
        failed(action)(errno.into())
    })?;
    // Mounts that go away on the host go away here too; ours stay here.
    let propagation = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", propagation).map_err(|errno| failed("separate the mounts")(errno.into()))?;

    let table = fs::read_to_string("/proc/self/mountinfo").map_err(failed("read the mount table"))?;
    for mount_point in cgroup_mounts(&table) {
        match rustix::mount::unmount(&mount_point, UnmountFlags::DETACH) {
            // What is below another mount goes with it.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(errno) => return Err(failed(format!("detach {}", mount_point.display()))(errno.into())),
        }
    }
    let tmpfs = |target: &str| {
        rustix::mount::mount("none", target, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=755")
            .map_err(|errno| failed(format!("hide {target}"))(errno.into()))
    };
    if !Path::new(CGROUPS).is_dir() {
        tmpfs("/sys")?;
        fs::create_dir_all(CGROUPS).map_err(failed(format!("create {CGROUPS}")))?;
    }
    tmpfs(CGROUPS)?;

    let no_devices = |errno: rustix::io::Errno| failed(format!("remount {}", rootfs.display()))(errno.into());
    rustix::mount::mount_bind_recursive(rootfs, rootfs).map_err(no_devices)?;
    let flags = rustix::fs::statvfs(rootfs).map_err(no_devices)?.f_flag;
    let mut keep = MountFlags::BIND | MountFlags::NODEV;
    for (flag, kept) in [
        (rustix::fs::StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (rustix::fs::StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (rustix::fs::StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
    ] {
        if flags.contains(flag) {
            keep |= kept;
        }
    }
    rustix::mount::mount_remount(rootfs, keep, "").map_err(no_devices)
}

/// The mount points of all cgroup file systems, in the order in which they were mounted.
fn cgroup_mounts(table: &str) -> Vec<PathBuf> {
    // `36 35 98:0 /root /mount/point options optional... - type source options`, proc_pid_mountinfo(5)
    table
        .lines()
        .filter_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            matches!(file_system.split(' ').next()?, "cgroup" | "cgroup2").then(|| mount.split(' ').nth(4))?
        })
        .map(unescape)
        .collect()
}

/// Reads a path of the mount table, in which blanks and backslashes are `\` and three octal digits.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match (first, octal) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

/// Takes from a specification what only cgroups could make safe, or what needs them.
fn restrict(mut spec: Spec, rootfs: PathBuf) -> Spec {
    if let Some(root) = spec.root_mut() {
        root.set_path(rootfs);
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_resources(None).set_cgroups_path(None);
    }
    if let Some(mounts) = spec.mounts_mut() {
        mounts.retain(|mount| mount.typ().as_deref() != Some("cgroup"));
    }
    if let Some(process) = spec.process_mut()
        && let Some(capabilities) = process.capabilities().clone()
    {
        process.set_capabilities(Some(without_device_nodes(capabilities)));
    }
    spec
}

fn without_device_nodes(mut capabilities: LinuxCapabilities) -> LinuxCapabilities {
    let without = |set: &Option<Capabilities>| {
        let mut set = set.clone().unwrap_or_default();
        set.remove(&Capability::Mknod);
        Some(set)
    };
    let (bounding, effective) = (without(capabilities.bounding()), without(capabilities.effective()));
    let (inheritable, permitted) = (without(capabilities.inheritable()), without(capabilities.permitted()));
    let ambient = without(capabilities.ambient());
    capabilities
        .set_bounding(bounding)
        .set_effective(effective)
        .set_inheritable(inheritable)
        .set_permitted(permitted)
        .set_ambient(ambient);
    capabilities
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(text: &str) -> Vec<OsString> {
        text.split_ascii_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn arguments() {
        let request = parse(&args("--root /r run --bundle /b --pid-file /p id")).unwrap();
        let expected =
            Request { root: "/r".into(), bundle: "/b".into(), pid_file: Some("/p".into()), id: "id".to_owned() };
        assert_eq!(request, expected);
        for bad in [
            "",
            "run",
            "run id",
            "run --bundle",
            "run --bundle /b",
            "--bundle /b id",
            "run --bundle /b a b",
            "run --other --bundle /b a",
        ] {
            assert!(parse(&args(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn mounts_of_cgroups() {
        let table = "\
            22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n\
            30 22 0:20 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            31 30 0:21 / /sys/fs/cgroup/cpu,cpuacct rw master:1 - cgroup cgroup rw,cpu\n\
            32 30 0:22 / /odd\\040place\\134 rw - cgroup2 cgroup2 rw\n\
            33 30 0:22 /cgroup /other rw - fuse.cgroup cgroup rw\n";
        let mounts: Vec<PathBuf> = vec!["/sys/fs/cgroup/cpu,cpuacct".into(), "/odd place\\".into()];
        assert_eq!(cgroup_mounts(table), mounts);
    }

    #[test]
    fn no_device_nodes() {
        let capabilities = LinuxCapabilities::default();
        let all: Capabilities = [Capability::Mknod, Capability::Chown].into();
        let mut given = capabilities;
        given.set_bounding(Some(all.clone())).set_effective(Some(all));
        let restricted = without_device_nodes(given);
        assert_eq!(restricted.bounding(), &Some([Capability::Chown].into()));
        assert_eq!(restricted.effective(), &Some([Capability::Chown].into()));
    }
}
