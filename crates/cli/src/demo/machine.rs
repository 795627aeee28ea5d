//! What the demo's image is made of: this machine's own C library, shell, interpreter, libraries and documents.
//!
//! Nothing is downloaded. The lists below are wishes: what a machine has not got is passed over, and what is left must
//! still hold an interpreter and reach the size that makes the comparison mean something.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

/// One layer of the demo's image: paths of this machine, in order, each preceded by its parents.
pub(super) struct LayerFiles {
    /// For the image's history.
    pub title: String,
    /// Absolute paths without symbolic links in their parents.
    pub paths: BTreeSet<PathBuf>,
    /// Content of the regular files, in bytes.
    pub bytes: u64,
}

/// What the image will hold, and the program that is started from it.
pub(super) struct Plan {
    /// Bottom first.
    pub layers: Vec<LayerFiles>,
    /// The command line, its first word an absolute path in the image.
    pub command: Vec<String>,
}

impl Plan {
    /// Spreads the same files over so many layers, in the order of their paths. Hard links between layers become files.
    pub(super) fn spread(&mut self, layers: usize) {
        let paths: Vec<PathBuf> = self.layers.iter_mut().flat_map(|layer| std::mem::take(&mut layer.paths)).collect();
        let of_part = |(number, paths): (usize, &[PathBuf])| {
            let size =
                |path: &PathBuf| fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file).map(|file| file.len());
            LayerFiles {
                title: format!("part {number}"),
                paths: paths.iter().cloned().collect(),
                bytes: paths.iter().filter_map(size).sum(),
            }
        };
        self.layers = paths.chunks(paths.len().div_ceil(layers).max(1)).enumerate().map(of_part).collect();
    }
}

/// Programs of the shell layer.
const SHELL: &[&str] =
    &["sh", "bash", "ls", "cat", "cp", "mv", "rm", "mkdir", "grep", "sed", "find", "tar", "gzip", "env", "id"];

/// Files that programs expect in `/etc`.
const ETC: &[&str] =
    &["/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/debian_version"];

/// Folders that make the image as large as images are, the ones most like an image first.
const FILLING: &[&str] = &[
    "/usr/lib/python3",
    "/usr/share/perl",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/share/doc",
    "/usr/lib/gcc",
    "/usr/share",
    "/usr/lib",
    "/usr/local/lib",
];

/// Chooses files until the layers hold `wanted` bytes of content.
///
/// # Errors
/// Where there is neither Python nor Perl, or the machine has not got that much.
pub(super) fn plan(wanted: u64) -> Result<Plan> {
    let mut taken = BTreeSet::new();
    let mut base = Gathered::new(&taken);
    for top in ["/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"] {
        base.add_entry(Path::new(top));
    }
    for program in SHELL {
        if let Some(path) = find_program(program) {
            base.add_program(&path);
        }
    }
    for file in ETC {
        base.add_entry(Path::new(file));
    }
    let base = base.into_layer("C library and shell");
    taken.extend(base.paths.iter().cloned());

    let (interpreter, folders, command) = interpreter()?;
    let mut language = Gathered::new(&taken);
    language.add_program(&interpreter);
    for folder in &folders {
        language.add_tree(folder, u64::MAX);
    }
    let language = language.into_layer("interpreter and its modules");
    taken.extend(language.paths.iter().cloned());

    let mut rest = wanted.saturating_sub(base.bytes + language.bytes);
    let mut filling = Gathered::new(&taken);
    for folder in FILLING {
        let before = filling.bytes;
        filling.add_tree(Path::new(folder), rest);
        rest = rest.saturating_sub(filling.bytes - before);
    }
    let filling = filling.into_layer("libraries and documents");

    let found = base.bytes + language.bytes + filling.bytes;
    if found < wanted {
        bail!(
            "this machine's libraries and documents come to {} of {} that the demo's image needs",
            crate::table::bytes(found),
            crate::table::bytes(wanted)
        );
    }
    Ok(Plan { layers: vec![base, language, filling], command })
}

/// Returns an interpreter, the folders of its modules, and a command that imports some of them and prints a line.
fn interpreter() -> Result<(PathBuf, Vec<PathBuf>, Vec<String>)> {
    for python in ["/usr/bin/python3", "/usr/local/bin/python3"] {
        let Ok(real) = fs::canonicalize(python) else { continue };
        let script = "import sysconfig as s; p=s.get_paths(); print(p['stdlib']); print(p['platstdlib'])";
        let Ok(output) = Command::new(python).args(["-I", "-c", script]).output() else { continue };
        let mut folders: Vec<PathBuf> =
            String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| fs::canonicalize(line).ok()).collect();
        folders.dedup();
        if !output.status.success() || folders.is_empty() {
            continue;
        }
        let program =
            "import json, decimal, sys; print('hello from Python', sys.version.split()[0], json.dumps([1, 2]))";
        let command = vec![python.to_owned(), "-c".to_owned(), program.to_owned()];
        // The name that is started and the file it leads to may differ; add_program takes both.
        drop(real);
        return Ok((PathBuf::from(python), folders, command));
    }
    let perl = PathBuf::from("/usr/bin/perl");
    if perl.exists() {
        let output = Command::new(&perl)
            .args(["-e", "print join qq(\\n), @INC"])
            .output()
            .context("asking perl for its modules")?;
        let folders =
            String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| fs::canonicalize(line).ok()).collect();
        let program =
            "use strict; use POSIX; use List::Util qw(sum); printf qq(hello from Perl %s %d\\n), $^V, sum(1, 2)";
        return Ok((perl, folders, vec!["/usr/bin/perl".to_owned(), "-e".to_owned(), program.to_owned()]));
    }
    bail!("this machine has neither Python nor Perl to put into the demo's image: apt-get install python3-minimal")
}

