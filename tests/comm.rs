//! Laws of communicators, over all of them: one rank, threads, and processes under mpirun.
//!
//! For MPI this file is also the program: a test starts `mpirun -n K` of this very executable, which then runs the
//! ignored test [`one_rank`] with the scenario that the environment names.

use candle_core::{Device, Tensor};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use vcycle::comm::{Buckets, Communicator, Exchange, Reduction, Solo, Ticket, World, agree, thread, told_to_end};
use vcycle::error::{Outcome, Result, anyhow, bail};

const SCENARIO: &str = "VCYCLE_TEST_SCENARIO";

fn tensor(values: impl Iterator<Item = f32>) -> Tensor {
    let values: Vec<f32> = values.collect();
    let len = values.len();
    Tensor::from_vec(values, len, &Device::Cpu).unwrap()
}

fn ones(len: usize) -> Tensor {
    tensor((0..len).map(|_| 1.0))
}

fn values(x: &Tensor) -> Vec<f32> {
    x.to_vec1().unwrap()
}

fn start_sum(comm: &mut dyn Communicator, data: &Tensor) -> Result<Ticket> {
    comm.start(Exchange::Sum, vec![vec![data.clone()]])
}

// Laws

fn laws(comm: &mut dyn Communicator) {
    sums_finish_in_any_order(comm);
    all_ranks_get_the_same_bits(comm);
    sums_are_scattered_and_parts_gathered(comm);
    small_reductions(comm);
    broadcasts_replace_content_and_length(comm);
    groups_work_by_themselves(comm);
    errors_are_agreed_on(comm);
    gradients_are_summed_in_buckets(comm);
    comm.barrier().unwrap();
}

/// x_i = rank + i, summed: K i + K (K-1) / 2.
fn sums_finish_in_any_order(comm: &mut dyn Communicator) {
    let (rank, size) = (comm.rank() as f32, comm.size() as f32);
    let lengths = [0, 1, 3, 1000, 70_000];
    for order in [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]] {
        let data = lengths.map(|len| tensor((0..len).map(|i| rank + i as f32)));
        let tickets = data.each_ref().map(|data| start_sum(comm, data).unwrap());
        comm.progress().unwrap();
        for i in order {
            comm.wait(tickets[i]).unwrap();
            for (i, sum) in values(&data[i]).into_iter().enumerate() {
                assert_eq!(sum, size * i as f32 + size * (size - 1.0) / 2.0);
            }
        }
        assert!(comm.wait(tickets[0]).is_err(), "a second wait for one ticket");
    }
}

fn all_ranks_get_the_same_bits(comm: &mut dyn Communicator) {
    let rank = comm.rank() as f32;
    let mut sum = || {
        // Small and large buffers may be summed in different ways.
        let data = [5000, 70_000].map(|len| tensor((0..len).map(|i| (i as f32 * 0.37 + rank).sin() * 1e3)));
        let tickets = data.each_ref().map(|data| start_sum(comm, data).unwrap());
        tickets.into_iter().for_each(|ticket| comm.wait(ticket).unwrap());
        data.each_ref().map(values).concat()
    };
    let (mine, again) = (sum(), sum());
    assert_eq!(mine, again);
    let mut bytes: Vec<u8> = mine.iter().flat_map(|x| x.to_le_bytes()).collect();
    let own = bytes.clone();
    comm.broadcast(&mut bytes, 0).unwrap();
    assert_eq!(bytes, own);
}

/// Two tensors a part, ragged: part r has r and 3 elements, and is rank r's.
fn sums_are_scattered_and_parts_gathered(comm: &mut dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    let parts = |value: &dyn Fn(usize) -> f32| -> Vec<Vec<Tensor>> {
        (0..size).map(|part| [part, 3].map(|len| tensor((0..len).map(|_| value(part)))).into()).collect()
    };
    let all = |part: &[Tensor], expected: f32| {
        let found: Vec<f32> = part.iter().flat_map(values).collect();
        assert!(found.iter().all(|&x| x == expected), "rank {rank}: {found:?} for {expected}");
    };
    let scattered = parts(&|part| (10 * part + rank) as f32);
    let gathered = parts(&|_| rank as f32);
    // Both under way at once.
    let tickets = [(Exchange::Scatter, &scattered), (Exchange::Gather, &gathered)]
        .map(|(exchange, parts)| comm.start(exchange, parts.clone()).unwrap());
    tickets.into_iter().rev().for_each(|ticket| comm.wait(ticket).unwrap());
    all(&scattered[rank], (10 * rank * size + size * (size - 1) / 2) as f32);
    gathered.iter().enumerate().for_each(|(part, tensors)| all(tensors, part as f32));
    let wrong = comm.start(Exchange::Gather, vec![Vec::new(); size + 1]).unwrap_err().to_string();
    assert!(wrong.contains("parts for"), "{wrong}");
}

