//! How this process was launched, as far as the environment tells.

/// What the launcher left in the environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// A launcher that speaks to MPI started this process.
    pub mpi: bool,
    /// Number of ranks it started, where it says so.
    pub size: Option<usize>,
    /// This process's rank, where it says so.
    pub rank: Option<usize>,
}

/// One of these is set in every rank by: Open MPI's mpirun; MPICH's mpiexec and `srun --mpi=pmi2`; `srun --mpi=pmix` and
/// PRRTE; MVAPICH; Cray PALS.
const MPI: &[&str] = &["OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_SIZE", "PALS_RANKID"];
/// The first one set counts: under mpirun inside a Slurm step, Slurm's variables tell of mpirun's daemons.
const SIZE: &[&str] = &["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"];
const RANK: &[&str] = &["OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID"];

impl Launch {
    pub fn of_this_process() -> Launch {
        Launch::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Launch {
        let number = |names: &[&str]| names.iter().find_map(|name| variable(name)).and_then(|v| v.parse().ok());
        Launch { mpi: MPI.iter().any(|name| variable(name).is_some()), size: number(SIZE), rank: number(RANK) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(environment: &[(&str, &str)]) -> Launch {
        Launch::read(|name| environment.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string()))
    }

    #[test]
    fn launchers_are_recognised() {
        assert_eq!(launch(&[]), Launch { mpi: false, size: None, rank: None });
        let mpirun_in_slurm = [("SLURM_STEP_NUM_TASKS", "2"), ("OMPI_COMM_WORLD_SIZE", "8"), ("PMIX_RANK", "3")];
        assert_eq!(launch(&mpirun_in_slurm), Launch { mpi: true, size: Some(8), rank: Some(3) });
        let srun_without_mpi = [("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_PROCID", "1")];
        assert_eq!(launch(&srun_without_mpi), Launch { mpi: false, size: Some(4), rank: Some(1) });
        let srun_pmix = [("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_PROCID", "1"), ("PMIX_RANK", "1")];
        assert_eq!(launch(&srun_pmix), Launch { mpi: true, size: Some(4), rank: Some(1) });
    }
}
