//! Which way Open MPI sums a buffer.
//!
//! Of n bytes over K ranks, each link carries in each direction, in Open MPI's non-blocking all-reduce left to itself,
//!
//! ```text
//! 2 ⌈log₂ K⌉ n           with K < 4: up and down a tree, whose root has ⌈log₂ K⌉ children
//! 2 (k−1)/k n            else, with K = k = 2^⌊log₂ K⌋: halving and doubling
//! 2 (k−1)/k n + 2 n      else: the same among k ranks, onto which the others are folded
//! 2 (K−1)/K n            a ring, in 2 (K−1) rounds
//! ```
//!
//! so large buffers of few ranks are better summed in a ring. Open MPI has one, and a control variable of MPI's tool interface
//! (MPI 4.0, 15.3) that asks for it.

/// Buffers of this many bytes are large: those of Open MPI's own choice.
pub const LARGE: usize = 64 << 10;

/// Whether a buffer of so many bytes is summed in a ring. More ranks would take too many rounds.
pub fn takes(bytes: usize, ranks: usize) -> bool {
    bytes >= LARGE && matches!(ranks, 2 | 3 | 5 | 6 | 7)
}

#[cfg(feature = "mpi")]
pub use variable::Algorithm;

#[cfg(feature = "mpi")]
mod variable {
    use mpi::ffi;
    use std::ffi::{CStr, c_int};

    const NAME: &CStr = c"coll_libnbc_iallreduce_algorithm";
    const SUCCESS: c_int = ffi::MPI_SUCCESS as c_int;

    #[derive(Clone, Copy)]
    #[repr(i32)]
    enum Value {
        /// Open MPI chooses.
        Ignore = 0,
        Ring = 1,
    }

    /// The control variable. MPI is initialised while it lives, and is not called by two threads at a time.
    pub struct Algorithm {
        /// `None`: this MPI has no such variable, or its user has set it.
        handle: Option<ffi::MPI_T_cvar_handle>,
    }

    impl Algorithm {
        /// Looks for it.
        pub fn find() -> Algorithm {
            // SAFETY: each call gets places for what it returns; MPI_T may be initialised at any time, and more than once.
            unsafe {
                let (mut provided, mut index, mut count, mut handle) = (0, 0, 0, std::ptr::null_mut());
                let mut value: c_int = Value::Ignore as c_int;
                let found = ffi::MPI_T_init_thread(ffi::RSMPI_THREAD_SERIALIZED, &mut provided) == SUCCESS
                    && ffi::MPI_T_cvar_get_index(NAME.as_ptr(), &mut index) == SUCCESS
                    && ffi::MPI_T_cvar_handle_alloc(index, std::ptr::null_mut(), &mut handle, &mut count) == SUCCESS
                    && count == 1
                    && ffi::MPI_T_cvar_read(handle, (&raw mut value).cast()) == SUCCESS;
                Algorithm { handle: (found && value == Value::Ignore as c_int).then_some(handle) }
            }
        }

        /// `call()` with the sums that it starts in a ring, or as Open MPI chooses.
        pub fn with<T>(&self, ring: bool, call: impl FnOnce() -> T) -> T {
            if !ring {
                return call();
            }
            self.set(Value::Ring);
            let result = call();
            self.set(Value::Ignore);
            result
        }

        fn set(&self, value: Value) {
            if let Some(handle) = self.handle {
                let value = value as c_int;
                // SAFETY: a live handle of a variable that is one int. Where it cannot be set, sums are right but slower.
                unsafe { ffi::MPI_T_cvar_write(handle, (&raw const value).cast()) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_buffers_of_few_ranks_take_the_ring() {
        let with = |bytes| (1..=9).filter(move |&ranks| takes(bytes, ranks)).collect::<Vec<_>>();
        assert_eq!(with(LARGE), [2, 3, 5, 6, 7]);
        assert!(with(LARGE - 1).is_empty());
    }
}