fn small_reductions(comm: &mut dyn Communicator) {
    let (rank, size) = (comm.rank() as f64, comm.size() as f64);
    let mut values = [rank, -rank, 0.1];
    comm.reduce(&mut values, Reduction::Sum).unwrap();
    let total = size * (size - 1.0) / 2.0;
    assert_eq!(values[..2], [total, -total]);
    assert!((values[2] - 0.1 * size).abs() < 1e-12);
    let mut values = [rank, -rank];
    comm.reduce(&mut values, Reduction::Max).unwrap();
    assert_eq!(values, [size - 1.0, 0.0]);
    let mut values = [if rank == 0.0 { f64::NAN } else { 1.0 }];
    comm.reduce(&mut values, Reduction::Sum).unwrap();
    assert!(values[0].is_nan());
}

fn broadcasts_replace_content_and_length(comm: &mut dyn Communicator) {
    for root in 0..comm.size() {
        for len in [0, 1, 100_000] {
            let brought = if comm.rank() == root { len } else { 7 * comm.rank() };
            let mut data = vec![comm.rank() as u8; brought];
            comm.broadcast(&mut data, root).unwrap();
            assert_eq!(data, vec![root as u8; len]);
        }
    }
    assert!(comm.broadcast(&mut Vec::new(), comm.size()).is_err());
}

/// Even and odd ranks, the last in neither; the groups then do different things at the same time.
fn groups_work_by_themselves(comm: &mut dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    let outside = rank + 1 == size;
    let mut all = comm.split(Some(0)).unwrap().unwrap();
    let group = comm.split((!outside).then_some(rank % 2)).unwrap();
    assert_eq!(group.is_none(), outside);
    if let Some(mut group) = group {
        assert_eq!(group.rank(), rank / 2);
        let members: Vec<_> = (0..size - 1).filter(|r| r % 2 == rank % 2).collect();
        assert_eq!(group.size(), members.len());
        for _ in 0..1 + rank % 2 {
            let mut sum = [rank as f64];
            group.reduce(&mut sum, Reduction::Sum).unwrap();
            assert_eq!(sum[0], members.iter().sum::<usize>() as f64);
        }
    }
    all.barrier().unwrap();
    assert_eq!((all.rank(), all.size()), (rank, size));
}

fn errors_are_agreed_on(comm: &mut dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    assert_eq!(agree(comm, Ok(rank)).unwrap(), rank);
    for first in 0..size {
        let mine: Result<()> = if rank >= first { Err(anyhow!("cannot read {rank}")) } else { Ok(()) };
        let agreed = format!("{:#}", agree(comm, mine).unwrap_err());
        let expected = if first == 0 { "cannot read 0".into() } else { format!("rank {first}: cannot read {first}") };
        assert_eq!(agreed, expected);
    }
}

fn gradients_are_summed_in_buckets(comm: &mut dyn Communicator) {
    let (rank, size) = (comm.rank() as f32, comm.size() as f32);
    let gradient = |rows, width| Tensor::full(rank + 1.0, (rows, width), &Device::Cpu).unwrap();
    let (blocks, ends) = (gradient(4, 100_000), gradient(1, 300_000));
    let mut buckets = Buckets::default();
    for row in (0..4).rev() {
        buckets.add(comm, &blocks, row, &[]).unwrap();
    }
    buckets.add(comm, &ends, 0, &[]).unwrap();
    buckets.finish(comm).unwrap();
    for sums in [blocks, ends] {
        let sums: Vec<f32> = sums.flatten_all().unwrap().to_vec1().unwrap();
        assert!(sums.iter().all(|&x| x == size * (size + 1.0) / 2.0));
    }
}

#[test]
fn laws_hold_for_one_rank() {
    laws(&mut Solo::default());
}

#[test]
fn laws_hold_for_threads() {
    for size in 1..=8 {
        thread::run(size, |comm| laws(comm));
    }
}

// Threads only: what MPI cannot tell

#[test]
fn threads_that_call_different_collectives_are_told() {
    let errors =
        thread::run(2, |comm| if comm.rank() == 0 { comm.barrier() } else { comm.reduce(&mut [0.0], Reduction::Max) });
    for error in errors {
        let told = error.unwrap_err().to_string();
        assert!(told.contains("`barrier`") && told.contains("`Max of 1 numbers`"), "{told}");
    }
}

