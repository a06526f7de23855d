"""The composition root: from a checked config to live objects. Everything is put together here, and nowhere else."""
