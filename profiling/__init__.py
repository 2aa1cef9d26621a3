"""Bundle x machine -> measurements: benchmarks, peers beside them, tables."""
