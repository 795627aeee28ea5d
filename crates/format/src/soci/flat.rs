//! FlatBuffers, as far as SOCI uses them: tables, strings, vectors of either, bytes.
//!
//! Our own, and not the crate of that name, for three reasons: a reader over hostile bytes needs every offset checked and
//! little else; what we write must be the same bytes as Go's builder makes, whose order and choice of shared tables is a
//! matter of its code and not of the format; and generated code for five tables would be longer than this.
//!
//! Source of the rules: "FlatBuffers Internals" (flatbuffers.dev): offsets lead forward but for a table's to its vtable;
//! everything is little-endian and aligned to its size, counted from the end of the buffer.

/// Why bytes are no FlatBuffer of the expected shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a sound FlatBuffer: {part} lies outside of its {length} bytes")]
pub struct Unsound {
    /// What was being read.
    part: &'static str,
    /// How many bytes there are.
    length: usize,
}

/// A table of a buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table<'a> {
    buffer: &'a [u8],
    at: usize,
    /// Its vtable without the two lengths in front: 16 bits for each field, the last ones may be left out.
    fields: &'a [u8],
}

type Result<T> = std::result::Result<T, Unsound>;

fn array<const N: usize>(buffer: &[u8], at: usize, part: &'static str) -> Result<[u8; N]> {
    let bytes = buffer.get(at..).and_then(|bytes| bytes.first_chunk());
    bytes.copied().ok_or(Unsound { part, length: buffer.len() })
}

/// Follows an offset that stands at `at`.
fn follow(buffer: &[u8], at: usize, part: &'static str) -> Result<usize> {
    let offset = u32::from_le_bytes(array(buffer, at, part)?);
    let target = usize::try_from(offset).ok().and_then(|offset| at.checked_add(offset));
    target.filter(|&target| target < buffer.len()).ok_or(Unsound { part, length: buffer.len() })
}

/// Returns `count` items of `size` bytes that stand behind their number.
fn items<'a>(buffer: &'a [u8], at: usize, size: usize, part: &'static str) -> Result<&'a [u8]> {
    let unsound = Unsound { part, length: buffer.len() };
    let count = u32::from_le_bytes(array(buffer, at, part)?);
    let length = usize::try_from(count).ok().and_then(|count| count.checked_mul(size)).ok_or(unsound)?;
    buffer.get(at + 4..).and_then(|rest| rest.get(..length)).ok_or(unsound)
}

impl<'a> Table<'a> {
    /// Returns the root of a buffer.
    pub(super) fn root(buffer: &'a [u8]) -> Result<Self> {
        Self::at(buffer, follow(buffer, 0, "the root")?)
    }

    fn at(buffer: &'a [u8], at: usize) -> Result<Self> {
        const PART: &str = "a table";
        let unsound = Unsound { part: PART, length: buffer.len() };
        let back = i64::from(i32::from_le_bytes(array(buffer, at, PART)?));
        let place = i64::try_from(at).ok().and_then(|at| usize::try_from(at - back).ok()).ok_or(unsound)?;
        let length = usize::from(u16::from_le_bytes(array(buffer, place, PART)?));
        let fields = buffer.get(place..).and_then(|rest| rest.get(..length)).and_then(|vtable| vtable.get(4..));
        Ok(Self { buffer, at, fields: fields.ok_or(unsound)? })
    }

    /// Returns where a field stands; `None` where it has its default.
    fn field(&self, slot: usize) -> Option<usize> {
        let offset = self.fields.get(2 * slot..)?.first_chunk()?;
        let offset = usize::from(u16::from_le_bytes(*offset));
        (offset != 0).then_some(self.at + offset)
    }

    fn number<const N: usize>(&self, slot: usize) -> Result<Option<[u8; N]>> {
        self.field(slot).map(|at| array(self.buffer, at, "a number")).transpose()
    }

