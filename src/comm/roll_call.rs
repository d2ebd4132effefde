//! Who is missing: a rank that has waited for too long asks all others what they wait in.
//!
//! A rank that waits in a collective answers at once (it polls anyway); one that has been killed, stopped or cut off
//! never does, and one that computes does not yet. Messages are point to point over all ranks of the job, whatever
//! group the collective is of, and are sent only when a time limit is nearly over.

use crate::error::Result;
use mpi::ffi;
use std::cell::{Cell, RefCell};
use std::ffi::c_int;
use std::time::Instant;

/// Tags: an answer is asked for; it is given.
const CALL: c_int = 1;
const ANSWER: c_int = 2;
/// Bytes of a message, the name of a collective: few enough to be sent without a handshake.
const MAX_TEXT: usize = 128;

/// The point-to-point side of a job.
pub struct RollCall {
    /// A duplicate of MPI_COMM_WORLD that returns errors. Never freed: it ends with the job.
    comm: ffi::MPI_Comm,
    rank: usize,
    /// What each rank of the job last said that it waits in, and when.
    heard: RefCell<Vec<Option<(Instant, String)>>>,
    /// Messages that may not have left yet.
    sent: RefCell<Vec<(ffi::MPI_Request, Box<[u8]>)>>,
    /// What this rank waited for when it gave up; what it does since then is of no interest.
    given_up: RefCell<Option<String>>,
    /// Whether any rank has been called: MPI_Finalize could wait for a message that nobody receives.
    used: Cell<bool>,
}

