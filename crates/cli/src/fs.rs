//! `fs ls` and `fs cat`: looking into an image by range reads.

use std::{io::Write as _, sync::Arc};

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use loris_format::{
    index::{NodeId, Timestamp},
    position::FileOffset,
    tree::{Inode, InodeId, InodeKind, Tree},
};
use loris_lazy::{FetchPolicy, LazyLayer};
use serde::Serialize;

use crate::{
    Global,
    access::OnePlatform,
    failure::{self, Outcome},
    opened::{OpenLazily, Opened},
    table::printable,
};

/// Look into an image by range reads, without pulling it.
#[derive(Subcommand)]
pub(crate) enum FsCommand {
    /// List files
    Ls(LsArguments),
    /// Print files
    Cat(CatArguments),
}

/// List files.
#[derive(Args)]
pub(crate) struct LsArguments {
    /// The image
    image: String,
    /// Files or directories in it
    #[arg(default_value = "/")]
    paths: Vec<String>,
    /// Show type, permissions, links, owner, size and time
    #[arg(long, short)]
    long: bool,
    /// Names that begin with a dot too: what is done anyway
    #[arg(long, short)]
    all: bool,
    /// Show directories themselves, and not what is in them
    #[arg(long, short, conflicts_with = "recursive")]
    directory: bool,
    /// List directories with all that is in them
    #[arg(long, short = 'R')]
    recursive: bool,
    #[command(flatten)]
    platform: OnePlatform,
    #[command(flatten)]
    open: OpenLazily,
}

/// Print files.
#[derive(Args)]
pub(crate) struct CatArguments {
    /// The image
    image: String,
    /// Files in it
    #[arg(required = true)]
    paths: Vec<String>,
    #[command(flatten)]
    platform: OnePlatform,
    #[command(flatten)]
    open: OpenLazily,
}

impl FsCommand {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        match self {
            Self::Ls(arguments) => arguments.run(global).await,
            Self::Cat(arguments) => arguments.run(global).await,
        }
    }
}

/// How much is read at once. Two of eStargz's usual chunks, so that one is fetched while another is printed.
const READ_BYTES: usize = 1 << 20;

impl LsArguments {
    async fn run(self, global: &Global) -> failure::Result {
        let opened = Opened::open(global, &self.image, &self.platform, &self.open, FetchPolicy::EXACT).await?;
        let tree = opened.tree();
        let mut listed = Vec::new();
        let mut all_found = true;
        for path in &self.paths {
            let inode = match resolve(&tree, path) {
                Ok(inode) => inode,
                Err(error) => {
                    failure::print(&error);
                    all_found = false;
                    continue;
                }
            };
            if self.directory {
                let shown = path.trim_matches('/');
                listed.push((if shown.is_empty() { "/" } else { shown }.as_bytes().to_vec(), inode));
                continue;
            }
            list(&tree, inode, path.trim_matches('/').as_bytes(), self.recursive, &mut listed);
        }
        let mut out = std::io::stdout().lock();
        if global.json {
            let lines: Vec<JsonLine> = listed.iter().map(|(path, id)| JsonLine::new(&tree, path, *id)).collect();
            serde_json::to_writer_pretty(&mut out, &lines)?;
            writeln!(out)?;
            return Ok(if all_found { Outcome::Done } else { Outcome::FoundFaults });
        }
        for (path, id) in &listed {
            // An id that the tree listed is in the tree.
            let Some(inode) = tree.inode(*id) else { continue };
            if self.long {
                writeln!(out, "{}", long_line(inode, path))?;
            } else {
                writeln!(out, "{}", printable(path))?;
            }
        }
        out.flush()?;
        Ok(if all_found { Outcome::Done } else { Outcome::FoundFaults })
    }
}

impl CatArguments {
    async fn run(self, global: &Global) -> failure::Result {
        let opened = Opened::open(global, &self.image, &self.platform, &self.open, FetchPolicy::EXACT).await?;
        let tree = opened.tree();
        let mut all_printed = true;
        for path in &self.paths {
            if let Err(error) = print(&opened, &tree, path).await {
                if failure::is_broken_pipe(&error) {
                    return Err(error);
                }
                failure::print(&error);
                all_printed = false;
            }
        }
        Ok(if all_printed { Outcome::Done } else { Outcome::FoundFaults })
    }
}

async fn print(opened: &Opened, tree: &Tree, path: &str) -> anyhow::Result<()> {
    let inode = resolve(tree, path)?;
    match tree.inode(inode).map(|inode| &inode.kind) {
        Some(InodeKind::Regular { layer, node, size, .. }) => {
            let layer = opened.layers().get(layer.0 as usize).context("a layer that the image has not got")?;
            print_file(layer, *node, *size).await.with_context(|| format!("reading {}", printable(path.as_bytes())))
        }
        Some(InodeKind::Directory) => bail!("{}: is a directory", printable(path.as_bytes())),
        _ => bail!("{}: is not a regular file", printable(path.as_bytes())),
    }
}

async fn print_file(layer: &Arc<LazyLayer>, node: NodeId, size: u64) -> anyhow::Result<()> {
    let mut buffer = vec![0; READ_BYTES];
    let mut at = 0;
    while at < size {
        let read = layer.read(node, FileOffset(at), &mut buffer).await?;
        if read == 0 {
            bail!("the file ends at {at} of {size} bytes");
        }
        std::io::stdout().write_all(&buffer[..read])?;
        at += read as u64;
    }
    std::io::stdout().flush()?;
    Ok(())
}

fn resolve(tree: &Tree, path: &str) -> anyhow::Result<InodeId> {
    tree.resolve(path.as_bytes()).with_context(|| format!("{} in the image", printable(path.as_bytes())))
}

