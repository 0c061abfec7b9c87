"""Many runs: planned, carried out, gathered."""
