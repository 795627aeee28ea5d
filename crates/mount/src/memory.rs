//! Memory that was freed and is kept by the C library for later.
//!
//! What must not be known here: who used it, and when they are done.

/// Gives memory that is free back to the kernel. glibc keeps what a burst of downloads has used, tens of MiB; other C
/// libraries do not, and nothing is done. Takes some milliseconds: not for threads that answer the kernel.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` takes the locks of the allocator itself and touches free memory only; it has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}
