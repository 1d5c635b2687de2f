"""Operations: they turn adapters, or updates, into others."""