fn find_program(name: &str) -> Option<PathBuf> {
    ["/usr/bin", "/bin", "/usr/sbin"].iter().map(|folder| Path::new(folder).join(name)).find(|path| path.exists())
}

/// Collects paths for one layer, leaving out what lower layers have.
struct Gathered<'a> {
    below: &'a BTreeSet<PathBuf>,
    paths: BTreeSet<PathBuf>,
    bytes: u64,
}

impl<'a> Gathered<'a> {
    fn new(below: &'a BTreeSet<PathBuf>) -> Self {
        Self { below, paths: BTreeSet::new(), bytes: 0 }
    }

    fn into_layer(self, title: &str) -> LayerFiles {
        LayerFiles { title: title.to_owned(), paths: self.paths, bytes: self.bytes }
    }

    /// Adds a program, what its name leads to, and the shared libraries it is linked to.
    fn add_program(&mut self, program: &Path) {
        self.add_entry(program);
        self.add_libraries(program);
    }

    fn add_libraries(&mut self, object: &Path) {
        let Ok(output) = Command::new("ldd").arg(object).output() else { return };
        let listing = String::from_utf8_lossy(&output.stdout).into_owned();
        for word in listing.split_whitespace().filter(|word| word.starts_with('/')) {
            self.add_entry(Path::new(word.trim_end_matches(':')));
        }
    }

    /// Adds a folder and all in it, up to so many bytes of content.
    fn add_tree(&mut self, folder: &Path, limit: u64) {
        let start = self.bytes;
        let mut open = vec![folder.to_owned()];
        while let Some(folder) = open.pop() {
            self.add_entry(&folder);
            let Ok(entries) = fs::read_dir(&folder) else { continue };
            let mut entries: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
            entries.sort();
            for path in entries {
                if self.bytes - start >= limit {
                    return;
                }
                match fs::symlink_metadata(&path) {
                    Ok(metadata) if metadata.is_dir() => open.push(path),
                    Ok(_) => {
                        self.add_entry(&path);
                        // Extension modules bring libraries that nothing else is linked to.
                        if path.components().any(|part| part.as_os_str() == "lib-dynload") {
                            self.add_libraries(&path);
                        }
                    }
                    Err(_) => {}
                }
            }
        }
    }

    /// Adds one entry with its parents, and where it is a symbolic link also what it leads to.
    fn add_entry(&mut self, path: &Path) {
        let mut path = path.to_owned();
        // Bounded as the kernel bounds it.
        for _ in 0..40 {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return };
            let Ok(parent) = fs::canonicalize(parent) else { return };
            let real = parent.join(name);
            let Ok(metadata) = fs::symlink_metadata(&real) else { return };
            let kind = metadata.file_type();
            if !(kind.is_dir() || kind.is_file() || kind.is_symlink()) || real.as_os_str().as_bytes().contains(&b'\n') {
                return;
            }
            if kind.is_file() && fs::File::open(&real).is_err() {
                return;
            }
            self.add_parents(&parent);
            if !self.below.contains(&real) && self.paths.insert(real.clone()) && kind.is_file() {
                self.bytes += metadata.len();
            }
            if !kind.is_symlink() {
                return;
            }
            let Ok(target) = fs::read_link(&real) else { return };
            path = parent.join(target);
        }
    }

    fn add_parents(&mut self, folder: &Path) {
        for parent in folder.ancestors().filter(|parent| parent.parent().is_some()) {
            if !self.below.contains(parent) {
                self.paths.insert(parent.to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_comes_after_its_parents_and_once() {
        let plan = plan(1 << 20).unwrap();
        let mut seen = BTreeSet::new();
        for layer in &plan.layers {
            for path in &layer.paths {
                let parent = path.parent().unwrap();
                assert!(parent == Path::new("/") || seen.contains(parent), "{} before its parent", path.display());
                assert!(seen.insert(path.clone()), "{} twice", path.display());
            }
        }
        assert!(seen.iter().any(|path| path.to_string_lossy().contains("libc.so")), "no C library");
    }
}
