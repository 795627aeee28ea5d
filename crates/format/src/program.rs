//! What a program names that has to be there before it runs: an ELF file its interpreter and its libraries, a script the
//! program behind `#!`.
//!
//! For those who want to have it here early. Nothing is decided by it, so that whatever is odd is passed over: no error,
//! no more than a few KiB of a file are looked at, and what is found are names that may lead nowhere.
//!
//! Knows bytes of a file, handed in piece by piece; no trees, no search paths.
//!
//! Sources: System V Application Binary Interface, "Object Files" and "Program Loading and Dynamic Linking" (gABI 4.1);
//! `execve(2)`, section "Interpreter scripts".

use std::ops::Range;

/// How many bytes of a file's start [`recognise`] wants to see, or all of them where there are fewer.
pub const START_BYTES: usize = 4096;
/// Most bytes of a dynamic section that are worth reading: some hundred libraries.
pub const DYNAMIC_BYTES: u64 = 16 << 10;
/// Most bytes of a name, with the zero behind it.
pub const NAME_BYTES: u64 = 256;

const SEGMENT_LOAD: u32 = 1;
const SEGMENT_DYNAMIC: u32 = 2;
const SEGMENT_INTERPRETER: u32 = 3;
const EXECUTABLE: u32 = 1;
const TAG_NEEDED: u64 = 1;
const TAG_STRINGS: u64 = 5;
const TAG_RPATH: u64 = 15;
const TAG_RUNPATH: u64 = 29;
/// Names that are taken from one file.
const MOST_NAMES: usize = 512;

/// What a file's start shows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Program {
    /// An executable or a shared library.
    Elf(Elf),
    /// A script: the program behind `#!`, and its argument if there is one.
    Script {
        /// A path.
        interpreter: Vec<u8>,
        /// All that stands behind it on the line, without spaces around it.
        argument: Option<Vec<u8>>,
    },
}

/// The header of an ELF file and its segments. Ranges are of bytes in the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Elf {
    is_64: bool,
    is_big_endian: bool,
    /// `e_machine`.
    pub machine: u16,
    /// Where the path of the interpreter stands, with a zero behind it.
    pub interpreter: Option<Range<u64>>,
    /// Where the dynamic section stands.
    pub dynamic: Option<Range<u64>>,
    /// Bytes of code.
    pub code_bytes: u64,
    loads: Vec<Load>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Load {
    offset: u64,
    address: u64,
    length: u64,
}

/// What a dynamic section names: where in the file each name begins. It ends with a zero.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Named {
    /// Libraries.
    pub libraries: Vec<u64>,
    /// Directories to look for them in first, with `:` between them.
    pub search: Option<u64>,
}

/// Tells what a file is by its first [`START_BYTES`]; `None` for what is no program, or too odd.
#[must_use]
pub fn recognise(start: &[u8]) -> Option<Program> {
    if let Some(line) = start.strip_prefix(b"#!") {
        return script(line);
    }
    elf(start).map(Program::Elf)
}

fn script(line: &[u8]) -> Option<Program> {
    let line = &line[..line.iter().position(|&byte| byte == b'\n')?];
    let line = line.trim_ascii();
    let end = line.iter().position(|byte| matches!(byte, b' ' | b'\t')).unwrap_or(line.len());
    let (interpreter, argument) = (line[..end].to_vec(), line[end..].trim_ascii().to_vec());
    let is_named = !interpreter.is_empty();
    is_named.then(|| Program::Script { interpreter, argument: (!argument.is_empty()).then_some(argument) })
}

/// Reads numbers of one width and order.
#[derive(Clone, Copy)]
struct Numbers<'a> {
    bytes: &'a [u8],
    is_64: bool,
    is_big_endian: bool,
}

impl Numbers<'_> {
    fn number(&self, at: usize, width: usize) -> Option<u64> {
        let bytes = self.bytes.get(at..at.checked_add(width)?)?;
        let push = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        Some(if self.is_big_endian { bytes.iter().fold(0, push) } else { bytes.iter().rev().fold(0, push) })
    }

    fn half(&self, at: usize) -> Option<u16> {
        u16::try_from(self.number(at, 2)?).ok()
    }

    fn word(&self, at: usize) -> Option<u32> {
        u32::try_from(self.number(at, 4)?).ok()
    }

    /// A number as wide as an address: at one place in files of 32 bits and at another in those of 64.
    fn wide(&self, at_32: usize, at_64: usize) -> Option<u64> {
        if self.is_64 { self.number(at_64, 8) } else { self.number(at_32, 4) }
    }
}

