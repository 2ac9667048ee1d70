"""From a run's checkpoint to an export."""
