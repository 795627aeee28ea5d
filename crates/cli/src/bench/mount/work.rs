//! What programs do to a root file system, timed from outside.
//!
//! It must not know what the root file system is made of.

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};

/// Files that random reads go to: the largest.
const FILES: usize = 16;
/// Random reads of one measurement: from the page cache, and from the disk.
const READS_WARM: u32 = 50_000;
const READS_COLD: u32 = 1_000;
/// Bytes of one read.
pub(super) const PAGE: usize = 4096;

/// What numpy brings in where an image has it not: modules of Python's own, most of what it has.
const IMPORT: &str = "
import importlib
try:
    import numpy
except ImportError:
    for name in '''argparse ast asyncio bz2 calendar codecs collections concurrent.futures configparser copy csv ctypes
            curses datetime dbm decimal difflib dis doctest email.message email.mime.text fractions ftplib gettext gzip
            hashlib html.parser http.client http.server imaplib inspect ipaddress json locale logging.config lzma mailbox
            multiprocessing.pool netrc optparse pathlib pdb pickletools platform plistlib poplib pprint pydoc queue random
            shelve shutil smtplib socketserver sqlite3 ssl statistics string subprocess sysconfig tarfile tempfile textwrap
            timeit tokenize tracemalloc typing unittest.mock urllib.request uuid wave xml.dom.minidom xml.etree.ElementTree
            xmlrpc.client zipapp zipfile zoneinfo'''.split():
        try:
            importlib.import_module(name)
        except ImportError:
            pass
";

/// One thing that programs do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Work {
    Find,
    Tar,
    Reads,
    Import,
}

impl Work {
    pub(super) const ALL: [Self; 4] = [Self::Find, Self::Tar, Self::Reads, Self::Import];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Find => "find",
            Self::Tar => "tar c",
            Self::Reads => "reads of 4 KiB",
            Self::Import => "python import",
        }
    }

    /// Does it once and returns the seconds that it took.
    pub(super) fn run(self, root: &Path, files: &Files, is_warm: bool) -> Result<f64> {
        match self {
            // The size makes it look at each file.
            Self::Find => timed(Command::new("find").arg(root).args(["-xdev", "-printf", "%s %m\n"])),
            Self::Tar => {
                timed(Command::new("tar").args(["-c", "--one-file-system", "-f", "-", "-C"]).arg(root).arg("."))
            }
            Self::Reads => files.read(root, if is_warm { READS_WARM } else { READS_COLD }),
            // Nothing is written, also no compiled modules.
            Self::Import => timed(
                Command::new("chroot").arg(root).arg(&files.python).args(["-I", "-B", "-c", IMPORT]).current_dir("/"),
            ),
        }
    }

    /// Says whether it can be done with this root.
    pub(super) fn is_possible(self, files: &Files) -> bool {
        match self {
            Self::Import => !files.python.as_os_str().is_empty(),
            Self::Reads => !files.largest.is_empty(),
            _ => true,
        }
    }
}

/// Runs a program, reads its output and throws it away. (GNU tar reads no content when its output is `/dev/null`.)
fn timed(command: &mut Command) -> Result<f64> {
    let program = command.get_program().to_string_lossy().into_owned();
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let mut output = child.stdout.take().context("no standard output")?;
    let mut buffer = vec![0; 256 << 10];
    while output.read(&mut buffer)? > 0 {}
    let status = child.wait()?;
    let seconds = start.elapsed().as_secs_f64();
    ensure!(status.success(), "{program} ended with {status}");
    Ok(seconds)
}

/// Files of a root that are used by name.
pub(super) struct Files {
    /// Relative paths and sizes in bytes, the largest first.
    largest: Vec<(PathBuf, u64)>,
    /// Its Python as seen from inside; empty where it has none.
    python: PathBuf,
    /// All names of it.
    pub(super) names: usize,
    /// Bytes of its regular files.
    pub(super) bytes: u64,
}

impl Files {
    /// Looks through a root.
    pub(super) fn of(root: &Path) -> Result<Self> {
        let device = fs::metadata(root)?.dev();
        let (mut regular, mut names, mut bytes) = (Vec::new(), 0, 0);
        let mut open = vec![root.to_owned()];
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
                let path = entry?.path();
                let metadata = fs::symlink_metadata(&path)?;
                names += 1;
                if metadata.is_dir() && metadata.dev() == device {
                    open.push(path);
                } else if metadata.is_file() {
                    bytes += metadata.len();
                    regular.push((path.strip_prefix(root).unwrap_or(&path).to_owned(), metadata.len()));
                }
            }
        }
        regular.sort_by(|one, other| other.1.cmp(&one.1).then_with(|| one.0.cmp(&other.0)));
        regular.truncate(FILES);
        regular.retain(|(_, size)| *size >= PAGE as u64);
        let python = ["usr/bin/python3", "usr/local/bin/python3"];
        let python = python.iter().find(|path| fs::symlink_metadata(root.join(path)).is_ok());
        let python = python.map_or_else(PathBuf::new, |path| Path::new("/").join(path));
        Ok(Self { largest: regular, python, names, bytes })
    }

    /// Returns the largest file and its size.
    pub(super) fn largest(&self) -> Result<(&Path, u64)> {
        self.largest.first().map(|(path, size)| (path.as_path(), *size)).context("there is no file in the image")
    }

    /// Reads pages by chance, the same for each root; the time of opening is not counted.
    fn read(&self, root: &Path, reads: u32) -> Result<f64> {
        let files = self.largest.iter().map(|(path, size)| Ok((File::open(root.join(path))?, *size)));
        let files = files.collect::<Result<Vec<_>>>()?;
        let mut buffer = [0; PAGE];
        let mut chance = Chance::new();
        let start = Instant::now();
        for _ in 0..reads {
            let (file, size) = &files[usize::try_from(chance.below(files.len() as u64)).unwrap_or_default()];
            file.read_exact_at(&mut buffer, chance.below(size / PAGE as u64) * PAGE as u64)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Numbers that look like chance (xorshift), the same in each run.
pub(super) struct Chance(u64);

impl Chance {
    pub(super) fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    /// A number below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Makes the kernel forget what it has read.
pub(super) fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("dropping the page cache, which takes root")
}
