"""Pure decisions about models: states, admission, eviction, leases. No clock, no I/O: both are handed in."""