#[test]
fn a_thread_that_ends_the_job_ends_the_others_waits() {
    let ended = std::panic::catch_unwind(|| {
        thread::run(3, |comm| {
            if comm.rank() == 1 {
                comm.abort(1)
            }
            comm.barrier().unwrap_err().to_string()
        })
    });
    assert!(ended.is_err());
}

#[test]
fn a_thread_left_alone_times_out() {
    thread::run(2, |comm| {
        if comm.rank() == 0 {
            let error = left_alone(comm).unwrap_err().to_string();
            assert!(error.starts_with(LEFT_ALONE), "{error}");
        }
    });
}

/// Waits for ranks that do not come.
fn left_alone(comm: &mut dyn Communicator) -> Result<()> {
    comm.set_timeout(Duration::from_millis(300));
    let ticket = start_sum(comm, &ones(5))?;
    comm.wait(ticket)
}

/// Of a test that waits for a rank which never comes.
const TIMEOUT: Duration = Duration::from_secs(6);

const LEFT_ALONE: &str = "rank 0 waited too long in the collective `sum of 5 values`";

// Processes

/// What a rank does under mpirun, by the name of the scenario.
fn scenario(name: &str, world: &mut World) -> Result<Outcome> {
    let (rank, size) = (world.rank(), world.size());
    match name {
        "laws" => {
            assert_eq!((world.local_rank(), world.local_size()), (rank, size));
            laws(world.communicator());
        }
        "large" => {
            let len = (1 << 24) + 5;
            let comm = world.communicator();
            let data = ones(len);
            let ticket = start_sum(comm, &data)?;
            comm.wait(ticket)?;
            assert!(values(&data).iter().all(|&x| x == size as f32));
            let middle = len - 7;
            for exchange in [Exchange::Scatter, Exchange::Gather] {
                let parts = [data.narrow(0, 0, middle)?, data.narrow(0, middle, len - middle)?];
                let ticket = comm.start(exchange, parts.into_iter().map(|part| vec![part]).collect())?;
                comm.wait(ticket)?;
            }
            assert!(values(&data).iter().all(|&x| x == (size * size) as f32));
        }
        "rank 0 left alone" => {
            if rank == 0 {
                left_alone(world.communicator())?;
            }
            std::thread::sleep(Duration::from_secs(60));
        }
        "stop rank 1" | "kill rank 1" => {
            let signal = if name.starts_with("stop") { libc::SIGSTOP } else { libc::SIGKILL };
            signal_hook::flag::register(libc::SIGTERM, told_to_end().clone())?;
            let mut all = world.communicator().split(Some(0))?.expect("all ranks join");
            all.set_timeout(TIMEOUT);
            for step in 0.. {
                if (rank, step) == (1, 3) {
                    // SAFETY: sends a signal to this process.
                    unsafe { libc::raise(signal) };
                }
                let ticket = start_sum(&mut *all, &ones(70_000))?;
                all.wait(ticket)?;
            }
        }
        "rank 1 elsewhere" => {
            let comm = world.communicator();
            comm.set_timeout(TIMEOUT);
            let mut all = comm.split(Some(0))?.expect("all ranks join");
            if rank == 1 { comm.barrier()? } else { all.reduce(&mut [0.0], Reduction::Sum)? }
        }
        "fail on rank 1" => {
            if rank == 1 {
                bail!("no space left");
            }
            world.communicator().barrier()?;
        }
        "fail on all" => bail!("unknown key"),
        "agree on failure of rank 1" => {
            let mine = if rank == 1 { Err(anyhow!("no such file")) } else { Ok(()) };
            world.agree(mine)?;
        }
        "panic on rank 1" => {
            if rank == 1 {
                panic!("a bug");
            }
            world.communicator().barrier()?;
        }
        "panic on a thread of rank 1" => {
            if rank == 1 {
                std::thread::spawn(|| panic!("a bug"));
            }
            std::thread::sleep(Duration::from_secs(60));
        }
        "panic on all" => panic!("a bug"),
        "interrupted" => return Ok(Outcome::Interrupted),
        _ => bail!("there is no scenario {name}"),
    }
    Ok(Outcome::Done)
}

#[test]
#[ignore = "one rank of the tests below, which run it under mpirun"]
fn one_rank() {
    let Ok(name) = std::env::var(SCENARIO) else { return };
    let mut world = World::init().unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        std::process::exit(1)
    });
    let result = scenario(&name, &mut world);
    std::process::exit(world.finish(result).into())
}

