//! The bytes of a tar that are no content, as `tar-split` keeps them: with the files, they give the tar again.
//!
//! JSON documents, one a line: `{"type":2,"payload":BASE64,"position":N}` is bytes of the tar (headers, with the padding of
//! the file before them, or its end), `{"type":1,"name":NAME,"size":BYTES,"payload":BASE64,"position":N}` stands for the
//! content of a file, with its CRC-64 (ISO 3309). Podman puts the tar together out of it, to check the DiffID.

use std::io::Write as _;

use base64::{Engine as _, engine::general_purpose::STANDARD};

use crate::estargz::toc::write::string;

/// Bytes of the tar's end in one document.
const SEGMENT_BYTES: usize = 1 << 20;

/// Collects the text.
#[derive(Debug, Default)]
pub struct TarSplit {
    text: Vec<u8>,
    position: u64,
}

impl TarSplit {
    /// Takes bytes of the tar: the padding of the file before, and all headers of one entry.
    pub fn headers(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.text.extend_from_slice(b"{\"type\":2,\"payload\":\"");
        self.text.extend_from_slice(STANDARD.encode(bytes).as_bytes());
        self.end("\"");
    }

    /// Takes the entry whose headers came before: its name as the tar has it, and of a file that is not empty its size and
    /// CRC-64.
    pub fn entry(&mut self, name: &[u8], content: Option<(u64, u64)>) {
        self.text.extend_from_slice(b"{\"type\":1");
        if std::str::from_utf8(name).is_ok() {
            self.text.extend_from_slice(b",\"name\":");
            string(name, &mut self.text);
        } else {
            self.text.extend_from_slice(b",\"name_raw\":\"");
            self.text.extend_from_slice(STANDARD.encode(name).as_bytes());
            self.text.push(b'"');
        }
        match content {
            Some((size, sum)) => {
                // Writing to a vector does not fail.
                let _ = write!(self.text, ",\"size\":{size},\"payload\":\"{}", STANDARD.encode(sum.to_be_bytes()));
                self.end("\"");
            }
            None => {
                self.text.extend_from_slice(b",\"payload\":null");
                self.end("");
            }
        }
    }

    /// Takes the end of the tar.
    pub fn tail(&mut self, bytes: &[u8]) {
        bytes.chunks(SEGMENT_BYTES).for_each(|piece| self.headers(piece));
    }

    fn end(&mut self, quote: &str) {
        let _ = writeln!(self.text, "{quote},\"position\":{}}}", self.position);
        self.position += 1;
    }

    /// Returns how many bytes of text wait to be taken.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.text.len()
    }

    /// Returns the text since the last call.
    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.text)
    }
}

/// CRC-64 as ISO 3309 has it and Go's `crc64.ISO`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Crc64(u64);

/// Reflected.
const POLYNOMIAL: u64 = 0xd800_0000_0000_0000;

/// What a byte does to the sum with 0 to 7 bytes behind it: eight bytes are taken in one step.
static TABLES: [[u64; 256]; 8] = tables();

const fn tables() -> [[u64; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut sum = byte as u64;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 == 1 { (sum >> 1) ^ POLYNOMIAL } else { sum >> 1 };
            bit += 1;
        }
        tables[0][byte] = sum;
        byte += 1;
    }
    let mut behind = 1;
    while behind < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[behind - 1][byte];
            tables[behind][byte] = tables[0][(before & 0xff) as usize] ^ (before >> 8);
            byte += 1;
        }
        behind += 1;
    }
    tables
}

impl Crc64 {
    /// Takes in bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        let mut sum = !self.0;
        let (eights, rest) = bytes.as_chunks::<8>();
        for eight in eights {
            let all = (sum ^ u64::from_le_bytes(*eight)).to_le_bytes();
            sum = all.iter().zip(TABLES.iter().rev()).fold(0, |sum, (byte, table)| sum ^ table[usize::from(*byte)]);
        }
        for byte in rest {
            sum = TABLES[0][usize::from(sum.to_le_bytes()[0] ^ byte)] ^ (sum >> 8);
        }
        self.0 = !sum;
    }

    /// Returns the sum.
    #[must_use]
    pub fn finish(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_go() {
        let sum = |bytes: &[u8]| {
            let mut sum = Crc64::default();
            sum.update(bytes);
            sum.finish()
        };
        // From Go's `hash/crc64` tests.
        assert_eq!(sum(b""), 0);
        assert_eq!(sum(b"a"), 0x3420_0000_0000_0000);
        assert_eq!(sum(b"ab"), 0x36c4_2000_0000_0000);
        let mut pieces = Crc64::default();
        pieces.update(b"abcde");
        pieces.update(b"fghijklmnopqrstuvwxyz");
        assert_eq!(pieces.finish(), sum(b"abcdefghijklmnopqrstuvwxyz"));
    }

    #[test]
    fn documents_are_as_the_peer_writes_them() {
        let mut split = TarSplit::default();
        split.headers(b"abc");
        split.entry(b"etc/<x>", None);
        split.entry(b"f\xff", Some((3, 1)));
        split.headers(b"");
        let text = String::from_utf8(split.take()).unwrap();
        let expected = "{\"type\":2,\"payload\":\"YWJj\",\"position\":0}\n\
                        {\"type\":1,\"name\":\"etc/\\u003cx\\u003e\",\"payload\":null,\"position\":1}\n\
                        {\"type\":1,\"name_raw\":\"Zv8=\",\"size\":3,\"payload\":\"AAAAAAAAAAE=\",\"position\":2}\n";
        assert_eq!(text, expected);
        assert_eq!(split.waiting(), 0);
    }
}
