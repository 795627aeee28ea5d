//! What is told while an image is converted, copied or checked.

use loris_format::digest::Digest;

/// What is done with a blob.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// It is read and written anew.
    Convert,
    /// It is taken along as it is.
    Copy,
    /// A new blob is sent to the sink.
    Send,
    /// It is read and checked.
    Verify,
}

/// How work on a blob ended, where it did not fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Done.
    Done,
    /// There was nothing to do: the sink has it, or took it from a neighbouring repository.
    Present,
}

/// Takes news. Called from several threads; must not block.
pub trait Progress: Send + Sync {
    /// Work on a blob begins. `bytes` is its compressed size.
    fn began(&self, action: Action, blob: &Digest, bytes: u64);
    /// So many more of the blob's compressed bytes have been read.
    fn advanced(&self, action: Action, blob: &Digest, bytes: u64);
    /// Work on a blob ended.
    fn ended(&self, action: Action, blob: &Digest, outcome: Outcome);
    /// Something that the user should know and that does not end the work.
    fn warned(&self, warning: &str);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn began(&self, _: Action, _: &Digest, _: u64) {}
    fn advanced(&self, _: Action, _: &Digest, _: u64) {}
    fn ended(&self, _: Action, _: &Digest, _: Outcome) {}
    fn warned(&self, _: &str) {}
}