    pub(super) fn i8(&self, slot: usize, default: i8) -> Result<i8> {
        Ok(self.number(slot)?.map_or(default, i8::from_le_bytes))
    }

    pub(super) fn i32(&self, slot: usize, default: i32) -> Result<i32> {
        Ok(self.number(slot)?.map_or(default, i32::from_le_bytes))
    }

    pub(super) fn u32(&self, slot: usize) -> Result<u32> {
        Ok(self.number(slot)?.map_or(0, u32::from_le_bytes))
    }

    pub(super) fn i64(&self, slot: usize) -> Result<i64> {
        Ok(self.number(slot)?.map_or(0, i64::from_le_bytes))
    }

    /// Returns a string or a vector of bytes; nothing where the field is left out.
    pub(super) fn bytes(&self, slot: usize) -> Result<&'a [u8]> {
        let Some(at) = self.field(slot) else { return Ok(&[]) };
        items(self.buffer, follow(self.buffer, at, "a string")?, 1, "a string")
    }

    /// Returns where such a field's first byte stands in the buffer.
    pub(super) fn bytes_at(&self, slot: usize) -> Result<usize> {
        let Some(at) = self.field(slot) else { return Ok(0) };
        Ok(follow(self.buffer, at, "a string")? + 4)
    }

    pub(super) fn table(&self, slot: usize) -> Result<Option<Self>> {
        let Some(at) = self.field(slot) else { return Ok(None) };
        Self::at(self.buffer, follow(self.buffer, at, "a table")?).map(Some)
    }

    /// Returns a vector of tables or strings; an empty one where the field is left out.
    pub(super) fn vector(&self, slot: usize) -> Result<Vector<'a>> {
        let Some(at) = self.field(slot) else { return Ok(Vector { buffer: self.buffer, at: 0, count: 0 }) };
        let at = follow(self.buffer, at, "a vector")?;
        let count = items(self.buffer, at, 4, "a vector")?.len() / 4;
        Ok(Vector { buffer: self.buffer, at: at + 4, count })
    }
}

/// A vector of tables or strings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vector<'a> {
    buffer: &'a [u8],
    at: usize,
    count: usize,
}

impl<'a> Vector<'a> {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn tables(self) -> impl Iterator<Item = Result<Table<'a>>> {
        self.places().map(move |at| Table::at(self.buffer, follow(self.buffer, at, "a table")?))
    }

    pub(super) fn strings(self) -> impl Iterator<Item = Result<&'a [u8]>> {
        self.places().map(move |at| items(self.buffer, follow(self.buffer, at, "a string")?, 1, "a string"))
    }

    fn places(self) -> impl Iterator<Item = usize> {
        (0..self.count).map(move |number| self.at + 4 * number)
    }
}

/// Something that was written: how far its beginning is from the end of the buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Written(u32);

/// Writes a buffer from its end to its beginning, in the order in which Go's builder does.
#[derive(Debug, Default)]
pub(super) struct Builder {
    /// The buffer, its last byte first.
    reversed: Vec<u8>,
    alignment: usize,
    vtables: Vec<Vtable>,
}

#[derive(Debug)]
struct Vtable {
    /// How far its beginning is from the end of the buffer.
    at: u32,
    /// Where each field is in its table, 0 for none.
    fields: Vec<u16>,
}

/// A field of a table that is being written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    I8(i8),
    I32(i32),
    U32(u32),
    I64(i64),
    Reference(Written),
}

/// A buffer is as long as an offset reaches.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a ztoc can't be longer than 2 GiB")]
pub struct TooLong;

impl Builder {
    fn position(&self) -> u32 {
        // `check_length` sees to it that it fits where it counts.
        u32::try_from(self.reversed.len()).unwrap_or(u32::MAX)
    }