/// This executable with `one_rank` and its scenario, behind `launcher`.
fn launch(launcher: &[&str], scenario: &str, environment: &[(&str, &str)]) -> Output {
    let this = std::env::current_exe().unwrap();
    let this = this.to_str().unwrap();
    let words = [launcher, &[this, "--exact", "one_rank", "--ignored", "--nocapture"]].concat();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env(SCENARIO, scenario).envs(environment.iter().copied()).stdin(Stdio::null());
    command.output().unwrap_or_else(|error| panic!("{}: {error}", words[0]))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A launcher that MPI does not know of is an error of rank 0, not as many runs as ranks.
#[test]
fn ranks_that_cannot_connect_are_refused_once() {
    let mut said = String::new();
    for rank in ["0", "1"] {
        let output = launch(&[], "interrupted", &[("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_PROCID", rank)]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        said += &stderr(&output);
    }
    assert_eq!(said.matches("error: 2 ranks were launched").count(), 1, "{said}");
}

#[test]
fn without_a_launcher_there_is_one_rank() {
    assert_eq!(launch(&[], "interrupted", &[]).status.code(), Some(75));
    let output = launch(&[], "fail on all", &[]);
    assert_eq!((output.status.code(), stderr(&output).trim()), (Some(1), "error: unknown key"));
}

#[cfg(feature = "mpi")]
mod processes {
    use super::*;

    fn mpirun(ranks: usize, scenario: &str) -> Output {
        let environment = [
            ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
            ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
            ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ];
        launch(&["mpirun", "-n", &ranks.to_string()], scenario, &environment)
    }

    fn succeeds(ranks: usize, scenario: &str) {
        let output = mpirun(ranks, scenario);
        assert!(output.status.success(), "{ranks} ranks, {scenario}: {}", stderr(&output));
    }

    /// Ends within seconds, exit status 1, and says `message` once.
    fn fails(ranks: usize, scenario: &str, message: &str) {
        let start = std::time::Instant::now();
        let output = mpirun(ranks, scenario);
        let (seconds, said) = (start.elapsed().as_secs_f64(), stderr(&output));
        assert_eq!(output.status.code(), Some(1), "{scenario}: {said}");
        assert_eq!(said.matches(message).count(), 1, "{scenario}: {said}");
        assert!(seconds < 15.0, "{scenario} took {seconds} s");
        println!("{scenario} on {ranks} ranks: {seconds:.1} s\n{said}");
    }

    #[test]
    fn laws_hold_for_processes() {
        for ranks in [1, 2, 3, 4, 5, 8] {
            succeeds(ranks, "laws");
        }
    }

    #[test]
    fn a_buffer_larger_than_one_call_is_summed() {
        succeeds(2, "large");
    }

    #[test]
    fn a_rank_left_alone_times_out() {
        fails(2, "rank 0 left alone", LEFT_ALONE);
    }

    #[test]
    fn a_stopped_rank_is_named() {
        let why = "`sum of 70000 values`: rank 1 does not answer: killed, stopped, cut off or far behind";
        for ranks in [2, 4] {
            fails(ranks, "stop rank 1", &format!("error: rank 0 waited too long in the collective {why}"));
        }
    }

    /// The launcher sees it and ends the others, which say what they waited for.
    #[test]
    fn a_killed_rank_is_named() {
        let output = mpirun(3, "kill rank 1");
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(137), "{said}");
        let why = "is told to end and waits in the collective `sum of 70000 values`: rank 1 does not answer";
        assert!(said.contains(why) && said.contains("process rank 1"), "{said}");
    }

    #[test]
    fn a_rank_in_another_collective_is_named() {
        fails(
            3,
            "rank 1 elsewhere",
            "error: rank 0 waited too long in the collective `Sum of 1 numbers`: all ranks answer, but rank 1 is in `barrier`",
        );
    }

    #[test]
    fn an_error_on_one_rank_ends_all() {
        fails(4, "fail on rank 1", "error: rank 1: no space left");
        fails(4, "agree on failure of rank 1", "error: rank 1: no such file");
    }

    #[test]
    fn an_error_on_all_ranks_is_told_once() {
        fails(1, "fail on all", "error: unknown key");
        fails(4, "fail on all", "error: unknown key");
    }

    #[test]
    fn a_panic_ends_all_ranks() {
        fails(3, "panic on rank 1", "a bug");
        fails(3, "panic on a thread of rank 1", "a bug");
        fails(3, "panic on all", "a bug");
    }

    #[test]
    fn interrupted_ranks_exit_75() {
        for ranks in [1, 4] {
            let output = mpirun(ranks, "interrupted");
            assert_eq!(output.status.code(), Some(75), "{}", stderr(&output));
        }
    }
}