/// Collects what `ls` shows of a path: itself, or what is in it.
fn list(tree: &Tree, start: InodeId, path: &[u8], recursive: bool, listed: &mut Vec<(Vec<u8>, InodeId)>) {
    let is_directory = |id| tree.inode(id).is_some_and(|inode| matches!(inode.kind, InodeKind::Directory));
    if !is_directory(start) {
        listed.push((path.to_vec(), start));
        return;
    }
    let prefix = if recursive { path.to_vec() } else { Vec::new() };
    let mut open = vec![(prefix, start)];
    while let Some((prefix, directory)) = open.pop() {
        if recursive && !prefix.is_empty() && directory != start {
            listed.push((prefix.clone(), directory));
        }
        let mut below = Vec::new();
        for (name, child) in tree.children(directory) {
            let mut path = prefix.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            if recursive {
                below.push((path, *child));
            } else {
                listed.push((path, *child));
            }
        }
        // The first child is taken next, so that a directory comes right before what is in it.
        for (path, child) in below.into_iter().rev() {
            open.push((path, child));
        }
        while let Some((path, child)) = open.pop_if(|(_, child)| !is_directory(*child)) {
            listed.push((path, child));
        }
    }
}

fn long_line(inode: &Inode, path: &[u8]) -> String {
    let (letter, size) = match &inode.kind {
        InodeKind::Directory => ('d', String::new()),
        InodeKind::Regular { size, .. } => ('-', size.to_string()),
        InodeKind::Symlink { target } => ('l', target.len().to_string()),
        InodeKind::CharDevice { major, minor } => ('c', format!("{major}, {minor}")),
        InodeKind::BlockDevice { major, minor } => ('b', format!("{major}, {minor}")),
        InodeKind::Fifo => ('p', String::new()),
    };
    let mut line = format!(
        "{letter}{} {:>3} {:>5} {:>5} {size:>10} {} {}",
        permissions(inode.permissions),
        inode.link_count,
        inode.uid,
        inode.gid,
        date(inode.mtime),
        printable(path)
    );
    if let InodeKind::Symlink { target } = &inode.kind {
        line.push_str(" -> ");
        line.push_str(&printable(target));
    }
    line
}

/// Shows permissions as `ls -l` does: `rwxr-xr-x`, with `s` and `t` for the special bits.
fn permissions(bits: u16) -> String {
    let mut text = String::with_capacity(9);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let three = bits >> shift;
        text.push(if three & 4 != 0 { 'r' } else { '-' });
        text.push(if three & 2 != 0 { 'w' } else { '-' });
        text.push(match (three & 1 != 0, bits & special != 0) {
            (true, false) => 'x',
            (false, false) => '-',
            (true, true) => letter,
            (false, true) => letter.to_ascii_uppercase(),
        });
    }
    text
}

/// Shows a time in UTC: `2026-01-31 12:00`. Civil date from days, after the proleptic Gregorian calendar.
fn date(time: Timestamp) -> String {
    let days = time.seconds.div_euclid(86_400);
    let second = time.seconds.rem_euclid(86_400);
    // Years from 1 March of the year 0, in eras of 400 years: leap days fall at the end of a year.
    let days = days.saturating_add(719_468);
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}", second / 3600, second / 60 % 60)
}

#[derive(Serialize)]
struct JsonLine {
    path: String,
    r#type: &'static str,
    mode: String,
    uid: u32,
    gid: u32,
    links: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    mtime: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

impl JsonLine {
    fn new(tree: &Tree, path: &[u8], id: InodeId) -> Self {
        let inode = tree.inode(id);
        let kind = inode.map(|inode| &inode.kind);
        let (kind, size, target) = match kind {
            Some(InodeKind::Directory) | None => ("directory", None, None),
            Some(InodeKind::Regular { size, .. }) => ("file", Some(*size), None),
            Some(InodeKind::Symlink { target }) => ("symlink", None, Some(printable(target))),
            Some(InodeKind::CharDevice { .. }) => ("char", None, None),
            Some(InodeKind::BlockDevice { .. }) => ("block", None, None),
            Some(InodeKind::Fifo) => ("fifo", None, None),
        };
        let mtime = inode.map_or(0.0, |inode| inode.mtime.seconds as f64 + f64::from(inode.mtime.nanoseconds) / 1e9);
        Self {
            path: printable(path),
            r#type: kind,
            mode: format!("{:04o}", inode.map_or(0, |inode| inode.permissions)),
            uid: inode.map_or(0, |inode| inode.uid),
            gid: inode.map_or(0, |inode| inode.gid),
            links: inode.map_or(0, |inode| inode.link_count),
            size,
            mtime,
            target,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_read_as_in_ls() {
        for (bits, shown) in [
            (0o755, "rwxr-xr-x"),
            (0o4755, "rwsr-xr-x"),
            (0o2644, "rw-r-Sr--"),
            (0o1777, "rwxrwxrwt"),
            (0o1666, "rw-rw-rwT"),
        ] {
            assert_eq!(permissions(bits), shown);
        }
    }

    #[test]
    fn dates_are_right_around_leap_days_and_before_1970() {
        for (seconds, shown) in [
            (0, "1970-01-01 00:00"),
            (951_782_399, "2000-02-28 23:59"),
            (951_782_400, "2000-02-29 00:00"),
            (1_709_164_800, "2024-02-29 00:00"),
            (-1, "1969-12-31 23:59"),
            (4_102_444_800, "2100-01-01 00:00"),
        ] {
            assert_eq!(date(Timestamp { seconds, nanoseconds: 0 }), shown);
        }
    }
}
