"""How each kind of job trains."""
