//! Locks that are taken whatever has become of who held them before.
//!
//! What this module must not know: what is behind a lock. Whoever uses it leaves nothing half done there.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