fn elf(start: &[u8]) -> Option<Elf> {
    let is_64 = match start.get(..6)? {
        [0x7f, b'E', b'L', b'F', 1, _] => false,
        [0x7f, b'E', b'L', b'F', 2, _] => true,
        _ => return None,
    };
    let is_big_endian = start[5] == 2;
    let header = Numbers { bytes: start, is_64, is_big_endian };
    let machine = header.half(18)?;
    let table = usize::try_from(header.wide(28, 32)?).ok()?;
    let (size, count) = (header.half(if is_64 { 54 } else { 42 })?, header.half(if is_64 { 56 } else { 44 })?);
    let mut elf =
        Elf { is_64, is_big_endian, machine, interpreter: None, dynamic: None, code_bytes: 0, loads: Vec::new() };
    for number in 0..usize::from(count) {
        // Tables that do not stand at the start of the file are none of a linker.
        let Some(at) = number.checked_mul(usize::from(size)).and_then(|offset| offset.checked_add(table)) else {
            break;
        };
        let Some(bytes) = start.get(at..) else { break };
        let segment = Numbers { bytes, is_64, is_big_endian };
        let (Some(kind), Some(flags)) = (segment.word(0), segment.word(if is_64 { 4 } else { 24 })) else { break };
        let (Some(offset), Some(address), Some(length)) =
            (segment.wide(4, 8), segment.wide(8, 16), segment.wide(16, 32))
        else {
            break;
        };
        let Some(end) = offset.checked_add(length) else { continue };
        match kind {
            SEGMENT_LOAD => {
                elf.loads.push(Load { offset, address, length });
                if flags & EXECUTABLE != 0 {
                    elf.code_bytes = elf.code_bytes.saturating_add(length);
                }
            }
            SEGMENT_DYNAMIC => elf.dynamic = Some(offset..end.min(offset.saturating_add(DYNAMIC_BYTES))),
            SEGMENT_INTERPRETER => elf.interpreter = Some(offset..end.min(offset.saturating_add(NAME_BYTES))),
            _ => {}
        }
    }
    Some(elf)
}

impl Elf {
    /// Reads the bytes of the dynamic section.
    #[must_use]
    pub fn named(&self, dynamic: &[u8]) -> Named {
        let width = if self.is_64 { 8 } else { 4 };
        let (mut libraries, mut strings, mut rpath, mut runpath) = (Vec::new(), None, None, None);
        for entry in dynamic.chunks_exact(2 * width) {
            let entry = Numbers { bytes: entry, is_64: self.is_64, is_big_endian: self.is_big_endian };
            let (Some(tag), Some(value)) = (entry.number(0, width), entry.number(width, width)) else { break };
            match tag {
                0 => break,
                TAG_NEEDED if libraries.len() < MOST_NAMES => libraries.push(value),
                TAG_STRINGS => strings = self.place_of(value),
                TAG_RPATH => rpath = Some(value),
                TAG_RUNPATH => runpath = Some(value),
                _ => {}
            }
        }
        let Some(strings) = strings else { return Named::default() };
        let place = |offset: u64| strings.checked_add(offset);
        // Where there is a newer one, the older one does not count.
        let search = runpath.or(rpath).and_then(place);
        Named { libraries: libraries.into_iter().filter_map(place).collect(), search }
    }

    /// Returns where in the file an address is loaded from.
    fn place_of(&self, address: u64) -> Option<u64> {
        let holds = |load: &&Load| address >= load.address && address - load.address < load.length;
        self.loads.iter().find(holds).and_then(|load| load.offset.checked_add(address - load.address))
    }

    /// Returns the directory that distributions which have several architectures side by side name after this one.
    #[must_use]
    pub fn triplet(&self) -> Option<&'static str> {
        // e_machine, and the names of Debian's `dpkg-architecture`.
        Some(match (self.machine, self.is_64, self.is_big_endian) {
            (62, true, _) => "x86_64-linux-gnu",
            (62, false, _) => "x86_64-linux-gnux32",
            (183, true, false) => "aarch64-linux-gnu",
            (3, ..) => "i386-linux-gnu",
            (40, ..) => "arm-linux-gnueabihf",
            (21, true, false) => "powerpc64le-linux-gnu",
            (22, true, _) => "s390x-linux-gnu",
            (243, true, _) => "riscv64-linux-gnu",
            _ => return None,
        })
    }
}

