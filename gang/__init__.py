"""Several configurations of a sweep at once on one frozen 4-bit base."""
