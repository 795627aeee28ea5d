//! Makes a [`super::LayerIndex`] out of entries in the order of a table of contents, and refuses what is not sound.
