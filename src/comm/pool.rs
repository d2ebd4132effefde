//! Buffers that are used again, so that a warm step allocates nothing.

/// Returned buffers, handed out again by size.
#[derive(Default)]
pub struct Pool {
    free: Vec<Vec<f32>>,
}

impl Pool {
    /// A buffer of `len` elements of any value: the smallest free one that is large enough, else a new one. (A buffer
    /// is never grown: in the end every one would be as large as the largest.)
    pub fn take(&mut self, len: usize) -> Vec<f32> {
        let fits = (0..self.free.len()).filter(|&i| self.free[i].capacity() >= len);
        match fits.min_by_key(|&i| self.free[i].capacity()) {
            Some(i) => {
                let mut buffer = self.free.swap_remove(i);
                buffer.resize(len, 0.0);
                buffer
            }
            None => vec![0.0; len],
        }
    }

    /// Only MPI gives back what it was sent from: between threads the buffers change hands.
    #[cfg(any(feature = "mpi", test))]
    pub fn give(&mut self, buffer: Vec<f32>) {
        self.free.extend((buffer.capacity() > 0).then_some(buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warm_pool_allocates_nothing_and_grows_nothing() {
        let mut pool = Pool::default();
        let (small, large) = (pool.take(10), pool.take(1000));
        let addresses = [small.as_ptr(), large.as_ptr()];
        pool.give(large);
        pool.give(small);
        let (small, large) = (pool.take(9), pool.take(500));
        assert_eq!([small.as_ptr(), large.as_ptr()], addresses);
        assert_eq!((small.len(), large.len()), (9, 500));
    }
}
