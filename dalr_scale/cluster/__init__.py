"""The processes and nodes of a job: Slurm records, node checks, rendezvous."""