impl RollCall {
    /// Collective over all ranks of the job.
    pub fn new() -> Result<RollCall> {
        // SAFETY: reads a constant of the library, whose place the next call fills.
        let mut comm = unsafe { ffi::RSMPI_COMM_WORLD };
        let (mut rank, mut size): (c_int, c_int) = (0, 0);
        // SAFETY: MPI is initialised by whoever calls this; the new handle is kept in the result.
        unsafe {
            super::mpi::check(ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &mut comm))?;
            super::mpi::check(ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN))?;
            super::mpi::check(ffi::MPI_Comm_rank(comm, &mut rank))?;
            super::mpi::check(ffi::MPI_Comm_size(comm, &mut size))?;
        }
        Ok(RollCall {
            comm,
            rank: rank as usize,
            heard: RefCell::new(vec![None; size as usize]),
            sent: RefCell::default(),
            given_up: RefCell::default(),
            used: Cell::new(false),
        })
    }

    pub fn is_used(&self) -> bool {
        self.used.get()
    }

    /// Asks all other ranks what they wait in.
    pub fn call(&self, op: &str) {
        let size = self.heard.borrow().len();
        for other in (0..size).filter(|&other| other != self.rank) {
            self.send(other, CALL, op);
        }
    }

    /// Receives what has come, and answers that this rank waits in `op`.
    pub fn attend(&self, op: impl Fn() -> String) {
        while let Some((from, tag, text)) = self.receive() {
            self.used.set(true);
            self.heard.borrow_mut()[from] = Some((Instant::now(), text));
            if tag == CALL {
                self.send(from, ANSWER, &self.given_up.borrow().clone().unwrap_or_else(&op));
            }
        }
    }

    /// From now on the answer is `op`.
    pub fn give_up(&self, op: &str) {
        self.given_up.borrow_mut().get_or_insert_with(|| op.to_owned());
    }

    /// Why `ranks` (of the job) do not come to `op`, as far as what has been heard since `called` tells.
    pub fn verdict(&self, ranks: &[usize], op: &str, called: Instant) -> String {
        let heard = self.heard.borrow();
        let others = || ranks.iter().filter(|&&rank| rank != self.rank);
        let said = |rank: usize| heard[rank].as_ref().filter(|(when, _)| *when >= called).map(|(_, op)| op.as_str());
        let silent: Vec<usize> = others().copied().filter(|&rank| said(rank).is_none()).collect();
        let elsewhere: Vec<String> = others()
            .filter_map(|&rank| said(rank).filter(|said| *said != op).map(|said| format!("rank {rank} is in `{said}`")))
            .collect();
        if !silent.is_empty() && silent.len() == others().count() && silent.len() > 1 {
            return "no other rank answers: they are gone, or this one is cut off".to_owned();
        }
        if !silent.is_empty() {
            return format!("{} not answer: killed, stopped, cut off or far behind", listed(&silent));
        }
        if !elsewhere.is_empty() {
            return format!("all ranks answer, but {}", elsewhere.join(", "));
        }
        "all ranks answer and wait in it too: the network loses what they send".to_owned()
    }

    /// How many of the ranks below `rank` have been heard since `called`.
    pub fn answered_before(&self, rank: usize, called: Instant) -> usize {
        rank - self.silent(&(0..rank).collect::<Vec<_>>(), called).len()
    }

    /// Ranks of `ranks` that have not been heard since `called`.
    pub fn silent(&self, ranks: &[usize], called: Instant) -> Vec<usize> {
        let heard = self.heard.borrow();
        let is_silent =
            |&rank: &usize| rank != self.rank && heard[rank].as_ref().is_none_or(|(when, _)| *when < called);
        ranks.iter().copied().filter(is_silent).collect()
    }

    /// Sends without waiting; to a rank that is gone in vain.
    fn send(&self, to: usize, tag: c_int, text: &str) {
        self.used.set(true);
        let bytes: Box<[u8]> = text.bytes().take(MAX_TEXT).collect();
        let mut sent = self.sent.borrow_mut();
        sent.retain_mut(|(request, _)| {
            let mut done: c_int = 0;
            // SAFETY: the request was made by this function and is not complete yet. An error ends it.
            let code = unsafe { ffi::MPI_Test(request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
            code == ffi::MPI_SUCCESS as c_int && done == 0
        });
        // SAFETY: the buffer stays on the heap, in `sent`, until its request is complete.
        unsafe {
            let mut request = ffi::RSMPI_REQUEST_NULL;
            let (data, len) = (bytes.as_ptr().cast(), bytes.len() as c_int);
            let code = ffi::MPI_Isend(data, len, ffi::RSMPI_UINT8_T, to as c_int, tag, self.comm, &mut request);
            if code == ffi::MPI_SUCCESS as c_int {
                sent.push((request, bytes));
            }
        }
    }

    /// The next message that has come: its sender, tag and text. A network that fails brings none.
    fn receive(&self) -> Option<(usize, c_int, String)> {
        let mut buffer = [0u8; MAX_TEXT];
        // SAFETY: a zeroed status is a valid one to be written to; the buffer has room for the longest message.
        unsafe {
            let mut status: ffi::MPI_Status = std::mem::zeroed();
            let (mut found, mut len): (c_int, c_int) = (0, 0);
            let any = (ffi::RSMPI_ANY_SOURCE, ffi::RSMPI_ANY_TAG);
            let code = ffi::MPI_Iprobe(any.0, any.1, self.comm, &mut found, &mut status);
            if code != ffi::MPI_SUCCESS as c_int || found == 0 {
                return None;
            }
            let (from, tag) = (status.MPI_SOURCE, status.MPI_TAG);
            let (data, room, kind) = (buffer.as_mut_ptr().cast(), MAX_TEXT as c_int, ffi::RSMPI_UINT8_T);
            let code = ffi::MPI_Recv(data, room, kind, from, tag, self.comm, &mut status);
            if code != ffi::MPI_SUCCESS as c_int || ffi::MPI_Get_count(&status, kind, &mut len) != code {
                return None;
            }
            Some((from as usize, tag, String::from_utf8_lossy(&buffer[..len as usize]).into_owned()))
        }
    }
}

impl Drop for RollCall {
    fn drop(&mut self) {
        // MPI may still read what has not left.
        std::mem::take(&mut *self.sent.borrow_mut()).into_iter().for_each(std::mem::forget);
    }
}

/// "rank 3 does", "ranks 1, 2 and 5 do"; of many the first few.
fn listed(ranks: &[usize]) -> String {
    const SHOWN: usize = 8;
    let names: Vec<String> = ranks.iter().take(SHOWN).map(usize::to_string).collect();
    match &names[..] {
        [one] => format!("rank {one} does"),
        _ if ranks.len() > SHOWN => format!("ranks {} and {} more do", names.join(", "), ranks.len() - SHOWN),
        [first @ .., last] => format!("ranks {} and {last} do", first.join(", ")),
        [] => "no rank does".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_listed_as_people_do() {
        assert_eq!(listed(&[3]), "rank 3 does");
        assert_eq!(listed(&[1, 2, 5]), "ranks 1, 2 and 5 do");
        assert_eq!(listed(&(0..10).collect::<Vec<_>>()), "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more do");
    }
}
