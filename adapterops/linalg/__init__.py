"""Linear algebra that adapters need: low-rank and truncated SVD, trimming, reproducible random masks."""