    /// Makes the next `size` bytes, with `behind` bytes between, end up aligned to `size`.
    fn align(&mut self, size: usize, behind: usize) {
        self.alignment = self.alignment.max(size);
        let filled = self.reversed.len() + behind;
        self.reversed.resize(self.reversed.len() + (filled.next_multiple_of(size) - filled), 0);
    }

    fn put(&mut self, bytes: &[u8]) {
        self.reversed.extend(bytes.iter().rev());
    }

    pub(super) fn string(&mut self, text: &[u8]) -> Written {
        self.align(4, text.len() + 1);
        self.reversed.push(0);
        self.counted(text)
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Written {
        self.align(4, bytes.len());
        self.counted(bytes)
    }

    fn counted(&mut self, bytes: &[u8]) -> Written {
        self.put(bytes);
        self.put(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
        Written(self.position())
    }

    pub(super) fn vector(&mut self, items: &[Written]) -> Written {
        self.align(4, 4 * items.len());
        for item in items.iter().rev() {
            self.reference(*item);
        }
        self.put(&u32::try_from(items.len()).unwrap_or(u32::MAX).to_le_bytes());
        Written(self.position())
    }

    fn reference(&mut self, to: Written) {
        self.align(4, 0);
        let offset = self.position().saturating_sub(to.0).saturating_add(4);
        self.put(&offset.to_le_bytes());
    }

    /// Writes a table of `fields`: slot and value, in the order in which they are to stand; defaults are to be left out.
    pub(super) fn table(&mut self, fields: &[(usize, Value)]) -> Written {
        let end = self.position();
        let mut places: Vec<u32> = vec![0; fields.iter().map(|(slot, _)| slot + 1).max().unwrap_or(0)];
        for &(slot, value) in fields {
            match value {
                Value::I8(value) => self.put(&value.to_le_bytes()),
                Value::I32(value) => self.aligned(&value.to_le_bytes()),
                Value::U32(value) => self.aligned(&value.to_le_bytes()),
                Value::I64(value) => self.aligned(&value.to_le_bytes()),
                Value::Reference(to) => self.reference(to),
            }
            places[slot] = self.position();
        }
        self.aligned(&[0; 4]);
        let at = self.position();
        let offset = |place: &u32| if *place == 0 { 0 } else { u16::try_from(at - place).unwrap_or(u16::MAX) };
        let fields: Vec<u16> = places.iter().map(offset).collect();
        let known = self.vtables.iter().rev().find(|vtable| vtable.fields == fields).map(|vtable| vtable.at);
        let vtable = known.unwrap_or_else(|| self.vtable(fields, at - end));
        // How far back from the table its vtable is.
        let back = i64::from(vtable) - i64::from(at);
        let back = i32::try_from(back).unwrap_or(i32::MAX).to_le_bytes();
        let first = at as usize - 4;
        for (byte, place) in back.iter().rev().zip(&mut self.reversed[first..]) {
            *place = *byte;
        }
        Written(at)
    }

    fn aligned<const N: usize>(&mut self, bytes: &[u8; N]) {
        self.align(N, 0);
        self.put(bytes);
    }

    fn vtable(&mut self, fields: Vec<u16>, table_bytes: u32) -> u32 {
        for field in fields.iter().rev() {
            self.put(&field.to_le_bytes());
        }
        self.put(&u16::try_from(table_bytes).unwrap_or(u16::MAX).to_le_bytes());
        self.put(&u16::try_from(2 * (fields.len() + 2)).unwrap_or(u16::MAX).to_le_bytes());
        let at = self.position();
        self.vtables.push(Vtable { at, fields });
        at
    }

    /// Returns the buffer, whose root is a table.
    pub(super) fn finish(mut self, root: Written) -> std::result::Result<Vec<u8>, TooLong> {
        self.align(self.alignment.max(1), 4);
        self.reference(root);
        if self.reversed.len() > i32::MAX as usize {
            return Err(TooLong);
        }
        self.reversed.reverse();
        Ok(self.reversed)
    }
}
