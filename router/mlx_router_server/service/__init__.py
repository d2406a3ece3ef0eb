"""The router as a service of the machine: units for systemd and launchd, and what a service owes its manager."""
