"""What every op stands on: how one is defined, which backend serves it, batches, failures, argument checks."""