/// Cuts a name off where it ends; `None` where it does not within what is there, or is empty.
#[must_use]
pub fn name(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.iter().position(|&byte| byte == 0)?;
    (end > 0).then(|| &bytes[..end])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn script_of(line: &str) -> Option<(String, Option<String>)> {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        match recognise(line.as_bytes())? {
            Program::Script { interpreter, argument } => Some((text(interpreter), argument.map(text))),
            Program::Elf(_) => None,
        }
    }

    #[test]
    fn scripts() {
        let cases = [
            ("#!/bin/sh\necho", Some(("/bin/sh", None))),
            ("#! /bin/sh -e \n", Some(("/bin/sh", Some("-e")))),
            ("#!/usr/bin/env  python3 -u\n", Some(("/usr/bin/env", Some("python3 -u")))),
            ("#!\n", None),
            ("#!/bin/sh", None),
            ("#", None),
            ("", None),
            ("text", None),
        ];
        for (line, expected) in cases {
            let expected = expected.map(|(program, argument)| (program.to_owned(), argument.map(str::to_owned)));
            assert_eq!(script_of(line), expected, "{line:?}");
        }
    }

    /// Reads a program of this machine as its loader does.
    fn names_of(path: &str) -> (Option<String>, Vec<String>) {
        let file = std::fs::read(path).unwrap();
        let Some(Program::Elf(elf)) = recognise(&file[..START_BYTES.min(file.len())]) else { panic!("{path}") };
        let place = |at: u64| usize::try_from(at).unwrap().min(file.len());
        let cut = |range: Range<u64>| &file[place(range.start)..place(range.end)];
        let text = |range: Range<u64>| String::from_utf8(name(cut(range)).unwrap().to_vec()).unwrap();
        let named = elf.dynamic.clone().map(|dynamic| elf.named(cut(dynamic))).unwrap_or_default();
        let libraries = named.libraries.iter().map(|&at| text(at..at + NAME_BYTES)).collect();
        assert!(elf.code_bytes > 1000, "{path}");
        (elf.interpreter.map(text), libraries)
    }

    #[test]
    fn programs_of_this_machine() {
        let own = std::env::current_exe().unwrap();
        let (interpreter, libraries) = names_of(own.to_str().unwrap());
        assert!(interpreter.unwrap().contains("ld"));
        assert!(libraries.iter().any(|library| library.starts_with("libc.")), "{libraries:?}");
    }

    /// The smallest program of each kind that names something.
    fn built(is_64: bool, is_big_endian: bool) -> Vec<u8> {
        let number = |value: u64, width: usize| {
            let mut bytes = value.to_le_bytes()[..width].to_vec();
            if is_big_endian {
                bytes.reverse();
            }
            bytes
        };
        let wide = if is_64 { 8 } else { 4 };
        let mut file = vec![0; 0x400];
        let mut put = |at: usize, bytes: Vec<u8>| file[at..at + bytes.len()].copy_from_slice(&bytes);
        put(0, vec![0x7f, b'E', b'L', b'F', if is_64 { 2 } else { 1 }, if is_big_endian { 2 } else { 1 }]);
        put(18, number(3, 2));
        put(if is_64 { 32 } else { 28 }, number(0x40, wide));
        let size = if is_64 { 56_u8 } else { 32 };
        put(if is_64 { 54 } else { 42 }, number(size.into(), 2));
        put(if is_64 { 56 } else { 44 }, number(3, 2));
        let segments = [(1, 5, 0, 0x1000, 0x400), (2, 4, 0x200, 0x1200, 0x80), (3, 4, 0x300, 0x1300, 8)];
        for (place, (kind, flags, offset, address, length)) in (0..).zip(segments) {
            let at = 0x40 + place * usize::from(size);
            put(at, number(kind, 4));
            put(at + if is_64 { 4 } else { 24 }, number(flags, 4));
            put(at + if is_64 { 8 } else { 4 }, number(offset, wide));
            put(at + if is_64 { 16 } else { 8 }, number(address, wide));
            put(at + if is_64 { 32 } else { 16 }, number(length, wide));
        }
        for (place, (tag, value)) in (0..).zip([(1, 1), (29, 6), (1, 3), (5, 0x1308), (0, 0), (1, 5)]) {
            put(0x200 + place * 2 * wide, number(tag, wide));
            put(0x200 + place * 2 * wide + wide, number(value, wide));
        }
        put(0x300, b"/ld\0\0\0\0\0\0a\0bc\0d/run\0".to_vec());
        file
    }

    #[test]
    fn all_widths_and_orders() {
        for (is_64, is_big_endian) in [(false, false), (false, true), (true, false), (true, true)] {
            let file = built(is_64, is_big_endian);
            let Some(Program::Elf(elf)) = recognise(&file) else { panic!() };
            assert_eq!((elf.machine, elf.code_bytes), (3, 0x400));
            assert_eq!((elf.interpreter.clone(), elf.dynamic.clone()), (Some(0x300..0x308), Some(0x200..0x280)));
            let named = elf.named(&file[0x200..0x280]);
            assert_eq!(named, Named { libraries: vec![0x309, 0x30b], search: Some(0x30e) });
            let text = |at: usize| name(&file[at..]).unwrap();
            assert_eq!((text(0x309), text(0x30b), text(0x30e)), (&b"a"[..], &b"bc"[..], &b"d/run"[..]));
            assert_eq!(elf.triplet(), Some("i386-linux-gnu"));
        }
    }

    proptest! {
        #[test]
        fn odd_files_are_passed_over(
            is_64: bool,
            is_big_endian: bool,
            changes in proptest::collection::vec((0usize..0x400, any::<u8>()), 0..20),
            cut in 0usize..0x400,
        ) {
            let mut file = built(is_64, is_big_endian);
            for (at, byte) in changes {
                file[at] = byte;
            }
            file.truncate(cut);
            if let Some(Program::Elf(elf)) = recognise(&file) {
                let named = elf.named(file.get(0x200..).unwrap_or_default());
                prop_assert!(named.libraries.len() <= MOST_NAMES);
                for range in elf.interpreter.iter().chain(&elf.dynamic) {
                    prop_assert!(range.end - range.start <= DYNAMIC_BYTES);
                }
            }
        }
    }
}
